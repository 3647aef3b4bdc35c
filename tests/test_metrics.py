"""Every metric once: closed label sets, zeros where a rate reads, moments absent while unknown, and a table in the docs that is true."""

from __future__ import annotations

import gzip
import math
import subprocess
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from bot.fleet.health import Thresholds, judge
from bot.metrics import DELIVERY_RESULTS, EVENTS, LLM_RESULTS, Metrics, Vocabulary, docs_table
from bot.models import EventKind, FailureReason, OutcomeKind, Source, SprintEvent, SprintId, SprintState, WaitingReason
from bot.providers.classify import ErrorClass
from bot.snapshot import Collected, Fault, FleetSnapshot, HealthVerdict, ProbeState, ProbeTarget, ProbeVerdict, WorkerBeat, WorkerState
from tests.prometheus_support import ROOT, ScriptedFleet, binary

NOW = 1_800_000_000_000
STARTED = NOW - 60_000
WORDS = Vocabulary(
    version="1.2.3",
    revision="abc",
    commands=("run", "status"),
    handlers=("issues",),
    agents=("loop",),
    chain=(("nous", "hermes"), ("local", "qwen")),
    endpoints=("/user", "/repos/{owner}/{repo}/issues/{index}"),
)
OPENMETRICS = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"

FULL = FleetSnapshot(
    NOW,
    sprints={SprintState.QUEUED: 5, SprintState.WORKING: 2, SprintState.ADMITTED: 1},
    waiting={WaitingReason.APPROVAL: 2, WaitingReason.SLOT: 3},
    oldest_runnable_ms=NOW - 5_500,
    oldest_running_ms=NOW - 9_000,
    last_progress_ms=NOW - 1_250,
    last_success_ms=NOW - 70_000,
    last_delivery_ms=NOW - 3_000,
    inbox_backlog=4,
    inbox_oldest_ms=NOW - 2_000,
    inbox_dead=1,
    outbox_backlog=6,
    outbox_oldest_ms=NOW - 1_000,
    workers=(WorkerBeat("host-0", WorkerState.BUSY, NOW - 100), WorkerBeat("host-1", WorkerState.LOST, NOW - 500_000)),
    providers={"nous": True, "local": False},
    probes=(
        ProbeState("model", ProbeVerdict.FAILING, NOW, NOW, targets=(ProbeTarget("default", ProbeVerdict.FAILING, "another model", NOW),)),
        ProbeState("webhook", ProbeVerdict.UNKNOWN, NOW, NOW),
    ),
    collected=Collected(
        {"tmux": NOW - 30_000, "disk": NOW - 100_000},
        {
            "schedule_drift_seconds": {("launcher",): 4.5},
            "tmux_panes": {("timmy", "active"): 2.0, ("timmy", "gone wild"): 1.0, ("wrong",): 9.0},
            "agent_up": {("lane-0",): 1.0},
            "worker_memory_bytes": {("host-0",): 1e8},
            "worker_start_timestamp_seconds": {("host-0",): NOW / 1000},
            "gitea_open_issues": {(): 7.0},
            "gitea_open_pull_requests": {("bot",): 2.0, ("people",): 1.0},
            "disk_size_bytes": {(): 1e12},
            "disk_free_bytes": {(): 1e11},
            "disk_used_bytes": {("sprints",): 1e9},
            "of another version": {(): 1.0},
        },
    ),
)


EMPTY = FleetSnapshot(NOW)


def made(snapshot: FleetSnapshot = EMPTY, words: Vocabulary = WORDS) -> Metrics:
    metrics = Metrics(CollectorRegistry(), words)
    metrics.read_store(ScriptedFleet(lambda _now: snapshot), lambda each: judge(each, Thresholds()), started_ms=STARTED)
    return metrics


def read(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"dispatch_{name}", labels)


def text(metrics: Metrics) -> str:
    return metrics.render("", compress=False).body.decode()


def series(metrics: Metrics) -> int:
    return sum(len(family.samples) for family in metrics.registry.collect())


def event(kind: EventKind, **data) -> SprintEvent:
    return SprintEvent(kind, SprintId("s1"), NOW, data)


def overflowed(metrics: Metrics) -> dict[str, float]:
    values = {
        label: read(metrics, "metrics_label_overflow_total", label=label)
        for row in metrics.described()
        for label in (each.name for each in row.labels)
    }
    return {label: value for label, value in values.items() if value}


