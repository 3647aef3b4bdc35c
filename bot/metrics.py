"""Every metric name once: facts of this process are counted as they happen, facts of the store are read when Prometheus asks."""

from __future__ import annotations

import gzip
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import dataclass
from itertools import product
from typing import Generic, TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from bot.models import EventKind, FailureReason, Json, OutcomeKind, PauseScope, Source, SprintEvent, SprintState, Stop, WaitingReason
from bot.snapshot import (
    Collected,
    Fault,
    FleetSnapshot,
    Health,
    HealthVerdict,
    PaneState,
    Place,
    ProbeState,
    ProbeVerdict,
    Sampled,
    StoreReader,
    WorkerState,
)

PREFIX = "dispatch_"
OTHER = "other"

HTTP = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
LLM = (0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300)
TOOL = (0.01, 0.05, 0.1, 0.5, 1, 5, 15, 60, 300, 900)
TURNS = (1, 2, 5, 10, 20, 40, 80, 160)
WAIT = (1, 5, 15, 60, 300, 900, 1800, 3600, 7200, 21600)
STAGE = (1, 5, 15, 30, 60, 120, 300, 600, 1200, 2700, 5400, 7200)
SPRINT = (30, 60, 120, 300, 600, 900, 1200, 1800, 2700, 3600, 5400, 7200)

EVENTS = (
    "issues",
    "issue_label",
    "issue_assign",
    "issue_comment",
    "push",
    "repository",
    "status",
    "workflow_run",
    "pull_request",
    "pull_request_comment",
    "pull_request_sync",
    "pull_request_label",
    "pull_request_review",
)
DELIVERY_RESULTS = ("accepted", "ignored", "duplicate", "bad_signature", "malformed", "error")
LLM_RESULTS = (
    "ok",
    "auth",
    "billing",
    "rate_limit",
    "overloaded",
    "model_gone",
    "bad_endpoint",
    "timeout",
    "context_overflow",
    "bad_request",
    "refused",
    "server",
    "garbage",
    "cut",
)
TOOLS = ("run_command", "read_file", "write_file", "edit_file", "list_files", "search", "gitea", "finish")
CODES = ("2xx", "3xx", "4xx", "401", "404", "409", "429", "5xx", "timeout", "connection", "cancelled")
OUTBOX_KINDS = ("status", "reply", "label", "reaction", "alert")
MODEL_PROBE = "model"
WAITING = "waiting"
LIVE_STATES = tuple(state for state in SprintState if state is not SprintState.SETTLED)

_GZIP_LEVEL = 3
_PIECE = 16
_WORK_SECONDS, _REST_SECONDS = 0.002, 0.0005
_NAMED_CODES = frozenset({401, 404, 409, 429})
_NO_ANSWER = {"lost": "timeout", "not sent": "connection"}
_EXEMPLAR_CHARACTERS = 64

M = TypeVar("M", Counter, Gauge, Histogram)


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """The label values that only configuration and discovery know; whatever is not among them becomes `other`.

    `chain` pairs provider and model; `logins` are the providers whose key is renewed by a login.
    """

    version: str = ""
    revision: str = ""
    commands: tuple[str, ...] = ()
    handlers: tuple[str, ...] = ()
    agents: tuple[str, ...] = ()
    chain: tuple[tuple[str, str], ...] = ()
    endpoints: tuple[str, ...] = ()
    logins: tuple[str, ...] = ()
    probes: tuple[str, ...] = ()
    profiles: tuple[str, ...] = ()

    @property
    def providers(self) -> tuple[str, ...]:
        """The names of the chain, each once."""
        return tuple(dict.fromkeys(provider for provider, _ in self.chain))

    @property
    def models(self) -> tuple[str, ...]:
        """The models of the chain, each once."""
        return tuple(dict.fromkeys(model for _, model in self.chain))


@dataclass(frozen=True, slots=True)
class Label:
    """A label with its closed set; `origin` says in words where the values come from when they are not fixed here."""

    name: str
    values: tuple[str, ...]
    origin: str = ""


@dataclass(frozen=True, slots=True)
class Described:
    """One row of the documented table; `name` is the name in `/metrics`."""

    name: str
    kind: str
    help: str
    labels: tuple[Label, ...]
    stored: bool


@dataclass(frozen=True, slots=True)
class Rendered:
    """One exposition: the body as sent, its content type, and its content encoding ("" for none)."""

    body: bytes
    content_type: str
    encoding: str


