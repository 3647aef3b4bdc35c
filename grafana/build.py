"""Writes the dashboards and the Prometheus rules from one set of numbers; the committed files are its output for the defaults.

Needs `grafana-foundation-sdk` (a development dependency). Who only runs the service never needs this script.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from grafana_foundation_sdk.builders import common, dashboard, heatmap, prometheus, stat, statetimeline, table, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import prometheus as prometheus_models

from bot.fleet.health import WEBHOOK_SILENT, Thresholds

TAG = "timmy-dispatch"
SERVICE = "timmy-dispatch"
WINDOWS = ("5m", "15m", "30m", "1h", "6h", "1d", "3d")
HEADER = "# Written by grafana/build.py: change the parameters there, not this file.\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """What the generated files depend on. `hold` multiplies every `for` and `keep_firing_for`, so that a test can shrink time."""

    thresholds: Thresholds = field(default_factory=Thresholds)
    hold: float = 1.0
    job: str = "timmy-dispatch"
    runbooks: str = "docs/runbooks/"
    grafana: str = "http://127.0.0.1:3000"
    gitea: str = ""
    pages: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """One alert rule; `hold` and `keep` are seconds before it fires and before it stops, `labels` stand beside severity and service."""

    name: str
    expr: str
    severity: str
    summary: str
    description: str
    hold: float = 0.0
    keep: float = 0.0
    labels: tuple[tuple[str, str], ...] = ()
    board: str = "dispatch-fleet"


def recordings(parameters: Parameters) -> list[dict[str, Any]]:
    """The recorded series of outcomes, logins and money; `no_change` and `budget` are bad, `cancelled`, `refused` and `planned` neither."""
    job = f'job="{parameters.job}"'
    neither, good = "cancelled|refused|planned", "pull_request|updated"
    rules = []
    for window in WINDOWS:
        count = f"dispatch_sprint_duration_seconds_count{{{job},outcome!~"
        finished = f"dispatch:sprints_finished:increase{window}"
        bad = f'sum by (job) (increase({count}"{good}|{neither}"}}[{window}]))'
        rules += [
            {"record": finished, "expr": f'sum by (job) (increase({count}"{neither}"}}[{window}]))'},
            {"record": f"dispatch:sprint_error:ratio_rate{window}", "expr": f"{bad} / ({finished} > 0)"},
        ]
    came = f"dispatch_webhook_deliveries_total{{{job}"
    for window in WINDOWS:
        rules.append(
            {
                "record": f"dispatch:webhook_error:ratio_rate{window}",
                "expr": f'sum by (job) (rate({came},result="error"}}[{window}])) / (sum by (job) (rate({came}}}[{window}])) > 0)',
            }
        )
    return [
        *rules,
        {
            "record": "dispatch:auth_token_expiry:seconds",
            "expr": f"min by (job, provider) (dispatch_auth_token_expiry_timestamp_seconds{{{job}}}) - time()",
        },
        {"record": "dispatch:llm_cost_usd:increase1d", "expr": f"sum by (job) (increase(dispatch_llm_cost_usd_total{{{job}}}[1d]))"},
    ]


def burn(first: tuple[str, str, float], second: tuple[str, str, float], *, ratio: str, guard: str = "") -> str:
    """Two pairs of windows: each fires where its long and its short window are both beyond the limit. `guard` is a count that must be reached."""
    parts = []
    for long, short, limit in (first, second):
        enough = f" and {guard}{long} >= 4.5" if guard else ""
        parts.append(f"( {ratio}{long} > {limit:g} and {ratio}{short} > {limit:g}{enough} )")
    return "\nor ".join(parts)


def burn_alerts() -> list[Alert]:
    """Objectives: 80 % of the sprints end with a pull request, so that the largest burn is 5 and the usual factor 14.4 could never fire;
    99.9 % of the deliveries are taken without an error of ours. The guard stands for five finished sprints, because `increase` extrapolates.
    """
    sprint, webhook = "dispatch:sprint_error:ratio_rate", "dispatch:webhook_error:ratio_rate"
    finished = "dispatch:sprints_finished:increase"
    text = "{{ $value | humanizePercentage }}"
    alerts = []
    for window, hold, severity, sprints, webhooks in (
        ("fast", 120, "critical", (("1h", "15m", 0.8), ("6h", "30m", 0.5)), (("1h", "5m", 0.0144), ("6h", "30m", 0.006))),
        ("slow", 900, "warning", (("1d", "1h", 0.35), ("3d", "6h", 0.25)), (("1d", "1h", 0.003), ("3d", "6h", 0.001))),
    ):
        alerts += [
            Alert(
                name="DispatchSprintSuccessBurn",
                expr=burn(*sprints, ratio=sprint, guard=finished),
                hold=hold,
                severity=severity,
                labels=(("slo", "sprint-success"), ("window", window)),
                board="dispatch-sprint",
                summary=f"Too many sprints end without a pull request ({window} burn)",
                description=f"{text} of the finished sprints of the longer window ended without a pull request; the objective is 20 % at most.",
            ),
            Alert(
                name="DispatchWebhookErrorBurn",
                expr=burn(*webhooks, ratio=webhook),
                hold=hold,
                severity=severity,
                labels=(("slo", "webhook"), ("window", window)),
                summary=f"Deliveries fail in our own hands ({window} burn)",
                description=f"{text} of the deliveries of the longer window were answered 5xx; Gitea does not send them again.",
            ),
        ]
    return alerts


def ages(parameters: Parameters) -> list[dict[str, Any]]:
    """The two ages of the stall alert; they stand before it in its own group, because groups are evaluated at different moments."""
    job = f'job="{parameters.job}"'
    oldest, moved = "dispatch_queue_oldest_enqueued_timestamp_seconds", "dispatch_fleet_last_progress_timestamp_seconds"
    return [
        {"record": "dispatch:queue_oldest:age_seconds", "expr": f"time() - max by (job) ({oldest}{{{job}}})"},
        {"record": "dispatch:fleet_since_progress:seconds", "expr": f"time() - max by (job) ({moved}{{{job}}})"},
    ]


def fleet_alerts(parameters: Parameters) -> list[Alert]:
    """Alerts on what this service exports, the pages first."""
    limit = parameters.thresholds
    job = f'job="{parameters.job}"'
    not_paused = f"unless on (job) max by (job) (dispatch_paused{{{job}}}) == 1"
    beat = f"dispatch_worker_last_heartbeat_timestamp_seconds{{{job}}}"
    gitea, llm = f"dispatch_gitea_requests_total{{{job}", f"dispatch_llm_requests_total{{{job}"
    return [
        Alert(
            name="DispatchFleetStalled",
            expr=f"dispatch:queue_oldest:age_seconds > {limit.stall_after:g}\n"
            f"and on (job) dispatch:fleet_since_progress:seconds > {limit.stall_after:g}\n{not_paused}",
            hold=60,
            severity="critical",
            summary="The fleet is stalled: work is queued and nothing moves",
            description="The oldest runnable sprint has been queued for {{ $value | humanizeDuration }}, and no sprint, model turn, tool call or check moved for longer than the threshold.",
        ),
        Alert(
            name="DispatchBotDown",
            expr=f"max by (job) (up{{{job}}}) == 0 or absent(up{{{job}}})",
            hold=120,
            keep=300,
            severity="critical",
            summary="The bot cannot be scraped",
            description="No target of job {{ $labels.job }} answered /metrics: the process is gone, its metrics listener is closed, or its database cannot be read.",
        ),
        Alert(
            name="DispatchAllWorkersLost",
            expr=f"min by (job) (time() - {beat}) > {limit.worker_lost:g}",
            hold=60,
            keep=300,
            severity="critical",
            board="dispatch-watchdog",
            summary="No worker has a heartbeat",
            description="The freshest heartbeat of any worker is {{ $value | humanizeDuration }} old.",
        ),
        Alert(
            name="DispatchSandboxUnproven",
            expr=f"max by (job, instance) (dispatch_sandbox_probe_ok{{{job}}}) == 0",
            hold=120,
            severity="critical",
            board="dispatch-watchdog",
            summary="The sandbox failed its live probes",
            description="On {{ $labels.instance }} the wall round the model is not proven; sprints are refused there.",
        ),
        Alert(
            name="DispatchWorkerHeartbeatLost",
            expr=f"time() - max by (job, worker) ({beat}) > {limit.worker_lost:g}",
            hold=60,
            severity="warning",
            board="dispatch-watchdog",
            summary="Worker {{ $labels.worker }} lost its heartbeat",
            description="The last heartbeat of worker {{ $labels.worker }} is {{ $value | humanizeDuration }} old.",
        ),
        Alert(
            name="DispatchNoThroughput",
            expr=f"dispatch:queue_oldest:age_seconds > {limit.no_success:g}\n"
            f"unless on (job) time() - max by (job) (dispatch_sprint_last_success_timestamp_seconds{{{job}}}) <= {limit.no_success:g}\n{not_paused}",
            hold=300,
            severity="warning",
            summary="Work is queued and no sprint ends with a pull request",
            description="The oldest runnable sprint has been queued for {{ $value | humanizeDuration }}, and none ended with a pull request meanwhile; the fleet may move and still achieve nothing.",
        ),
        Alert(
            name="DispatchSprintOverrun",
            expr=f"time() - min by (job) (dispatch_sprint_running_oldest_start_timestamp_seconds{{{job}}}) > {limit.sprint_overrun:g}",
            hold=60,
            severity="warning",
            board="dispatch-sprint",
            summary="A sprint runs far beyond its limits",
            description="The longest running sprint started {{ $value | humanizeDuration }} ago; its time limit should have ended it.",
        ),
        Alert(
            name="DispatchWebhookMissed",
            expr=f"sum by (job) (increase(dispatch_reconcile_missed_events_total{{{job}}}[30m])) > 0",
            severity="warning",
            summary="Reconciliation found work that no webhook announced",
            description="About {{ $value | humanize }} events in 30 minutes arrived only by asking the forge.",
        ),
        Alert(
            name="DispatchWebhookSignatureFailures",
            expr=f'sum by (job) (increase(dispatch_webhook_deliveries_total{{{job},result="bad_signature"}}[15m])) > {limit.bad_signatures}',
            severity="warning",
            summary="Deliveries with a wrong signature",
            description="About {{ $value | humanize }} deliveries in 15 minutes were refused for their signature.",
        ),
        Alert(
            name="DispatchWebhookSilent",
            expr=f"time() - max by (job) (dispatch_webhook_last_delivery_timestamp_seconds{{{job}}}) > {limit.webhook_silent or WEBHOOK_SILENT:g}\n"
            f"and on (job) time() - max by (job) (dispatch_webhook_canary_timestamp_seconds{{{job}}}) < {limit.webhook_silent or WEBHOOK_SILENT:g}",
            hold=300,
            severity="warning",
            summary="Gitea sends test deliveries and none arrives",
            description="The last delivery came {{ $value | humanizeDuration }} ago, although Gitea agreed to send test deliveries meanwhile.",
        ),
        Alert(
            name="DispatchAuthTokenExpired",
            expr="dispatch:auth_token_expiry:seconds <= 0\n"
            f"and on (job, provider) ( max by (job, provider) (dispatch_llm_provider_available{{{job}}}) == 0\n"
            f'or sum by (job, provider) (increase(dispatch_auth_refresh_total{{{job},result="error"}}[30m])) > 0 )',
            hold=60,
            severity="critical",
            board="dispatch-watchdog",
            summary="The login of {{ $labels.provider }} has expired and is not renewed",
            description="The key of {{ $labels.provider }} expired and renewing it failed; only a person can log in again.",
        ),
        Alert(
            name="DispatchBudgetNearlySpent",
            expr="dispatch:llm_cost_usd:increase1d\n"
            f"/ on (job) (max by (job) (dispatch_llm_budget_usd{{{job}}}) > 0)\n> {limit.budget_ratio:g}",
            severity="warning",
            board="dispatch-cost",
            summary="The money of a day is nearly spent",
            description="{{ $value | humanizePercentage }} of the daily budget went in the last 24 hours; at the limit no sprint is started.",
        ),
        Alert(
            name="DispatchGiteaErrors",
            expr=f'sum by (job) (rate({gitea},code=~"5xx|timeout|connection|401"}}[10m]))\n'
            f"/ sum by (job) (rate({gitea}}}[10m]))\n> {limit.gitea_error_ratio:g}",
            hold=300,
            severity="warning",
            summary="Gitea answers with errors",
            description="{{ $value | humanizePercentage }} of the requests to Gitea failed in the last 10 minutes.",
        ),
        Alert(
            name="DispatchLlmProviderErrors",
            expr=f'sum by (job, provider) (rate({llm},result!="ok"}}[10m]))\n'
            f"/ sum by (job, provider) (rate({llm}}}[10m]))\n> {limit.llm_error_ratio:g}",
            hold=300,
            severity="warning",
            board="dispatch-cost",
            summary="Provider {{ $labels.provider }} fails",
            description="{{ $value | humanizePercentage }} of the calls of {{ $labels.provider }} failed in the last 10 minutes.",
        ),
        Alert(
            name="DispatchLabelOverflow",
            expr=f"sum by (job, label) (increase(dispatch_metrics_label_overflow_total{{{job}}}[1h])) > 0",
            severity="info",
            board="dispatch-watchdog",
            summary="Values of label {{ $labels.label }} are folded to other",
            description="About {{ $value | humanize }} values of {{ $labels.label }} in one hour were outside its closed set.",
        ),
    ]


def watch_alerts(parameters: Parameters) -> list[Alert]:
    """Alerts on what watchdog, collector and breaker found: tickets, because the fleet may still work."""
    limit = parameters.thresholds
    job = f'job="{parameters.job}"'
    expiry = "dispatch:auth_token_expiry:seconds"
    refused = f'sum by (job, provider) (increase(dispatch_auth_refresh_total{{{job},result="error"}}[30m])) > 0'
    return [
        Alert(
            name="DispatchBreakerOpen",
            expr=f"max by (job, scope) (dispatch_breaker_open{{{job}}}) > 0",
            hold=600,
            severity="warning",
            board="dispatch-watchdog",
            summary="A breaker is open ({{ $labels.scope }})",
            description="Sprints failed in a row for no fault of their tasks, and {{ $value | humanize }} breakers of scope {{ $labels.scope }} hold the others but for one try at a time.",
        ),
        Alert(
            name="DispatchProbeFailing",
            expr=f"max by (job, probe) (dispatch_probe_ok{{{job}}}) == 0",
            hold=300,
            severity="warning",
            board="dispatch-watchdog",
            summary="The watchdog's probe {{ $labels.probe }} fails",
            description="The probe {{ $labels.probe }} fails or breaks, and what it may do about it did not help.",
        ),
        Alert(
            name="DispatchModelDrift",
            expr=f"max by (job, agent) (dispatch_watchdog_model_drift{{{job}}}) == 1",
            hold=300,
            severity="warning",
            board="dispatch-watchdog",
            summary="The profile {{ $labels.agent }} runs another model than it should",
            description="The model of the profile {{ $labels.agent }} is not the one of `watchdog.expect`; either nobody may mend it, or mending did not hold.",
        ),
        Alert(
            name="DispatchAgentDown",
            expr=f"max by (job, instance, agent) (dispatch_agent_up{{{job}}}) == 0",
            hold=300,
            severity="warning",
            board="dispatch-watchdog",
            summary="The worker of {{ $labels.agent }} is down",
            description="On {{ $labels.instance }} the worker of {{ $labels.agent }} does not run; nobody stopped it, and starting it again did not help or is not allowed.",
        ),
        Alert(
            name="DispatchCollectorStale",
            expr=f"time() - max by (job, instance, collector) (dispatch_collector_last_success_timestamp_seconds{{{job}}}) > {limit.collector_stale:g}",
            hold=300,
            severity="warning",
            board="dispatch-watchdog",
            summary="The collector sees nothing of {{ $labels.collector }}",
            description="On {{ $labels.instance }} the collector's source {{ $labels.collector }} last answered {{ $value | humanizeDuration }} ago.",
        ),
        Alert(
            name="DispatchScheduleDrift",
            expr=f"max by (job, schedule) (dispatch_schedule_drift_seconds{{{job}}}) > {limit.schedule_drift:g}",
            hold=600,
            severity="warning",
            board="dispatch-watchdog",
            summary="The schedule {{ $labels.schedule }} does not keep its time",
            description="The schedule {{ $labels.schedule }} fired {{ $value | humanizeDuration }} late, or is overdue for as long.",
        ),
        Alert(
            name="DispatchAuthTokenExpiring",
            expr=f"{expiry} > 0\nand on (job, provider) {expiry} < {limit.token_expiring:g}\nand on (job, provider) {refused}",
            hold=300,
            severity="warning",
            board="dispatch-watchdog",
            summary="The login of {{ $labels.provider }} is about to expire and is not renewed",
            description="The key of {{ $labels.provider }} ends in {{ $value | humanizeDuration }}, and renewing it failed; only a person can log in again.",
        ),
    ]


def pipeline_alerts(parameters: Parameters) -> list[Alert]:
    """Alerts on the alerting itself. Their windows shrink with every `for`, and end before a bot that came back stops muting them."""
    failing, undelivered = duration(300 * parameters.hold), duration(240 * parameters.hold)
    return [
        Alert(
            name="DispatchRulesFailing",
            expr=f'increase(prometheus_rule_evaluation_failures_total{{rule_group=~".*dispatch.*"}}[{failing}]) > 0',
            hold=300,
            severity="warning",
            summary="Prometheus cannot evaluate the rules of this service",
            description="{{ $labels.rule_group }} failed {{ $value | humanize }} times in 5 minutes; its alerts may be silent.",
        ),
        Alert(
            name="DispatchNotificationsFailing",
            expr=f"rate(alertmanager_notifications_failed_total[{undelivered}]) > 0",
            hold=300,
            severity="critical",
            summary="Alertmanager cannot deliver notifications",
            description="Notifications by {{ $labels.integration }} fail: pages may not arrive.",
        ),
        Alert(
            name="Watchdog",
            expr="vector(1)",
            severity="none",
            summary="Always firing: proves that the way from Prometheus to the pager works",
            description="The dead man's switch pages when this alert stops arriving.",
        ),
    ]


def rule_file(groups: dict[str, list[dict[str, Any]]]) -> str:
    """The text of one rule file."""
    body = {"groups": [{"name": name, "rules": rules} for name, rules in groups.items()]}
    return HEADER + yaml.dump(body, Dumper=_Dumper, sort_keys=False, width=1000, allow_unicode=True)


def alert_rule(alert: Alert, parameters: Parameters) -> dict[str, Any]:
    """One alert in Prometheus' form."""
    rule: dict[str, Any] = {"alert": alert.name, "expr": alert.expr}
    if alert.hold:
        rule["for"] = duration(alert.hold * parameters.hold)
    if alert.keep:
        rule["keep_firing_for"] = duration(alert.keep * parameters.hold)
    return rule | {
        "labels": {"severity": alert.severity, "service": SERVICE, **dict(alert.labels)},
        "annotations": {
            "summary": alert.summary,
            "description": alert.description,
            "runbook_url": f"{parameters.runbooks}{alert.name}.md",
            "dashboard_uid": alert.board,
            "dashboard_url": f"{parameters.grafana}/d/{alert.board}",
        },
    }


