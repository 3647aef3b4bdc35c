"""Traces as an option: one a sprint, told from its events after the fact; while no address is configured, nothing of OpenTelemetry is imported."""

from __future__ import annotations

import hashlib
import threading
from typing import TYPE_CHECKING, Any, Final

from bot.models import DispatchError, EventKind, Json, OutcomeKind, SprintEvent

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import SpanKind

SERVICE: Final = "timmy-dispatch"
AGENT_SPAN: Final = "invoke_agent"
_MS: Final = 1_000_000
_GOOD: Final = frozenset({OutcomeKind.PULL_REQUEST, OutcomeKind.UPDATED, OutcomeKind.NO_CHANGE, OutcomeKind.CANCELLED, OutcomeKind.PLANNED})


class TracingUnavailable(DispatchError):
    """Traces are asked for and the extra is not installed."""


def trace_id_of(sprint_id: str) -> str:
    """The trace of a sprint (32 hex digits): the same in every process and after every restart."""
    return hashlib.sha256(f"trace:{sprint_id}".encode()).hexdigest()[:32]


def _root_of(sprint_id: str) -> int:
    return int(hashlib.sha256(f"root:{sprint_id}".encode()).hexdigest()[:16], 16)


def connect(endpoint: str, version: str) -> Tracing:
    """Traces that go to `endpoint` (OTLP over HTTP). Raises TracingUnavailable without the extra `otel`."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise TracingUnavailable(
            f"tracing.endpoint is set, and OpenTelemetry is not installed ({error.name}). Remedy: install timmy-dispatch[otel], or leave the key out"
        ) from None
    return Tracing(OTLPSpanExporter(endpoint=endpoint), version)


class Tracing:
    """An observer of sprints. Each fact already says how long it took, so every span is made when it is over and nothing is kept between two facts.

    Names and attributes are those of OpenTelemetry's conventions for generative AI, as texts; neither prompt nor answer is ever told.
    """

    def __init__(self, exporter: SpanExporter, version: str) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.id_generator import RandomIdGenerator

        class Ids(RandomIdGenerator):
            """The ids of the next root span where they are set, else random ones."""

            trace = 0
            span = 0

            def generate_trace_id(self) -> int:
                return self.trace or super().generate_trace_id()

            def generate_span_id(self) -> int:
                return self.span or super().generate_span_id()

        self._ids = Ids()
        # Events come from the loop and from the store's thread; the ids of a root are set for one span.
        self._lock = threading.Lock()
        resource = Resource.create({"service.name": SERVICE, "service.version": version})
        self._provider = TracerProvider(resource=resource, id_generator=self._ids, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer(SERVICE, version)

    def observe(self, event: SprintEvent) -> None:
        """Makes the span of a fact that has a length."""
        if not event.sprint_id:
            return
        data = event.data
        match event.kind:
            case EventKind.STAGE_ENDED:
                self._span(event, str(data.get("stage") or "stage"), {"dispatch.stage": data.get("stage")})
            case EventKind.STEP_ENDED:
                self._chat(event)
            case EventKind.TOOL_ENDED:
                tool = str(data.get("tool") or "unknown")
                facts = {"gen_ai.operation.name": "execute_tool", "gen_ai.tool.name": tool, "dispatch.step": data.get("step")}
                result = str(data.get("result") or "")
                self._span(event, f"execute_tool {tool}", facts, error="" if result == "ok" else result)
            case EventKind.SETTLED:
                self._root(event)
            case _:
                pass

    def close(self) -> None:
        """Sends what is left; blocks."""
        self._provider.shutdown()

    def _chat(self, event: SprintEvent) -> None:
        from opentelemetry.trace import SpanKind

        data = event.data
        model = str(data.get("model") or "")
        facts = {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": data.get("provider"),
            "gen_ai.request.model": model,
            "gen_ai.usage.input_tokens": data.get("input"),
            "gen_ai.usage.output_tokens": data.get("output"),
            "dispatch.step": data.get("step"),
            "dispatch.cost_usd": data.get("usd"),
        }
        result = str(data.get("result") or "ok")
        self._span(event, f"chat {model}".strip(), facts, kind=SpanKind.CLIENT, error="" if result == "ok" else result)

    def _root(self, event: SprintEvent) -> None:
        data = event.data
        outcome = str(data.get("outcome") or "")
        facts = {
            "gen_ai.operation.name": AGENT_SPAN,
            "gen_ai.agent.name": data.get("agent"),
            "gen_ai.request.model": data.get("model"),
            "dispatch.outcome": outcome,
            "dispatch.steps": data.get("steps"),
            "dispatch.cost_usd": data.get("usd"),
        }
        error = "" if outcome in _GOOD else str(data.get("reason") or outcome)
        name = f"{AGENT_SPAN} {data.get('agent') or ''}".strip()
        with self._lock:
            self._ids.trace, self._ids.span = int(trace_id_of(event.sprint_id), 16), _root_of(event.sprint_id)
            try:
                self._make(event, name, facts, context=None, error=error)
            finally:
                self._ids.trace = self._ids.span = 0

    def _span(self, event: SprintEvent, name: str, facts: Json, *, kind: SpanKind | None = None, error: str = "") -> None:
        from opentelemetry.context import Context
        from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

        trace = int(trace_id_of(event.sprint_id), 16)
        parent = SpanContext(trace, _root_of(event.sprint_id), is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED))
        with self._lock:
            self._make(event, name, facts, context=set_span_in_context(NonRecordingSpan(parent), Context()), kind=kind, error=error)

    def _make(self, event: SprintEvent, name: str, facts: Json, *, context: Any, kind: SpanKind | None = None, error: str = "") -> None:
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind, Status, StatusCode

        seconds = event.data.get("seconds")
        ends = event.at_ms * _MS
        starts = ends - int(max(0.0, float(seconds if isinstance(seconds, int | float) else 0)) * 1e9)
        attributes = {"dispatch.sprint.id": str(event.sprint_id), **{key: value for key, value in facts.items() if value is not None}}
        span = self._tracer.start_span(
            name,
            context=Context() if context is None else context,
            kind=kind or SpanKind.INTERNAL,
            attributes=attributes,
            start_time=starts,
        )
        if error:
            span.set_attribute("error.type", error)
            span.set_status(Status(StatusCode.ERROR))
        span.end(end_time=ends)