class Closed(Generic[M]):
    """A metric whose label values come from closed sets; a value outside becomes `other` and is counted."""

    def __init__(self, metric: M, labels: tuple[Label, ...], overflow: Callable[[str], None]) -> None:
        self._metric: M = metric
        self._names = tuple(label.name for label in labels)
        self._known = tuple(frozenset(label.values) for label in labels)
        self._overflow = overflow
        self._children: dict[tuple[str, ...], M] = {} if labels else {(): metric}

    def at(self, *values: str) -> M:
        """The child of these label values, in the order of declaration."""
        child = self._children.get(values)
        return child if child is not None else self._fold(values)

    def _fold(self, values: tuple[str, ...]) -> M:
        folded = []
        for name, known, value in zip(self._names, self._known, values, strict=True):
            if value not in known and value != OTHER:
                self._overflow(name)
            folded.append(value if value in known else OTHER)
        key = tuple(folded)
        child: M = self._metric.labels(*key)
        if key == values:
            self._children[key] = child
        return child


class _Late(Collector):
    """A gauge without labels that is absent until it is known: born at 0 it would read as broken, or as 1970."""

    def __init__(self, name: str, text: str) -> None:
        self._name = name
        self._text = text
        self.value: float | None = None

    def describe(self) -> Iterable[Metric]:
        return [GaugeMetricFamily(self._name, self._text)]

    def collect(self) -> Iterable[Metric]:
        if self.value is not None:
            yield GaugeMetricFamily(self._name, self._text, value=self.value)


