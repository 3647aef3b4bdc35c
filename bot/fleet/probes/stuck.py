"""A sprint that takes no step is ended and begun again where it stood, once; stuck again it has failed as `stalled`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from sqlalchemy.engine import Connection

from bot.fleet.probes import WATCHDOG, MendError, Probe, Reach, ago, failing
from bot.models import RUNNING, FailureReason, Outcome, OutcomeKind, SprintState, SprintView, Stop, WaitingReason
from bot.settings import Settings
from bot.snapshot import Finding
from bot.store import intents, probes, sprints, steps

# A flag that nobody obeys for so many leases is of a process that hangs: its sprint is taken from it.
GRACE_LEASES = 4
AGAIN = "it took no step for a long time; it goes on where it stood"
STALLED = "it took no step for a long time, again after it was begun anew"


async def look(reach: Reach) -> Sequence[Finding]:
    """Every running sprint that has not moved for its time."""
    views = await reach.store.read(probes.running)
    return list(stuck(views, reach.settings, reach.now_ms()))


def stuck(views: Sequence[SprintView], settings: Settings, now_ms: int) -> Iterator[Finding]:
    """Those that took no step, began no call and ended none for longer than they may. From publishing on nobody may stop them.

    What a person stopped is left alone.
    """
    for view in views:
        by_us = view.stop is not None and view.stop_by == WATCHDOG
        if view.state not in RUNNING or (view.stop is not None and not by_us):
            continue
        idle = (now_ms - view.updated_ms) / 1000
        allowed = GRACE_LEASES * settings.timing.lease_seconds if by_us else seconds_for(view, settings)
        if idle <= allowed:
            continue
        did = f"was told to stop {ago(idle)} ago and goes on" if by_us else f"took no step for {ago(idle)}"
        evidence = {"state": view.state.value, "k": view.admitted_n, "moved_ms": view.updated_ms, "idle_seconds": round(idle)}
        finding = failing(view.id, f"{view.issue} is {view.state.value} and {did}", **evidence)
        may = view.state is not SprintState.PUBLISHING
        yield replace(finding, repo_id=view.repo_id, issue=view.issue.number, provider=view.provider, mendable=may)


def seconds_for(view: SprintView, settings: Settings) -> float:
    """How long this sprint may stand still: while its checks run, their own time comes on top."""
    repository = settings.repository(view.issue.full_name)
    checks = repository.checks_timeout_seconds if repository is not None and view.state is SprintState.VETTING else 0
    return settings.watchdog.stuck_minutes * 60 + checks


async def mend(reach: Reach, finding: Finding) -> str:
    """Guarded by what was seen: a sprint that moved, ended or was stopped by a person meanwhile is left alone."""
    now = reach.now_ms()

    def write(conn: Connection) -> str:
        sprints.lock(conn, finding.target)
        view = sprints.get(conn, finding.target)
        seen = finding.evidence
        if view is None or (view.state, view.admitted_n, view.updated_ms) != (seen["state"], seen["k"], seen["moved_ms"]):
            raise MendError("it moved meanwhile")
        if view.stop is None:
            # One more life for every sprint, whatever becomes of it: the key stays.
            stop = Stop.REQUEUE if intents.claim(conn, f"stuck:{view.id}", now) else Stop.STALLED
            if not sprints.flag(conn, view.id, stop, by=WATCHDOG, now_ms=now):
                raise MendError("it cannot be stopped any more")
            return "it is ended and begun again where it stood" if stop is Stop.REQUEUE else "it is ended and has failed"
        if view.stop_by != WATCHDOG:
            raise MendError("somebody else stopped it")
        return _take_away(conn, view, now)

    said = await reach.store.write(write)
    reach.kick_queue()
    reach.kick_projector()
    return said


def _take_away(conn: Connection, view: SprintView, now_ms: int) -> str:
    """Whoever runs it does not obey: it is no longer theirs, and their next write meets no row."""
    if view.stop is Stop.REQUEUE:
        sprints.requeue(conn, view.id, view.admitted_n, me=None, reason=WaitingReason.REQUEUED, note=AGAIN, not_before_ms=0, now_ms=now_ms)
        kind, result, reason = "requeue", WaitingReason.REQUEUED.value, AGAIN
    else:
        outcome = Outcome(OutcomeKind.FAILED, FailureReason.STALLED, STALLED)
        spent, count = steps.spent(conn, view.id), steps.count(conn, view.id)
        sprints.settle(conn, view.id, view.admitted_n, me=None, outcome=outcome, spent=spent, steps=count, now_ms=now_ms)
        kind, result, reason = "settle", OutcomeKind.FAILED.value, STALLED
    intents.decide_of(conn, view, kind=kind, result=result, reason=reason, now_ms=now_ms, actor=WATCHDOG)
    return "it was taken from a process that does not answer"


plugin = Probe(
    "sprints that take no step",
    look,
    period_seconds=30.0,
    mend=mend,
    does="ends the sprint and begins it again, once",
    distance_seconds=0.0,
)
