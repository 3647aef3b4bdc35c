"""The real Prometheus scrapes the real bot under a scripted fleet: every panel says something, every legend's labels are there, every variable has values."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import re
import urllib.parse
import urllib.request
from pathlib import Path

import aiohttp
import pytest
from prometheus_support import GRAFANA, Monitoring, monitoring
from test_alerts import TOKEN, alert, notice
from world import World, make_world, until

from bot.redaction import Secret

BOARDS = {path.stem: json.loads(path.read_text()) for path in sorted((GRAFANA / "dashboards").glob("*.json"))}
PANELS = [(uid, panel) for uid, board in BOARDS.items() for panel in board["panels"] if panel["type"] != "row"]
# What is empty in this fleet because that is the truth; each entry must be empty indeed.
MAY_BE_EMPTY = {
    "Token expires in",
    "Login renewals",
    "Retries by reason",
    "tmux panes",
    "Agents up",
    # No Hermes profile is expected to run anything here.
    "Model drift",
    "Repairs",
}
# What is there or not according to the moment of a scrape.
SOMETIMES = {"Oldest queued", "Age of inbox and outbox", "Waiting by reason"}
OUTCOMES = {"pull_request", "no_change", "failed", "budget", "refused", "cancelled", "updated"}
BODY = "script: {}\n\nPlease mend `lib/slug.sh`."


class Fleet(World):
    """Two providers, the first of which nobody answers for, a price, a budget and the receiver of alerts."""

    def settings(self, **more):
        entry = {"name": "scripted", "base_url": self.model.url, "model": "scripted-1", "price": {"input": 1.0, "output": 2.0}}
        dead = {"name": "dead", "base_url": "http://127.0.0.1:9/v1", "model": "nobody"}
        changes = {
            "providers": [dead, entry],
            "queue": {"usd_per_day": 100.0},
            "alerts": {"repository": self.stage.repo},
            "limits": {"steps": 12},
            "collector": {"enabled": True, "every_seconds": 5.0},
        }
        return super().settings(**(changes | more))

    async def start(self, **more):
        keys = dataclasses.replace(self.stage.secrets(), alerts_token=Secret(TOKEN))
        return await super().start(**({"keys": keys} | more))

    async def sprint_of(self, script: str) -> int:
        issue = await self.alice.open_issue(f"with {script}", BODY.format(script))
        await self.alice.comment(issue, "/dispatch run")
        return issue


async def live(world: Fleet) -> None:
    """A day of the fleet: a sprint of every outcome, a command nobody may give, a delivery with a wrong signature, an alert."""
    ended = set()

    async def settled(issue: int) -> None:
        ended.add((await world.settled(issue, 60)).outcome)

    first = await world.sprint_of("fix")
    await settled(first)
    for script in ("no_change", "truncated", "endless", "touch_workflow"):
        await settled(await world.sprint_of(script))
    hung = await world.sprint_of("hang")
    await until(lambda: world.model.requests and world.model.requests[-1].script == "hang", 30)
    await asyncio.sleep(2.5)
    await world.alice.comment(hung, "/dispatch cancel")
    await settled(hung)
    await world.alice.comment(first, "/dispatch retry")
    await until(lambda: _attempts(world, first, 2), 30)
    await settled(first)
    [pull] = [
        each["number"] for each in await world.pulls() if each["state"] == "open" and each["head"]["label"] == f"dispatch/issue-{first}"
    ]
    await world.alice.merge(pull)
    await until(lambda: _merged(world), 30)
    await world.mallory.comment(first, "/dispatch run")
    await world.send("issue_comment", b"{}", secret="not the secret")
    url = f"http://127.0.0.1:{world.service.metrics_port}/alerts"
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {TOKEN}"}) as session:
        await session.post(url, json=notice(alert()))
        await session.post(url, json=notice(alert(firing=False)))
    print(f"outcomes: {sorted(ended)}")
    assert OUTCOMES - ended <= {"updated"}, ended


async def _merged(world: World) -> bool:
    samples = world.service.metrics.registry.collect()
    return any(
        each.labels["event"] == "merged" and each.value for one in samples if one.name == "dispatch_pull_requests" for each in one.samples
    )


async def _attempts(world: World, issue: int, count: int) -> bool:
    statement = "select count(*) from sprints where issue = ?"
    return (await world.store.read(lambda conn: conn.exec_driver_sql(statement, (issue,)).scalar())) >= count


def filled(expr: str) -> str:
    """The expression as Grafana sends it with everything chosen."""
    expr = re.sub(r"\$(job|instance|agent|model|provider)\b", ".+", expr)
    return expr.replace("$__rate_interval", "60s").replace("$__range", "5m")


async def series(watched: Monitoring, expr: str) -> list[dict]:
    """Every series the expression has had in the last two minutes, with its values."""
    now = asyncio.get_running_loop().run_in_executor

    def ask() -> list[dict]:
        import time

        end = time.time()
        query = urllib.parse.urlencode({"query": expr, "start": end - 120, "end": end, "step": 1})
        try:
            with urllib.request.urlopen(f"{watched.prometheus}/api/v1/query_range?{query}", timeout=10) as reply:
                return json.load(reply)["data"]["result"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{expr}: {error.read()!r}") from None

    return await now(None, ask)


def says(found: list[dict]) -> bool:
    return any(math.isfinite(float(value)) for each in found for _, value in each["values"])


async def complaints(watched: Monitoring, panels: list[tuple[str, dict]], empty: set[str]) -> list[str]:
    """What is wrong with the panels, one line each."""
    wrong = []
    for uid, panel in panels:
        where = f"{uid}: {panel['title']}"
        data = False
        for target in panel["targets"]:
            try:
                found = await series(watched, filled(target["expr"]))
            except AssertionError as error:
                wrong.append(f"{where}: {error}")
                continue
            data |= says(found)
            if panel["title"] not in empty | SOMETIMES and not says(found):
                wrong.append(f"{where} ({target['refId']}, {target['legendFormat']}) says nothing: {filled(target['expr'])}")
            for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
                if found and not all(label in each["metric"] for each in found):
                    wrong.append(f"{where}: the legend's {label} is not in the result")
        if panel["title"] in empty and data:
            wrong.append(f"{where} is on the list of what may be empty, and is not")
    return wrong


BREAKS = [
    ("a renamed metric", "dispatch_sprints{", "dispatch_sprintsx{"),
    ("a wrong by", "by (le, model)", "by (le, agent)"),
    ("bad PromQL", "sum by (tool, result)", "sum by (tool, result"),
    ("a missing legend label", "max by (state)", "max by (job)"),
    ("a wrong matcher", 'outcome!~"cancelled|refused|planned"', 'outcome=~"nothing"'),
]


@pytest.mark.prometheus
@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_every_panel_says_something(base: Path, tmp_path: Path):
    async with make_world(
        base, kind=Fleet, timing={"stall_after_seconds": 300}, watchdog={"every_seconds": {"disk": 1, "clock": 1}}
    ) as world:
        target = f"127.0.0.1:{world.service.metrics_port}"
        async with monitoring(tmp_path, target, generated=[]) as watched:
            await live(world)
            await asyncio.sleep(5)
            wrong = await complaints(watched, PANELS, MAY_BE_EMPTY)
            assert not wrong, "\n".join(wrong)
            assert await watched.query("dispatch_metrics_label_overflow_total > 0") == [], "a value outside its closed set"
            await every_variable_has_values(watched)
            await annotations_can_be_asked(watched)
            for what, old, new in BREAKS:
                text = json.dumps([panel for panel in PANELS if any(old in target["expr"] for target in panel[1]["targets"])])
                broken = json.loads(text.replace(json.dumps(old)[1:-1], json.dumps(new)[1:-1]))
                assert broken, what
                assert await complaints(watched, broken, MAY_BE_EMPTY), f"{what} is not noticed"


async def every_variable_has_values(watched: Monitoring) -> None:
    for uid, board in BOARDS.items():
        for variable in board["templating"]["list"]:
            if variable["name"] == "datasource":
                continue
            selector, label = re.fullmatch(r"label_values\((.*), (\w+)\)", filled(variable["query"])).groups()
            assert any(each["metric"].get(label) for each in await series(watched, selector)), f"{uid}: {variable['name']}"


async def annotations_can_be_asked(watched: Monitoring) -> None:
    for uid, board in BOARDS.items():
        for each in board["annotations"]["list"]:
            await series(watched, filled(each["expr"]))
            assert each["enable"], uid