class _Paced:
    """The registry for the encoder, which reads it in one go: between some samples its thread rests, so that the event loop waits for a short piece
    of work only, also where the machine takes the processor away from whoever holds the interpreter's lock.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._began = time.perf_counter()

    def collect(self) -> Iterator[Metric]:
        for family in self._registry.collect():
            paced = copy(family)
            paced.samples = _Samples(family.samples, self.rest)
            yield paced
            self.rest()

    def rest(self) -> None:
        if time.perf_counter() - self._began > _WORK_SECONDS:
            time.sleep(_REST_SECONDS)
            self._began = time.perf_counter()


class _Samples(list[Sample]):
    """Samples that rest now and then while they are read."""

    def __init__(self, samples: Iterable[Sample], rest: Callable[[], None]) -> None:
        super().__init__(samples)
        self._rest = rest

    def __iter__(self) -> Iterator[Sample]:
        for number, sample in enumerate(super().__iter__()):
            if number % _PIECE == 0:
                self._rest()
            yield sample


class _Expiries(Collector):
    """When logins expire, as `ask` says at the scrape (provider -> Unix ms); what it cannot tell is absent and fails nothing else."""

    def __init__(self, name: str, text: str, known: frozenset[str], ask: Callable[[], Mapping[str, int]]) -> None:
        self._name = name
        self._text = text
        self._known = known
        self._ask = ask

    def describe(self) -> Iterable[Metric]:
        return [GaugeMetricFamily(self._name, self._text)]

    def collect(self) -> Iterable[Metric]:
        family = GaugeMetricFamily(self._name, self._text, labels=["provider"])
        with suppress(Exception):
            for provider, expires_ms in sorted(self._ask().items()):
                if expires_ms > 0 and provider in self._known:
                    family.add_metric((provider,), expires_ms / 1000)
        if family.samples:
            yield family


class Metrics:
    """The metrics of one process on one registry. Every method is safe from any thread, cheap, and never raises on what it is told."""

    def __init__(self, registry: CollectorRegistry, vocabulary: Vocabulary | None = None) -> None:
        without_created: Callable[[], None] = disable_created_metrics
        without_created()
        self.registry = registry
        self._described: list[Described] = []
        words = vocabulary or Vocabulary()
        event, command = Label("event", EVENTS), Label("command", words.commands, "the files of `commands/`")
        agent = Label("agent", words.agents, "the engines found at start")
        model = Label("model", words.models, "the configured models")
        provider = Label("provider", words.providers, "the configured providers")
        endpoint = Label("endpoint", words.endpoints, "the route templates of the Gitea client")
        outcome, source = Label("outcome", tuple(OutcomeKind)), Label("source", tuple(Source))
        failure = Label("reason", tuple(FailureReason))
        tool = Label("tool", TOOLS)

        self._overflow = self._plain_counter("metrics_label_overflow_total", "Label values outside their closed set, by label.", ("label",))
        build = self._gauge(
            "build_info",
            "Constant 1, labelled with what runs.",
            Label("version", (words.version,), "what is installed"),
            Label("revision", (words.revision,), "what is installed"),
        )
        build.at(words.version, words.revision).set(1)

        self._deliveries = self._counter(
            "webhook_deliveries_total", "Deliveries by what the response said.", event, Label("result", DELIVERY_RESULTS)
        )
        self._handle_seconds = self._histogram("webhook_handle_duration_seconds", "Request read to response written.", HTTP, event)
        self._handler_seconds = self._histogram(
            "handler_duration_seconds", "One run of one handler.", HTTP, Label("handler", words.handlers, "the files of `handlers/`")
        )
        self._canary = self._late(
            "webhook_canary_timestamp_seconds", "When the forge last agreed to send a test delivery; absent while it cannot be asked."
        )
        self._missed = self._counter("reconcile_missed_events_total", "Work found by reconciliation that no webhook announced.")
        self._inbox_handled = self._counter(
            "inbox_handled_total", "Handlings of stored deliveries.", Label("result", ("done", "retry", "not_yet", "dead"))
        )
        self._inbox_tries = self._histogram("inbox_tries", "Tries a stored delivery took until done or given up.", TURNS)
        self._outbox_failures = self._counter(
            "outbox_failures_total",
            "Failed writes to the forge of what it should show.",
            Label("kind", OUTBOX_KINDS),
        )
        self._commands = self._counter(
            "commands_total", "Answered commands.", command, Label("result", ("ok", "denied", "invalid", "rate_limited", "error"))
        )
        self._ack_seconds = self._histogram("command_ack_duration_seconds", "Delivery received to the reaction's 2xx.", HTTP)
        self._enqueued = self._counter("sprints_enqueued_total", "Sprints put into the queue.", source)
        self._started = self._counter("sprints_started_total", "Attempts begun.", agent)
        self._wait_seconds = self._histogram("sprint_queue_wait_seconds", "Enqueued to started.", WAIT, source)
        self._sprint_seconds = self._histogram("sprint_duration_seconds", "Start to end of an attempt.", SPRINT, agent, model, outcome)
        self._stage_seconds = self._histogram(
            "sprint_stage_duration_seconds",
            "One stage of a sprint.",
            STAGE,
            Label("stage", ("prepare", "work", "vet", "publish", "settle")),
        )
        self._turns = self._histogram("sprint_llm_turns", "Model turns of one sprint.", TURNS, outcome)
        self._failures = self._counter("sprint_failures_total", "Sprints that ended as failed.", failure)
        self._retries = self._counter(
            "sprint_retries_total",
            "Attempts beyond the first, by what sent the sprint back.",
            Label("reason", tuple(dict.fromkeys((*WaitingReason, *FailureReason, Stop.REQUEUE, Stop.DRAIN)))),
        )
        self._pulls = self._counter(
            "pull_requests_total",
            "What became of our pull requests.",
            Label("event", ("opened", "updated", "merged", "closed_unmerged", "reverted")),
            model,
        )
        self._llm_seconds = self._histogram("llm_request_duration_seconds", "One call of a provider, retries apart.", LLM, provider, model)
        self._llm_requests = self._counter(
            "llm_requests_total", "Calls of providers by result.", provider, model, Label("result", LLM_RESULTS)
        )
        self._llm_tokens = self._counter(
            "llm_tokens_total",
            "Tokens as the provider reported them.",
            provider,
            model,
            Label("direction", ("input", "output", "cache_read", "cache_write", "reasoning")),
        )
        self._llm_cost = self._counter("llm_cost_usd_total", "Money by the configured price table.", provider, model)
        self._llm_inflight = self._gauge("llm_inflight_requests", "Calls in flight.", provider)
        self._llm_fallbacks = self._counter(
            "llm_fallbacks_total",
            "A provider passed over for the next.",
            Label("from_provider", words.providers, provider.origin),
            Label("to_provider", words.providers, provider.origin),
        )
        self._expiry = self._declare(
            "auth_token_expiry_timestamp_seconds", "gauge", "When the key of a login expires; absent without an expiry.", (provider,)
        )
        self._logins = frozenset(words.providers)
        self._refreshes = self._counter(
            "auth_refresh_total", "Renewals of a login that were tried.", provider, Label("result", ("ok", "error"))
        )
        self._notifications = self._counter(
            "alertmanager_notifications_total",
            "Notifications that came to /alerts.",
            Label("status", ("firing", "resolved")),
            Label("result", ("ok", "error")),
        )
        self._budget = self._late("llm_budget_usd", "Configured budget of a day; absent for none.")
        self._takeovers = self._counter("lease_takeovers_total", "Sprints of a dead worker taken over.")
        self._tools = self._counter(
            "tool_calls_total", "Tool calls of the model.", tool, Label("result", ("ok", "error", "denied", "timeout", "interrupted"))
        )
        self._tool_seconds = self._histogram("tool_call_duration_seconds", "One tool call.", TOOL, tool)
        self._gitea_seconds = self._histogram("gitea_request_duration_seconds", "One attempt of one request to the forge.", HTTP, endpoint)
        self._gitea_requests = self._counter(
            "gitea_requests_total",
            "Attempts by answer.",
            endpoint,
            Label("method", ("GET", "POST", "PATCH", "PUT", "DELETE")),
            Label("code", CODES),
        )
        self._gitea_retries = self._counter("gitea_retries_total", "Attempts beyond the first.", endpoint)
        self._lag_seconds = self._histogram("event_loop_lag_seconds", "How late a timer of one second fires.", HTTP)
        self._sandbox = self._gauge(
            "sandbox_info",
            "Constant 1, labelled with the wall asked for and the one in use.",
            Label("backend", ("bubblewrap", "none")),
            Label("level", ("bubblewrap", "none")),
        )
        self._sandbox_ok = self._late(
            "sandbox_probe_ok", "1 if the last live probes of the sandbox passed, 0 if not; absent before the first."
        )
        probe = Label("probe", words.probes, "the files of `bot/fleet/probes/`")
        profile = Label("agent", words.profiles, "of the watchdog: the Hermes profiles of `watchdog.expect`")
        self._watchdog_acts = self._counter(
            "watchdog_actions_total", "What the watchdog did about what it found.", probe, Label("result", ("ok", "error"))
        )
        self._watchdog_fixes = self._counter(
            "watchdog_fixes_total", "Repairs of a profile's model that were tried.", profile, Label("result", ("ok", "error"))
        )
        stored = _stored(provider, probe=probe, profile=profile)
        self._uncollected = self._counter(
            "collector_errors_total", "Sources that the collector missed.", Label("collector", tuple(Sampled))
        )
        self._stored = [Described(PREFIX + name, "gauge", text, labels, stored=True) for name, (text, labels) in stored.items()]
        self._described += self._stored

        self._zero(self._overflow_child, sorted({(label.name,) for row in self._described for label in row.labels}))
        self._zero(self._deliveries.at, product((*EVENTS, OTHER), ("accepted", "error", "bad_signature")))
        self._zero(self._enqueued.at, product(Source))
        self._zero(self._started.at, product(words.agents))
        self._zero(self._sprint_seconds.at, product(words.agents, words.models, ("pull_request", "no_change", "failed")))
        # A sprint that fails before its first call has no model; unseen at zero, the first of them would be missing in every rate.
        self._zero(self._sprint_seconds.at, product((*words.agents, OTHER), (OTHER,), ("failed",)))
        self._zero(self._failures.at, product(FailureReason))
        self._zero(self._pulls.at, product(("opened", "updated", "merged", "closed_unmerged", "reverted"), words.models))
        self._zero(self._llm_requests.at, ((*pair, result) for pair in words.chain for result in LLM_RESULTS))
        self._zero(self._turns.at, product(OutcomeKind))
        self._zero(self._gitea_retries.at, product(words.endpoints))
        self._zero(self._outbox_failures.at, product(OUTBOX_KINDS))
        self._zero(self._refreshes.at, product(words.logins, ("ok", "error")))
        self._zero(self._notifications.at, product(("firing", "resolved"), ("ok", "error")))
        self._zero(self._uncollected.at, product(Sampled))
        self._zero(self._watchdog_acts.at, product(words.probes, ("ok", "error")))
        self._zero(self._watchdog_fixes.at, product(words.profiles, ("ok", "error")))
        self._trace_of: Callable[[str], str] = _no_trace
        for collect in (ProcessCollector, PlatformCollector, GCCollector):
            collect(registry=registry)

    def read_store(self, reader: StoreReader, judge: Callable[[FleetSnapshot], Health], *, started_ms: int) -> None:
        """Adds the facts of the store, read and judged at every scrape; `started_ms` stands for the last delivery while there was none."""
        self.registry.register(_StoreCollector(self._stored, reader, judge, started_ms))

    def read_logins(self, ask: Callable[[], Mapping[str, int]]) -> None:
        """Adds when each provider's login expires (Unix ms), asked at every scrape."""
        self.registry.register(_Expiries(*self._expiry[:2], self._logins, ask))

    def traced_by(self, trace_of: Callable[[str], str]) -> None:
        """Sprints have traces: `trace_of(sprint id)` is its trace's id (32 hex digits), told in exemplars."""
        self._trace_of = trace_of

    def render(self, accept: str, *, compress: bool) -> Rendered:
        """The exposition for an `Accept` header. Blocks (store, rendering), so it belongs in a thread; raises what the store raises."""
        try:
            encode, content_type = choose_encoder(accept)
        except (TypeError, ValueError):
            # The library compares whatever version the header names.
            encode, content_type = choose_encoder("")
        body = encode(_Paced(self.registry))
        return Rendered(gzip.compress(body, _GZIP_LEVEL, mtime=0), content_type, "gzip") if compress else Rendered(body, content_type, "")

    def observe(self, event: SprintEvent) -> None:
        """Counts one fact about a sprint; kinds that no metric tells are passed over."""
        data = event.data
        match event.kind:
            case EventKind.ENQUEUED:
                self._enqueued.at(_text(data, "source")).inc()
            case EventKind.STARTED:
                self._started.at(_text(data, "agent")).inc()
                self._wait_seconds.at(_text(data, "source")).observe(_amount(data, "waited_seconds"))
            case EventKind.STAGE_ENDED:
                self._stage_seconds.at(_text(data, "stage")).observe(_amount(data, "seconds"))
            case EventKind.STEP_ENDED:
                self._step(data)
            case EventKind.TOOL_ENDED:
                self._tools.at(_text(data, "tool"), _text(data, "result")).inc()
                self._tool_seconds.at(_text(data, "tool")).observe(_amount(data, "seconds"))
            case EventKind.FALLBACK:
                self._llm_fallbacks.at(_text(data, "from_provider"), _text(data, "to_provider")).inc()
            case EventKind.REQUEUED:
                self._retries.at(_text(data, "reason")).inc()
            case EventKind.TAKEN_OVER:
                self._takeovers.at().inc()
            case EventKind.PULL_REQUEST:
                self._pulls.at(_text(data, "event"), _text(data, "model")).inc()
            case EventKind.SETTLED:
                self._settled(event)
            case _:
                pass

    def delivery(self, event_type: str, result: str) -> None:
        """One delivery answered: its `X-Gitea-Event-Type`, and one of DELIVERY_RESULTS."""
        self._deliveries.at(_event(event_type), result).inc()

    def webhook_handled(self, event_type: str, seconds: float) -> None:
        """The time from request read to response written."""
        self._handle_seconds.at(_event(event_type)).observe(seconds)

    def handler_ran(self, handler: str, seconds: float) -> None:
        """One run of one file of `handlers/`."""
        self._handler_seconds.at(handler).observe(seconds)

    def missed(self, count: int = 1) -> None:
        """Reconciliation found work that no webhook had announced."""
        self._missed.at().inc(count)

    def inbox_handled(self, result: str) -> None:
        """One handling of a stored delivery ended: done, retry, not_yet or dead."""
        self._inbox_handled.at(result).inc()

    def inbox_tries(self, tries: int) -> None:
        """A stored delivery is done or given up after so many tries."""
        self._inbox_tries.at().observe(tries)

    def outbox_failed(self, kind: str) -> None:
        """The projector could not write a status, reply, label or reaction."""
        self._outbox_failures.at(kind).inc()

    def command(self, verb: str, result: str) -> None:
        """One command answered."""
        self._commands.at(verb, result).inc()

    def ack(self, seconds: float) -> None:
        """The time from a delivery received to its reaction shown."""
        self._ack_seconds.at().observe(max(0.0, seconds))

    def forge_request(self, route: str, method: str, status: int | str, attempt: int, seconds: float) -> None:
        """One attempt of a request, told as the client's `on_request`: route template, method, status or why there is none, number from 1."""
        self._gitea_seconds.at(route).observe(seconds)
        self._gitea_requests.at(route, method, _code(status)).inc()
        if attempt > 1:
            self._gitea_retries.at(route).inc()

    def llm_attempt(self, provider: str, model: str, result: str, seconds: float) -> None:
        """One request to a provider, retries apart, as the chain tells of every one: `ok` or the class of its error."""
        self._llm_seconds.at(provider, model).observe(seconds)
        self._llm_requests.at(provider, model, result).inc()

    @contextmanager
    def llm_inflight(self, provider: str) -> Iterator[None]:
        """Counts a call in flight while the block runs."""
        with self._llm_inflight.at(provider).track_inprogress():
            yield

    def login_refreshed(self, provider: str, *, ok: bool) -> None:
        """A renewal of a login was tried."""
        self._refreshes.at(provider, "ok" if ok else "error").inc()

    def notified(self, status: str, result: str) -> None:
        """A notification came to /alerts: firing or resolved, ok or error."""
        self._notifications.at(status, result).inc()

    def canary_sent(self, at_ms: int) -> None:
        """The forge agreed to send a test delivery (Unix ms)."""
        self._canary.value = at_ms / 1000

    def watchdog_acted(self, probe: str, target: str, *, ok: bool) -> None:
        """The watchdog did something about what a probe found; of the probe `model` the target is a profile."""
        result = "ok" if ok else "error"
        self._watchdog_acts.at(probe, result).inc()
        if probe == MODEL_PROBE:
            self._watchdog_fixes.at(target, result).inc()

    def uncollected(self, source: str) -> None:
        """The collector missed a source in one of its rounds."""
        self._uncollected.at(source).inc()

    def loop_lag(self, seconds: float) -> None:
        """How late the timer of the event loop fired."""
        self._lag_seconds.at().observe(max(0.0, seconds))

    def sandbox(self, backend: str, level: str) -> None:
        """The wall asked for and the wall in use: bubblewrap or none each."""
        self._sandbox.at(backend, level).set(1)

    def sandbox_probed(self, *, ok: bool) -> None:
        """The live probes of the sandbox passed or failed."""
        self._sandbox_ok.value = 1.0 if ok else 0.0

    def budget(self, usd: float) -> None:
        """The configured budget of a day in USD; 0 means none and leaves the gauge absent."""
        self._budget.value = usd or None

    def described(self) -> tuple[Described, ...]:
        """Every metric of ours, by name."""
        return tuple(sorted(self._described, key=lambda row: row.name))

    def _step(self, data: Json) -> None:
        provider, model = _text(data, "provider"), _text(data, "model")
        for direction, key in (("input", "input"), ("output", "output"), ("cache_read", "cached")):
            self._llm_tokens.at(provider, model, direction).inc(_amount(data, key))
        self._llm_cost.at(provider, model).inc(_amount(data, "usd"))

    def _settled(self, event: SprintEvent) -> None:
        data = event.data
        outcome = _text(data, "outcome")
        duration = self._sprint_seconds.at(_text(data, "agent"), _text(data, "model"), outcome)
        exemplar = {"sprint": str(event.sprint_id)[:_EXEMPLAR_CHARACTERS]}
        trace = self._trace_of(event.sprint_id)
        duration.observe(_amount(data, "seconds"), exemplar | ({"trace_id": trace} if trace else {}))
        self._turns.at(outcome).observe(_amount(data, "steps"))
        if outcome == OutcomeKind.FAILED:
            self._failures.at(_text(data, "reason")).inc()

    def _overflow_child(self, label: str) -> Counter:
        return self._overflow.labels(label)

    def _overflowed(self, label: str) -> None:
        self._overflow_child(label).inc()

    @staticmethod
    def _zero(child: Callable[..., object], values: Iterable[tuple[str, ...]]) -> None:
        for each in values:
            child(*each)

    def _plain_counter(self, name: str, text: str, labels: tuple[str, ...]) -> Counter:
        self._described.append(
            Described(PREFIX + name, "counter", text, tuple(Label(label, (), "the label names below") for label in labels), stored=False)
        )
        return Counter(PREFIX + name, text, labels, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: Label) -> Closed[Counter]:
        return Closed(Counter(*self._declare(name, "counter", text, labels), registry=self.registry), labels, self._overflowed)

    def _gauge(self, name: str, text: str, *labels: Label) -> Closed[Gauge]:
        return Closed(Gauge(*self._declare(name, "gauge", text, labels), registry=self.registry), labels, self._overflowed)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: Label) -> Closed[Histogram]:
        metric = Histogram(*self._declare(name, "histogram", text, labels), registry=self.registry, buckets=buckets)
        return Closed(metric, labels, self._overflowed)

    def _late(self, name: str, text: str) -> _Late:
        self._declare(name, "gauge", text, ())
        late = _Late(PREFIX + name, text)
        self.registry.register(late)
        return late

    def _declare(self, name: str, kind: str, text: str, labels: tuple[Label, ...]) -> tuple[str, str, tuple[str, ...]]:
        self._described.append(Described(PREFIX + name, kind, text, labels, stored=False))
        return PREFIX + name, text, tuple(label.name for label in labels)


