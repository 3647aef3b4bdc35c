"""telemetry-analyzer.py: a report's every number is what a naive recount of the rows says, in all of its forms."""

from __future__ import annotations

import asyncio
import html.parser
import io
import json
import re
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from postgres_support import BACKENDS
from rich.console import Console
from talk import issue_with, reacted
from test_launcher import cli
from world import World, make_world, until

from bot import config, handbook, replies
from bot.chatops import parse
from bot.figures import HOUR_MS, Figures, Spread, window_ms
from bot.fleet import report
from bot.models import ConfigError, FailureReason, OutcomeKind, Reply, Source, UserError, WaitingReason
from bot.store import Store, deliveries, intents, providers, pulls, sprints, steps

NOW = 1_800_000_000_000
LENGTH = 24 * HOUR_MS
SINCE = NOW - LENGTH
REPOS = {1: "acme/rocket", 2: "acme/ship"}
BAD = [OutcomeKind.NO_CHANGE, OutcomeKind.REFUSED, OutcomeKind.BUDGET, OutcomeKind.FAILED]

moments = st.integers(NOW - 2 * LENGTH, NOW + HOUR_MS)


@st.composite
def sprint_rows(draw: st.DrawFn) -> list[dict[str, Any]]:
    rows = []
    for n in range(draw(st.integers(0, 14))):
        queued = draw(moments)
        started = queued + draw(st.integers(0, HOUR_MS)) if draw(st.booleans()) else None
        settled = (started or queued) + draw(st.integers(0, 2 * HOUR_MS)) if draw(st.integers(0, 3)) else None
        outcome = draw(st.sampled_from(list(OutcomeKind))) if settled is not None else None
        rows.append(
            {
                "id": f"s{n}",
                "repo_id": (repo := draw(st.sampled_from([1, 2]))),
                "repo": REPOS[repo],
                "issue": n + 1,
                "state": "settled" if settled is not None else draw(st.sampled_from(["queued", "admitted", "working"])),
                "outcome": outcome,
                "reason": draw(st.sampled_from(list(FailureReason))) if outcome is OutcomeKind.FAILED else "",
                "detail": draw(st.sampled_from(["", "it broke", "<b>\x1b[31m|`"])),
                "source": draw(st.sampled_from(list(Source))),
                "provider": draw(st.sampled_from(["", "nous"])),
                "model": draw(st.sampled_from(["", "hermes-4", "qwen"])),
                "steps": draw(st.integers(0, 60)),
                "tokens": draw(st.integers(0, 10**6)),
                "usd": draw(st.integers(0, 500)) / 100,
                "queued_ms": queued,
                "started_ms": started,
                "settled_ms": settled,
                "admitted_n": draw(st.integers(0, 3)),
                "crashes": draw(st.integers(0, 2)),
                "pr": draw(st.sampled_from([0, 0, 101, 102, 103])) if settled is not None else 0,
            }
        )
    return rows


fates = st.dictionaries(
    st.tuples(st.sampled_from([1, 2]), st.sampled_from([101, 102, 103]), st.sampled_from(["merged", "closed", "open"])), moments, max_size=6
)
calls = st.lists(
    st.tuples(st.integers(0, 13), moments, st.one_of(st.none(), st.integers(0, 300)), st.integers(0, 300), st.booleans()), max_size=12
)
waits = st.lists(st.tuples(st.sampled_from([1, 2]), st.sampled_from(list(WaitingReason)), moments), max_size=8)
said = st.lists(
    st.tuples(st.sampled_from([1, 2]), st.sampled_from(["run", "retry"]), st.sampled_from(["ok", "denied"]), moments), max_size=8
)
heard = st.lists(st.tuples(st.sampled_from(["issues", "issue_comment"]), moments), max_size=8)


