"""Retention of what decides: of random histories only what an issue at rest can spare goes, and whoever asks afterwards gets the same answer."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import sqlalchemy as sa
from postgres_support import BACKENDS

from bot.figures import LONGEST_MS
from bot.fleet.retention import DAY_MS, Aged, prune_aged, prune_journals
from bot.models import OutcomeKind, PlanState, SprintState
from bot.settings import RetentionSettings
from bot.store import Store, aged, follow_ups, intents, outbox, plans, sprints, steps
from bot.store.figures import figures

NOW = 1_800_000_000_000
KEEP = RetentionSettings(journals_days=30, plans_days=100, follow_ups_days=150, sprints_days=200)
REPO = 5
pytestmark = pytest.mark.parametrize("database", BACKENDS, indirect=True)
EVER = RetentionSettings(journals_days=0, plans_days=0, follow_ups_days=0, sprints_days=0)


@dataclass
class Life:
    """What one issue has gone through: rows of sprints, plans and follow-ups."""

    issue: int
    sprints: list[dict[str, Any]] = field(default_factory=list)
    plans: list[dict[str, Any]] = field(default_factory=list)
    follow_ups: list[str] = field(default_factory=list)

    def rests(self, days: float) -> bool:
        """By the words of the policy: nothing live, no pull request open, nothing still to be shown, nothing touched for so many days."""
        return all(
            row["state"] == SprintState.SETTLED
            and row["pr_state"] != "open"
            and row["projected_rev"] == row["rev"]
            and row["updated_ms"] < NOW - days * DAY_MS
            for row in self.sprints
        )


def sprint(name: str, issue: int, settled_ms: int | None, **more: Any) -> dict[str, Any]:
    row = {
        "id": name,
        "repo_id": REPO,
        "repo": "acme/rocket",
        "issue": issue,
        "title": "slug",
        "state": SprintState.SETTLED if settled_ms is not None else SprintState.WORKING,
        "outcome": OutcomeKind.UPDATED if settled_ms is not None else None,
        "priority": 5,
        "source": "command",
        "trigger": f"command:{name}",
        "requester_id": 1,
        "requester": "alice",
        "instructions": f"words of {name}",
        "options": {},
        "limits": {"steps": 60, "seconds": 60, "tokens": 1000, "usd": 1.0},
        "queued_ms": (settled_ms or NOW) - 10_000,
        "started_ms": (settled_ms or NOW) - 9_000,
        "settled_ms": settled_ms,
        "updated_ms": settled_ms or NOW,
        "checks": [{"command": "make test", "exit_code": 1, "output": "red"}, {"command": "make lint", "exit_code": 0, "output": ""}],
        "flagged": ["a"],
        "config_faults": [],
        "summary": f"said by {name}",
        "head_sha": f"sha-{name}",
        "steps": 2,
        "tokens": 30,
        "usd": 0.5,
        "pr": 0,
        "pr_state": "",
        "rev": 3,
        "projected_rev": 3,
    }
    return row | more


def history(dice: random.Random, issues: int) -> list[Life]:
    """Issues with up to four sprints each, some live, some with open pull requests, over three years."""
    lives = []
    for issue in range(1, issues + 1):
        life = Life(issue)
        moments = sorted(NOW - int(dice.uniform(0, 1100) * DAY_MS) for _ in range(dice.randint(1, 4)))
        # Half of all issues were over long ago, or the test would only see what stays.
        if dice.random() < 0.5:
            moments = [moment - 400 * DAY_MS for moment in moments]
        pull = issue + 1000 if dice.random() < 0.6 else 0
        state = dice.choice(["open", "merged", "closed", "reverted"]) if pull and dice.random() < 0.8 else "closed"
        for n, moment in enumerate(moments):
            name = f"i{issue}s{n}"
            last = n == len(moments) - 1
            live = last and dice.random() < 0.1
            row = sprint(name, issue, None if live else moment, pr=pull, pr_state=state if pull else "")
            if not live and dice.random() < 0.15:
                row["updated_ms"] = moment + int(dice.uniform(0, 500) * DAY_MS)
            if last and dice.random() < 0.05:
                row["projected_rev"] = 2
            life.sprints.append(row)
            if n and pull:
                life.follow_ups.append(name)
            if not live and dice.random() < 0.5:
                ended = dice.choice([each for each in PlanState if each is not PlanState.WAITING])
                life.plans.append(plan_row(name, issue, moment, PlanState.WAITING if last and dice.random() < 0.3 else ended))
        lives.append(life)
    return lives


def plan_row(name: str, issue: int, moment: int, state: PlanState) -> dict[str, Any]:
    return {
        "id": name,
        "sprint_id": name,
        "repo_id": REPO,
        "repo": "acme/rocket",
        "issue": issue,
        "state": state,
        "text": "1. a",
        "text_hash": "h",
        "told_hash": "",
        "requester_id": 1,
        "requester": "alice",
        "instructions": "",
        "options": {},
        "made_ms": moment,
        "expires_ms": moment + DAY_MS,
        "decided_by": "bob" if state is not PlanState.WAITING else "",
        "decided_ms": moment + 1000 if state is not PlanState.WAITING else 0,
        "reason": "",
    }


def write(store: Store, lives: list[Life]) -> None:
    def insert(conn: Any) -> None:
        for life in lives:
            for row in life.sprints:
                conn.execute(sprints.table.insert().values(**row))
                begun = row["started_ms"]
                for n in (1, 2):
                    key = {"sprint_id": row["id"], "attempt": 1, "n": n}
                    booked = {"reserved_usd": 1.0, "reserved_tokens": 9, "cost_usd": 0.25, "input": 10, "output": 5, "started_ms": begun}
                    conn.execute(steps.table.insert().values(**key, **booked, reply={"content": "said"}, done_ms=begun + 1))
                    conn.execute(
                        steps.tool_calls.insert().values(
                            **key, i=0, call_id="c", tool="search", arguments="{}", result="x", started_ms=begun
                        )
                    )
                intents.claim(conn, row["trigger"], begun)
                intents.decide(conn, repo_id=REPO, issue=life.issue, kind="run", result="ok", reason="", now_ms=begun)
            for row in life.plans:
                conn.execute(plans.table.insert().values(**row))
            for name in life.follow_ups:
                follow_ups.begin(conn, name, repo_id=REPO, pull=life.issue + 1000, afresh=False)
                follow_ups.gathered(conn, name, {"remarks": [name]})

    store.write_sync(insert)


def look(conn: Any) -> dict[str, Any]:
    """Everything that retention may or must not touch, as sets and rows."""

    def ids(column: Any) -> set[str]:
        return set(conn.execute(sa.select(column)).scalars())

    rows = {row.id: dict(row._mapping) for row in conn.execute(sa.select(sprints.table))}
    said = sa.select(steps.table.c.sprint_id).where(steps.table.c.reply.is_not(sa.null()))
    return {
        "plans": ids(plans.c.id),
        "follow_ups": ids(follow_ups.c.sprint_id),
        "steps": ids(steps.table.c.sprint_id),
        "calls": ids(steps.tool_calls.c.sprint_id),
        "said": set(conn.execute(said).scalars()),
        "summaries": {name for name, row in rows.items() if row["summary"]},
        "printed": {name for name, row in rows.items() if row["checks"][0]["output"]},
        "rows": {
            name: {key: value for key, value in row.items() if key not in ("summary", "checks")}
            | {"exits": [(check["command"], check["exit_code"]) for check in row["checks"]]}
            for name, row in rows.items()
        },
        "intents": ids(intents.table.c.key),
        "decisions": len(conn.execute(sa.select(intents.decisions.c.id)).all()),
    }


def report(conn: Any, days: float) -> Any:
    return figures(conn, since_ms=NOW - int(days * DAY_MS), until_ms=NOW, now_ms=NOW).to_json()


@pytest.mark.parametrize("seed", range(3))
async def test_only_what_an_issue_at_rest_can_spare_goes(store: Store, seed: int):
    dice = random.Random(seed)
    lives = history(dice, 60)
    write(store, lives)
    before = store.read_sync(look)
    windows = [dice.uniform(1, LONGEST_MS / DAY_MS) for _ in range(4)] + [LONGEST_MS / DAY_MS]
    reports = [store.read_sync(lambda conn, days=days: report(conn, days)) for days in windows]
    assert await prune_aged(store, EVER, NOW) == Aged()
    assert await prune_journals(store, EVER, NOW) == 0
    assert store.read_sync(look) == before
    found = await prune_aged(store, KEEP, NOW)
    after = store.read_sync(look)

    rested = {days: [life for life in lives if life.rests(days)] for days in (100, 150, LONGEST_MS / DAY_MS)}
    old_plans = {
        row["id"]
        for life in rested[100]
        for row in life.plans
        if row["state"] is not PlanState.WAITING and row["decided_ms"] < NOW - 100 * DAY_MS
    }
    old_follow_ups = {name for life in rested[150] for name in life.follow_ups}
    # What was asked for is 200 days; a report reaches back a year, and so do the steps.
    thinned = {row["id"] for life in rested[LONGEST_MS / DAY_MS] for row in life.sprints}
    assert all((old_plans, old_follow_ups, thinned)), "the history is too young to show anything"
    assert before["plans"] - after["plans"] == old_plans
    assert before["follow_ups"] - after["follow_ups"] == old_follow_ups
    for heavy in ("steps", "calls", "summaries", "printed"):
        assert before[heavy] - after[heavy] == thinned, heavy
    assert found == Aged(len(old_plans), len(old_follow_ups), len(thinned))
    for kept in ("rows", "intents", "decisions"):
        assert after[kept] == before[kept], kept
    assert [store.read_sync(lambda conn, days=days: report(conn, days)) for days in windows] == reports
    # Once more there is nothing to do; and what was said goes where no pull request is open, after its own days.
    assert await prune_aged(store, KEEP, NOW) == Aged()
    over = {
        row["id"]
        for life in lives
        for row in life.sprints
        if row["state"] == SprintState.SETTLED and row["pr_state"] != "open" and row["settled_ms"] < NOW - 30 * DAY_MS
    }
    assert await prune_journals(store, KEEP, NOW) == len(over & after["said"])
    assert await prune_journals(store, KEEP, NOW) == 0
    assert store.read_sync(look)["said"] == before["said"] - over


async def test_many_go_in_small_bites_and_a_pull_request_that_ends_begins_the_days_anew(store: Store):
    old = NOW - 500 * DAY_MS
    lives = [Life(n, [sprint(f"s{n}", n, old + n)], [plan_row(f"s{n}", n, old, PlanState.DENIED)]) for n in range(1, 231)]
    still = lives[-1]
    still.sprints[0] |= {"pr": 99, "pr_state": "open"}
    still.follow_ups.append(still.sprints[0]["id"])
    write(store, lives)
    assert await prune_aged(store, KEEP, NOW) == Aged(229, 0, 229)
    # It is closed now, after 500 days: what it refers to stays for as long as anything else, for it may be opened again.
    store.write_sync(lambda conn: sprints.pull_fate(conn, REPO, 99, state="closed", now_ms=NOW))
    shown = sprints.table.update().values(projected_rev=sprints.c.rev)
    store.write_sync(lambda conn: conn.execute(shown))
    assert await prune_aged(store, KEEP, NOW + DAY_MS) == Aged()
    assert await prune_aged(store, KEEP, NOW + 101 * DAY_MS) == Aged(plans=1)
    assert await prune_aged(store, KEEP, NOW + 151 * DAY_MS) == Aged(follow_ups=1)
    assert await prune_aged(store, KEEP, NOW + LONGEST_MS + DAY_MS) == Aged(sprints=1)


async def test_who_decides_by_an_old_plan_at_that_very_moment_keeps_it(store: Store):
    old = NOW - 500 * DAY_MS
    write(store, [Life(1, [sprint("a", 1, old)], [plan_row("a", 1, old, PlanState.APPROVED)])])
    before_ms = NOW - 100 * DAY_MS
    [found] = store.read_sync(lambda conn: aged.old_plans(conn, before_ms=before_ms, limit=9))
    # Between the look and the bite somebody retried the sprint that carried it out.
    store.write_sync(lambda conn: conn.execute(sprints.table.insert().values(**sprint("b", 1, None, queued_ms=NOW))))
    assert store.write_sync(lambda conn: aged.drop_plans(conn, [found], before_ms=before_ms)) == 0
    assert store.read_sync(lambda conn: plans.get(conn, "a")) is not None


async def test_what_is_shown_of_a_plan_outlives_neither_more_nor_less(store: Store):
    """The comment of a plan is a row of the outbox with days of its own; that it went before does not hold the plan, nor the other way round."""
    old = NOW - 500 * DAY_MS
    write(store, [Life(1, [sprint("a", 1, old)], [plan_row("a", 1, old, PlanState.EXPIRED)])])
    store.write_sync(lambda conn: plans._show(conn, "a", old))
    assert await prune_aged(store, KEEP, NOW) == Aged(plans=1, sprints=1)
    keys = store.read_sync(lambda conn: list(conn.execute(sa.select(outbox.table.c.key)).scalars()))
    assert keys == ["plan:a"], "not shown yet, so it stays"