def _stored(provider: Label, *, probe: Label, profile: Label) -> dict[str, tuple[str, tuple[Label, ...]]]:
    return {
        "webhook_last_delivery_timestamp_seconds": ("Last authentic delivery, or the start of the process while there was none.", ()),
        "inbox_backlog": ("Stored deliveries not yet handled.", ()),
        "inbox_oldest_received_timestamp_seconds": ("The oldest of them; absent while none.", ()),
        "inbox_dead_letters": ("Stored deliveries given up.", ()),
        "outbox_backlog": ("What the forge does not yet show.", ()),
        "outbox_oldest_timestamp_seconds": ("The oldest of it; absent while none.", ()),
        "sprints": ("Live sprints; `queued` are runnable, `waiting` are held by a policy.", (Label("state", (*LIVE_STATES, WAITING)),)),
        "sprints_waiting": ("Why queued sprints wait.", (Label("reason", tuple(WaitingReason)),)),
        "queue_oldest_enqueued_timestamp_seconds": (
            "First enqueued time of the oldest sprint the fleet owes a slot; absent while none.",
            (),
        ),
        "sprint_running_oldest_start_timestamp_seconds": ("Start of the longest running sprint; absent while none.", ()),
        "fleet_last_progress_timestamp_seconds": ("When anything last moved; before the first progress, the oldest debt.", ()),
        "sprint_last_success_timestamp_seconds": ("Last sprint that ended with a pull request; absent while none.", ()),
        "llm_provider_available": ("0 while a provider cools down or is paused; absent until its first call.", (provider,)),
        "workers": ("Worker slots by what they do.", (Label("state", tuple(WorkerState)),)),
        "worker_last_heartbeat_timestamp_seconds": ("The worker's lease row.", (Label("worker", (), "the worker slots"),)),
        "health": ("1 for the verdict that holds, 0 for the others.", (Label("verdict", tuple(HealthVerdict)),)),
        "health_reason": ("1 for each fault that holds, 0 for the others.", (Label("reason", tuple(Fault)),)),
        "paused": ("1 while the whole fleet is paused by a person or a schedule.", ()),
        "breaker_open": ("Open automatic breakers.", (Label("scope", tuple(PauseScope)),)),
        "probe_ok": ("0 while a watchdog probe fails or breaks, absent while it cannot tell.", (probe,)),
        "probe_last_run_timestamp_seconds": ("End of the last run of a watchdog probe.", (probe,)),
        "watchdog_model_drift": ("1 while a profile runs another model than `watchdog.expect` says.", (profile,)),
        "collector_last_success_timestamp_seconds": (
            "When the collector of this host last got an answer from a source; before the first, when it first asked.",
            (Label("collector", tuple(Sampled)),),
        ),
        **_sampled(),
    }


