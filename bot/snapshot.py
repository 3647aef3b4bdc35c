"""What the store knows about the fleet at one moment, and the shape of a judgement on it; values only, read by metrics, health and web alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from bot.models import IN_FLIGHT, RUNNING, SprintState, WaitingReason


class WorkerState(StrEnum):
    """What a worker slot does. One that left politely is no row any more; a lost one stays until its slot is taken over."""

    IDLE = "idle"
    BUSY = "busy"
    DRAINING = "draining"
    LOST = "lost"


class HealthVerdict(StrEnum):
    """The service's own judgement of the fleet (observability.md, "verdict")."""

    WORKING = "working"
    IDLE = "idle"
    PAUSED = "paused"
    DEGRADED = "degraded"
    STALLED = "stalled"


class Fault(StrEnum):
    """Why a fleet is degraded; a closed set, also the label `reason` of `dispatch_health_reason`."""

    NO_PROGRESS = "no_progress"
    WORKERS_LOST = "workers_lost"
    WORKER_LOST = "worker_lost"
    SPRINT_OVERRUN = "sprint_overrun"
    AGENT_DOWN = "agent_down"
    PROVIDER_DOWN = "provider_down"
    TOKEN_EXPIRED = "token_expired"  # noqa: S105  the name of a fault
    MODEL_DRIFT = "model_drift"
    COLLECTOR_STALE = "collector_stale"
    WEBHOOK_SILENT = "webhook_silent"
    GITEA_ERRORS = "gitea_errors"
    BREAKER_OPEN = "breaker_open"
    SANDBOX_UNPROVEN = "sandbox_unproven"
    PROBE_FAILING = "probe_failing"


@dataclass(frozen=True, slots=True)
class Reason:
    """One piece of evidence: `code` is a Fault, or `stalled`, `paused`, `active`, `queued`, `waiting`, `empty`; `detail` a sentence with the figures."""

    code: str
    detail: str


@dataclass(frozen=True, slots=True)
class Health:
    """A verdict with its reasons, the deciding one first; never without a reason."""

    verdict: HealthVerdict
    reasons: tuple[Reason, ...]

    def has(self, code: str) -> bool:
        """True where a reason with that code is given."""
        return any(reason.code == code for reason in self.reasons)


@dataclass(frozen=True, slots=True)
class WorkerBeat:
    """One worker process: its name, what it does, its last lease heartbeat (Unix ms), how many sprints it can run and how many it runs."""

    name: str
    state: WorkerState
    beat_ms: int
    slots: int = 0
    running: int = 0


@dataclass(frozen=True, slots=True)
class FleetSnapshot:
    """All facts about the fleet that survive a restart, read in one transaction. Moments are Unix ms, None while unknown (never 0).

    `now_ms` is the reader's clock. `sprints` counts live sprints by state. `waiting` counts the queued ones by why they wait. `oldest_runnable_ms`
    is the first enqueued time of the oldest sprint the fleet owes a slot: queued and held by no policy, or admitted and not begun; a requeue keeps
    it. `oldest_running_ms` is the earliest start among running ones. `last_progress_ms` is the last state change of any sprint other than its
    being enqueued, or the last begin or end of a model turn, tool call or vet check, or its renewal inside its deadline; a worker's heartbeat is
    none. `last_success_ms` is the last `pull_request` or `updated`, `last_delivery_ms` the last authentic delivery. `inbox_backlog` counts rows
    not done, `inbox_dead` those given up; `outbox_backlog` those not yet shown. `paused` is a pause of the whole fleet by a person or a schedule;
    `paused_until_ms` is None where only a person ends it.
    `providers` tells of each provider tried so far whether it is available; one not yet tried is absent.
    """

    now_ms: int
    sprints: Mapping[SprintState, int] = field(default_factory=dict)
    waiting: Mapping[WaitingReason, int] = field(default_factory=dict)
    oldest_runnable_ms: int | None = None
    oldest_running_ms: int | None = None
    last_progress_ms: int | None = None
    last_success_ms: int | None = None
    last_delivery_ms: int | None = None
    inbox_backlog: int = 0
    inbox_oldest_ms: int | None = None
    inbox_dead: int = 0
    outbox_backlog: int = 0
    outbox_oldest_ms: int | None = None
    workers: tuple[WorkerBeat, ...] = ()
    paused: bool = False
    paused_by: str = ""
    paused_since_ms: int | None = None
    paused_until_ms: int | None = None
    paused_reason: str = ""
    providers: Mapping[str, bool] = field(default_factory=dict)

    @property
    def held(self) -> int:
        """Queued sprints that a policy or a person holds."""
        return sum(count for reason, count in self.waiting.items() if not reason.runnable)

    @property
    def runnable(self) -> int:
        """Queued sprints that nothing but a slot, a breaker or a provider keeps."""
        return max(0, self.sprints.get(SprintState.QUEUED, 0) - self.held)

    @property
    def running(self) -> int:
        """Sprints from preparing to publishing."""
        return sum(self.sprints.get(state, 0) for state in RUNNING)

    @property
    def in_flight(self) -> int:
        """Admitted and running sprints."""
        return sum(self.sprints.get(state, 0) for state in IN_FLIGHT)

    @property
    def moved_ms(self) -> int | None:
        """The moment since which nothing moved: the last progress, or where there never was any the oldest debt, so that a first night stalls too."""
        return self.oldest_runnable_ms if self.last_progress_ms is None else self.last_progress_ms

    def age(self, moment_ms: int | None) -> float | None:
        """Seconds from a moment to `now_ms`, by the arithmetic of PromQL's `time() - x`; None while the moment is unknown."""
        return None if moment_ms is None else self.now_ms / 1000 - moment_ms / 1000


class StoreReader(Protocol):
    """What the collector needs of the store; may block, is called in a thread, raises what the database raises."""

    def snapshot(self) -> FleetSnapshot:
        """The facts of this moment, read in one transaction on its own connection."""
        ...