def test_the_page_of_the_docs_is_generated_from_the_code():
    assert (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8") == docs_table(), "run: python -m bot.metrics > docs/metrics.md"


def test_every_name_in_the_exposition_is_in_the_table_and_every_name_once():
    metrics = made(FULL)
    metrics.sandbox_probed(ok=True)
    metrics.budget(5)
    metrics.canary_sent(NOW)
    metrics.read_logins(lambda: {"nous": NOW})
    described = [row.name for row in metrics.described()]
    assert len(described) == len(set(described))
    exposed = {family.name for family in parse_text(text(metrics)) if family.name.startswith("dispatch_")}
    assert exposed == {name.removesuffix("_total") for name in described}


@pytest.mark.parametrize("snapshot", [FleetSnapshot(NOW), FULL], ids=["empty", "full"])
def test_promtool_finds_nothing_to_say(snapshot):
    promtool = binary("promtool")
    metrics = made(snapshot)
    exercise(metrics)
    done = subprocess.run([promtool, "check", "metrics"], input=text(metrics), capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def exercise(metrics: Metrics) -> None:
    """Everything the process can tell, once."""
    metrics.delivery("issue_comment", "accepted")
    metrics.webhook_handled("issue_comment", 0.01)
    metrics.handler_ran("issues", 0.01)
    metrics.missed(2)
    metrics.inbox_handled("done")
    metrics.inbox_tries(1)
    metrics.outbox_failed("reply")
    metrics.command("run", "ok")
    metrics.ack(0.3)
    metrics.forge_request("/user", "GET", 200, 1, 0.1)
    metrics.llm_attempt("nous", "hermes", "ok", 2)
    metrics.loop_lag(0.001)
    metrics.sandbox("bubblewrap", "bubblewrap")
    metrics.sandbox_probed(ok=True)
    metrics.budget(5.0)
    metrics.observe(event(EventKind.ENQUEUED, source="label"))
    metrics.observe(event(EventKind.ADMITTED))
    metrics.observe(event(EventKind.STARTED, source="label", waited_seconds=4, agent="loop"))
    metrics.observe(event(EventKind.STAGE_ENDED, stage="prepare", seconds=3))
    metrics.observe(
        event(EventKind.STEP_ENDED, step=1, provider="nous", model="hermes", result="ok", seconds=2, input=10, output=5, cached=3, usd=0.25)
    )
    metrics.observe(event(EventKind.TOOL_ENDED, step=1, tool="search", result="ok", seconds=0.2))
    metrics.observe(event(EventKind.FALLBACK, from_provider="nous", to_provider="local"))
    metrics.observe(event(EventKind.REQUEUED, reason="drain"))
    metrics.observe(event(EventKind.TAKEN_OVER))
    metrics.observe(event(EventKind.PULL_REQUEST, event="opened", number=3, model="hermes"))
    metrics.observe(
        event(EventKind.SETTLED, outcome="failed", reason="checks", seconds=70, steps=4, agent="loop", model="hermes", usd=0.25)
    )
    metrics.observe(event(EventKind.TEXT, step=1, text="hello"))
    metrics.observe(event(EventKind.HEARTBEAT))


def test_what_the_process_tells_is_counted():
    metrics = made()
    exercise(metrics)
    assert read(metrics, "webhook_deliveries_total", event="issue_comment", result="accepted") == 1
    assert read(metrics, "reconcile_missed_events_total") == 2
    assert read(metrics, "commands_total", command="run", result="ok") == 1
    assert read(metrics, "command_ack_duration_seconds_sum") == 0.3
    assert read(metrics, "sprints_enqueued_total", source="label") == 1
    assert read(metrics, "sprint_queue_wait_seconds_sum", source="label") == 4
    assert read(metrics, "sprints_started_total", agent="loop") == 1
    assert read(metrics, "sprint_stage_duration_seconds_sum", stage="prepare") == 3
    assert read(metrics, "llm_requests_total", provider="nous", model="hermes", result="ok") == 1, (
        "the chain tells of every request; the step does not tell it again"
    )
    assert [read(metrics, "llm_tokens_total", provider="nous", model="hermes", direction=d) for d in ("input", "output", "cache_read")] == [
        10,
        5,
        3,
    ]
    assert read(metrics, "llm_cost_usd_total", provider="nous", model="hermes") == 0.25
    assert read(metrics, "llm_fallbacks_total", from_provider="nous", to_provider="local") == 1
    assert read(metrics, "tool_calls_total", tool="search", result="ok") == 1
    assert read(metrics, "sprint_retries_total", reason="drain") == 1
    assert read(metrics, "lease_takeovers_total") == 1
    assert read(metrics, "pull_requests_total", event="opened", model="hermes") == 1
    assert read(metrics, "sprint_duration_seconds_sum", agent="loop", model="hermes", outcome="failed") == 70
    assert read(metrics, "sprint_llm_turns_sum", outcome="failed") == 4
    assert read(metrics, "sprint_failures_total", reason="checks") == 1
    assert read(metrics, "build_info", version="1.2.3", revision="abc") == 1
    assert overflowed(metrics) == {}


def test_logins_are_told_when_they_can_be_read():
    metrics = made()
    answers = [{"nous": NOW, "local": 0, "a stranger": NOW}]
    metrics.read_logins(lambda: answers.pop())
    assert read(metrics, "auth_token_expiry_timestamp_seconds", provider="nous") == NOW / 1000
    assert "token_expiry" not in text(metrics), "a file that cannot be read fails no scrape, and 0 is never told"
    metrics.login_refreshed("nous", ok=False)
    assert read(metrics, "auth_refresh_total", provider="nous", result="error") == 1


def test_calls_in_flight_are_counted_also_when_they_fail():
    metrics = made()
    with pytest.raises(ValueError), metrics.llm_inflight("nous"):
        assert read(metrics, "llm_inflight_requests", provider="nous") == 1
        raise ValueError
    assert read(metrics, "llm_inflight_requests", provider="nous") == 0


def test_an_exemplar_leads_to_the_trace_where_there_is_one():
    metrics = made()
    metrics.traced_by(lambda sprint: "ab" * 16 if sprint == "s1" else "")
    metrics.observe(event(EventKind.SETTLED, outcome="failed", reason="llm", seconds=1, steps=1, agent="loop", model="hermes", usd=0))
    assert f'{{sprint="s1",trace_id="{"ab" * 16}"}}' in metrics.render(OPENMETRICS, compress=False).body.decode()


def test_the_rests_of_the_rendering_change_nothing():
    metrics = made(FULL)
    exercise(metrics)
    for accept in ("", OPENMETRICS):
        encode, _ = choose_encoder(accept)
        steady = [
            line for line in metrics.render(accept, compress=False).body.splitlines() if b"process_" not in line and b"python_" not in line
        ]
        assert steady == [line for line in encode(metrics.registry).splitlines() if b"process_" not in line and b"python_" not in line]


def test_only_failed_sprints_count_as_failures():
    metrics = made()
    metrics.observe(event(EventKind.SETTLED, outcome="refused", reason="internal", seconds=1, steps=0, agent="loop", model="hermes", usd=0))
    assert read(metrics, "sprint_failures_total", reason="internal") == 0


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (200, "2xx"),
        (204, "2xx"),
        (302, "3xx"),
        (401, "401"),
        (403, "4xx"),
        (404, "404"),
        (409, "409"),
        (423, "4xx"),
        (429, "429"),
        (502, "5xx"),
        ("lost", "timeout"),
        ("not sent", "connection"),
        ("timeout", "timeout"),
        ("cancelled", "cancelled"),
        (999, "other"),
        ("???", "other"),
    ],
)
def test_answers_of_the_forge_fold_to_classes(status, code):
    metrics = made()
    metrics.forge_request("/user", "GET", status, 1, 0.1)
    assert read(metrics, "gitea_requests_total", endpoint="/user", method="GET", code=code) == 1
    assert not read(metrics, "gitea_retries_total", endpoint="/user")