def duration(seconds: float) -> str:
    """A Prometheus duration: whole minutes, seconds or milliseconds."""
    milliseconds = round(seconds * 1000)
    for unit, size in (("m", 60_000), ("s", 1000)):
        if milliseconds % size == 0 and milliseconds:
            return f"{milliseconds // size}{unit}"
    return f"{milliseconds}ms"


class _Dumper(yaml.SafeDumper):
    """Keeps expressions of several lines readable."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:  # noqa: ARG002, FBT001, FBT002  the signature is PyYAML's
        return super().increase_indent(flow, False)


def _string(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _string)


SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
SEL = 'job=~"$job",instance=~"$instance"'
RATE = "$__rate_interval"
GREEN, YELLOW, RED = "green", "yellow", "red"


def sel(name: str, more: str = "") -> str:
    """A selector of one of our metrics that obeys the dashboard's variables."""
    return f"dispatch_{name}{{{SEL}{',' + more if more else ''}}}"


def quantile(q: float, name: str, *by: str) -> str:
    """A quantile of a histogram over the time shown by one point."""
    return f"histogram_quantile({q:g}, sum by ({', '.join(('le', *by))}) (rate({sel(name + '_bucket')}[{RATE}])))"


def per_hour(name: str, *by: str, more: str = "") -> str:
    """Events an hour of one counter."""
    return f"sum by ({', '.join(by)}) (rate({sel(name, more)}[{RATE}])) * 3600"


