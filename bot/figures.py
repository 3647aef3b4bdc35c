"""The figures of a report over a window of time: values only, as the store counts them and every form of the report shows them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field

from bot.models import Json, OutcomeKind, UserError

HOUR_MS = 3_600_000
LONGEST_MS = 366 * 24 * HOUR_MS
GOOD = frozenset({OutcomeKind.PULL_REQUEST, OutcomeKind.UPDATED})
EXAMPLES = 3
BUCKETS = 24
SPELLS = 20
# Verdicts on the fleet that a person asks about in the morning, the worst first.
TROUBLED = ("stalled", "degraded", "paused")

_UNITS = {"m": HOUR_MS // 60, "min": HOUR_MS // 60, "h": HOUR_MS, "d": 24 * HOUR_MS, "w": 7 * 24 * HOUR_MS}


@dataclass(frozen=True, slots=True)
class Spread:
    """Some durations (ms): how many, and by nearest rank their median, their 90th percentile, and the longest; all 0 where there are none."""

    count: int = 0
    median_ms: int = 0
    p90_ms: int = 0
    longest_ms: int = 0

    @classmethod
    def of(cls, values: Iterable[int]) -> Spread:
        """Of these values, in any order."""
        line = sorted(max(0, value) for value in values)
        if not line:
            return cls()
        return cls(len(line), line[(len(line) - 1) // 2], line[-(-len(line) * 9 // 10) - 1], line[-1])


@dataclass(frozen=True, slots=True)
class Group:
    """The sprints of one repository or of one model that settled in the window, and the pull requests merged in it that go back to them."""

    name: str
    outcomes: Mapping[str, int]
    steps: int
    tokens: int
    usd: float
    merged: int

    @property
    def sprints(self) -> int:
        """All of them."""
        return sum(self.outcomes.values())

    @property
    def good(self) -> int:
        """Those that ended in a pull request."""
        return sum(count for outcome, count in self.outcomes.items() if outcome in GOOD)


@dataclass(frozen=True, slots=True)
class Example:
    """One sprint that failed: `owner/repo#7`, and the sentence it ended with."""

    ref: str
    detail: str


@dataclass(frozen=True, slots=True)
class Failure:
    """Sprints that came to nothing in the same way; `reason` is "" where the outcome says all. The newest are the examples."""

    outcome: str
    reason: str
    count: int
    examples: tuple[Example, ...]


@dataclass(frozen=True, slots=True)
class Outage:
    """A provider entry that cannot be called now: why, and until when (Unix ms, 0: until somebody mends it)."""

    name: str
    reason: str
    until_ms: int


@dataclass(frozen=True, slots=True)
class Downtime:
    """The outages of one provider entry in the window: how many, how long together and at most (ms), and why the last one came."""

    name: str
    count: int
    total_ms: int
    longest_ms: int
    reason: str


@dataclass(frozen=True, slots=True)
class VerdictTime:
    """How often one verdict on the fleet held in the window, and how long together and at most (ms)."""

    verdict: str
    count: int
    total_ms: int
    longest_ms: int


@dataclass(frozen=True, slots=True)
class Spell:
    """One time in which a verdict on the fleet held: from when until when (Unix ms), how long of it lies in the window (ms), whether it still holds, the
    codes of the faults that were seen in it, and the evidence it began with.
    """

    verdict: str
    from_ms: int
    until_ms: int
    inside_ms: int
    lasts: bool = False
    causes: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Bucket:
    """A slice of the window: sprints that ended in a pull request, all other ends, and what was spent (USD) on those that ended."""

    since_ms: int
    good: int
    other: int
    usd: float


@dataclass(frozen=True, slots=True)
class Figures:
    """What happened from `since_ms` until before `until_ms`. `repo` is "" for the whole fleet.

    `asked` counts sprints that were queued, by source; `outcomes` those that settled; `opened`, `merged`, `closed` and `reverted` our pull requests by when
    that happened (closed: without a merge). `to_pull` is the time from trigger to pull request of those opened, `queue_wait` from trigger to start of those
    started. `usd`, `tokens` and `steps` belong to the settled sprints; `calls`, `failed_calls` and `calls_usd` are the model calls made in the window,
    reserves included. `waits` counts decisions that a sprint must wait, by reason; `crashes` workers' deaths under sprints that settled, `requeues` how
    often those went back to the queue. `acts` counts what the watchdog and the breaker decided. `outages` are the providers down now, `downtimes` the
    time in the window in which one was. `verdicts` is the time of each verdict on the fleet, `spells` the stalls, degradations and pauses one by one (at
    most SPELLS, stalls before others, the newest before older ones), `unwatched_ms` how long nobody judged because no service ran. `running` and `queued`
    are as of now.
    """

    since_ms: int
    until_ms: int
    repo: str = ""
    asked: Mapping[str, int] = field(default_factory=dict)
    outcomes: Mapping[str, int] = field(default_factory=dict)
    repositories: tuple[Group, ...] = ()
    models: tuple[Group, ...] = ()
    opened: int = 0
    merged: int = 0
    closed: int = 0
    reverted: int = 0
    to_pull: Spread = field(default_factory=Spread)
    queue_wait: Spread = field(default_factory=Spread)
    steps: int = 0
    tokens: int = 0
    usd: float = 0.0
    calls: int = 0
    failed_calls: int = 0
    calls_usd: float = 0.0
    failures: tuple[Failure, ...] = ()
    waits: Mapping[str, int] = field(default_factory=dict)
    crashes: int = 0
    requeues: int = 0
    stalled: int = 0
    acts: Mapping[str, int] = field(default_factory=dict)
    outages: tuple[Outage, ...] = ()
    downtimes: tuple[Downtime, ...] = ()
    verdicts: tuple[VerdictTime, ...] = ()
    spells: tuple[Spell, ...] = ()
    unwatched_ms: int = 0
    commands: Mapping[str, int] = field(default_factory=dict)
    deliveries: Mapping[str, int] = field(default_factory=dict)
    buckets: tuple[Bucket, ...] = ()
    running: int = 0
    queued: int = 0

    @property
    def settled(self) -> int:
        """Sprints that ended."""
        return sum(self.outcomes.values())

    @property
    def good(self) -> int:
        """Those that ended in a pull request."""
        return sum(count for outcome, count in self.outcomes.items() if outcome in GOOD)

    @property
    def usd_per_merged(self) -> float | None:
        """What all sprints that ended cost, over the pull requests merged; None where none was."""
        return self.usd / self.merged if self.merged else None

    def to_json(self) -> Json:
        """As JSON values, with the sums that every form shows."""
        return {**asdict(self), "settled": self.settled, "good": self.good, "usd_per_merged": self.usd_per_merged}


def window_ms(text: str) -> int:
    """The length of `12h`, `24h`, `7d`, `2w` or `90m` (ms); raises UserError."""
    match = re.fullmatch(r"([1-9][0-9]{0,4})\s*(m|min|h|d|w)", text.strip().casefold())
    length = int(match[1]) * _UNITS[match[2]] if match else 0
    if not 0 < length <= LONGEST_MS:
        raise UserError(
            f"`{text[:40].replace('`', chr(39))}` is no window of time: write for example `12h`, `24h` or `7d`, at most a year."
        )
    return length


def window_words(length_ms: int) -> str:
    """`12 hours`, `24 hours`, `7 days`, `90 minutes`."""
    for size, noun, least in ((24 * HOUR_MS, "day", 2), (HOUR_MS, "hour", 1), (HOUR_MS // 60, "minute", 0)):
        if length_ms % size == 0 and length_ms // size >= least:
            count = length_ms // size
            return f"{count} {noun}" + ("" if count == 1 else "s")
    return f"{length_ms // 1000} seconds"
