"""One trace a sprint, from its events alone, the same over a restart; and nothing of OpenTelemetry while it is off."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from aiohttp import web
from prometheus_support import ROOT, served
from world import World, make_world

from bot.models import EventKind, SprintEvent, SprintId
from bot.tracing import Tracing, TracingUnavailable, connect, trace_id_of

pytest.importorskip("opentelemetry.sdk")

AT = 1_800_000_000_000


def event(kind: EventKind, sprint: str = "s1", **data) -> SprintEvent:
    return SprintEvent(kind, SprintId(sprint), AT, data)


@pytest.fixture
def traced():
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    tracing = Tracing(exporter, "1.2.3")
    yield tracing, lambda: (tracing._provider.force_flush(), exporter.get_finished_spans())[1]
    tracing.close()


def test_a_sprint_is_one_trace_with_its_stages_calls_and_tools(traced):
    tracing, spans = traced
    tracing.observe(event(EventKind.ENQUEUED, source="label"))
    tracing.observe(event(EventKind.STAGE_ENDED, stage="prepare", seconds=2.5))
    step = {"step": 1, "provider": "nous", "model": "hermes", "seconds": 4, "input": 100, "output": 7, "cached": 0, "usd": 0.25}
    tracing.observe(event(EventKind.STEP_ENDED, result="ok", **step))
    tracing.observe(event(EventKind.TOOL_ENDED, step=1, tool="run_command", result="timeout", seconds=120))
    settled = {"outcome": "failed", "reason": "checks", "seconds": 600, "steps": 3, "agent": "loop", "model": "hermes", "usd": 0.5}
    tracing.observe(event(EventKind.SETTLED, **settled))
    found = {span.name: span for span in spans()}
    assert set(found) == {"prepare", "chat hermes", "execute_tool run_command", "invoke_agent loop"}
    root = found["invoke_agent loop"]
    assert format(root.context.trace_id, "032x") == trace_id_of("s1")
    assert root.parent is None
    for name, span in found.items():
        assert span.context.trace_id == root.context.trace_id
        assert name == "invoke_agent loop" or span.parent.span_id == root.context.span_id
        assert span.end_time == AT * 1_000_000
        assert span.attributes["dispatch.sprint.id"] == "s1"
    assert len({span.context.span_id for span in found.values()}) == 4
    assert root.end_time - root.start_time == 600 * 10**9
    chat = found["chat hermes"]
    assert chat.end_time - chat.start_time == 4 * 10**9
    assert (chat.kind.name, chat.status.status_code.name) == ("CLIENT", "UNSET")
    assert chat.attributes["gen_ai.operation.name"] == "chat"
    assert chat.attributes["gen_ai.request.model"] == "hermes"
    assert chat.attributes["gen_ai.usage.input_tokens"] == 100
    tool = found["execute_tool run_command"]
    assert (tool.attributes["error.type"], tool.status.status_code.name) == ("timeout", "ERROR")
    assert (root.attributes["dispatch.outcome"], root.attributes["error.type"]) == ("failed", "checks")
    assert root.resource.attributes["service.name"] == "timmy-dispatch"


def test_two_sprints_are_two_traces_and_a_restart_goes_on_with_the_same(traced):
    tracing, spans = traced
    for sprint in ("s1", "s2", "s1"):
        tracing.observe(event(EventKind.STAGE_ENDED, sprint, stage="work", seconds=1))
    traces = [span.context.trace_id for span in spans()]
    assert traces[0] == traces[2] != traces[1]
    assert len({span.context.span_id for span in spans()}) == 3


def test_neither_words_nor_what_belongs_to_no_sprint_is_told(traced):
    tracing, spans = traced
    tracing.observe(event(EventKind.TEXT, step=1, text="the secret plan"))
    tracing.observe(event(EventKind.FALLBACK, sprint="", from_provider="a", to_provider="b"))
    tracing.observe(event(EventKind.STAGE_ENDED, sprint="", stage="work", seconds=1))
    assert spans() == ()


@pytest.mark.parametrize("seconds", [None, "x", -5, float("inf")])
def test_an_odd_length_is_no_span_of_that_length(traced, seconds):
    tracing, spans = traced
    if seconds == float("inf"):
        with pytest.raises(OverflowError):
            tracing.observe(event(EventKind.STAGE_ENDED, stage="work", seconds=seconds))
        return
    tracing.observe(event(EventKind.STAGE_ENDED, stage="work", seconds=seconds))
    [span] = spans()
    assert span.start_time == span.end_time


def test_without_the_extra_the_remedy_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(TracingUnavailable, match=r"install timmy-dispatch\[otel\]"):
        connect("http://127.0.0.1:4318/v1/traces", "1")


def test_while_it_is_off_nothing_of_opentelemetry_is_loaded():
    code = "import sys, bot.service, bot.tracing, bot.cli.serve; print([name for name in sys.modules if name.startswith('opentelemetry')])"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}
    )
    assert done.stdout.strip() == "[]"


async def test_a_sprint_of_the_whole_bot_reaches_a_collector(base: Path):
    bodies: list[bytes] = []

    async def take(request: web.Request) -> web.Response:
        bodies.append(await request.read())
        return web.Response(content_type="application/x-protobuf")

    app = web.Application()
    app.router.add_post("/v1/traces", take)
    async with served(app) as address, make_world(base, tracing={"endpoint": f"http://{address}/v1/traces"}) as world:
        assert isinstance(world, World)
        issue = await world.alice.open_issue("slug keeps capitals", "script: fix\n\nPlease mend `lib/slug.sh`.")
        await world.alice.label(issue, "dispatch")
        sprint = await world.settled(issue)
        assert f"· trace `{trace_id_of(sprint.id)}`" in await world.status_comment(issue)
        rendered = world.service.metrics.render("application/openmetrics-text;version=1.0.0", compress=False).body.decode()
        await world.stop()
        import gzip

        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        spans = []
        for body in bodies:
            raw = gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body
            message = ExportTraceServiceRequest.FromString(raw)
            spans += [span for each in message.resource_spans for scope in each.scope_spans for span in scope.spans]
    assert {span.trace_id.hex() for span in spans} == {trace_id_of(sprint.id)}
    names = {span.name for span in spans}
    assert {"prepare", "work", "vet", "publish", "invoke_agent loop", "chat scripted-1", "execute_tool run_command"} <= names
    assert f'trace_id="{trace_id_of(sprint.id)}"' in rendered, "the exemplar leads to the trace"
    assert all(b"Please mend" not in body for body in bodies)