def queries(pairs: Iterable[tuple[str, str]], *, instant: bool) -> list[prometheus.Dataquery]:
    """Targets A, B, C... of (expression, legend) pairs."""
    built = []
    for index, (expr, legend) in enumerate(pairs):
        query = prometheus.Dataquery().datasource(SOURCE).expr(expr).legend_format(legend).ref_id(chr(ord("A") + index))
        built.append(query.instant() if instant else query.range())
    return built


def number(
    title: str,
    text: str,
    unit: str,
    query: tuple[str, str],
    *,
    no_value: str,
    warn: float | None = None,
    alarm: float | None = None,
    name: bool = False,
) -> stat.Panel:
    """One figure of this moment, coloured from `warn` and `alarm` on; with `name` its legend is shown instead of it."""
    steps = [models.Threshold(None, GREEN)]
    steps += [models.Threshold(value, color) for value, color in ((warn, YELLOW), (alarm, RED)) if value is not None]
    panel = stat.Panel().title(title).description(text).unit(unit).datasource(SOURCE).no_value(no_value).span(4).height(4)
    panel.thresholds(dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps))
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"])).graph_mode(common_models.BigValueGraphMode.NONE)
    if name:
        panel.text_mode(common_models.BigValueTextMode.NAME)
    for target in queries([query], instant=True):
        panel.with_target(target)
    return panel


