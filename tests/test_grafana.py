"""The monitoring pack: generated files are committed as generated, real tools accept them, and no query names what does not exist."""

from __future__ import annotations

import json
import os
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
SCHEMA = os.environ.get("GRAFANA_DASHBOARD_SCHEMA", "")
DASHBOARDS = sorted((GRAFANA / "dashboards").glob("*.json"))
RULE_TESTS = sorted((ALERTS / "tests").glob("*.yml"))
SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def rules() -> list[dict]:
    return [
        rule for path in sorted(ALERTS.glob("*.yml")) for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]
    ]


def alerts() -> dict[str, dict]:
    """By name; of the two windows of a burn alert the last."""
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


# (alert, what stands in its rule, what stands there after the mutation, and for alerts with long tests the case that must turn red).
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
    ("DispatchSprintSuccessBurn", "rate1h > 0.8", "rate1h > 1", "every sprint of an hour"),
    ("DispatchSprintSuccessBurn", "> 0.5 and", "> 0.9 and", "all went well until"),
    ("DispatchSprintSuccessBurn", ">= 4.5", ">= 0", "three failures in"),
    ("DispatchSprintSuccessBurn", " and dispatch:sprint_error:ratio_rate15m > 0.8", "", "a burst of failures"),
    ("DispatchSprintSuccessBurn slow", "rate1d > 0.35", "rate1d > 0.5", "forty of a hundred"),
    ("DispatchSprintSuccessBurn slow", "rate3d > 0.25", "rate3d > 0.4", "twenty-eight"),
    ("DispatchSprintSuccessBurn slow", "0.25", "0.1", "fifteen of a hundred"),
    ("DispatchSprintSuccessBurn slow", " and dispatch:sprint_error:ratio_rate1h > 0.35", "", "a bad day"),
    ("DispatchWebhookErrorBurn", "0.0144", "0.04", "two of a hundred"),
    ("DispatchWebhookErrorBurn", "rate6h > 0.006", "rate6h > 0.02", "one of a hundred fails"),
    ("DispatchWebhookErrorBurn", " and dispatch:webhook_error:ratio_rate30m > 0.006", "", "a burst of errors"),
    ("DispatchWebhookErrorBurn slow", "0.003", "0.005", "four of a thousand"),
    ("DispatchWebhookErrorBurn slow", "rate3d > 0.001", "rate3d > 0.01", "two of a thousand"),
    ("DispatchWebhookErrorBurn slow", "0.001", "0.0001", "one of two thousand"),
    ("DispatchWebhookSilent", "> 5400", "> 7200"),
    (
        "DispatchWebhookSilent",
        "and on (job) time() - max by (job) (dispatch_webhook_canary_timestamp_seconds",
        "or on (job) time() - max by (job) (dispatch_x",
    ),
    ("DispatchWebhookSilent", "< 5400", "< 99999"),
    ("DispatchWebhookSilent", "for: 5m", "for: 30m"),
    ("DispatchAuthTokenExpired", "seconds <= 0", "seconds <= 9999999"),
    ("DispatchAuthTokenExpired", ") == 0", ") >= 0"),
    ("DispatchAuthTokenExpired", 'result="error"', 'result="ok"'),
    ("DispatchAuthTokenExpired", "for: 1m", "for: 1h"),
    ("DispatchBudgetNearlySpent", "> 0.8", "> 0.4"),
    ("DispatchBudgetNearlySpent", "> 0.8", "> 0.99"),
    ("DispatchBudgetNearlySpent", "increase1d", "increase3d"),
    ("DispatchBreakerOpen", "max by (job, scope)", "max by (job)"),
    ("DispatchBreakerOpen", "for: 10m", "for: 1m"),
    ("DispatchBreakerOpen", "> 0", "> 2"),
    ("DispatchProbeFailing", "max by (job, probe)", "max by (job)"),
    ("DispatchProbeFailing", "== 0", "== 1"),
    ("DispatchProbeFailing", "for: 5m", "for: 1m"),
    ("DispatchModelDrift", "max by (job, agent)", "min by (job)"),
    ("DispatchModelDrift", "for: 5m", "for: 1m"),
    ("DispatchAgentDown", "max by (job, instance, agent)", "max by (job, agent)"),
    ("DispatchAgentDown", "max by (job, instance, agent)", "min by (job, instance)"),
    ("DispatchAgentDown", "== 0", ">= 0"),
    ("DispatchAgentDown", "for: 5m", "for: 1m"),
    ("DispatchCollectorStale", "(job, instance, collector)", "(job, collector)"),
    ("DispatchCollectorStale", "> 600", "> 300"),
    ("DispatchScheduleDrift", "> 3600", "> 1200"),
    ("DispatchScheduleDrift", "for: 10m", "for: 2m"),
    ("DispatchAuthTokenExpiring", "< 1800", "< 3600"),
    ("DispatchAuthTokenExpiring", "seconds > 0", "seconds > -9999"),
    ("DispatchAuthTokenExpiring", 'result="error"}[30m])) > 0', 'result="error"}[30m])) >= 0'),
    ("DispatchRulesFailing", ".*dispatch.*", ".*"),
    ("DispatchNotificationsFailing", "for: 5m", "for: 9m"),
]


