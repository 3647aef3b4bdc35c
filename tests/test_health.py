"""The verdict: its table, and that STALLED says what the page says."""

from __future__ import annotations

import dataclasses
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from fleet_support import settings as fleet_settings
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from bot.fleet.health import WEBHOOK_SILENT, Thresholds, judge, stalled
from bot.metrics import Metrics
from bot.models import SprintState, WaitingReason
from bot.snapshot import Collected, Fault, FleetSnapshot, HealthVerdict, Reason, WorkerBeat, WorkerState
from tests.prometheus_support import GRAFANA, ScriptedFleet, binary

NOW = 1_800_000_000_000
LIMITS = Thresholds()
SILENT = Thresholds(webhook_silent=5400)


def ago(seconds: float) -> int:
    return NOW - int(seconds * 1000)


def queued(**facts) -> FleetSnapshot:
    return FleetSnapshot(NOW, sprints={SprintState.QUEUED: 1}, **facts)


def beat(name: str, age: float) -> WorkerBeat:
    return WorkerBeat(name, WorkerState.IDLE, ago(age))


HUNG = queued(oldest_runnable_ms=ago(700), last_progress_ms=ago(650), workers=(beat("a", 1),))
RUNNING = FleetSnapshot(NOW, sprints={SprintState.WORKING: 1}, oldest_running_ms=ago(60), last_progress_ms=ago(5))

TABLE = [
    ("nothing at all", FleetSnapshot(NOW), HealthVerdict.IDLE, ["empty"]),
    ("an idle night", FleetSnapshot(NOW, last_progress_ms=ago(40_000), last_success_ms=ago(40_000)), HealthVerdict.IDLE, ["empty"]),
    (
        "an idle night and one fresh item",
        queued(oldest_runnable_ms=ago(3), last_progress_ms=ago(40_000)),
        HealthVerdict.WORKING,
        ["queued"],
    ),
    ("one running", RUNNING, HealthVerdict.WORKING, ["active"]),
    (
        "only admitted",
        FleetSnapshot(NOW, sprints={SprintState.ADMITTED: 1}, oldest_runnable_ms=ago(2), last_progress_ms=ago(2)),
        HealthVerdict.WORKING,
        ["active", "queued"],
    ),
    (
        "full with a long queue",
        FleetSnapshot(
            NOW,
            sprints={SprintState.QUEUED: 90, SprintState.WORKING: 2},
            waiting={WaitingReason.SLOT: 90},
            oldest_runnable_ms=ago(9000),
            last_progress_ms=ago(20),
        ),
        HealthVerdict.WORKING,
        ["active", "queued"],
    ),
    (
        "waiting on policy only",
        FleetSnapshot(
            NOW, sprints={SprintState.QUEUED: 3}, waiting={WaitingReason.APPROVAL: 2, WaitingReason.BUDGET: 1}, last_progress_ms=ago(90_000)
        ),
        HealthVerdict.IDLE,
        ["waiting", "waiting"],
    ),
    ("hung with live heartbeats", HUNG, HealthVerdict.STALLED, ["stalled"]),
    ("nothing ever moved", queued(oldest_runnable_ms=ago(601)), HealthVerdict.STALLED, ["stalled"]),
    (
        "admitted and never begun",
        FleetSnapshot(NOW, sprints={SprintState.ADMITTED: 1}, oldest_runnable_ms=ago(700), last_progress_ms=ago(700)),
        HealthVerdict.STALLED,
        ["stalled", Fault.NO_PROGRESS],
    ),
    (
        "stalled and workers lost",
        dataclasses.replace(HUNG, workers=(beat("a", 500),)),
        HealthVerdict.STALLED,
        ["stalled", Fault.WORKERS_LOST],
    ),
    ("exactly at the threshold", queued(oldest_runnable_ms=ago(600), last_progress_ms=ago(600)), HealthVerdict.WORKING, ["queued"]),
    (
        "paused and stuck",
        dataclasses.replace(HUNG, paused=True, paused_by="ops", paused_since_ms=ago(60)),
        HealthVerdict.PAUSED,
        ["paused", "queued"],
    ),
    (
        "a running sprint that does not move",
        dataclasses.replace(RUNNING, last_progress_ms=ago(601)),
        HealthVerdict.DEGRADED,
        [Fault.NO_PROGRESS, "active"],
    ),
    (
        "one heartbeat of two",
        dataclasses.replace(RUNNING, workers=(beat("a", 1), beat("b", 121))),
        HealthVerdict.DEGRADED,
        [Fault.WORKER_LOST, "active"],
    ),
    ("every heartbeat", FleetSnapshot(NOW, workers=(beat("a", 121), beat("b", 500))), HealthVerdict.DEGRADED, [Fault.WORKERS_LOST]),
    ("overrun", dataclasses.replace(RUNNING, oldest_running_ms=ago(9001)), HealthVerdict.DEGRADED, [Fault.SPRINT_OVERRUN, "active"]),
    (
        "a provider is down",
        dataclasses.replace(RUNNING, providers={"a": True, "b": False}),
        HealthVerdict.DEGRADED,
        [Fault.PROVIDER_DOWN, "active"],
    ),
]