def heat(title: str, text: str, unit: str, expr: str) -> heatmap.Panel:
    """A histogram over time, with exemplars."""
    panel = heatmap.Panel().title(title).description(text).unit(unit).datasource(SOURCE).no_value("none finished").span(8).height(8)
    query = prometheus.Dataquery().datasource(SOURCE).expr(expr).legend_format("{{le}}").ref_id("A").range().exemplar(True)
    return panel.calculate(False).with_target(query.format(prometheus_models.PromQueryFormat.HEATMAP))


def grid(title: str, text: str, unit: str, expr: str, legend: str, *, no_value: str, span: int = 6) -> table.Panel:
    """A table of the time shown, one row a series."""
    panel = table.Panel().title(title).description(text).unit(unit).datasource(SOURCE).no_value(no_value).span(span).height(8)
    query = prometheus.Dataquery().datasource(SOURCE).expr(expr).legend_format(legend).ref_id("A").instant()
    panel.with_target(query.format(prometheus_models.PromQueryFormat.TABLE))
    organize = {"excludeByName": {"Time": True}, "renameByName": {"Value": title}}
    return panel.with_transformation(models.DataTransformerConfig(id_val="organize", options=organize))


def states(title: str, text: str, expr: str, legend: str, *, no_value: str = "no bot", span: int = 12) -> statetimeline.Panel:
    """Bars over time, one line a series."""
    panel = (
        statetimeline.Panel().title(title).description(text).unit("bool_yes_no").datasource(SOURCE).no_value(no_value).span(span).height(8)
    )
    panel.show_value(common_models.VisibilityMode.NEVER)
    for target in queries([(expr, legend)], instant=False):
        panel.with_target(target)
    return panel


def verdict() -> stat.Panel:
    """The service's own judgement, as a word in its colour."""
    panel = number(
        "Verdict",
        "The service's own judgement of the fleet; its reasons are at /readyz.",
        "none",
        (f"max by (verdict) ({sel('health')}) == 1", "{{verdict}}"),
        no_value="no bot",
    )
    colors = {"working": GREEN, "idle": GREEN, "paused": "blue", "degraded": YELLOW, "stalled": RED}
    for name, color in colors.items():
        panel.override_by_name(name, [models.DynamicConfigValue("color", {"mode": "fixed", "fixedColor": color})])
    return panel.text_mode(common_models.BigValueTextMode.NAME).color_mode(common_models.BigValueColorMode.BACKGROUND)


def lines(
    title: str, text: str, unit: str, *pairs: tuple[str, str], stacked: bool = False, span: int = 8, no_value: str = "nothing yet"
) -> timeseries.Panel:
    """Curves over time with a table of last and greatest values."""
    legend = common.VizLegendOptions().display_mode(common_models.LegendDisplayMode.TABLE).placement(common_models.LegendPlacement.BOTTOM)
    panel = timeseries.Panel().title(title).description(text).unit(unit).datasource(SOURCE).no_value(no_value).min(0).span(span).height(8)
    panel.legend(legend.show_legend(True).calcs(["lastNotNull", "max"]))
    panel.tooltip(common.VizTooltipOptions().mode(common_models.TooltipDisplayMode.MULTI).sort(common_models.SortOrder.DESCENDING))
    if stacked:
        panel.stacking(common.StackingConfig().mode(common_models.StackingMode.NORMAL)).fill_opacity(40)
    for target in queries(pairs, instant=False):
        panel.with_target(target)
    return panel


def now_row(parameters: Parameters) -> list[Any]:
    """Is the fleet well at this moment?"""
    stall = parameters.thresholds.stall_after
    firing = 'count(ALERTS{alertstate="firing",service="timmy-dispatch",severity!="none"}) or vector(0)'
    queued = sel("sprints", 'state="queued"')
    running = 'state=~"preparing|working|vetting|publishing"'
    return [
        verdict(),
        number(
            "Queued",
            "Runnable sprints that wait for a slot.",
            "short",
            (f"max({queued})", "queued"),
            no_value="no bot",
            warn=10,
            alarm=50,
        ),
        number(
            "Running",
            "Sprints from preparing to publishing.",
            "short",
            (f"sum(max by (state) ({sel('sprints', running)}))", "running"),
            no_value="no bot",
        ),
        number("Firing alerts", "Alerts of this service that fire now.", "short", (firing, "alerts"), no_value="0", alarm=1),
        number(
            "Oldest queued",
            "Age of the oldest sprint the fleet owes a slot.",
            "s",
            (f"time() - max({sel('queue_oldest_enqueued_timestamp_seconds')})", "age"),
            no_value="none queued",
            warn=stall / 2,
            alarm=stall,
        ),
        number(
            "Since progress",
            "Time since anything moved; only bad while work is queued.",
            "s",
            (f"time() - max({sel('fleet_last_progress_timestamp_seconds')})", "age"),
            no_value="never",
            warn=stall / 2,
            alarm=stall,
        ),
    ]


def flow_row() -> list[Any]:
    """Does work come in, move, and come out?"""
    finished = "sprint_duration_seconds_count"
    return [
        lines(
            "Sprints by state",
            "Live sprints; `waiting` are held by a policy or a person.",
            "short",
            (f"max by (state) ({sel('sprints')})", "{{state}}"),
            stacked=True,
            span=6,
        ),
        lines(
            "Enqueued, started, finished",
            "Sprints an hour that entered the queue, began, and ended.",
            "short",
            (f"sum(rate({sel('sprints_enqueued_total')}[{RATE}])) * 3600", "enqueued"),
            (f"sum(rate({sel('sprints_started_total')}[{RATE}])) * 3600", "started"),
            (f"sum(rate({sel(finished)}[{RATE}])) * 3600", "finished"),
            span=6,
        ),
        lines(
            "Finished by outcome",
            "How sprints ended, an hour.",
            "short",
            (per_hour(finished, "outcome"), "{{outcome}}"),
            stacked=True,
            span=6,
        ),
        lines(
            "Waiting by reason",
            "Why queued sprints wait; cap, slot, no_worker, breaker, provider and requeued still count as runnable.",
            "short",
            (f"max by (reason) ({sel('sprints_waiting')}) > 0", "{{reason}}"),
            stacked=True,
            span=6,
            no_value="none waits",
        ),
    ]