def _sampled() -> dict[str, tuple[str, tuple[Label, ...]]]:
    """The gauges of the collector's last sample; absent until there is one."""
    worker, schedule = Label("worker", (), "the worker slots"), Label("schedule", (), "the configured schedules")
    return {
        "schedule_drift_seconds": ("How late a schedule fired last, or how long it is overdue.", (schedule,)),
        "tmux_panes": (
            "Panes of our own tmux sessions by what they do.",
            (Label("session", (), "our own tmux sessions"), Label("state", tuple(PaneState))),
        ),
        "agent_up": (
            "1 if the process in a lane's pane lives; absent where the lane was stopped by a person or the fleet is paused.",
            (Label("agent", (), "our own lanes"),),
        ),
        "worker_memory_bytes": ("Resident memory of a worker's process on this host.", (worker,)),
        "worker_start_timestamp_seconds": ("When the process of a worker on this host began.", (worker,)),
        "gitea_open_issues": ("Open issues of the served repositories.", ()),
        "gitea_open_pull_requests": (
            "Open pull requests of the served repositories.",
            (Label("author", ("bot", "people")),),
        ),
        "disk_size_bytes": ("Size of the file system that holds the state folder.", ()),
        "disk_free_bytes": ("What is free of it.", ()),
        "disk_used_bytes": ("What the fleet takes in the state folder.", (Label("place", tuple(Place)),)),
    }


