"""The queue as one deciding transaction sees it: bound to a connection, an issue and the person who asks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy.engine import Connection

from bot.figures import Figures
from bot.models import (
    FOLLOWS_PLAN,
    FOLLOWS_PULL,
    Ask,
    CancelResult,
    Decision,
    Limits,
    LogLine,
    Pause,
    PauseScope,
    Plan,
    PlanState,
    Position,
    RepositoryLoad,
    Skip,
    Source,
    SprintId,
    SprintState,
    SprintView,
)
from bot.snapshot import FleetSnapshot, ProbeState
from bot.store import breakers, figures, fleet, intents, pauses, plans, probes, skips, sprints, steps, waits


@dataclass(frozen=True, slots=True)
class IssueQueue:
    """What a command may do to the queue; see `bot.chatops.Queue`. `fresh_id` becomes the new sprint's id, `look` reads the fleet."""

    conn: Connection
    ask: Ask
    limits: Limits
    base_branch: str
    fresh_id: SprintId
    now_ms: int
    look: Callable[[Connection], FleetSnapshot]
    caps: waits.Caps

    def active(self) -> SprintView | None:
        """The sprint of this issue that has not settled."""
        return sprints.active(self.conn, self.ask.repo_id, self.ask.issue.number)

    def last(self) -> SprintView | None:
        """The newest settled sprint of this issue."""
        return sprints.last(self.conn, self.ask.repo_id, self.ask.issue.number)

    def enqueue(
        self, *, source: Source, priority: int, instructions: str, options: Mapping[str, str], text_hash: str, title: str
    ) -> SprintView | None:
        """A new sprint; None where one is active already."""
        made = sprints.new(
            self.conn,
            sprint_id=self.fresh_id,
            repo_id=self.ask.repo_id,
            issue=self.ask.issue,
            title=title,
            source=source,
            priority=priority,
            trigger=self.ask.key,
            requester_id=self.ask.actor.id,
            requester=self.ask.actor.login,
            instructions=instructions,
            options=options,
            limits=_lowered(self.limits, options),
            text_hash=text_hash,
            base_branch=options.get("base", self.base_branch),
            now_ms=self.now_ms,
        )
        if not made:
            return None
        if options.get(FOLLOWS_PULL):
            sprints.follow(self.conn, self.fresh_id, int(options[FOLLOWS_PULL]))
        sprint = sprints.get(self.conn, self.fresh_id)
        waiting = self.plan()
        # A new plan takes the place of an old one when it is there; what works without a plan, or by another one, does so at once.
        if sprint is not None and waiting is not None and not sprint.plans and options.get(FOLLOWS_PLAN) != waiting.id:
            plans.end(self.conn, waiting, PlanState.SUPERSEDED, reason="work was started without it", now_ms=self.now_ms)
        return sprint

    def plan(self) -> Plan | None:
        """The plan of this issue that waits for a person, else the newest one."""
        return plans.newest(self.conn, self.ask.repo_id, self.ask.issue.number, lock=True)

    def end_plan(self, plan: Plan, state: PlanState, *, by: str, reason: str = "") -> bool:
        """A plan that waits, waits no longer; the decision of the Ask tells why."""
        return plans.end(self.conn, plan, state, by=by, reason=reason, told=False, now_ms=self.now_ms)

    def revise(self, sprint_id: SprintId, by: str, *, instructions: str, options: Mapping[str, str]) -> bool:
        """A planning sprint makes its plan with these instructions and options, anew where it has begun; False where it ends already."""
        return sprints.revise(
            self.conn,
            sprint_id,
            by=by,
            instructions=instructions,
            options=options,
            limits=_lowered(self.limits, options),
            now_ms=self.now_ms,
        )

    def told_of_text(self, plan: Plan, digest: str) -> None:
        """This very text may be approved now."""
        plans.told(self.conn, plan.id, digest)

    def plans(self, limit: int) -> Sequence[tuple[Plan, str]]:
        """Those that wait for a person, the one that ends first in front."""
        return plans.waiting(self.conn, limit=limit)

    def cancel(self, sprint_id: SprintId, by: str, why: str = "") -> CancelResult:
        """Stops a sprint, or tells why not."""
        return sprints.cancel(self.conn, sprint_id, by=by, why=why, now_ms=self.now_ms)

    def position(self, sprint_id: SprintId) -> Position | None:
        """Its place in line; None where it does not wait."""
        return waits.position(self.conn, sprint_id, self.caps)

    def listing(self, limit: int) -> list[SprintView]:
        """Those in flight, then those queued, in order."""
        return sprints.listing(self.conn, limit=limit)

    def counts(self) -> Mapping[SprintState, int]:
        """How many live sprints of the fleet are in each state."""
        return sprints.counts(self.conn)

    def prioritise(self, sprint_id: SprintId, priority: int) -> bool:
        """Another priority for a sprint that waits; False where it waits no longer."""
        return sprints.prioritise(self.conn, sprint_id, priority, self.now_ms)

    def trail(self, limit: int) -> list[Decision]:
        """The newest decisions about this issue, oldest first."""
        return intents.trail(self.conn, self.ask.repo_id, self.ask.issue.number, limit=limit)

    def log(self, sprint_id: SprintId, limit: int) -> list[LogLine]:
        """The last things a sprint did, oldest first."""
        return steps.latest(self.conn, sprint_id, limit=limit)

    def pauses(self) -> Sequence[Pause]:
        """Every pause that holds now, the fleet's first, and behind them the open breakers."""
        return (*pauses.current(self.conn, self.now_ms), *(breaker.as_pause() for breaker in breakers.opened(self.conn)))

    def pause(self, scope: PauseScope, *, until_ms: int | None, reason: str, provider: str = "") -> Pause:
        """Pauses the fleet, this repository or a provider."""
        repo_id, repo = (self.ask.repo_id, self.ask.issue.full_name) if scope is PauseScope.REPO else (0, "")
        pause = Pause(scope, repo_id, repo, self.ask.actor.login, self.now_ms, until_ms, reason, provider)
        pauses.put(self.conn, pause)
        return pause

    def resume(self, scope: PauseScope, *, provider: str = "") -> Pause | None:
        """Ends a pause, and closes the breaker of the same; returns what held, or None where nothing did."""
        repo_id = self.ask.repo_id if scope is PauseScope.REPO else 0
        ended = pauses.lift(self.conn, scope, repo_id, self.now_ms, provider=provider)
        login = self.ask.actor.login
        closed = breakers.close(self.conn, (scope, repo_id, provider), now_ms=self.now_ms, why=f"closed by {login}", actor=login)
        return ended or (closed.as_pause() if closed else None)

    def skipped(self) -> Skip | None:
        """The entry of this issue on the skip list."""
        return skips.get(self.conn, self.ask.repo_id, self.ask.issue.number)

    def skip(self, reason: str) -> Skip:
        """Puts this issue on the skip list."""
        skip = Skip(self.ask.repo_id, self.ask.issue.number, self.ask.actor.login, self.now_ms, reason)
        skips.put(self.conn, skip)
        return skip

    def unskip(self) -> Skip | None:
        """Takes this issue off the skip list."""
        return skips.remove(self.conn, self.ask.repo_id, self.ask.issue.number)

    def open_pulls(self) -> int:
        """Open pull requests of the bot in this repository."""
        return len(sprints.open_pulls_of(self.conn, self.ask.repo_id))

    def spent_usd(self, since_ms: int) -> float:
        """Money that all sprints of the fleet have used since then."""
        return steps.spent_since(self.conn, since_ms)

    def snapshot(self) -> FleetSnapshot:
        """The fleet as the store knows it at this moment."""
        return self.look(self.conn)

    def load(self) -> Sequence[RepositoryLoad]:
        """What each repository has in flight and queued."""
        return fleet.load(self.conn)

    def watchdog(self) -> Sequence[ProbeState]:
        """The watchdog's probes as they stand."""
        return probes.states(self.conn)

    def wish_probes(self, names: Sequence[str]) -> None:
        """Asks for these probes to run at once and to act on what they find."""
        probes.wish(self.conn, names, self.ask.actor.login)

    def figures(self, *, since_ms: int, until_ms: int) -> Figures:
        """What happened in a window of time, in this repository; in the whole fleet where the Ask names none."""
        return figures.figures(self.conn, since_ms=since_ms, until_ms=until_ms, now_ms=self.now_ms, repo_id=self.ask.repo_id or None)


def _lowered(limits: Limits, options: Mapping[str, str]) -> Limits:
    """The limits as a command's options lower them; the command has checked that they are numbers."""
    steps = min(limits.steps, int(options["steps"])) if "steps" in options else limits.steps
    usd = limits.usd
    if "budget" in options:
        wanted = float(options["budget"].lstrip("$"))
        usd = min(usd, wanted) if usd else wanted
    return Limits(steps=steps, seconds=limits.seconds, tokens=limits.tokens, usd=usd)