def service_row() -> list[Any]:
    """Does the work succeed, and how long do people wait?"""
    ratios = [(f'dispatch:sprint_error:ratio_rate{window}{{job=~"$job"}}', window) for window in ("1h", "6h", "3d")]
    return [
        lines(
            "Sprint error ratio",
            "Share of finished sprints without a pull request; cancelled, refused and planned count as neither.",
            "percentunit",
            *ratios,
            no_value="none finished",
        ),
        lines(
            "Queue wait",
            "From enqueued to started.",
            "s",
            (quantile(0.5, "sprint_queue_wait_seconds"), "p50"),
            (quantile(0.95, "sprint_queue_wait_seconds"), "p95"),
            no_value="none started",
        ),
        lines(
            "Pull requests by event",
            "What became of our pull requests, an hour.",
            "short",
            (per_hour("pull_requests_total", "event"), "{{event}}"),
        ),
    ]


def gitea_row() -> list[Any]:
    """Do the forge and we understand each other?"""
    return [
        lines(
            "Deliveries by event and result",
            "Webhook deliveries by what we answered.",
            "reqps",
            (f"sum by (event, result) (rate({sel('webhook_deliveries_total')}[{RATE}])) > 0", "{{event}} {{result}}"),
            no_value="no delivery",
        ),
        lines(
            "Commands by command and result",
            "Answered /dispatch commands, a minute.",
            "short",
            (f"sum by (command, result) (rate({sel('commands_total')}[{RATE}])) * 60", "{{command}} {{result}}"),
            no_value="no command",
        ),
        lines(
            "API latency p95",
            "Slowest twentieth of the requests to Gitea, by endpoint.",
            "s",
            (quantile(0.95, "gitea_request_duration_seconds", "endpoint"), "{{endpoint}}"),
            no_value="no request",
        ),
        lines(
            "Acknowledgement and webhook handling",
            "From a delivery to its reaction, and from request read to response written.",
            "s",
            (quantile(0.5, "command_ack_duration_seconds"), "ack p50"),
            (quantile(0.99, "command_ack_duration_seconds"), "ack p99"),
            (quantile(0.99, "webhook_handle_duration_seconds"), "webhook p99"),
            no_value="no delivery",
        ),
        lines(
            "API answers and retries",
            "Requests to Gitea by answer, and attempts beyond the first.",
            "reqps",
            (f"sum by (code) (rate({sel('gitea_requests_total')}[{RATE}]))", "{{code}}"),
            (f"sum(rate({sel('gitea_retries_total')}[{RATE}]))", "retries"),
            no_value="no request",
        ),
        lines(
            "Inbox and outbox",
            "Deliveries not yet handled, given up, and what the forge does not yet show.",
            "short",
            (f"max({sel('inbox_backlog')})", "inbox"),
            (f"max({sel('inbox_dead_letters')})", "given up"),
            (f"max({sel('outbox_backlog')})", "outbox"),
            (f"sum(rate({sel('outbox_failures_total')}[{RATE}])) * 60", "failures a minute"),
        ),
        lines(
            "Age of inbox and outbox",
            "How long the oldest row waits; nothing is shown while both are empty.",
            "s",
            (f"time() - min({sel('inbox_oldest_received_timestamp_seconds')})", "inbox"),
            (f"time() - min({sel('outbox_oldest_timestamp_seconds')})", "outbox"),
            no_value="both empty",
        ),
        lines(
            "Missed by webhook",
            "Events an hour that only reconciliation found.",
            "short",
            (f"sum(rate({sel('reconcile_missed_events_total')}[{RATE}])) * 3600", "missed"),
        ),
        lines(
            "Since last delivery",
            "Time since the last authentic delivery, or since the start while there was none.",
            "s",
            (f"time() - max({sel('webhook_last_delivery_timestamp_seconds')})", "age"),
            no_value="no bot",
        ),
    ]


def inbox_row() -> list[Any]:
    """What becomes of the deliveries that were taken in?"""
    return [
        lines(
            "Handlings by result",
            "Stored deliveries that were handled, a minute; `dead` were given up.",
            "short",
            (f"sum by (result) (rate({sel('inbox_handled_total')}[{RATE}])) * 60", "{{result}}"),
            no_value="no delivery",
        ),
        lines(
            "Tries of a delivery",
            "How often a stored delivery was tried until it was done or given up.",
            "short",
            (quantile(0.5, "inbox_tries"), "p50"),
            (quantile(0.95, "inbox_tries"), "p95"),
            no_value="no delivery",
        ),
        lines(
            "Handlers p95",
            "Slowest twentieth of the runs of each handler.",
            "s",
            (quantile(0.95, "handler_duration_seconds", "handler"), "{{handler}}"),
            no_value="no delivery",
        ),
    ]


CHOSEN = 'agent=~"$agent",model=~"$model"'
BY_MODEL = 'model=~"$model"'


def duration_row() -> list[Any]:
    """How long do sprints take, and where does the time go?"""
    seconds = sel("sprint_duration_seconds_bucket", CHOSEN)
    mean = "sum by (stage) (rate(dispatch_sprint_stage_duration_seconds"
    return [
        heat(
            "Duration",
            "Sprints by how long they took; the dots are single sprints with their ids.",
            "s",
            f"sum by (le) (increase({seconds}[{RATE}]))",
        ),
        lines(
            "Duration by model",
            "Half and nine tenths of the sprints of a model are faster.",
            "s",
            (f"histogram_quantile(0.5, sum by (le, model) (rate({seconds}[{RATE}])))", "{{model}} p50"),
            (f"histogram_quantile(0.9, sum by (le, model) (rate({seconds}[{RATE}])))", "{{model}} p90"),
            no_value="none finished",
        ),
        lines(
            "Mean by stage",
            "Mean time of each stage of a sprint.",
            "s",
            (
                f"{mean}_sum{{{SEL}}}[{RATE}]))\n/ {mean}_count{{{SEL}}}[{RATE}]))",
                "{{stage}}",
            ),
            no_value="none finished",
        ),
    ]


def outcome_row() -> list[Any]:
    """What comes of sprints?"""
    finished = "sprint_duration_seconds_count"
    good = sel(finished, f'{CHOSEN},outcome=~"pull_request|updated"')
    counted = sel(finished, f'{CHOSEN},outcome!~"cancelled|refused|planned"')
    return [
        grid(
            "Success by agent and model",
            "Share of the finished sprints that ended with a pull request; cancelled, refused and planned count as neither.",
            "percentunit",
            # What never ended well has no series of its own.
            f"(sum by (agent, model) (increase({good}[$__range])) or 0 * sum by (agent, model) (increase({counted}[$__range])))"
            f" / (sum by (agent, model) (increase({counted}[$__range])) > 0)",
            "{{agent}} {{model}}",
            no_value="none finished",
        ),
        lines(
            "Failures by reason",
            "Sprints that ended as failed, an hour.",
            "short",
            (per_hour("sprint_failures_total", "reason"), "{{reason}}"),
            stacked=True,
            span=6,
        ),
        lines(
            "Retries by reason",
            "Attempts beyond the first, an hour, by what sent the sprint back.",
            "short",
            (per_hour("sprint_retries_total", "reason"), "{{reason}}"),
            stacked=True,
            span=6,
            no_value="none",
        ),
        lines(
            "Pull requests by model",
            "What became of our pull requests, an hour, by the model that wrote them.",
            "short",
            (per_hour("pull_requests_total", "event", "model", more=BY_MODEL), "{{model}} {{event}}"),
            span=6,
        ),
    ]