def fill(store: Store, rows: Any, fate: Any, call: Any, wait: Any, command: Any, delivery: Any) -> None:
    fixed = {
        "priority": 5,
        "trigger": "t",
        "requester_id": 1,
        "requester": "alice",
        "options": {},
        "limits": {},
        "checks": [],
        "flagged": [],
    }

    def write(conn: Any) -> None:
        for table in (sprints.table, pulls.table, steps.table, intents.decisions, deliveries.table, providers.table):
            conn.execute(table.delete())
        if rows:
            conn.execute(sprints.table.insert(), [fixed | row | {"updated_ms": NOW} for row in rows])
        for (repo_id, number, state), at_ms in fate.items():
            conn.execute(pulls.table.insert().values(repo_id=repo_id, number=number, state=state, at_ms=at_ms))
        for n, (of, at_ms, cents, reserve, failed) in enumerate(call):
            conn.execute(
                steps.table.insert().values(
                    sprint_id=f"s{of}",
                    attempt=1,
                    n=n,
                    reserved_usd=reserve / 100,
                    reserved_tokens=1,
                    cost_usd=None if cents is None else cents / 100,
                    error="no" if failed else None,
                    started_ms=at_ms,
                )
            )
        for repo_id, reason, at_ms in wait:
            intents.decide(conn, repo_id=repo_id, issue=1, kind="wait", result=reason, reason="", now_ms=at_ms)
        for n, (repo_id, verb, result, at_ms) in enumerate(command):
            intents.decide(conn, repo_id=repo_id, issue=1, kind=verb, result=result, reason="", intent_key=f"command:{n}", now_ms=at_ms)
        for n, (event, at_ms) in enumerate(delivery):
            deliveries.add(conn, digest=str(n), event_type=event, delivery="", body=b"", now_ms=at_ms)

    store.write_sync(write)


def inside(at_ms: int | None) -> bool:
    return at_ms is not None and SINCE <= at_ms < NOW