class _StoreCollector(Collector):
    """Reads one snapshot a scrape. A store that cannot be read fails the scrape on purpose: absent queue gauges would silence the stall page."""

    def __init__(self, rows: list[Described], reader: StoreReader, judge: Callable[[FleetSnapshot], Health], started_ms: int) -> None:
        self._rows = rows
        self._reader = reader
        self._judge = judge
        self._started_ms = started_ms

    def describe(self) -> Iterable[Metric]:
        return [GaugeMetricFamily(row.name, row.help) for row in self._rows]

    def collect(self) -> Iterable[Metric]:
        snapshot = self._reader.snapshot()
        values = self._values(snapshot, self._judge(snapshot))
        for row in self._rows:
            family = GaugeMetricFamily(row.name, row.help, labels=[label.name for label in row.labels])
            for labels, value in values[row.name.removeprefix(PREFIX)].items():
                family.add_metric(labels, value)
            if family.samples:
                yield family

    def _values(self, snapshot: FleetSnapshot, health: Health) -> dict[str, dict[tuple[str, ...], float]]:
        return {
            "webhook_last_delivery_timestamp_seconds": _moment(snapshot.last_delivery_ms or self._started_ms),
            "inbox_backlog": _one(snapshot.inbox_backlog),
            "inbox_oldest_received_timestamp_seconds": _moment(snapshot.inbox_oldest_ms),
            "inbox_dead_letters": _one(snapshot.inbox_dead),
            "outbox_backlog": _one(snapshot.outbox_backlog),
            "outbox_oldest_timestamp_seconds": _moment(snapshot.outbox_oldest_ms),
            "sprints": _sprints(snapshot),
            "sprints_waiting": {(reason,): snapshot.waiting.get(reason, 0) for reason in WaitingReason},
            "queue_oldest_enqueued_timestamp_seconds": _moment(snapshot.oldest_runnable_ms),
            "sprint_running_oldest_start_timestamp_seconds": _moment(snapshot.oldest_running_ms),
            "fleet_last_progress_timestamp_seconds": _moment(snapshot.moved_ms),
            "sprint_last_success_timestamp_seconds": _moment(snapshot.last_success_ms),
            "llm_provider_available": {
                (name,): float(available and name not in snapshot.paused_providers)
                for name, available in sorted(snapshot.providers.items())
            },
            "workers": {(state,): sum(worker.state is state for worker in snapshot.workers) for state in WorkerState},
            "worker_last_heartbeat_timestamp_seconds": {
                (worker.name,): worker.beat_ms / 1000 for worker in snapshot.workers if worker.beat_ms
            },
            "health": {(verdict,): float(verdict is health.verdict) for verdict in HealthVerdict},
            "health_reason": {(fault,): float(health.has(fault)) for fault in Fault},
            "paused": _one(snapshot.paused),
            "breaker_open": {(scope,): sum(breaker.scope is scope for breaker in snapshot.breakers) for scope in PauseScope},
            "probe_ok": {(probe.name,): float(ok) for probe in snapshot.probes if (ok := _probe_ok(probe)) is not None},
            "probe_last_run_timestamp_seconds": {(probe.name,): probe.ran_ms / 1000 for probe in snapshot.probes},
            "watchdog_model_drift": {
                (target.name,): float(target.verdict is ProbeVerdict.FAILING)
                for probe in snapshot.probes
                if probe.name == MODEL_PROBE
                for target in probe.targets
            },
            "collector_last_success_timestamp_seconds": {
                (source,): snapshot.collected.succeeded_ms[source] / 1000 for source in Sampled if source in snapshot.collected.succeeded_ms
            },
            **{name: _gauges(snapshot.collected, name, labels) for name, (_, labels) in _sampled().items()},
        }