def turns_row() -> list[Any]:
    """How do the models work?"""
    return [
        lines(
            "Model turns of a sprint",
            "How many turns a sprint took.",
            "short",
            (quantile(0.5, "sprint_llm_turns"), "p50"),
            (quantile(0.95, "sprint_llm_turns"), "p95"),
            no_value="none finished",
        ),
        lines(
            "Tool calls by tool and result",
            "Tool calls of the models, a minute.",
            "short",
            (f"sum by (tool, result) (rate({sel('tool_calls_total')}[{RATE}])) * 60", "{{tool}} {{result}}"),
            no_value="no call",
        ),
        lines(
            "Tool latency p95",
            "Slowest twentieth of the calls of each tool.",
            "s",
            (quantile(0.95, "tool_call_duration_seconds", "tool"), "{{tool}}"),
            no_value="no call",
        ),
    ]


def health_row() -> list[Any]:
    """What does the service think of itself?"""
    return [
        states(
            "Verdict over time",
            "The service's own judgement of the fleet; one line a verdict, drawn while it holds.",
            f"max by (verdict) ({sel('health')}) == 1",
            "{{verdict}}",
        ),
        states(
            "Reasons",
            "Every fault that made the fleet degraded, drawn while it holds.",
            f"max by (reason) ({sel('health_reason')}) == 1",
            "{{reason}}",
            no_value="no fault",
        ),
        number(
            "Sandbox proven",
            "Whether the live probes of the sandbox passed; sprints are refused while they do not.",
            "bool_yes_no",
            (f"min({sel('sandbox_probe_ok')})", "proven"),
            no_value="not probed",
        ),
        number(
            "Sandbox in use",
            "The wall round what the models run: asked for, and in use.",
            "none",
            (f"max by (backend, level) ({sel('sandbox_info')})", "{{backend}} > {{level}}"),
            no_value="no bot",
            name=True,
        ),
        number("Version", "What runs.", "none", (f"max by (version) ({sel('build_info')})", "{{version}}"), no_value="no bot", name=True),
        number("Paused", "Whether the whole fleet is paused.", "bool_yes_no", (f"max({sel('paused')})", "paused"), no_value="no bot"),
    ]


def workers_row() -> list[Any]:
    """Do the workers live, and do they work?"""
    return [
        lines(
            "Heartbeat age by worker",
            "Time since the last heartbeat of each worker; a worker that left politely is gone.",
            "s",
            (f"time() - max by (worker) ({sel('worker_last_heartbeat_timestamp_seconds')})", "{{worker}}"),
            no_value="no worker",
        ),
        lines(
            "Workers by state",
            "Worker processes by what they do.",
            "short",
            (f"max by (state) ({sel('workers')})", "{{state}}"),
            stacked=True,
        ),
        lines(
            "Take-overs",
            "Workers declared dead whose sprints another took over, an hour.",
            "short",
            (f"sum(rate({sel('lease_takeovers_total')}[{RATE}])) * 3600", "take-overs"),
        ),
        lines(
            "Worker memory",
            "Resident memory of each worker's process, as the collector saw it last.",
            "bytes",
            (f"max by (worker) ({sel('worker_memory_bytes')})", "{{worker}}"),
            span=6,
        ),
        lines(
            "Worker age",
            "Time since the process of each worker began.",
            "s",
            (f"time() - max by (worker) ({sel('worker_start_timestamp_seconds')})", "{{worker}}"),
            span=6,
        ),
        lines(
            "tmux panes",
            "Panes of our own tmux sessions by what they do; none where no lanes are up.",
            "short",
            (f"max by (session, state) ({sel('tmux_panes')})", "{{session}} {{state}}"),
            span=6,
            no_value="no lanes",
        ),
        states(
            "Agents up",
            "Lanes that are meant to be up, drawn while the process in their pane lives; none while the fleet is paused.",
            f"max by (instance, agent) ({sel('agent_up')})",
            "{{instance}} {{agent}}",
            no_value="no lanes",
            span=6,
        ),
    ]


def telemetry_row() -> list[Any]:
    """Do logins, deliveries and alerts come through?"""
    return [
        number(
            "Token expires in",
            "Time until the first login expires; it is renewed only when it is needed, so an idle night may end it without harm.",
            "s",
            (f"min({sel('auth_token_expiry_timestamp_seconds')}) - time()", "left"),
            no_value="no login",
        ),
        number(
            "Since last delivery",
            "Time since the last authentic delivery, or since the start while there was none.",
            "s",
            (f"time() - max({sel('webhook_last_delivery_timestamp_seconds')})", "age"),
            no_value="no bot",
        ),
        number(
            "Since last test delivery",
            "Time since Gitea last agreed to send a test delivery; without the right to see the webhook it never does.",
            "s",
            (f"time() - max({sel('webhook_canary_timestamp_seconds')})", "age"),
            no_value="not possible",
        ),
        lines(
            "Login renewals",
            "Renewals of logins that were tried, an hour.",
            "short",
            (per_hour("auth_refresh_total", "provider", "result"), "{{provider}} {{result}}"),
            span=6,
            no_value="no login",
        ),
        lines(
            "Alert notifications",
            "Notifications of Alertmanager that came to /alerts, an hour.",
            "short",
            (per_hour("alertmanager_notifications_total", "status", "result"), "{{status}} {{result}}"),
            span=6,
        ),
    ]


def watchdog_row() -> list[Any]:
    """What do the probes find, what was done, and what holds itself?"""
    return [
        states(
            "Probes",
            "The watchdog's probes, drawn while they are well; one that cannot tell has no line.",
            f"max by (probe) ({sel('probe_ok')})",
            "{{probe}}",
            no_value="no watchdog",
        ),
        states(
            "Model drift",
            "Profiles that run another model than `watchdog.expect` says, drawn while they do.",
            f"max by (agent) ({sel('watchdog_model_drift')})",
            "{{agent}}",
            no_value="no profile",
        ),
        lines(
            "Probe age",
            "Time since the last run of each probe ended.",
            "s",
            (f"time() - max by (probe) ({sel('probe_last_run_timestamp_seconds')})", "{{probe}}"),
            span=12,
            no_value="no watchdog",
        ),
        lines(
            "Actions",
            "What the watchdog did about what its probes found, an hour.",
            "short",
            (per_hour("watchdog_actions_total", "probe", "result"), "{{probe}} {{result}}"),
            span=12,
            no_value="no watchdog",
        ),
        lines(
            "Repairs",
            "Repairs of a profile's model that were tried, an hour.",
            "short",
            (per_hour("watchdog_fixes_total", "agent", "result"), "{{agent}} {{result}}"),
            span=12,
            no_value="no profile",
        ),
        lines(
            "Open breakers",
            "Automatic breakers that are open, by what they hold; what waits for one counts as work the fleet owes.",
            "short",
            (f"max by (scope) ({sel('breaker_open')})", "{{scope}}"),
            span=12,
        ),
    ]