def test_attempts_beyond_the_first_are_retries():
    metrics = made()
    for attempt in (1, 2, 3):
        metrics.forge_request("/user", "GET", 502, attempt, 0.1)
    assert read(metrics, "gitea_retries_total", endpoint="/user") == 2


def test_the_three_types_of_review_are_one_event():
    metrics = made()
    for kind in ("pull_request_review_approved", "pull_request_review_rejected", "pull_request_review_comment"):
        metrics.delivery(kind, "accepted")
    assert read(metrics, "webhook_deliveries_total", event="pull_request_review", result="accepted") == 3


def test_results_of_models_are_the_classes_of_the_providers():
    assert set(LLM_RESULTS) == {"ok", *ErrorClass}


def test_hostile_values_add_no_series_and_are_counted():
    metrics = made()
    exercise(metrics)
    before = None
    for index in range(10_000):
        evil = f'\ud800"}} {index}\n# x'
        metrics.delivery(evil, evil)
        metrics.command(evil, evil)
        metrics.forge_request(f"/repos/acme/{evil}", evil, evil, 2, 0.1)
        metrics.llm_attempt(evil, evil, evil, 1)
        metrics.handler_ran(evil, 1)
        metrics.observe(event(EventKind.SETTLED, outcome=evil, reason=evil, seconds=1, steps=1, agent=evil, model=evil, usd=1))
        metrics.observe(event(EventKind.TOOL_ENDED, tool=evil, result=evil, seconds=1))
        metrics.observe(event(EventKind.PULL_REQUEST, event=evil, model=evil, number=1))
        before = before or series(metrics)
    assert series(metrics) == before
    assert read(metrics, "commands_total", command="other", result="other") == 10_000
    assert overflowed(metrics)["command"] == 10_000
    assert "\ud800" not in text(metrics)