def check(found: Figures, repo_id: int | None, rows: Any, fate: Any, call: Any, wait: Any, command: Any, delivery: Any) -> None:
    """Counted anew, one loop a number, from what was generated."""
    rows = [row for row in rows if repo_id in (None, row["repo_id"])]
    ended = [row for row in rows if row["state"] == "settled" and inside(row["settled_ms"])]
    assert found.settled == len(ended)
    for outcome in OutcomeKind:
        assert found.outcomes.get(outcome, 0) == sum(row["outcome"] == outcome for row in ended)
    assert dict(found.asked) == Counter(str(row["source"]) for row in rows if inside(row["queued_ms"]))
    assert found.usd == pytest.approx(sum(row["usd"] for row in ended))
    assert (found.steps, found.tokens) == (sum(row["steps"] for row in ended), sum(row["tokens"] for row in ended))
    assert found.crashes == sum(row["crashes"] for row in ended)
    assert found.requeues == sum(max(0, row["admitted_n"] - 1) for row in ended)
    assert found.stalled == sum(row["reason"] == "stalled" for row in ended)
    assert (found.running, found.queued) == (
        sum(row["state"] in ("admitted", "working") for row in rows),
        sum(row["state"] == "queued" for row in rows),
    )
    first: dict[tuple[int, int], Any] = {}
    for row in sorted(rows, key=lambda row: (row["settled_ms"] or 0, row["id"])):
        if row["pr"]:
            first.setdefault((row["repo_id"], row["pr"]), row)
    opened = [row for row in first.values() if inside(row["settled_ms"])]
    assert found.opened == len(opened)
    check_spread(found.to_pull, [row["settled_ms"] - row["queued_ms"] for row in opened])
    check_spread(found.queue_wait, [row["started_ms"] - row["queued_ms"] for row in rows if inside(row["started_ms"])])
    of_repo = {key: at for key, at in fate.items() if repo_id in (None, key[0]) and inside(at)}
    merged = [key for key in of_repo if key[2] == "merged"]
    assert (found.merged, found.closed) == (len(merged), sum(key[2] == "closed" for key in of_repo))
    for group in found.repositories:
        mine = [row for row in ended if row["repo"] == group.name]
        assert (group.sprints, group.usd) == (len(mine), pytest.approx(sum(row["usd"] for row in mine)))
        assert group.merged == sum((key[0], key[1]) in first and REPOS[key[0]] == group.name for key in merged)
    assert sum(group.sprints for group in found.repositories) == len(ended)
    for group in found.models:
        mine = [row for row in ended if named(row) == group.name]
        assert (group.sprints, group.good) == (len(mine), sum(row["outcome"] in ("pull_request", "updated") for row in mine))
        assert group.merged == sum(named(first[key[:2]]) == group.name for key in merged if key[:2] in first)
    assert sum(group.sprints for group in found.models) == len(ended)
    failures = Counter((str(row["outcome"]), str(row["reason"])) for row in ended if row["outcome"] in BAD)
    assert {(failure.outcome, failure.reason): failure.count for failure in found.failures} == failures
    for failure in found.failures:
        of_kind = [f"{row['repo']}#{row['issue']}" for row in ended if (row["outcome"], row["reason"]) == (failure.outcome, failure.reason)]
        assert {example.ref for example in failure.examples} <= set(of_kind)
        assert len(failure.examples) == min(3, len(of_kind))
    ids = {row["id"] for row in rows}
    made = [one for one in call if inside(one[1]) and (repo_id is None or f"s{one[0]}" in ids)]
    assert (found.calls, found.failed_calls) == (len(made), sum(one[4] for one in made))
    assert found.calls_usd == pytest.approx(sum(one[3] if one[2] is None else one[2] for one in made) / 100)
    assert dict(found.waits) == Counter(str(one[1]) for one in wait if inside(one[2]) and repo_id in (None, one[0]))
    assert dict(found.commands) == Counter(f"{one[1]}: {one[2]}" for one in command if inside(one[3]) and repo_id in (None, one[0]))
    assert dict(found.deliveries) == (Counter(one[0] for one in delivery if inside(one[1])) if repo_id is None else {})
    assert sum(bucket.good for bucket in found.buckets) == found.good
    assert sum(bucket.good + bucket.other for bucket in found.buckets) == found.settled
    assert sum(bucket.usd for bucket in found.buckets) == pytest.approx(found.usd)


def check_spread(spread: Spread, values: list[int]) -> None:
    assert spread.count == len(values)
    if values:
        assert spread.median_ms == statistics.median_low(values)
        assert spread.longest_ms == max(values)
        assert sum(value <= spread.p90_ms for value in values) >= 0.9 * len(values)


def named(row: Any) -> str:
    return "/".join(part for part in (row["provider"], row["model"]) if part) or "none"


@pytest.mark.parametrize("database", BACKENDS, indirect=True)
def test_every_number_is_what_a_recount_says(store: Store):
    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(rows=sprint_rows(), fate=fates, call=calls, wait=waits, command=said, delivery=heard)
    def holds(**generated: Any) -> None:
        fill(store, *generated.values())
        for repo_id in (None, 1):
            found = store.read_sync(lambda conn, repo_id=repo_id: report.collect(conn, length_ms=LENGTH, now_ms=NOW, repo_id=repo_id))
            check(found, repo_id, *generated.values())
            forms(found)

    holds()


class Closed(html.parser.HTMLParser):
    """Counts tags that were not closed, and notes what would be fetched."""

    VOID = ("meta", "br", "rect", "line", "link")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.fetched += [str(value) for name, value in attrs if name in ("src", "href", "srcset", "action")]
        if tag not in self.VOID or (
            tag == "rect" and "<rect" in (self.get_starttag_text() or "") and "/>" not in (self.get_starttag_text() or "")
        ):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def forms(found: Figures) -> None:
    """Every form can be made, and none of them acts."""
    page = Closed()
    page.feed(report.as_html(found))
    assert page.open == []
    assert page.fetched == []
    assert not page.tags & {"script", "img", "iframe", "b"}
    assert json.loads(report.as_json(found))["settled"] == found.settled
    comment = replies.render(Reply("report", {"figures": json.loads(report.as_json(found))}), key="report:x")
    assert parse(comment.partition("<!--")[0], {"run", "report"}) == []
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(*report.as_tables(found))
    said = console.export_text()
    assert "\x1b[31m" not in said
    assert f"{found.settled:,}" in said


