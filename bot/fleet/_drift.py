"""How late a schedule is, from when its fires were due and when they were seen: arithmetic on what is given, with no clock of its own."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from croniter import croniter

from bot.store.samples import Schedule

# The engine spreads fires over up to ten seconds, and what fires takes its time; a round that is later than this did not come.
GRACE_MS = 90_000
MOST_MISSED = 100


@dataclass(frozen=True, slots=True)
class Drift:
    """`seconds` is how late the last fire was, or where one is `overdue` for how long; `missed` counts the fires that were due and did not come.

    `due_ms` is the first fire that has not been seen.
    """

    seconds: float
    overdue: bool
    missed: int
    due_ms: int


def next_fire(schedule: Schedule, after_ms: int) -> int:
    """The first moment after this one at which a schedule is due (Unix ms)."""
    if not schedule.cron:
        return after_ms + schedule.every_ms
    start = datetime.fromtimestamp(after_ms / 1000, UTC)
    return round(croniter(schedule.cron, start, second_at_beginning=True).get_next(float) * 1000)


def drift(schedule: Schedule, now_ms: int, *, trusted_ms: int = 0) -> Drift:
    """A schedule at a moment. What was due before it was served, or before `trusted_ms` (when the clock last jumped), is nobody's fault.

    A fire noted for a moment that has not come yet was noted by a clock that was put back since: it tells nothing.
    """
    begun = min(now_ms, max(schedule.since_ms, trusted_ms))
    last = _last(schedule, now_ms, begun)
    from_ms = begun if last is None else max(last, begun)
    due = next_fire(schedule, from_ms)
    if now_ms - due > GRACE_MS:
        missed, each = 0, due
        while each <= now_ms and missed < MOST_MISSED:
            missed, each = missed + 1, next_fire(schedule, each)
        return Drift((now_ms - due) / 1000, overdue=True, missed=missed, due_ms=due)
    late = (schedule.seen_ms - schedule.expected_ms) / 1000 if last is not None and schedule.seen_ms and schedule.expected_ms else 0.0
    return Drift(late, overdue=False, missed=0, due_ms=due)


def _last(schedule: Schedule, now_ms: int, begun_ms: int) -> int | None:
    """From when the next fire is counted: when the last was due (one that goes by a distance: when it came); None where that tells nothing."""
    if schedule.expected_ms is None or schedule.seen_ms is None:
        return None
    if schedule.seen_ms > now_ms or schedule.expected_ms > now_ms or schedule.seen_ms < begun_ms:
        return None
    return schedule.expected_ms if schedule.cron else schedule.seen_ms