junk = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.integers(), max_size=2))
KEYS = (
    "source",
    "agent",
    "waited_seconds",
    "stage",
    "seconds",
    "provider",
    "model",
    "result",
    "input",
    "output",
    "cached",
    "usd",
    "tool",
    "reason",
    "event",
    "outcome",
    "steps",
)
ROBUST = made()


@given(st.sampled_from(EventKind), st.dictionaries(st.sampled_from(KEYS), junk))
def test_an_observer_never_raises_and_no_figure_turns_bad(kind, data):
    ROBUST.observe(SprintEvent(kind, SprintId("s" * 300), NOW, data))
    cost = read(ROBUST, "llm_cost_usd_total", provider="other", model="other") or 0.0
    assert math.isfinite(cost)
    assert cost >= 0


def test_what_a_rate_reads_is_zero_from_the_start():
    metrics = made()
    for name in EVENTS:
        for result in ("accepted", "error", "bad_signature"):
            assert read(metrics, "webhook_deliveries_total", event=name, result=result) == 0
    assert all(read(metrics, "sprints_enqueued_total", source=source) == 0 for source in Source)
    assert all(read(metrics, "sprint_failures_total", reason=reason) == 0 for reason in FailureReason)
    assert all(read(metrics, "llm_requests_total", provider="nous", model="hermes", result=result) == 0 for result in LLM_RESULTS)
    assert all(
        read(metrics, "sprint_duration_seconds_count", agent="loop", model="qwen", outcome=outcome) == 0
        for outcome in ("pull_request", "no_change", "failed")
    )
    assert all(read(metrics, "pull_requests_total", event=event, model="hermes") == 0 for event in ("opened", "merged"))
    assert read(metrics, "reconcile_missed_events_total") == 0
    assert read(metrics, "metrics_label_overflow_total", label="model") == 0
    assert read(metrics, "llm_requests_total", provider="nous", model="qwen", result="ok") is None, "only pairs of the chain"


def test_an_empty_store_exports_no_moment_but_the_start():
    metrics = made()
    moments = {
        sample.name: sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name.startswith("dispatch_") and sample.name.endswith("_timestamp_seconds")
    }
    assert moments == {"dispatch_webhook_last_delivery_timestamp_seconds": STARTED / 1000}


def test_probes_and_budget_are_absent_until_known():
    metrics = made()
    assert (read(metrics, "sandbox_probe_ok"), read(metrics, "llm_budget_usd")) == (None, None)
    metrics.sandbox_probed(ok=False)
    metrics.budget(0)
    assert (read(metrics, "sandbox_probe_ok"), read(metrics, "llm_budget_usd")) == (0, None)


def test_the_store_is_read_at_every_scrape():
    metrics = made(FULL)
    assert read(metrics, "sprints", state="queued") == 3, "two of five wait for a person"
    assert read(metrics, "sprints", state="waiting") == 2
    assert read(metrics, "sprints", state="working") == 2
    assert read(metrics, "sprints", state="vetting") == 0
    assert read(metrics, "sprints_waiting", reason="slot") == 3
    assert read(metrics, "queue_oldest_enqueued_timestamp_seconds") == (NOW - 5_500) / 1000
    assert read(metrics, "sprint_running_oldest_start_timestamp_seconds") == (NOW - 9_000) / 1000
    assert read(metrics, "fleet_last_progress_timestamp_seconds") == (NOW - 1_250) / 1000
    assert read(metrics, "sprint_last_success_timestamp_seconds") == (NOW - 70_000) / 1000
    assert read(metrics, "webhook_last_delivery_timestamp_seconds") == (NOW - 3_000) / 1000
    assert (read(metrics, "inbox_backlog"), read(metrics, "inbox_dead_letters"), read(metrics, "outbox_backlog")) == (4, 1, 6)
    assert read(metrics, "worker_last_heartbeat_timestamp_seconds", worker="host-1") == (NOW - 500_000) / 1000
    assert (read(metrics, "workers", state="busy"), read(metrics, "workers", state="lost"), read(metrics, "workers", state="idle")) == (
        1,
        1,
        0,
    )
    assert (read(metrics, "llm_provider_available", provider="nous"), read(metrics, "llm_provider_available", provider="local")) == (1, 0)
    assert read(metrics, "paused") == 0
    assert {verdict: read(metrics, "health", verdict=verdict) for verdict in HealthVerdict} == {
        v: float(v == "degraded") for v in HealthVerdict
    }
    assert {fault for fault in Fault if read(metrics, "health_reason", reason=fault)} == {
        Fault.WORKER_LOST,
        Fault.PROVIDER_DOWN,
        Fault.MODEL_DRIFT,
    }