@pytest.mark.parametrize(("text", "hours"), [("12h", 12), ("24H", 24), ("7d", 168), ("2w", 336), ("90m", 1.5), ("60 min", 1)])
def test_windows(text: str, hours: float):
    assert window_ms(text) == hours * HOUR_MS


@pytest.mark.parametrize("text", ["", "h", "0h", "-1h", "12", "400d", "1y", "12h; rm"])
def test_what_is_no_window(text: str):
    with pytest.raises(UserError, match="no window"):
        window_ms(text)


async def test_a_person_asks_in_a_comment_and_sees_this_repository_only(world: World):
    issue = await issue_with(world)
    await world.alice.label(issue, "dispatch")
    await world.settled(issue)
    await world.store.write(lambda conn: conn.execute(sprints.table.update().where(sprints.c.issue == issue).values(usd=1.5)))
    [pull] = await world.pulls()
    await world.alice.merge(pull["number"])

    async def merged():
        return (await world.sprint(issue)).pr_state == "merged"

    await until(merged)
    comment = await world.mallory.comment(issue, "/dispatch report 12h")
    await reacted(world, comment, "rocket")
    await world.shown(issue)
    answer = (await world.by_bot(issue))[-1]
    assert "1 sprint: pull request 1" in answer
    assert "1 opened, 1 merged, 0 closed" in answer
    assert "$1.50 per merged pull request" in answer
    other = await world.alice.comment(issue, "/dispatch report a fortnight")
    await reacted(world, other, "confused")


async def test_the_terminal_has_all_forms(world: World):
    issue = await issue_with(world, "no_change")
    await world.alice.label(issue, "dispatch")
    await world.settled(issue)
    code, said = await cli(world, "report", "12h")
    assert code == 0
    assert re.search(r"Ended +1 \(no change 1\)", said)
    code, said = await cli(world, "report", "12h", "--format", "json")
    assert json.loads(said)["outcomes"] == {"no_change": 1}
    page = world.state_dir.parent / "night.html"
    assert (await cli(world, "report", world.stage.repo, "7d", "-o", str(page)))[0] == 0
    assert "<svg" in page.read_text()
    code, said = await cli(world, "report", "--format", "md")
    assert (code, "### Report: the last 24 hours" in said) == (0, True)
    assert (await cli(world, "report", "soon"))[0] == 1
    assert (await cli(world, "report", "nobody/nothing"))[0] == 1


def test_the_morning_reports_issue_must_be_served(tmp_path: Path):
    path = tmp_path / "dispatch.yml"
    text = handbook.example().replace('issue: ""', "issue: nobody/nothing#3").replace('"0 0 6 * * *"', '"0 0 25 * * *"')
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(ConfigError) as caught:
        config.load(path, environ={})
    faults = "\n".join(caught.value.faults)
    assert "report.issue: nobody/nothing is not among the repositories" in faults
    assert "report.schedule: '25' is no hour of a schedule" in faults


async def test_telemetry_analyzer_py_morning_report_is_posted_once(base: Path):
    async with make_world(base, start=False) as world:
        issue = await world.alice.open_issue("ops", "the morning report")
        await world.start(report={"issue": f"{world.stage.repo}#{issue}", "schedule": "* * * * * *"})
        await until(lambda: world.by_bot(issue))
        await asyncio.gather(*(world.service.morning_report.post() for _ in range(3)))
        await asyncio.sleep(2)
        await world.shown(issue)
        found = await world.by_bot(issue)
        assert 1 <= len(found) <= 2  # two where the hour ends meanwhile
        assert "Report: the last 24 hours" in found[0]