def collector_row() -> list[Any]:
    """What does the collector see, and does it see it?"""
    return [
        lines(
            "Collector age",
            "Time since each source of the collector last answered.",
            "s",
            (f"time() - max by (collector) ({sel('collector_last_success_timestamp_seconds')})", "{{collector}}"),
            span=6,
            no_value="no collector",
        ),
        lines(
            "Missed sources",
            "Sources that gave the collector nothing in time, an hour.",
            "short",
            (per_hour("collector_errors_total", "collector"), "{{collector}}"),
            span=6,
        ),
        lines(
            "Schedule drift",
            "How late each schedule fired last, or how long it is overdue.",
            "s",
            (f"max by (schedule) ({sel('schedule_drift_seconds')})", "{{schedule}}"),
            span=6,
            no_value="no collector",
        ),
        lines(
            "Open issues and pull requests",
            "What is open in the served repositories.",
            "short",
            (f"max({sel('gitea_open_issues')})", "issues"),
            (f"max by (author) ({sel('gitea_open_pull_requests')})", "pull requests by {{author}}"),
            span=6,
            no_value="no collector",
        ),
        lines(
            "Disk",
            "Size of the file system that holds the state folder, and what is free of it.",
            "bytes",
            (f"min by (instance) ({sel('disk_free_bytes')})", "free on {{instance}}"),
            (f"max by (instance) ({sel('disk_size_bytes')})", "size on {{instance}}"),
            span=12,
            no_value="no collector",
        ),
        lines(
            "Room taken",
            "What the fleet takes in the state folder.",
            "bytes",
            (f"max by (place) ({sel('disk_used_bytes')})", "{{place}}"),
            span=12,
            no_value="no collector",
        ),
    ]


def process_row() -> list[Any]:
    """Is the process itself well?"""
    return [
        lines(
            "Event loop lag p99",
            "How late a timer of one second fires; what blocks the loop shows here.",
            "s",
            (quantile(0.99, "event_loop_lag_seconds"), "p99"),
        ),
        lines(
            "Memory",
            "Resident memory of each process.",
            "bytes",
            (f"max by (instance) (process_resident_memory_bytes{{{SEL}}})", "{{instance}}"),
        ),
        lines(
            "Scrape duration",
            "How long Prometheus waits for /metrics, which reads the store.",
            "s",
            (f"max by (instance) (scrape_duration_seconds{{{SEL}}})", "{{instance}}"),
        ),
        lines(
            "Label overflow",
            "Values outside their closed set, an hour, by label: a wrong list, or somebody's hostile text.",
            "short",
            (per_hour("metrics_label_overflow_total", "label"), "{{label}}"),
        ),
    ]


def money_row() -> list[Any]:
    """What does it cost?"""
    spent = sel("llm_cost_usd_total", 'provider=~"$provider"')
    opened, merged = sel("pull_requests_total", 'event="opened"'), sel("pull_requests_total", 'event="merged"')
    sprints = sel("sprint_duration_seconds_count")
    return [
        number(
            "Spent in 24 h",
            "Money by the configured price table.",
            "currencyUSD",
            (f"sum(increase({spent}[1d]))", "spent"),
            no_value="nothing yet",
        ),
        number(
            "Budget used in 24 h",
            "Share of the daily budget; at the limit no sprint is started.",
            "percentunit",
            (f'dispatch:llm_cost_usd:increase1d{{job=~"$job"}} / on (job) (max by (job) ({sel("llm_budget_usd")}) > 0)', "used"),
            no_value="no budget",
            warn=0.8,
            alarm=1.0,
        ),
        number(
            "Cost per opened pull request",
            "Money of the time shown by pull requests opened in it.",
            "currencyUSD",
            (f"sum(increase({spent}[$__range])) / (sum(increase({opened}[$__range])) > 0)", "cost"),
            no_value="none opened",
        ),
        number(
            "Cost per sprint",
            "Money of the time shown by sprints finished in it.",
            "currencyUSD",
            (f"sum(increase({spent}[$__range])) / (sum(increase({sprints}[$__range])) > 0)", "cost"),
            no_value="none finished",
        ),
        number(
            "Cost per merged pull request",
            "Money of the time shown by pull requests merged in it: merges come days after the spend, so choose a long time.",
            "currencyUSD",
            (f"sum(increase({spent}[$__range])) / (sum(increase({merged}[$__range])) > 0)", "cost"),
            no_value="none merged",
        ),
    ]


def use_row() -> list[Any]:
    """Where do money and tokens go?"""
    chosen = 'provider=~"$provider"'
    return [
        lines(
            "Cost by provider and model",
            "Money an hour, by the configured price table.",
            "currencyUSD",
            (f"sum by (provider, model) (rate({sel('llm_cost_usd_total', chosen)}[{RATE}])) * 3600", "{{provider}} {{model}}"),
            stacked=True,
        ),
        lines(
            "Tokens by direction",
            "Tokens a second, as the providers reported them.",
            "short",
            (f"sum by (direction) (rate({sel('llm_tokens_total', chosen)}[{RATE}]))", "{{direction}}"),
            stacked=True,
        ),
        grid(
            "Tokens by model",
            "Tokens in the time shown.",
            "short",
            f"sum by (provider, model, direction) (increase({sel('llm_tokens_total', chosen)}[$__range]))",
            "{{provider}} {{model}} {{direction}}",
            no_value="no call",
            span=8,
        ),
    ]


def providers_row() -> list[Any]:
    """How do the providers do?"""
    chosen = 'provider=~"$provider"'
    seconds = sel("llm_request_duration_seconds_bucket", chosen)
    calls, bad = sel("llm_requests_total", chosen), sel("llm_requests_total", f'{chosen},result!="ok"')
    return [
        lines(
            "Latency by provider",
            "Half and nineteen twentieths of the calls of a provider are faster.",
            "s",
            (f"histogram_quantile(0.5, sum by (le, provider) (rate({seconds}[{RATE}])))", "{{provider}} p50"),
            (f"histogram_quantile(0.95, sum by (le, provider) (rate({seconds}[{RATE}])))", "{{provider}} p95"),
            no_value="no call",
        ),
        lines(
            "Error ratio by provider",
            "Share of the calls that gave no usable reply.",
            "percentunit",
            (f"sum by (provider) (rate({bad}[{RATE}]))\n/ (sum by (provider) (rate({calls}[{RATE}])) > 0)", "{{provider}}"),
            no_value="no call",
        ),
        lines(
            "Fallbacks",
            "Providers passed over for the next, an hour.",
            "short",
            (per_hour("llm_fallbacks_total", "from_provider", "to_provider"), "{{from_provider}} to {{to_provider}}"),
            no_value="none",
        ),
        lines(
            "Calls in flight",
            "Calls that wait for a reply now.",
            "short",
            (f"sum by (provider) ({sel('llm_inflight_requests', chosen)})", "{{provider}}"),
            span=12,
            no_value="no call",
        ),
        states(
            "Available",
            "Providers that may be called, drawn while they may; one that cools down or is logged out is not.",
            f"max by (provider) ({sel('llm_provider_available', chosen)})",
            "{{provider}}",
            span=12,
            no_value="not tried",
        ),
    ]