def _sprints(snapshot: FleetSnapshot) -> dict[tuple[str, ...], float]:
    counts: dict[tuple[str, ...], float] = {(state,): snapshot.sprints.get(state, 0) for state in LIVE_STATES}
    return counts | {(SprintState.QUEUED,): snapshot.runnable, (WAITING,): snapshot.held}


def _gauges(collected: Collected, name: str, labels: tuple[Label, ...]) -> dict[tuple[str, ...], float]:
    """The values of one gauge of the last sample, as this version declares it: what lies outside a closed set is folded."""
    folded: dict[tuple[str, ...], float] = {}
    for given, value in collected.gauges.get(name, {}).items():
        if len(given) == len(labels):
            key = tuple(OTHER if label.values and text not in label.values else text for label, text in zip(labels, given, strict=True))
            folded[key] = folded.get(key, 0.0) + value
    return folded


def _probe_ok(probe: ProbeState) -> bool | None:
    if probe.verdict is ProbeVerdict.UNKNOWN and not probe.broken:
        return None
    return probe.verdict in (ProbeVerdict.OK, ProbeVerdict.WARN)


def _no_trace(_sprint_id: str) -> str:
    return ""


def _one(value: float) -> dict[tuple[str, ...], float]:
    return {(): float(value)}


def _moment(moment_ms: int | None) -> dict[tuple[str, ...], float]:
    return {(): moment_ms / 1000} if moment_ms else {}


