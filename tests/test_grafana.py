"""The monitoring pack: generated files are committed as generated, real tools accept them, and no query names what does not exist."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry

from bot.config import MetricsSettings
from bot.fleet.health import Thresholds, judge
from bot.metrics import Metrics
from bot.snapshot import FleetSnapshot
from tests.prometheus_support import GRAFANA, ROOT, ScriptedFleet, binary, load_build

ALERTS = GRAFANA / "alerts"
DASHBOARDS = sorted((GRAFANA / "dashboards").glob("*.json"))
RULE_TESTS = sorted((ALERTS / "tests").glob("*.yml"))
SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def rules() -> list[dict]:
    return [
        rule for path in sorted(ALERTS.glob("*.yml")) for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]
    ]


def alerts() -> dict[str, dict]:
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


def dashboard(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def panels(path: Path) -> list[dict]:
    return [panel for panel in dashboard(path)["panels"] if panel["type"] != "row"]


def expressions(path: Path) -> list[str]:
    return [target["expr"] for panel in panels(path) for target in panel["targets"]] + [
        each["expr"] for each in dashboard(path)["annotations"]["list"]
    ]


def kinds() -> dict[str, str]:
    """Every sample name that `/metrics` can hold, with the kind of its metric."""
    metrics = Metrics(CollectorRegistry())
    metrics.read_store(ScriptedFleet(lambda now: FleetSnapshot(now)), lambda each: judge(each, Thresholds()), started_ms=1)
    found = {}
    for row in metrics.described():
        suffixes = ("_bucket", "_sum", "_count") if row.kind == "histogram" else ("",)
        found |= {row.name + suffix: "counter" if row.kind in ("counter", "histogram") else "gauge" for suffix in suffixes}
    return found


def run(*command: str | Path) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=100, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_committed_files_are_what_the_generator_writes(tmp_path):
    build = load_build()
    build.main(["--out", str(tmp_path)])
    written = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    for path in written:
        assert (GRAFANA / path).read_text(encoding="utf-8") == (tmp_path / path).read_text(encoding="utf-8"), (
            f"run: python grafana/build.py ({path})"
        )
    committed = {path.relative_to(GRAFANA) for path in (*DASHBOARDS, *ALERTS.glob("*.yml"))}
    assert committed == set(written)


def test_the_generator_is_a_script(tmp_path):
    load_build()
    run(
        sys.executable,
        "-W",
        "error",
        "-W",
        "ignore::DeprecationWarning",
        GRAFANA / "build.py",
        "--out",
        tmp_path,
        "--stall-after",
        "30",
        "--hold",
        "0.5",
        "--gitea",
        "https://git.example.org/",
    )
    text = (tmp_path / "alerts" / "dispatch.alerts.yml").read_text()
    assert "dispatch:queue_oldest:age_seconds > 30\n" in text
    assert "for: 30s" in text
    assert "https://git.example.org/issues?labels=" in (tmp_path / "dashboards" / "dispatch-fleet.json").read_text()


@pytest.mark.parametrize(
    ("seconds", "text"), [(60, "1m"), (120, "2m"), (90, "90s"), (0.6, "600ms"), (3, "3s"), (1.5, "1500ms"), (0, "0ms")]
)
def test_durations(seconds, text):
    assert load_build().duration(seconds) == text


def test_promtool_accepts_rules_and_configuration():
    promtool = binary("promtool")
    run(promtool, "check", "rules", *sorted(ALERTS.glob("*.yml")))
    run(promtool, "check", "config", ROOT / "prometheus.yml")


def test_amtool_accepts_the_routing():
    run(binary("amtool"), "check-config", GRAFANA / "alertmanager.yml")


@pytest.mark.parametrize("path", RULE_TESTS, ids=lambda path: path.stem)
def test_every_rule_fires_when_it_should_and_not_else(path):
    run(binary("promtool"), "test", "rules", path)


def test_every_alert_has_a_firing_and_a_silent_case():
    fires, silent = set(), set()
    for path in RULE_TESTS:
        for case in yaml.safe_load(path.read_text())["tests"]:
            for check in case["promql_expr_test"]:
                name = re.search(r'alertname="(\w+)"', check["expr"])
                if name:
                    (fires if check["exp_samples"] else silent).add(name[1])
    assert fires == set(alerts())
    assert silent == set(alerts()) - {"Watchdog"}


BREAKS = [
    ("DispatchFleetStalled", "age_seconds > 600", "age_seconds > 700"),
    ("DispatchFleetStalled", "and on (job) dispatch:fleet_since_progress:seconds > 600\n", ""),
    ("DispatchFleetStalled", "unless on (job) max by (job) (dispatch_paused", "unless on (job) max by (job) (dispatch_pausedx"),
    ("DispatchFleetStalled", "for: 1m", "for: 3m"),
    ("DispatchBotDown", ' or absent(up{job="timmy-dispatch"})', ""),
    ("DispatchBotDown", "max by (job) (up", "min by (job) (up"),
    ("DispatchBotDown", "keep_firing_for: 5m", "keep_firing_for: 1m"),
    ("DispatchAllWorkersLost", "min by (job)", "max by (job)"),
    ("DispatchAllWorkersLost", "for: 1m", "for: 2m"),
    ("DispatchSandboxUnproven", "== 0", "== 1"),
    ("DispatchWorkerHeartbeatLost", "max by (job, worker)", "max by (job)"),
    ("DispatchNoThroughput", "unless on (job) time()", "and on (job) time()"),
    ("DispatchNoThroughput", "unless on (job) max by (job) (dispatch_paused", "unless on (job) max by (job) (dispatch_pausedx"),
    ("DispatchSprintOverrun", "> 9000", "> 7000"),
    ("DispatchWebhookMissed", "[30m]", "[2h]"),
    ("DispatchWebhookSignatureFailures", "> 5", "> 3"),
    ("DispatchWebhookSignatureFailures", 'result="bad_signature"', 'result="accepted"'),
    ("DispatchGiteaErrors", "|401", ""),
    ("DispatchGiteaErrors", "> 0.2", "> 0.05"),
    ("DispatchLlmProviderErrors", "> 0.5", "> 0.3"),
    (
        "DispatchLlmProviderErrors",
        '(job, provider) (rate(dispatch_llm_requests_total{job="timmy-dispatch"}',
        '(job) (rate(dispatch_llm_requests_total{job="timmy-dispatch"}',
    ),
    ("DispatchLabelOverflow", "[1h]", "[5m]"),
    ("DispatchRulesFailing", ".*dispatch.*", ".*"),
    ("DispatchNotificationsFailing", "for: 5m", "for: 9m"),
]


@pytest.mark.parametrize(("alert", "old", "new"), BREAKS, ids=[f"{row[0]}-{index}" for index, row in enumerate(BREAKS)])
def test_a_broken_rule_turns_its_test_red(tmp_path, alert, old, new):
    promtool = binary("promtool")
    shutil.copytree(ALERTS, tmp_path / "alerts")
    path = tmp_path / "alerts" / "dispatch.alerts.yml"
    head, found, rest = path.read_text().partition(f"alert: {alert}\n")
    body, following, tail = rest.partition("      - alert: ")
    assert found
    assert old in body
    path.write_text(head + found + body.replace(old, new) + following + tail)
    held = next(each for each in RULE_TESTS if f'alertname="{alert}"' in each.read_text())
    test = yaml.safe_load(held.read_text())
    test["tests"] = [case for case in test["tests"] if alert in case["promql_expr_test"][0]["expr"]]
    only = tmp_path / "alerts" / "tests" / "only.yml"
    only.write_text(yaml.safe_dump(test))
    done = subprocess.run([promtool, "test", "rules", str(only)], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert alert in done.stdout + done.stderr


def test_every_alert_tells_a_person_what_to_do():
    uids = {dashboard(path)["uid"] for path in DASHBOARDS}
    for name, rule in alerts().items():
        notes = rule["annotations"]
        assert rule["labels"]["service"] == "timmy-dispatch"
        assert rule["labels"]["severity"] in ("critical", "warning", "info", "none")
        assert notes["summary"]
        assert notes["description"].endswith(".")
        assert notes["runbook_url"].endswith(f"{name}.md")
        assert (ROOT / "docs" / "runbooks" / f"{name}.md").read_text().startswith(f"# {name}\n")
        assert notes["dashboard_uid"] in uids
        assert notes["dashboard_url"].endswith(f"/d/{notes['dashboard_uid']}")
    assert {path.stem for path in (ROOT / "docs" / "runbooks").glob("*.md")} == set(alerts())


def test_the_two_ages_stand_before_the_stall_alert_in_its_group():
    group = next(g for g in yaml.safe_load((ALERTS / "dispatch.alerts.yml").read_text())["groups"] if g["name"] == "dispatch-fleet")
    assert [rule.get("record") or rule["alert"] for rule in group["rules"]][:3] == [
        "dispatch:queue_oldest:age_seconds",
        "dispatch:fleet_since_progress:seconds",
        "DispatchFleetStalled",
    ]


def test_the_numbers_of_the_rules_are_those_of_the_verdict():
    limits = Thresholds()
    assert f"> {limits.stall_after:g}\n" in alerts()["DispatchFleetStalled"]["expr"]
    assert alerts()["DispatchWorkerHeartbeatLost"]["expr"].endswith(f"> {limits.worker_lost:g}")
    assert alerts()["DispatchSprintOverrun"]["expr"].endswith(f"> {limits.sprint_overrun:g}")


def test_prometheus_scrapes_the_default_address_and_loads_the_rules():
    config = yaml.safe_load((ROOT / "prometheus.yml").read_text())
    job = next(each for each in config["scrape_configs"] if each["job_name"] == "timmy-dispatch")
    assert job["static_configs"] == [{"targets": [MetricsSettings().listen]}]
    assert config["rule_files"] == ["grafana/alerts/*.yml"]
    assert {path.name for path in ROOT.glob(config["rule_files"][0])} == {"dispatch.rules.yml", "dispatch.alerts.yml"}, (
        "a test file here stops Prometheus"
    )


def test_alertmanager_never_pages_through_the_bot_and_names_alerts_that_exist():
    config = yaml.safe_load((GRAFANA / "alertmanager.yml").read_text())
    urls = [hook["url"] for receiver in config["receivers"] for hook in receiver.get("webhook_configs", ())]
    assert len(urls) == 3
    assert all(url.split("/")[2].endswith(".example.invalid") for url in urls), "the operator fills these in"
    named = set(re.findall(r"Dispatch\w+", (GRAFANA / "alertmanager.yml").read_text()))
    assert named <= set(alerts())
    watchdog = config["route"]["routes"][0]
    assert (watchdog["receiver"], watchdog["group_interval"], watchdog["repeat_interval"]) == ("deadman", "30s", "50s")


RECORDED = re.compile(r"\bdispatch:\w+:\w+")
RAW = re.compile(r"\bdispatch_\w+")


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_no_panel_names_a_metric_that_does_not_exist(path):
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    for expr in expressions(path):
        assert set(RAW.findall(expr)) <= set(kinds()), expr
        assert set(RECORDED.findall(expr)) <= recorded, expr


def test_no_rule_names_a_metric_that_does_not_exist():
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    for rule in rules():
        assert set(RAW.findall(rule["expr"])) <= set(kinds()), rule["expr"]
        assert set(RECORDED.findall(rule["expr"])) <= recorded, rule["expr"]


def test_rules_and_panels_read_counters_only_as_rates():
    exprs = [rule["expr"] for rule in rules()] + [expr for path in DASHBOARDS for expr in expressions(path)]
    counters = [name for name, kind in kinds().items() if kind == "counter"]
    for expr in exprs:
        for name in counters:
            for match in re.finditer(rf"\b{name}\b", expr):
                assert re.search(r"\b(rate|increase)\($", expr[: match.start()]), f"{name} without a rate in {expr}"


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_the_dashboard_is_well_made(path):
    board = dashboard(path)
    assert board["uid"] == path.stem
    assert board["tags"] == ["timmy-dispatch"]
    assert (board["editable"], board["refresh"], board["graphTooltip"], board["time"]["from"]) == (False, "30s", 1, "now-6h")
    variables = {each["name"]: each for each in board["templating"]["list"]}
    assert variables["datasource"]["query"] == "prometheus"
    for name in ("job", "instance"):
        assert (variables[name]["allValue"], variables[name]["refresh"], variables[name]["multi"], variables[name]["includeAll"]) == (
            ".+",
            2,
            True,
            True,
        )
        assert variables[name]["datasource"] == SOURCE
    ids = [panel["id"] for panel in board["panels"]]
    assert ids == list(range(1, len(ids) + 1))
    assert all("placement" not in each for each in (*board["links"], *board["annotations"]["list"]))
    for annotation in board["annotations"]["list"]:
        assert annotation["datasource"] == SOURCE


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_every_panel_is_well_made(path):
    for panel in panels(path):
        title = panel["title"]
        defaults = panel["fieldConfig"]["defaults"]
        assert panel["description"].endswith("."), title
        assert defaults["unit"], title
        assert defaults["noValue"], title
        assert panel["datasource"] == SOURCE
        assert panel["targets"], title
        for target in panel["targets"]:
            assert target["datasource"] == SOURCE
            assert target["legendFormat"], title
            assert target.get("instant", False) is (panel["type"] == "stat"), title
            for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
                assert re.search(rf"by \([^)]*\b{label}\b", target["expr"]), f"{title}: {label} is not in the result"
        if panel["type"] == "timeseries":
            assert panel["options"]["legend"]["displayMode"] == "table", title
            assert panel["options"]["tooltip"]["mode"] == "multi", title
            assert defaults["min"] == 0, title


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_every_query_obeys_the_variables_and_has_no_fixed_window(path):
    for expr in expressions(path):
        for match in re.finditer(r"\b(dispatch_\w+|process_\w+|python_\w+)", expr):
            after = expr[match.end() :]
            assert after.startswith('{job=~"$job",instance=~"$instance"'), f"{match[0]} in {expr}"
        for match in RECORDED.finditer(expr):
            assert expr[match.end() :].startswith('{job=~"$job"}'), expr
        assert set(re.findall(r"\[([^\]]+)\]", expr)) <= {"$__rate_interval", "$__range", "1d"}, expr


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_panels_fill_the_grid_without_overlap(path):
    taken = set()
    for panel in dashboard(path)["panels"]:
        box = panel["gridPos"]
        assert 0 <= box["x"] < box["x"] + box["w"] <= 24, panel["title"]
        cells = {(x, y) for x in range(box["x"], box["x"] + box["w"]) for y in range(box["y"], box["y"] + box["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells


def test_provisioning_points_at_what_exists():
    sources = yaml.safe_load((GRAFANA / "provisioning" / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert [(each["uid"], each["type"], each["jsonData"]) for each in sources] == [
        ("timmy-prometheus", "prometheus", {"httpMethod": "POST", "timeInterval": "15s"})
    ]
    (provider,) = yaml.safe_load((GRAFANA / "provisioning" / "dashboards" / "timmy-dispatch.yml").read_text())["providers"]
    assert (provider["type"], provider["disableDeletion"], provider["allowUiUpdates"], provider["folder"]) == ("file", True, False, "Timmy")
