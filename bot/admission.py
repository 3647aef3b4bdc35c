"""Who goes next, as a pure function: smallest (priority, turn, time queued) among the heads of the repositories that nothing holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from bot.models import Breaker, Pause, PauseKind, PauseScope, WaitingReason


@dataclass(frozen=True, slots=True)
class Head:
    """The first ready sprint of one repository, or the first that goes on with an open pull request, `pull`. Moments are Unix ms."""

    id: str
    repo_id: int
    repo: str
    issue: int
    priority: int
    queued_ms: int
    pull: int = 0


@dataclass(frozen=True, slots=True)
class Policy:
    """What holds sprints back now. Caps of 0 mean none; `open_prs` are ours in each repository; `pauses` are those that hold at this moment.

    `breakers` are the open ones, `providers` the names of the chain, `now_ms` this moment (Unix ms).
    """

    capacity: int
    max_running: int = 0
    caps: Mapping[int, int] = field(default_factory=dict)
    default_cap: int = 1
    pr_caps: Mapping[int, int] = field(default_factory=dict)
    open_prs: Mapping[int, int] = field(default_factory=dict)
    pauses: Sequence[Pause] = ()
    providers: Sequence[str] = ()
    breakers: Sequence[Breaker] = ()
    now_ms: int = 0
    budget_usd: float = 0.0
    spent_usd: float = 0.0


@dataclass(frozen=True, slots=True)
class Admit:
    """This head goes into the engine's queue."""

    head: Head


@dataclass(frozen=True, slots=True)
class Wait:
    """This head waits, for this reason; the note has the figures."""

    head: Head
    reason: WaitingReason
    note: str


def decide(heads: Sequence[Head], flight: Mapping[int, int], policy: Policy) -> list[Admit | Wait]:
    """At most one Admit, the best; a Wait for every head that cannot go. The caller repeats until nobody is admitted.

    `turn` is the number of sprints of the repository in flight plus one, so repositories take turns within a priority (engine.md, "Order").
    """
    free: list[Head] = []
    answers: list[Admit | Wait] = []
    for head in heads:
        held = _held(head, flight, policy)
        if held is None:
            free.append(head)
        else:
            answers.append(Wait(head, *held))
    ordered = sorted(free, key=lambda head: order(head, flight))
    if ordered:
        busy = _busy(flight, policy)
        if busy is None:
            answers.append(Admit(ordered[0]))
        else:
            answers.extend(Wait(head, *busy) for head in ordered)
    return answers


def order(head: Head, flight: Mapping[int, int]) -> tuple[int, int, int, str]:
    """The sort key of a head."""
    return (head.priority, flight.get(head.repo_id, 0) + 1, head.queued_ms, head.id)


def _held(head: Head, flight: Mapping[int, int], policy: Policy) -> tuple[WaitingReason, str] | None:
    pause = pause_of(head.repo_id, policy.pauses, policy.providers)
    if pause is not None:
        return WaitingReason.QUIET_HOURS if pause.kind is PauseKind.HOURS else WaitingReason.PAUSED, pause_note(pause)
    if policy.budget_usd and policy.spent_usd >= policy.budget_usd:
        return WaitingReason.BUDGET, f"${policy.spent_usd:.2f} of today's ${policy.budget_usd:.2f} are spent"
    pr_cap = policy.pr_caps.get(head.repo_id, 0)
    open_prs = policy.open_prs.get(head.repo_id, 0)
    # What goes on with a pull request opens none: it is how the place of the others gets free.
    if pr_cap and open_prs >= pr_cap and not head.pull:
        return WaitingReason.OPEN_PRS, f"{open_prs} of {pr_cap} open pull requests"
    cap = policy.caps.get(head.repo_id, policy.default_cap)
    running = flight.get(head.repo_id, 0)
    if running >= cap:
        return WaitingReason.CAP, f"{running} of {cap} running in this repository"
    # The last of all: what passes here and goes is a try of the breaker.
    for breaker in breakers_of(head.repo_id, policy.breakers):
        if breaker.probe or policy.now_ms < breaker.due_ms:
            return WaitingReason.BREAKER, breaker_note(breaker)
    return None


def pause_of(repo_id: int, pauses: Sequence[Pause], providers: Sequence[str]) -> Pause | None:
    """The pause that holds a repository: the fleet's, its own, or, where every provider is paused, the one of them that ends first."""
    for pause in pauses:
        if pause.scope is PauseScope.FLEET or (pause.scope is PauseScope.REPO and pause.repo_id == repo_id):
            return pause
    paused = {pause.provider: pause for pause in reversed(pauses) if pause.scope is PauseScope.PROVIDER}
    if not providers or not paused.keys() >= set(providers):
        return None
    return min((paused[name] for name in providers), key=lambda pause: (pause.until_ms is None, pause.until_ms or 0))


def breakers_of(repo_id: int, breakers: Iterable[Breaker]) -> list[Breaker]:
    """The open breakers that hold a repository; one of a provider holds no sprint, the chain passes it over."""
    return [
        breaker
        for breaker in breakers
        if breaker.scope is PauseScope.FLEET or (breaker.scope is PauseScope.REPO and breaker.repo_id == repo_id)
    ]


def breaker_note(breaker: Breaker) -> str:
    """What failed, and when the next try may begin, as plain text."""
    what = "in the whole fleet" if breaker.scope is PauseScope.FLEET else "in this repository"
    due = datetime.fromtimestamp(breaker.due_ms / 1000, UTC)
    after = "one is tried now" if breaker.probe else f"one is tried at {due:%H:%M} UTC"
    return f"{breaker.failures} in a row {what}, the last for {breaker.reason}; {after}"


def pause_note(pause: Pause) -> str:
    """Who paused what, until when and why, as plain text."""
    what = {PauseScope.FLEET: "the whole fleet", PauseScope.REPO: "this repository"}.get(pause.scope, f"the provider {pause.provider}")
    until = "" if pause.until_ms is None else f", until {datetime.fromtimestamp(pause.until_ms / 1000, UTC):%Y-%m-%d %H:%M} UTC"
    why = f": {pause.reason}" if pause.reason else ""
    return f"{what}, by {pause.by}{until}{why}"


def _busy(flight: Mapping[int, int], policy: Policy) -> tuple[WaitingReason, str] | None:
    running = sum(flight.values())
    if policy.capacity <= 0:
        return WaitingReason.NO_WORKER, "no worker is alive"
    if policy.max_running and running >= policy.max_running:
        return WaitingReason.CAP, f"{running} of {policy.max_running} running in the fleet"
    if running >= policy.capacity:
        return WaitingReason.SLOT, f"all {policy.capacity} slots are busy"
    return None