@pytest.mark.parametrize("row", BREAKS, ids=[f"{row[0]}-{index}" for index, row in enumerate(BREAKS)])
def test_a_broken_rule_turns_its_test_red(tmp_path, row):
    alert, old, new, only_case = (*row, "")[:4]
    alert, _, window = alert.partition(" ")
    promtool = binary("promtool")
    shutil.copytree(ALERTS, tmp_path / "alerts")
    path = tmp_path / "alerts" / "dispatch.alerts.yml"
    before, found, rest = path.read_text().partition(f"alert: {alert}\n")
    if window:
        skipped, found, rest = rest.partition(f"alert: {alert}\n")
        before += f"alert: {alert}\n" + skipped
    body, following, tail = rest.partition("      - alert: ")
    assert found
    assert old in body
    assert f"window: {window}" in body or not window
    path.write_text(before + found + body.replace(old, new) + following + tail)
    held = next(each for each in RULE_TESTS if f'alertname="{alert}"' in each.read_text())
    test = yaml.safe_load(held.read_text())
    test["tests"] = [case for case in test["tests"] if alert in case["promql_expr_test"][0]["expr"] and case["name"].startswith(only_case)]
    assert test["tests"]
    only = tmp_path / "alerts" / "tests" / "only.yml"
    only.write_text(yaml.safe_dump(test))
    done = subprocess.run([promtool, "test", "rules", str(only)], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert alert in done.stdout + done.stderr


def test_every_alert_tells_a_person_what_to_do():
    uids = {dashboard(path)["uid"] for path in DASHBOARDS}
    for rule in (each for each in rules() if "alert" in each):
        name = rule["alert"]
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
    hooks = {receiver["name"]: receiver["webhook_configs"] for receiver in config["receivers"] if "webhook_configs" in receiver}
    [mirror] = hooks.pop("ops-issue")
    assert mirror["url"] == f"http://{MetricsSettings().listen}/alerts"
    assert mirror["send_resolved"] is True
    assert mirror["http_config"]["authorization"]["type"] == "Bearer"
    assert "credentials" not in mirror["http_config"]["authorization"], "the token stands in a file"
    urls = [hook["url"] for each in hooks.values() for hook in each]
    assert len(urls) == 3
    assert all(url.split("/")[2].endswith(".example.invalid") for url in urls), "the operator fills these in"
    named = set(re.findall(r"Dispatch\w+", (GRAFANA / "alertmanager.yml").read_text()))
    assert named <= set(alerts())
    watchdog = config["route"]["routes"][0]
    assert (watchdog["receiver"], watchdog["group_interval"], watchdog["repeat_interval"]) == ("deadman", "30s", "50s")
    mirrored = config["route"]["routes"][1]
    assert (mirrored["receiver"], mirrored["continue"]) == ("ops-issue", True), "the mirror never stands instead of a person"


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
                # `group by` reads that a series is there, never its value.
                assert re.search(r"\b(rate\(|increase\(|group by \([a-z, ]+\) \()$", expr[: match.start()]), (
                    f"{name} without a rate in {expr}"
                )


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_the_dashboard_is_well_made(path):
    board = dashboard(path)
    assert board["uid"] == path.stem
    assert board["tags"] == ["timmy-dispatch"]
    assert (board["editable"], board["refresh"], board["graphTooltip"], board["time"]["from"]) == (False, "30s", 1, "now-6h")
    variables = {each["name"]: each for each in board["templating"]["list"]}
    assert variables["datasource"]["query"] == "prometheus"
    for name in variables.keys() - {"datasource"}:
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
            assert target.get("instant", False) is (panel["type"] in ("stat", "table")), title
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


def test_every_metric_is_in_a_panel_or_an_alert():
    named = {
        name
        for expr in [rule["expr"] for rule in rules()] + [e for path in DASHBOARDS for e in expressions(path)]
        for name in RAW.findall(expr)
    }
    shown = {name.removesuffix("_bucket").removesuffix("_count").removesuffix("_sum") for name in named} | named
    metrics = Metrics(CollectorRegistry())
    assert {row.name for row in metrics.described()} <= shown


def test_there_are_four_dashboards_that_link_to_each_other_and_mark_what_happened():
    assert [path.stem for path in DASHBOARDS] == ["dispatch-cost", "dispatch-fleet", "dispatch-sprint", "dispatch-watchdog"]
    for path in DASHBOARDS:
        board = dashboard(path)
        assert [each["name"] for each in board["annotations"]["list"]] == ["Restarts", "Alerts", "Deploys", "Pauses", "Cut-overs"]
        assert board["links"][0]["type"] == "dashboards"
        assert board["links"][0]["tags"] == ["timmy-dispatch"]
        assert board["links"][0]["keepTime"] is True


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_the_dashboard_is_what_the_model_of_the_sdk_understands(path):
    """Reading it into the typed model and writing it again loses nothing: no key is misspelt or in the wrong place."""
    load_build()
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    register_default_plugins()
    board = dashboard(path)
    again = json.loads(JSONEncoder(sort_keys=True).encode(Dashboard.from_json(board)))
    for item in (*again["links"], *again["annotations"]["list"]):
        item.pop("placement", None)
    assert again == board


@pytest.mark.skipif(
    not SCHEMA, reason="GRAFANA_DASHBOARD_SCHEMA names no JSON schema of Grafana's dashboards (the SDK's repository has it)"
)
@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_the_dashboard_fits_the_schema(path):
    import jsonschema

    board = dashboard(path)
    for panel in board["panels"]:
        for each in panel.get("fieldConfig", {}).get("overrides", ()):
            # Every Grafana writes the name here; the schema asks for an object.
            each["matcher"].pop("options")
    jsonschema.validate(board, json.loads(Path(SCHEMA).read_text(encoding="utf-8")))


def test_provisioning_points_at_what_exists():
    sources = yaml.safe_load((GRAFANA / "provisioning" / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert [(each["uid"], each["type"], each["jsonData"]) for each in sources] == [
        (
            "timmy-prometheus",
            "prometheus",
            {
                "httpMethod": "POST",
                "timeInterval": "15s",
                # Grafana takes $ for a variable of its environment in these files.
                "exemplarTraceIdDestinations": [
                    {"name": "trace_id", "url": "http://127.0.0.1:16686/trace/$${__value.raw}", "urlDisplayLabel": "Trace"}
                ],
            },
        )
    ]
    (provider,) = yaml.safe_load((GRAFANA / "provisioning" / "dashboards" / "timmy-dispatch.yml").read_text())["providers"]
    assert (provider["type"], provider["disableDeletion"], provider["allowUiUpdates"], provider["folder"]) == ("file", True, False, "Timmy")
