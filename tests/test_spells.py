"""What the fleet was, and for how long: every change of the verdict is a row, and a report's stalls are what a naive recount says."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from fleet_support import settings as fleet_settings
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from postgres_support import BACKENDS
from rich.console import Console
from talk import issue_with
from test_launcher import cli
from test_report import Closed
from world import make_world, until

from bot.figures import HOUR_MS, SPELLS, Figures, Spell, VerdictTime
from bot.fleet import report
from bot.fleet.chronicle import CONFIRM_MS, Chronicle
from bot.fleet.health import Thresholds, judge
from bot.fleet.retention import prune_rows
from bot.models import Pause, PauseScope, SprintState
from bot.settings import RetentionSettings
from bot.snapshot import FleetSnapshot, Health, HealthVerdict, WorkerBeat, WorkerState
from bot.store import Store, pauses, spells

NOW = 1_800_000_000_000
MINUTE = 60_000


looks = st.lists(
    st.tuples(st.integers(0, 5 * MINUTE), st.sampled_from(list(HealthVerdict)), st.sampled_from(["", "provider_down", "worker_lost"])),
    min_size=1,
    max_size=25,
)


def recount(seen: list[tuple[int, str, str]], since: int, until: int, now: int) -> list[tuple[str, int, int, set[str]]]:
    """(verdict, from, end, causes) of each spell that lies in the window, by one loop over the looks."""
    found: list[list[Any]] = []
    for at, verdict, cause in seen:
        if found and found[-1][0] == verdict and at - found[-1][2] <= spells.GAP_MS:
            found[-1][2] = at
            found[-1][3].add(cause)
            continue
        if found and at - found[-1][2] <= spells.GAP_MS:
            found[-1][2] = at
        found.append([verdict, at, at, {cause}])
    if now - found[-1][2] <= spells.GAP_MS:
        found[-1][2] = now
    return [(verdict, begin, end, causes - {""}) for verdict, begin, end, causes in found if begin < until and end > since]


@pytest.mark.parametrize("database", BACKENDS, indirect=True)
def test_the_history_is_what_a_recount_of_the_looks_says(store: Store):
    @hypothesis_settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(looks=looks, early=st.integers(-HOUR_MS, HOUR_MS), length=st.integers(1, 2 * HOUR_MS), later=st.integers(0, 6 * MINUTE))
    def holds(looks: Any, early: int, length: int, later: int) -> None:
        at, seen = NOW, []
        for step, verdict, cause in looks:
            at += step
            seen.append((at, str(verdict), cause))
        now, since = at + later, NOW + early
        until = min(since + length, now)

        def write(conn: Any) -> None:
            conn.execute(spells.table.delete())
            for moment, verdict, cause in seen:
                spells.note(conn, HealthVerdict(verdict), causes=filter(None, [cause]), reason="it is so", now_ms=moment)

        store.write_sync(write)
        times, listed, unwatched = store.read_sync(lambda conn: spells.between(conn, since_ms=since, until_ms=until, now_ms=now))
        wanted = recount(seen, since, until, now)
        for one in times:
            lengths = [min(end, until) - max(begin, since) for verdict, begin, end, _ in wanted if verdict == one.verdict]
            assert (one.count, one.total_ms, one.longest_ms) == (len(lengths), sum(lengths), max(lengths))
        assert {one.verdict for one in times} == {verdict for verdict, *_ in wanted}
        troubled = [row for row in wanted if row[0] in ("stalled", "degraded", "paused")]
        assert len(listed) == min(SPELLS, len(troubled))
        if len(troubled) <= SPELLS:
            assert [(one.verdict, one.from_ms, one.until_ms, set(one.causes)) for one in listed] == sorted(
                troubled, key=lambda row: (row[1], row[0])
            )
        assert unwatched == max(0, until - max(since, NOW + looks[0][0]) - sum(one.total_ms for one in times))

    holds()


def test_stalls_are_listed_before_all_else_and_in_order_of_time(store: Store):
    def write(conn: Any) -> None:
        for n in range(SPELLS + 10):
            for verdict in (HealthVerdict.DEGRADED, HealthVerdict.STALLED if n == 3 else HealthVerdict.WORKING):
                at = NOW + n * 2 * MINUTE + (MINUTE if verdict is not HealthVerdict.DEGRADED else 0)
                spells.note(conn, verdict, causes=(), reason="", now_ms=at)

    store.write_sync(write)
    _, listed, _ = store.read_sync(lambda conn: spells.between(conn, since_ms=NOW, until_ms=NOW + HOUR_MS * 9, now_ms=NOW + HOUR_MS * 9))
    assert [one.verdict for one in listed].count("stalled") == 1
    assert len(listed) == SPELLS
    assert [one.from_ms for one in listed] == sorted(one.from_ms for one in listed)


def test_a_clock_that_is_set_back_begins_anew_and_old_rows_go(store: Store):
    def note(verdict: HealthVerdict, at: int) -> bool:
        return store.write_sync(lambda conn: spells.note(conn, verdict, causes=(), reason="x", now_ms=at))

    assert note(HealthVerdict.IDLE, NOW)
    assert not note(HealthVerdict.IDLE, NOW + MINUTE)
    assert note(HealthVerdict.IDLE, NOW - HOUR_MS), "a row of the future cannot go on"
    assert not note(HealthVerdict.IDLE, NOW - HOUR_MS + MINUTE)
    for at, left in ((NOW + HOUR_MS, 2), (NOW + 400 * 24 * HOUR_MS, 1)):
        store.write_sync(lambda conn, at=at: prune_rows(conn, RetentionSettings(), at))
        assert store.read_sync(lambda conn: conn.execute(sa.select(sa.func.count()).select_from(spells.table)).scalar()) == left


class Judged:
    """A fleet in hand, judged as the service judges."""

    def __init__(self) -> None:
        worker = WorkerBeat("n-0", WorkerState.IDLE, NOW, slots=1)
        self.now = NOW
        self.facts: dict[str, Any] = {"sprints": {}, "oldest_runnable_ms": None, "last_progress_ms": None, "paused": False}
        self.workers = (worker,)

    def __call__(self, _conn: Any) -> tuple[FleetSnapshot, Health]:
        found = FleetSnapshot(now_ms=self.now, workers=tuple(replace(one, beat_ms=self.now) for one in self.workers), **self.facts)
        return found, judge(found, Thresholds())


async def test_the_leader_writes_what_changes_and_now_and_then_what_holds(store: Store, base: Path):
    judged, leads = Judged(), [True]
    chronicle = Chronicle(store, settings=fleet_settings(base, timing={"tick_seconds": 0.01}), judge=judged, is_leader=lambda: leads[0])

    def rows() -> list[Any]:
        return store.read_sync(lambda conn: conn.execute(sa.select(spells.table).order_by(spells.c.id)).all())

    await chronicle.round()
    judged.now += 5000
    await chronicle.round()
    assert [(row.verdict, row.seen_ms) for row in rows()] == [("idle", NOW)], "nothing is written where nothing changed"
    judged.now = NOW + CONFIRM_MS
    await chronicle.round()
    assert rows()[0].seen_ms == NOW + CONFIRM_MS
    judged.now += 5000
    judged.facts |= {"sprints": {SprintState.QUEUED: 1}, "oldest_runnable_ms": NOW - 2 * HOUR_MS, "last_progress_ms": NOW - HOUR_MS}
    await chronicle.round()
    judged.facts |= {"paused": True, "paused_by": "alice"}
    judged.now += 7 * MINUTE
    other = Chronicle(store, settings=fleet_settings(base), judge=judged, is_leader=lambda: True)
    await other.round()
    assert [(row.verdict, row.over) for row in rows()] == [("idle", True), ("stalled", True), ("paused", False)]
    idle, stalled, paused = rows()
    assert (idle.seen_ms, "oldest runnable" in stalled.reason, stalled.seen_ms) == (stalled.from_ms, True, stalled.from_ms), "nobody looked"
    assert (paused.from_ms, paused.reason) == (judged.now, "by alice")

    leads[0] = False
    loop = asyncio.create_task(chronicle.run())
    judged.facts |= {"paused": False, "sprints": {}, "oldest_runnable_ms": None}
    await asyncio.sleep(0.05)
    assert len(rows()) == 3, "only the leader writes"
    leads[0] = True
    chronicle._every = 0.01

    async def written() -> bool:
        return len(rows()) == 4

    await until(written)
    loop.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await loop


def test_every_form_of_the_report_tells_it():
    evil = "it <b>broke</b>, @alice |\x1b[31m"
    found = Figures(
        since_ms=NOW,
        until_ms=NOW + 12 * HOUR_MS,
        verdicts=(VerdictTime("idle", 3, 10 * HOUR_MS, 5 * HOUR_MS), VerdictTime("stalled", 2, 12 * MINUTE, 10 * MINUTE)),
        spells=(
            Spell("stalled", NOW - MINUTE, NOW + 9 * MINUTE, 9 * MINUTE, causes=("provider_down",), reason=evil),
            Spell("paused", NOW + HOUR_MS, NOW + 12 * HOUR_MS, 11 * HOUR_MS, lasts=True),
        ),
        unwatched_ms=HOUR_MS,
    )
    said = report.as_markdown(found)
    assert "No sprint was asked for and none ended." in said
    assert (
        "**The fleet was** idle 10 h, stalled 12 min (2 times, the longest 10 min), and nobody looked for 1 h, because no service ran."
        in said
    )
    assert "- 🔴 **stalled** for 10 min, from 2027-01-15 07:59 UTC: `provider_down`; it " in said
    assert "- ⏸️ **paused** for 11 h so far, from 2027-01-15 09:00 UTC" in said
    assert "<b>" not in said.replace("\\<b>", "")
    assert (
        "The fleet was",
        "idle 10 h, stalled 12 min (2 times, the longest 10 min), and nobody looked for 1 h, because no service ran",
    ) in (report.sums(found))
    console = Console(width=140, file=io.StringIO(), record=True)
    console.print(*report.as_tables(found))
    shown = console.export_text()
    assert "Stalled, degraded, paused" in shown
    assert "11 h so far" in shown
    assert "\x1b[31m" not in shown
    page = Closed()
    page.feed(html := report.as_html(found))
    assert page.open == []
    assert not page.tags & {"b", "script"}
    assert "<title>stalled 2027-01-15 07:59 UTC, 10 min</title>" in html
    made = json.loads(report.as_json(found))
    assert made["spells"][0] == {
        "verdict": "stalled",
        "from_ms": NOW - MINUTE,
        "until_ms": NOW + 9 * MINUTE,
        "inside_ms": 9 * MINUTE,
        "lasts": False,
        "causes": ["provider_down"],
        "reason": evil,
    }
    assert report.as_markdown(Figures(since_ms=NOW, until_ms=NOW + HOUR_MS)).count("The fleet was") == 0


async def test_a_pause_of_the_fleet_is_in_the_report_that_a_person_asks_for(base: Path):
    async with make_world(base, timing={"stall_after_seconds": 2.0}) as world:
        issue = await issue_with(world)

        async def verdicts(*wanted: str) -> None:
            async def reached() -> bool:
                made = await world.store.read(lambda conn: conn.execute(sa.select(spells.c.verdict).order_by(spells.c.id)).scalars().all())
                return [one for one in made if one in ("idle", "paused")][-len(wanted) :] == list(wanted)

            await until(reached)

        await verdicts("idle")
        now = int(time.time() * 1000)
        pause = Pause(PauseScope.FLEET, 0, "", "alice", now, reason="the host moves")
        await world.store.write(lambda conn: pauses.put(conn, pause))
        await verdicts("idle", "paused")
        await world.store.write(lambda conn: pauses.lift(conn, PauseScope.FLEET, 0, int(time.time() * 1000)))
        await verdicts("idle", "paused", "idle")
        await world.alice.comment(issue, "/dispatch report 12h")
        answer = ""

        async def told() -> bool:
            nonlocal answer
            answer = "\n".join(await world.by_bot(issue))
            return "The fleet was" in answer

        await until(told)
        assert "⏸️ **paused** for" in answer
        assert "UTC: by alice: the host moves" in answer
        code, said = await cli(world, "telemetry", "export", "--table", "verdicts", "--format", "jsonl")
        assert code == 0, said
        assert [json.loads(line)["verdict"] for line in said.splitlines() if line.startswith("{")][-1] == "idle"