def _text(data: Json, key: str) -> str:
    value = data.get(key)
    return value if isinstance(value, str) and value else OTHER


def _amount(data: Json, key: str) -> float:
    value = data.get(key)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) and value > 0 else 0.0


def _event(event_type: str) -> str:
    return "pull_request_review" if event_type.startswith("pull_request_review") else event_type


def _code(status: int | str) -> str:
    if isinstance(status, str):
        return _NO_ANSWER.get(status, status)
    if status in _NAMED_CODES:
        return str(status)
    return f"{status // 100}xx"


def docs_table() -> str:
    """The catalogue as Markdown, generated from the declarations: `docs/metrics.md` is this text (`python -m bot.metrics > docs/metrics.md`)."""
    rows = Metrics(CollectorRegistry()).described()
    lines = [
        "# Metrics",
        "",
        "Generated from `bot/metrics.py`. Moments are Unix times in seconds and absent while unknown.",
        "",
        "| metric | type | labels | read from | meaning |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        labels = ", ".join(f"`{label.name}`" for label in row.labels)
        lines.append(f"| `{row.name}` | {row.kind} | {labels} | {'store' if row.stored else 'process'} | {row.help} |")
    sets = {(label.name, label.origin or ", ".join(f"`{value}`" for value in label.values)) for row in rows for label in row.labels}
    lines += ["", "| label | values (each also `other`) |", "|---|---|"]
    lines += [f"| `{name}` | {values} |" for name, values in sorted(sets)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(docs_table())
