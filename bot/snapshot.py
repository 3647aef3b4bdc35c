"""What the store knows about the fleet at one moment, and the shape of a judgement on it; values only, read by metrics, health and web alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from bot.models import IN_FLIGHT, RUNNING, Breaker, SprintState, WaitingReason


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


class Sampled(StrEnum):
    """What the collector samples; the label `collector` of its metrics."""

    TMUX = "tmux"
    PROCESSES = "processes"
    CRON = "cron"
    GITEA = "gitea"
    SPRINTS = "sprints"
    DISK = "disk"
    PROVIDERS = "providers"


class PaneState(StrEnum):
    """What a pane of a lane does."""

    ACTIVE = "active"
    IDLE = "idle"
    DEAD = "dead"


class Place(StrEnum):
    """What takes room in the state folder."""

    DATABASE = "database"
    SPRINTS = "sprints"
    EXPORTS = "exports"
    TELEMETRY = "telemetry"


@dataclass(frozen=True, slots=True)
class Reason:
    """One piece of evidence: `code` is a Fault, or `stalled`, `paused`, `active`, `queued`, `waiting`, `empty`, `provider_paused`.

    `detail` is a sentence with the figures.
    """

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
class Collected:
    """What the collector of this host saw last. `succeeded_ms` is by source its last success (before the first: its first try).

    `gauges` are by metric (without prefix) its values by their labels.
    """

    succeeded_ms: Mapping[str, int] = field(default_factory=dict)
    gauges: Mapping[str, Mapping[tuple[str, ...], float]] = field(default_factory=dict)


class ProbeVerdict(StrEnum):
    """What a probe of the watchdog found; `unknown` where it could not tell. Of several targets the worst counts."""

    OK = "ok"
    WARN = "warn"
    UNKNOWN = "unknown"
    FAILING = "failing"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one look of a probe found of one target. `evidence` holds figures (JSON values) for the row, `reason` is a sentence for people.

    `repo_id` is 0 for what belongs to no repository, `issue` 0 for what belongs to no issue; `provider` names the provider of the chain it is
    about. `mendable` says that the probe's action could help.
    """

    target: str
    verdict: ProbeVerdict
    reason: str
    evidence: Mapping[str, object] = field(default_factory=dict)
    repo_id: int = 0
    issue: int = 0
    provider: str = ""
    mendable: bool = False


@dataclass(frozen=True, slots=True)
class ProbeTarget:
    """What a probe found of one thing it looks at, since when, and what was done about it.

    `repo_id` is 0 for what belongs to no repository. `acts` counts the actions since it was last well for a while; `acted_ms` is None while there
    was none, `act_result` what the last one came to.
    """

    name: str
    verdict: ProbeVerdict
    reason: str
    since_ms: int
    repo_id: int = 0
    acts: int = 0
    acted_ms: int | None = None
    act_result: str = ""


@dataclass(frozen=True, slots=True)
class ProbeState:
    """One probe of the watchdog: the worst of its targets, the end of its last run (Unix ms), and when it is due again.

    `broken` says that it did not come to a verdict by its own fault (it raised, or did not end), `reason` is "" where the targets say all.
    `policy` is what the settings let it do; `wished_by` who asked for a run that has not begun.
    """

    name: str
    verdict: ProbeVerdict
    ran_ms: int
    due_ms: int
    broken: bool = False
    reason: str = ""
    policy: str = ""
    wished_by: str = ""
    targets: tuple[ProbeTarget, ...] = ()

    @property
    def said(self) -> str:
        """Its own reason, or that of its worst target."""
        worst = next((target for target in self.targets if target.verdict is self.verdict), None)
        return self.reason or (f"{worst.name}: {worst.reason}" if worst else "")


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
    `providers` tells of each provider tried so far whether it is available; one not yet tried is absent. `probes` are those of the watchdog that
    ran and are not overdue by far.
    `collected` is what the collector of the reader's host saw last.
    `paused_providers` says of each provider that is paused who paused it, which is no fault; `breakers` are the open ones.
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
    paused_providers: Mapping[str, str] = field(default_factory=dict)
    breakers: tuple[Breaker, ...] = ()
    probes: tuple[ProbeState, ...] = ()
    collected: Collected = field(default_factory=Collected)

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