def test_before_the_first_progress_the_oldest_debt_stands_for_it():
    metrics = made(FleetSnapshot(NOW, sprints={SprintState.QUEUED: 1}, oldest_runnable_ms=NOW - 900_000))
    assert read(metrics, "fleet_last_progress_timestamp_seconds") == (NOW - 900_000) / 1000
    assert read(metrics, "health", verdict="stalled") == 1


def test_a_store_that_cannot_be_read_fails_the_scrape():
    def broken(_now: int) -> FleetSnapshot:
        raise OSError("database is locked")

    metrics = Metrics(CollectorRegistry(), WORDS)
    metrics.read_store(ScriptedFleet(broken), lambda each: judge(each, Thresholds()), started_ms=STARTED)
    with pytest.raises(OSError, match="locked"):
        metrics.render("", compress=False)


def test_openmetrics_carries_the_sprint_as_an_exemplar():
    metrics = made(FULL)
    exercise(metrics)
    rendered = metrics.render(OPENMETRICS, compress=True)
    assert rendered.encoding == "gzip"
    assert rendered.content_type.startswith("application/openmetrics-text")
    body = gzip.decompress(rendered.body).decode()
    assert '# {sprint="s1"} 70.0' in body
    assert "dispatch_sprint_duration_seconds" in {family.name for family in parse_openmetrics(body)}


@pytest.mark.parametrize(
    "accept",
    [
        "",
        "*/*",
        "text/plain",
        "application/openmetrics-text;version=x.y",
        "application/openmetrics-text;version=9.9.9;escaping=wrong",
        "\x00;;;",
    ],
)
def test_any_accept_header_is_answered(accept):
    assert b"dispatch_build_info" in made().render(accept, compress=False).body


def test_no_series_tells_when_it_was_created():
    assert "_created" not in text(made())


def test_every_combination_stays_below_a_third_of_the_sample_limit():
    words = Vocabulary(
        version="1",
        commands=tuple(f"c{i}" for i in range(20)),
        handlers=tuple(f"h{i}" for i in range(6)),
        agents=tuple(f"a{i}" for i in range(3)),
        chain=tuple((f"p{i % 3}", f"m{i}") for i in range(6)),
        endpoints=tuple(f"/e{i}" for i in range(15)),
    )
    metrics = made(FULL, words)
    for agent in words.agents:
        for model in words.models:
            for outcome in OutcomeKind:
                metrics.observe(
                    event(EventKind.SETTLED, outcome=outcome, reason="tool", seconds=1, steps=1, agent=agent, model=model, usd=0)
                )
    for endpoint in words.endpoints:
        for status in (200, 302, 400, 401, 404, 409, 429, 500, "timeout", "connection"):
            for method in ("GET", "POST", "PATCH", "PUT", "DELETE"):
                metrics.forge_request(endpoint, method, status, 2, 0.1)
    for kind in EVENTS:
        for result in DELIVERY_RESULTS:
            metrics.delivery(kind, result)
            metrics.webhook_handled(kind, 0.1)
    for provider, model in words.chain:
        for result in LLM_RESULTS:
            metrics.llm_attempt(provider, model, result, 1)
    for command in words.commands:
        for result in ("ok", "denied", "invalid", "rate_limited", "error"):
            metrics.command(command, result)
    assert 3_000 < series(metrics) < 20_000 / 3


def test_counting_is_cheap():
    metrics = made()
    began = time.perf_counter()
    for _ in range(20_000):
        metrics.forge_request("/user", "GET", 200, 1, 0.1)
    assert (time.perf_counter() - began) / 20_000 < 100e-6
