"""Judges by what moved, never by which process runs: one pure function from a snapshot to a verdict with its evidence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bot.models import PauseScope, SprintState
from bot.settings import Settings
from bot.snapshot import Fault, FleetSnapshot, Health, HealthVerdict, ProbeVerdict, Reason

_NAMED = 5
WEBHOOK_SILENT = 5400.0
PROBES = {"model": Fault.MODEL_DRIFT, "pane": Fault.AGENT_DOWN, "auth": Fault.TOKEN_EXPIRED, "gitea": Fault.GITEA_ERRORS}
JUDGED = frozenset({"worker", "provider", "webhook"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """Every number of the verdict and of the alert rules (seconds unless named otherwise); `grafana/build.py` writes the rules from these.

    `webhook_silent` is None while no canary delivery runs: a quiet repository would look broken. Where the forge agreed to send one within
    WEBHOOK_SILENT it is that.
    """

    stall_after: float = 600.0
    worker_lost: float = 120.0
    sprint_overrun: float = 9000.0
    no_success: float = 7200.0
    collector_stale: float = 600.0
    schedule_drift: float = 3600.0
    token_expiring: float = 1800.0
    webhook_silent: float | None = None
    gitea_error_ratio: float = 0.2
    llm_error_ratio: float = 0.5
    budget_ratio: float = 0.8
    bad_signatures: int = 5

    @classmethod
    def of(cls, settings: Settings, *, canary_age: float | None = None) -> Thresholds:
        """The thresholds of one configuration; `canary_age` is how long ago (seconds) the forge agreed to send a test delivery."""
        silent = WEBHOOK_SILENT if canary_age is not None and canary_age < WEBHOOK_SILENT else None
        return cls(stall_after=settings.timing.stall_after_seconds, webhook_silent=silent)


def judge(snapshot: FleetSnapshot, thresholds: Thresholds, also: tuple[Reason, ...] = ()) -> Health:
    """The first verdict that holds: paused, stalled, degraded, working, idle. `also` are faults only this process knows (the sandbox's probe)."""
    faults = (*_faults(snapshot, thresholds), *also)
    if snapshot.paused:
        return Health(HealthVerdict.PAUSED, (_paused(snapshot), *_moving(snapshot), *faults))
    if stalled(snapshot, thresholds):
        evidence = f"the oldest runnable sprint waits for {_age(snapshot, snapshot.oldest_runnable_ms)} and nothing moved for {_age(snapshot, snapshot.moved_ms)}"
        return Health(HealthVerdict.STALLED, (Reason("stalled", evidence), *faults))
    moving, passed = _moving(snapshot), tuple(_passed_over(snapshot))
    if faults:
        return Health(HealthVerdict.DEGRADED, (*faults, *moving, *passed))
    if moving:
        return Health(HealthVerdict.WORKING, (*moving, *passed))
    return Health(HealthVerdict.IDLE, (*(tuple(_held(snapshot)) or (Reason("empty", "no sprint is queued or running"),)), *passed))


def stalled(snapshot: FleetSnapshot, thresholds: Thresholds) -> bool:
    """The condition of the page `DispatchFleetStalled`, and nothing else: an old debt, no progress, no pause."""
    return (
        not snapshot.paused
        and _older(snapshot, snapshot.oldest_runnable_ms, thresholds.stall_after)
        and _older(snapshot, snapshot.moved_ms, thresholds.stall_after)
    )


def _faults(snapshot: FleetSnapshot, thresholds: Thresholds) -> Iterator[Reason]:
    if snapshot.in_flight and _older(snapshot, snapshot.moved_ms, thresholds.stall_after):
        yield Reason(Fault.NO_PROGRESS, f"{snapshot.in_flight} in flight and nothing moved for {_age(snapshot, snapshot.moved_ms)}")
    lost = [worker for worker in snapshot.workers if _older(snapshot, worker.beat_ms, thresholds.worker_lost)]
    if lost:
        names = ", ".join(worker.name for worker in lost[:_NAMED]) + (f" and {len(lost) - _NAMED} more" if len(lost) > _NAMED else "")
        code = Fault.WORKERS_LOST if len(lost) == len(snapshot.workers) else Fault.WORKER_LOST
        yield Reason(code, f"no heartbeat for {thresholds.worker_lost:g} s from {names}")
    if _older(snapshot, snapshot.oldest_running_ms, thresholds.sprint_overrun):
        yield Reason(Fault.SPRINT_OVERRUN, f"a sprint runs for {_age(snapshot, snapshot.oldest_running_ms)}")
    down = sorted(name for name, available in snapshot.providers.items() if not available and name not in snapshot.paused_providers)
    if down:
        yield Reason(Fault.PROVIDER_DOWN, f"unavailable: {', '.join(down)}")
    if snapshot.breakers:
        yield Reason(Fault.BREAKER_OPEN, _breakers(snapshot))
    if thresholds.webhook_silent is not None and _older(snapshot, snapshot.last_delivery_ms, thresholds.webhook_silent):
        yield Reason(Fault.WEBHOOK_SILENT, f"the last delivery came {_age(snapshot, snapshot.last_delivery_ms)} ago")
    stale = sorted(name for name, at_ms in snapshot.collected.succeeded_ms.items() if _older(snapshot, at_ms, thresholds.collector_stale))
    if stale:
        yield Reason(Fault.COLLECTOR_STALE, f"the collector has seen nothing for {thresholds.collector_stale:g} s of {', '.join(stale)}")
    yield from _probes(snapshot)


def _probes(snapshot: FleetSnapshot) -> Iterator[Reason]:
    """Probes that fail or broke, but for those whose subject is judged here by its own figures; no name of a repository is told."""
    for probe in snapshot.probes:
        if probe.name in JUDGED or not (probe.broken or probe.verdict is ProbeVerdict.FAILING):
            continue
        bad = [target for target in probe.targets if target.verdict is ProbeVerdict.FAILING]
        private = any(target.repo_id for target in bad)
        yield Reason(
            PROBES.get(probe.name, Fault.PROBE_FAILING), f"{probe.name}: {len(bad)} found" if private else f"{probe.name}: {probe.said}"
        )


def _moving(snapshot: FleetSnapshot) -> tuple[Reason, ...]:
    reasons = []
    if snapshot.in_flight:
        since = "nothing moved yet" if snapshot.last_progress_ms is None else f"last moved {_age(snapshot, snapshot.last_progress_ms)} ago"
        reasons.append(Reason("active", f"{snapshot.running} running, {snapshot.in_flight - snapshot.running} admitted, {since}"))
    if snapshot.runnable or snapshot.oldest_runnable_ms is not None:
        reasons.append(
            Reason(
                "queued", f"{snapshot.runnable} queued and runnable, the oldest debt is {_age(snapshot, snapshot.oldest_runnable_ms)} old"
            )
        )
    return tuple(reasons)


def _held(snapshot: FleetSnapshot) -> Iterator[Reason]:
    for reason, count in sorted(snapshot.waiting.items()):
        if count and not reason.runnable:
            yield Reason("waiting", f"{count} waiting: {reason}")


def _passed_over(snapshot: FleetSnapshot) -> Iterator[Reason]:
    """Paused providers are no fault: somebody wants it so."""
    for name, by in sorted(snapshot.paused_providers.items()):
        yield Reason("provider_paused", f"the provider {name} is paused by {by}")


def _breakers(snapshot: FleetSnapshot) -> str:
    """Without the names of repositories, which may be private."""
    parts = [f"of the fleet ({breaker.reason})" for breaker in snapshot.breakers if breaker.scope is PauseScope.FLEET]
    repositories = sum(breaker.scope is PauseScope.REPO for breaker in snapshot.breakers)
    if repositories:
        parts.append("of one repository" if repositories == 1 else f"of {repositories} repositories")
    parts += [f"of the provider {breaker.provider}" for breaker in snapshot.breakers if breaker.scope is PauseScope.PROVIDER]
    return f"the breaker {' and '.join(parts)} is open after {max(breaker.failures for breaker in snapshot.breakers)} failures in a row"


def _paused(snapshot: FleetSnapshot) -> Reason:
    who = f" by {snapshot.paused_by}" if snapshot.paused_by else ""
    since = f" for {_age(snapshot, snapshot.paused_since_ms)}" if snapshot.paused_since_ms is not None else ""
    left = snapshot.age(snapshot.paused_until_ms)
    until = "" if left is None else f", ends by itself in {max(0.0, -left):.0f} s"
    why = f" ({snapshot.paused_reason})" if snapshot.paused_reason else ""
    queued = snapshot.sprints.get(SprintState.QUEUED, 0)
    return Reason("paused", f"paused{who}{since}{why}{until}, {snapshot.running} still running, {queued} queued")


def _older(snapshot: FleetSnapshot, moment_ms: int | None, seconds: float) -> bool:
    age = snapshot.age(moment_ms)
    return age is not None and age > seconds


def _age(snapshot: FleetSnapshot, moment_ms: int | None) -> str:
    age = snapshot.age(moment_ms)
    return "an unknown time" if age is None else f"{age:.0f} s"
