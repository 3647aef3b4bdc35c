"""A night in compressed time: hundreds of sprints through the real engine, a worker lost in the middle, and a report that agrees with a journal kept beside."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import time
from collections import Counter
from pathlib import Path
from typing import Any

import fleet_support
import pytest
from fleet_support import Fleet, Notes, launched, now_ms, queue_sprint

from bot.figures import HOUR_MS
from bot.fleet import report
from bot.fleet.exports import Exporter
from bot.models import FailureReason, Outcome, OutcomeKind, Usage
from bot.store import pulls, sprints, steps

SPRINTS = 200
OUTCOMES = (OutcomeKind.PULL_REQUEST, OutcomeKind.NO_CHANGE, OutcomeKind.FAILED, OutcomeKind.PULL_REQUEST, OutcomeKind.BUDGET)
JOURNAL: dict[str, dict[str, Any]] = {}


class Night(Notes):
    """Stages that end as the number of the issue says, and write down beside the store what they did."""

    async def prepare(self, sprint_id: str, k: int) -> dict[str, Any]:
        answer = await super().prepare(sprint_id, k)
        if answer["go"] == "next":
            await self._note(sprint_id, k, started_ms=now_ms(), provider="nous", model="hermes-4" if int(sprint_id[1:]) % 2 else "qwen")
        return answer

    async def work(self, sprint_id: str, k: int) -> dict[str, Any]:
        answer = await super().work(sprint_id, k)
        if answer["go"] == "next":

            def call(conn: Any) -> None:
                steps.reserve(conn, sprint_id, 1, 1, usd=0.02, tokens=100, now_ms=now_ms())
                usage = Usage(input=90, output=10, usd=0.01)
                steps.replied(
                    conn, sprint_id, 1, 1, message={"content": "done"}, usage=usage, provider="nous", model="hermes-4", now_ms=now_ms()
                )

            await self.fleet.store.write(call)
        return answer

    async def publish(self, sprint_id: str, k: int) -> dict[str, Any]:
        answer = await super().publish(sprint_id, k)
        if answer["go"] == "settle" and ending(sprint_id)[0] is OutcomeKind.PULL_REQUEST:
            await self._note(sprint_id, k, pr=1000 + int(sprint_id[1:]), pr_state="open")
        return answer

    async def settle(self, sprint_id: str, k: int, end: dict[str, Any]) -> dict[str, Any]:
        kind, reason = ending(sprint_id)
        me, at = self.fleet.lease.executor_id, now_ms()
        done = await self.fleet.store.write(
            lambda conn: sprints.settle(
                conn,
                sprint_id,
                k,
                me=me,
                outcome=Outcome(kind, reason, "as the night wanted"),
                spent=steps.spent(conn, sprint_id),
                steps=steps.count(conn, sprint_id),
                now_ms=at,
            )
        )
        if done:
            assert sprint_id not in JOURNAL, "it settled twice"
            JOURNAL[sprint_id] = {"outcome": kind, "reason": reason, "usd": 0.01, "tokens": 100, "model": int(sprint_id[1:]) % 2, "at": at}
        return {"result": "settled"}

    async def _note(self, sprint_id: str, k: int, **values: Any) -> None:
        me = self.fleet.lease.executor_id
        await self.fleet.store.write(lambda conn: sprints.update(conn, sprint_id, k, me=me, now_ms=now_ms(), **values))


def ending(sprint_id: str) -> tuple[OutcomeKind, str]:
    kind = OUTCOMES[int(sprint_id[1:]) % len(OUTCOMES)]
    return kind, FailureReason.CHECKS if kind is OutcomeKind.FAILED else ""


async def turn(fleet: Fleet, until_settled: int, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while len(JOURNAL) < until_settled:
        assert time.monotonic() < deadline, len(JOURNAL)
        await fleet.leader.round()
        await asyncio.sleep(0.05)


@pytest.mark.timeout(300)
async def test_a_night_is_reported_as_it_was(base: Path, monkeypatch: pytest.MonkeyPatch):
    JOURNAL.clear()
    monkeypatch.setattr(fleet_support, "Notes", Night)
    url, began = f"sqlite:///{base}/timmy.db", now_ms()
    cancelled = []
    async with launched(url, base / "a", node="a") as first:
        for issue in range(1, SPRINTS + 1):
            queue_sprint(first.store, issue, repo_id=1 + issue % 7, sprint_id=f"s{issue:03}")
        for issue in range(9, SPRINTS, 40):
            first.store.write_sync(lambda conn, issue=issue: sprints.cancel(conn, f"s{issue:03}", by="alice", now_ms=now_ms()))
            cancelled.append(f"s{issue:03}")
        await turn(first, SPRINTS // 3)
        # It is taken away in the middle of its work: what it runs is left as it stands.
        first.notes.hold = "work"
        with contextlib.suppress(AssertionError):
            await turn(first, SPRINTS, seconds=1.0)
    before = len(JOURNAL)
    async with launched(url, base / "b", node="b") as second:
        left = second.store.read_sync(sprints.owners)
        second.engine.recover(left or second.store.read_sync(second.engine.pending_owners))
        await turn(second, SPRINTS - len(cancelled))
        assert before < len(JOURNAL)
        merged = sorted(sprint for sprint, end in JOURNAL.items() if end["outcome"] is OutcomeKind.PULL_REQUEST)[::3]
        for sprint in merged:
            number = 1000 + int(sprint[1:])
            repo = 1 + int(sprint[1:]) % 7
            second.store.write_sync(
                lambda conn, repo=repo, number=number: pulls.fate(conn, repo, number, state="merged", at_ms=now_ms(), now_ms=now_ms())
            )
        exports = Exporter(second.store, base / "exports", scrub=lambda text: text)
        assert await exports.round() == SPRINTS
        now = now_ms() + 1
        found = second.store.read_sync(lambda conn: report.collect(conn, length_ms=HOUR_MS, now_ms=now))
    ends = Counter(str(end["outcome"]) for end in JOURNAL.values()) + Counter({"cancelled": len(cancelled)})
    assert dict(found.outcomes) == ends
    assert sum(found.asked.values()) == found.settled == SPRINTS
    assert (found.opened, found.merged, found.closed) == (ends["pull_request"], len(merged), 0)
    assert found.usd == pytest.approx(sum(end["usd"] for end in JOURNAL.values()))
    assert (found.tokens, found.steps, found.calls) == (100 * len(JOURNAL), len(JOURNAL), len(JOURNAL))
    assert found.usd_per_merged == pytest.approx(found.usd / len(merged))
    assert {(failure.outcome, failure.reason): failure.count for failure in found.failures} == {
        ("failed", "checks"): ends["failed"],
        ("no_change", ""): ends["no_change"],
        ("budget", ""): ends["budget"],
    }
    models = {group.name: group for group in found.models}
    for name, parity in (("nous/hermes-4", 1), ("nous/qwen", 0)):
        assert models[name].sprints == sum(end["model"] == parity for end in JOURNAL.values())
        assert models[name].merged == sum(int(sprint[1:]) % 2 == parity for sprint in merged)
    assert found.queue_wait.count == len(JOURNAL)
    assert 0 < found.to_pull.median_ms <= now - began
    assert (found.running, found.queued) == (0, 0)
    with (base / "exports" / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert Counter(line["outcome"] for line in lines) == ends
    assert {line["sprint"] for line in lines} == JOURNAL.keys() | set(cancelled)
    assert len(lines) == SPRINTS