@pytest.mark.parametrize(("snapshot", "verdict", "codes"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_the_table(snapshot, verdict, codes):
    health = judge(snapshot, LIMITS)
    assert health.verdict is verdict
    assert [reason.code for reason in health.reasons] == codes
    assert all(reason.detail for reason in health.reasons)


def test_a_collector_that_sees_nothing_degrades_and_one_that_never_ran_does_not():
    seen = Collected({"tmux": NOW - 601_000, "disk": NOW - 599_000})
    [fault, *_] = judge(FleetSnapshot(NOW, collected=seen), Thresholds()).reasons
    assert (fault.code, fault.detail) == (Fault.COLLECTOR_STALE, "the collector has seen nothing for 600 s of tmux")
    assert not judge(FleetSnapshot(NOW), Thresholds()).has(Fault.COLLECTOR_STALE)


def test_silence_of_webhooks_counts_only_with_a_canary():
    snapshot = FleetSnapshot(NOW, last_delivery_ms=ago(5401))
    assert judge(snapshot, LIMITS).verdict is HealthVerdict.IDLE
    assert judge(snapshot, SILENT).has(Fault.WEBHOOK_SILENT)


def test_faults_of_this_process_degrade():
    health = judge(RUNNING, LIMITS, (Reason(Fault.SANDBOX_UNPROVEN, "user namespaces are off"),))
    assert health.verdict is HealthVerdict.DEGRADED
    assert health.reasons[0] == Reason(Fault.SANDBOX_UNPROVEN, "user namespaces are off")


def test_a_pause_tells_who_and_what_else_is_broken():
    snapshot = dataclasses.replace(HUNG, paused=True, paused_by="ops", paused_since_ms=ago(60), workers=(beat("a", 500),))
    health = judge(snapshot, LIMITS)
    assert health.reasons[0] == Reason("paused", "paused by ops for 60 s, 0 still running, 1 queued")
    assert health.has(Fault.WORKERS_LOST)


moments = st.one_of(
    st.none(),
    st.sampled_from([0.0, 599.999, 600.0, 600.001, 601.0, 86_400.0]).map(ago),
    st.integers(NOW - 2_000_000, NOW + 5_000),
)
snapshots = st.builds(
    FleetSnapshot,
    now_ms=st.just(NOW),
    sprints=st.dictionaries(st.sampled_from([state for state in SprintState if state is not SprintState.SETTLED]), st.integers(0, 50)),
    waiting=st.dictionaries(st.sampled_from(list(WaitingReason)), st.integers(0, 50)),
    oldest_runnable_ms=moments,
    oldest_running_ms=moments,
    last_progress_ms=moments,
    last_success_ms=moments,
    workers=st.lists(
        st.builds(WorkerBeat, st.sampled_from("abcd"), st.sampled_from(list(WorkerState)), st.integers(NOW - 400_000, NOW)),
        max_size=4,
        unique_by=lambda beat: beat.name,
    ).map(tuple),
    paused=st.booleans(),
    providers=st.dictionaries(st.sampled_from(["x", "y"]), st.booleans()),
)


def stall_rule() -> tuple[str, list[dict]]:
    """The committed expression of the page, and the rules of its group before it."""
    groups = yaml.safe_load((GRAFANA / "alerts" / "dispatch.alerts.yml").read_text())["groups"]
    rules = next(group["rules"] for group in groups if group["name"] == "dispatch-fleet")
    at = next(index for index, rule in enumerate(rules) if rule.get("alert") == "DispatchFleetStalled")
    return rules[at]["expr"], rules[:at]


EXPRESSION = re.compile(
    r"dispatch:queue_oldest:age_seconds > (?P<queued>\S+)\n"
    r"and on \(job\) dispatch:fleet_since_progress:seconds > (?P<moved>\S+)\n"
    r'unless on \(job\) max by \(job\) \(dispatch_paused\{job="timmy-dispatch"\}\) == 1'
)


def pages(exposed: CollectorRegistry, now_ms: int) -> bool:
    """A small mirror of the committed expression over what one target exposes; an absent series makes its side empty."""
    match = EXPRESSION.fullmatch(stall_rule()[0])
    assert match, "the expression changed: change this mirror with it"
    queued_at = exposed.get_sample_value("dispatch_queue_oldest_enqueued_timestamp_seconds")
    moved_at = exposed.get_sample_value("dispatch_fleet_last_progress_timestamp_seconds")
    old = queued_at is not None and now_ms / 1000 - queued_at > float(match["queued"])
    still = moved_at is not None and now_ms / 1000 - moved_at > float(match["moved"])
    return old and still and exposed.get_sample_value("dispatch_paused") != 1


FLEET = ScriptedFleet(lambda now: FleetSnapshot(now))
EXPOSED = Metrics(CollectorRegistry())
EXPOSED.read_store(FLEET, lambda snapshot: judge(snapshot, LIMITS), started_ms=NOW)


@settings(deadline=None)
@given(snapshots)
def test_stalled_and_the_page_agree(snapshot):
    FLEET.make = lambda _now: snapshot
    said = judge(snapshot, LIMITS)
    assert (said.verdict is HealthVerdict.STALLED) == pages(EXPOSED.registry, NOW) == stalled(snapshot, LIMITS)
    assert EXPOSED.registry.get_sample_value("dispatch_health", {"verdict": said.verdict}) == 1
    assert said.reasons


@settings(deadline=None)
@given(snapshots)
def test_idle_and_paused_never_page(snapshot):
    FLEET.make = lambda _now: snapshot
    if judge(snapshot, LIMITS).verdict in (HealthVerdict.IDLE, HealthVerdict.PAUSED, HealthVerdict.WORKING):
        assert not pages(EXPOSED.registry, NOW)


EDGES = [None, 0.0, 599.999, 600.0, 600.001, 1500.5]
AT = 1_800_000


@pytest.mark.prometheus
def test_stalled_and_the_page_agree_by_promtool(tmp_path):
    """The same on Prometheus' own evaluation: every pair of ages at the edges, paused or not."""
    promtool = binary("promtool")
    expr, before = stall_rule()
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "g", "rules": before}]}))
    cases, stalls = [], 0
    for runnable in EDGES:
        for moved in EDGES:
            for paused in (False, True):
                snapshot = FleetSnapshot(
                    AT,
                    oldest_runnable_ms=None if runnable is None else AT - round(runnable * 1000),
                    last_progress_ms=None if moved is None else AT - round(moved * 1000),
                    paused=paused,
                )
                stall = judge(snapshot, LIMITS).verdict is HealthVerdict.STALLED
                stalls += stall
                cases.append(
                    _promtool_case(
                        snapshot,
                        expr,
                        [
                            {
                                "labels": 'dispatch:queue_oldest:age_seconds{job="timmy-dispatch"}',
                                "value": snapshot.age(snapshot.oldest_runnable_ms),
                            }
                        ]
                        if stall
                        else [],
                    )
                )
    (tmp_path / "test.yml").write_text(yaml.safe_dump({"rule_files": ["rules.yml"], "evaluation_interval": "1m", "tests": cases}))
    done = subprocess.run([promtool, "test", "rules", str(tmp_path / "test.yml")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert 0 < stalls < len(cases)


def _promtool_case(snapshot: FleetSnapshot, expr: str, expected: list[dict]) -> dict:
    metrics = Metrics(CollectorRegistry())
    metrics.read_store(ScriptedFleet(lambda _now: snapshot), lambda each: judge(each, LIMITS), started_ms=AT)
    names = ("dispatch_queue_oldest_enqueued_timestamp_seconds", "dispatch_fleet_last_progress_timestamp_seconds", "dispatch_paused")
    values = [(name, metrics.registry.get_sample_value(name)) for name in names]
    return {
        "interval": "1m",
        "input_series": [
            {"series": f'{name}{{job="timmy-dispatch",instance="a"}}', "values": f"{value!r}x30"}
            for name, value in values
            if value is not None
        ],
        "promql_expr_test": [{"expr": expr, "eval_time": "30m", "exp_samples": expected}],
    }


def test_silence_counts_only_while_test_deliveries_are_asked_for():
    conf = fleet_settings(Path("/nonexistent"))
    assert Thresholds.of(conf).webhook_silent is None
    assert Thresholds.of(conf, canary_age=WEBHOOK_SILENT + 1).webhook_silent is None
    assert Thresholds.of(conf, canary_age=60.0).webhook_silent == WEBHOOK_SILENT