def dashboards(parameters: Parameters) -> list[dict[str, Any]]:
    """The four dashboards."""
    agent = ("agent", "Agent", 'label_values(dispatch_sprints_started_total{job=~"$job"}, agent)')
    model = ("model", "Model", 'label_values(dispatch_llm_requests_total{job=~"$job"}, model)')
    provider = ("provider", "Provider", 'label_values(dispatch_llm_requests_total{job=~"$job"}, provider)')
    return [
        _dashboard(
            parameters,
            "dispatch-fleet",
            "fleet",
            "Is work being done, does it succeed, and do Gitea and the bot understand each other?",
            {
                "Now": now_row(parameters),
                "Flow": flow_row(),
                "Service level": service_row(),
                "Gitea": gitea_row(),
                "Deliveries": inbox_row(),
            },
        ),
        _dashboard(
            parameters,
            "dispatch-sprint",
            "sprints",
            "How long do sprints take, what comes of them, and how do the models work?",
            {"Duration": duration_row(), "Outcome": outcome_row(), "Turns and tools": turns_row()},
            agent,
            model,
        ),
        _dashboard(
            parameters,
            "dispatch-watchdog",
            "watchdog and health",
            "What does the service think of itself, do its workers live, and do logins, deliveries and alerts come through?",
            {
                "Health": health_row(),
                "Workers": workers_row(),
                "Auth and telemetry": telemetry_row(),
                "Watchdog": watchdog_row(),
                "Collector": collector_row(),
                "Service itself": process_row(),
            },
        ),
        _dashboard(
            parameters,
            "dispatch-cost",
            "cost",
            "What do sprints cost, and how do the providers do?",
            {"Money": money_row(), "Use": use_row(), "Providers": providers_row()},
            provider,
        ),
    ]


def _dashboard(
    parameters: Parameters, uid: str, title: str, text: str, rows: dict[str, list[Any]], *variables: tuple[str, str, str]
) -> dict[str, Any]:
    board = _board(uid, f"timmy-dispatch: {title}", text, parameters, variables)
    for name, panels in rows.items():
        board.with_row(dashboard.Row(name))
        for panel in panels:
            board.with_panel(panel)
    return _finished(board)


def _board(uid: str, title: str, text: str, parameters: Parameters, variables: Iterable[tuple[str, str, str]]) -> dashboard.Dashboard:
    board = dashboard.Dashboard(title).uid(uid).description(text).tags([TAG]).readonly().refresh("30s").time("now-6h", "now")
    board.tooltip(models.DashboardCursorSync.CROSSHAIR)
    board.with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
    for name, label, query in (
        ("job", "Job", "label_values(dispatch_build_info, job)"),
        ("instance", "Instance", 'label_values(dispatch_build_info{job=~"$job"}, instance)'),
        *variables,
    ):
        variable = dashboard.QueryVariable(name).label(label).query(query).datasource(SOURCE).multi(True).include_all(True).all_value(".+")
        board.with_variable(variable.refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED))
    version = f"count by (version) ({sel('build_info')})"
    offered = f"group by (provider, model) ({sel('llm_requests_total')})"
    for name, color, expr in (
        ("Restarts", "blue", f"changes(process_start_time_seconds{{{SEL}}}[{RATE}]) > 0"),
        ("Alerts", "red", 'ALERTS{alertstate="firing",service="timmy-dispatch",severity="critical"}'),
        ("Deploys", "purple", f"{version} unless {version.replace('})', '} offset 5m)')}"),
        ("Pauses", "yellow", f"max({sel('paused')}) == 1"),
        # Children of every configured model stand at zero from the start, so a new series is a new model.
        ("Cut-overs", "orange", f"{offered} unless {offered.replace('})', '} offset 5m)')}"),
    ):
        board.annotation(dashboard.AnnotationQuery().name(name).datasource(SOURCE).enable(True).icon_color(color).expr(expr))
    board.link(
        dashboard.DashboardLink("Dashboards")
        .type(models.DashboardLinkType.DASHBOARDS)
        .tags([TAG])
        .as_dropdown(True)
        .keep_time(True)
        .include_vars(True)
    )
    if parameters.pages:
        board.link(
            dashboard.DashboardLink("Sprint pages")
            .type(models.DashboardLinkType.LINK)
            .url(parameters.pages.rstrip("/") + "/")
            .target_blank(True)
        )
    if parameters.gitea:
        queued = f"{parameters.gitea.rstrip('/')}/issues?labels=dispatch%2Fqueued"
        board.link(dashboard.DashboardLink("Queued issues").type(models.DashboardLinkType.LINK).url(queued).target_blank(True))
    return board


def _finished(board: dashboard.Dashboard) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(JSONEncoder(sort_keys=True).encode(board.build()))
    for index, panel in enumerate(body["panels"], start=1):
        panel["id"] = index
    for item in (*body.get("links", ()), *body["annotations"]["list"]):
        if item.get("placement") == "inControlsMenu":
            del item["placement"]
    return body


def build(parameters: Parameters) -> dict[str, str]:
    """Every generated file: its path below `grafana/`, and its text."""
    fleet = [
        *ages(parameters),
        *(alert_rule(alert, parameters) for alert in (*fleet_alerts(parameters), *watch_alerts(parameters), *burn_alerts())),
    ]
    pipeline = [alert_rule(alert, parameters) for alert in pipeline_alerts(parameters)]
    return {
        "alerts/dispatch.rules.yml": rule_file({"dispatch-recordings": recordings(parameters)}),
        "alerts/dispatch.alerts.yml": rule_file({"dispatch-fleet": fleet, "dispatch-pipeline": pipeline}),
        **{f"dashboards/{board['uid']}.json": _text(board) for board in dashboards(parameters)},
    }


def _text(board: dict[str, Any]) -> str:
    return json.dumps(board, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Writes all files below `--out`, and says which changed."""
    defaults, limits = Parameters(), Thresholds()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder that gets dashboards/ and alerts/")
    parser.add_argument(
        "--stall-after", type=float, default=limits.stall_after, help="seconds; the same as timing.stall_after_seconds in dispatch.yml"
    )
    parser.add_argument("--worker-lost", type=float, default=limits.worker_lost, help="seconds without a heartbeat")
    parser.add_argument("--sprint-overrun", type=float, default=limits.sprint_overrun, help="seconds a sprint may run")
    parser.add_argument("--no-success", type=float, default=limits.no_success, help="seconds without a pull request")
    parser.add_argument("--hold", type=float, default=defaults.hold, help="factor on every `for` and `keep_firing_for`")
    parser.add_argument("--job", default=defaults.job, help="the scrape job")
    parser.add_argument("--runbooks", default=defaults.runbooks, help="what stands before ALERT.md in runbook_url")
    parser.add_argument("--grafana", default=defaults.grafana, help="address of Grafana")
    parser.add_argument("--pages", default=defaults.pages, help="address of the service's own pages, for links")
    parser.add_argument("--gitea", default=defaults.gitea, help="address of Gitea, for links")
    given = parser.parse_args(arguments)
    thresholds = replace(
        limits,
        stall_after=given.stall_after,
        worker_lost=given.worker_lost,
        sprint_overrun=given.sprint_overrun,
        no_success=given.no_success,
    )
    parameters = Parameters(
        thresholds=thresholds,
        hold=given.hold,
        job=given.job,
        runbooks=given.runbooks,
        grafana=given.grafana.rstrip("/"),
        gitea=given.gitea,
        pages=given.pages,
    )
    for name, text in build(parameters).items():
        path = given.out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        changed = not path.exists() or path.read_text(encoding="utf-8") != text
        path.write_text(text, encoding="utf-8")
        print(f"{'written  ' if changed else 'unchanged'} {path}")


if __name__ == "__main__":
    main()
