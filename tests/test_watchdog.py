"""The watchdog: it looks by the clock, tells what it sees, and acts seldom, only where told to, never against a pause and never twice."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
import yaml
from aiohttp import web
from fleet_support import queue_sprint
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from test_launcher import cli
from world import LIVE, make_world, until

from bot.config import ProviderSettings, RepositorySettings, Settings
from bot.demo.forge.server import ForgeServer
from bot.demo.model import ScriptedModel
from bot.demo.sample import FILES
from bot.demo.stage import Stage
from bot.fleet import watchdog as dog
from bot.fleet.health import Thresholds
from bot.fleet.health import judge as judge_fleet
from bot.fleet.lanes import Lane, LaneState, Pane, Shown
from bot.fleet.probes import (
    WATCHDOG,
    MendError,
    Probe,
    Reach,
    auth,
    clock,
    disk,
    failing,
    fine,
    gitea,
    model,
    pane,
    probes,
    provider,
    stuck,
    webhook,
    worker,
)
from bot.fleet.probes._http import healthy
from bot.fleet.watchdog import Measure, Watchdog, refusal
from bot.gitea.aiohttp import GiteaClient
from bot.gitea.forge import Forge
from bot.models import IssueRef, Pause, PauseScope, SprintId, SprintState, SprintView, Stop
from bot.providers.chain import ProviderChain
from bot.providers.classify import After, Diagnosis, ErrorClass
from bot.providers.condition import Conditions
from bot.providers.entries import Resolver
from bot.providers.health import EntryState, MemoryHealth
from bot.redaction import Secret
from bot.settings import ExpectedModel, ForgeSettings, WatchdogSettings
from bot.snapshot import Fault, Finding, FleetSnapshot, ProbeState, ProbeTarget, ProbeVerdict, WorkerBeat, WorkerState
from bot.store import Store, cursors, intents, pauses, sprints
from bot.store import lanes as stored_lanes
from bot.store import probes as rows

NOW = 1_800_000_000_000
HOUR = 3_600_000
MENDABLE = replace(failing("it", "broken"), mendable=True)
FLEET_PAUSE = Pause(PauseScope.FLEET, 0, "", "alice", NOW)


def settings(folder: Path = Path("/var/tmp"), **changes: Any) -> Settings:
    return Settings(
        forge=ForgeSettings(url="https://git.example"),
        repositories=(RepositorySettings(name="acme/rocket"),),
        state_dir=folder,
        providers=(ProviderSettings(name="local", base_url="http://127.0.0.1:1/v1", model="m"),),
        watchdog=WatchdogSettings(**changes),
    )


# ------------------------------------------------------------------ policy: values only


def may(finding: Finding = MENDABLE, *, policy: str = "act", standing: ProbeTarget | None = None, **changes: Any) -> str:
    facts: dict[str, Any] = {"holds": (), "recent": 0, "wished": False, "now_ms": NOW}
    measure = Measure(policy, HOUR, 30_000, 6)
    return refusal(measure, finding, standing or ProbeTarget("it", finding.verdict, "broken", NOW), **(facts | changes))


def test_it_acts_only_where_it_is_told_to():
    assert may() == ""
    assert may(policy="watch") == "it is only watched"
    assert may(policy="off") == "it is only watched"
    assert may(policy="off", wished=True) == "it is only watched", "off is off for everybody"
    assert may(policy="watch", wished=True) == ""
    assert may(replace(MENDABLE, mendable=False), wished=True) == "there is nothing that would help"
    for verdict in (ProbeVerdict.OK, ProbeVerdict.UNKNOWN):
        assert may(replace(MENDABLE, verdict=verdict)) == "there is nothing that would help"
    assert may(recent=6) == "6 actions in the last hour are enough"
    assert may(recent=6, wished=True) == ""


@pytest.mark.parametrize(
    ("pause", "finding", "held"),
    [
        (FLEET_PAUSE, MENDABLE, True),
        (Pause(PauseScope.REPO, 5, "acme/rocket", "alice", NOW), replace(MENDABLE, repo_id=5), True),
        (Pause(PauseScope.REPO, 6, "acme/other", "alice", NOW), replace(MENDABLE, repo_id=5), False),
        (Pause(PauseScope.PROVIDER, 0, "", "alice", NOW, provider="nous"), replace(MENDABLE, provider="nous"), True),
        (Pause(PauseScope.PROVIDER, 0, "", "alice", NOW, provider=""), MENDABLE, False),
    ],
)
def test_a_pause_holds_it_and_an_operators_wish_as_well(pause: Pause, finding: Finding, held: bool):
    for wished in (False, True):
        assert (may(finding, holds=[pause], wished=wished) == "a pause by alice holds") is held


def test_the_distance_doubles_up_to_a_day():
    measure = Measure("act", HOUR, 30_000, 6)
    assert [measure.after(acts) for acts in (0, 1, 2, 3)] == [0, HOUR, 2 * HOUR, 4 * HOUR]
    assert measure.after(40) == dog.DAY_MS
    assert Measure("act", 0, 30_000, 6).after(9) == 30_000, "at most once a period"


MOMENTS = st.lists(
    st.tuples(
        st.integers(0, 2 * HOUR),
        st.sampled_from(["a", "b", "c"]),
        st.booleans(),
        st.sampled_from(["", "fleet", "repo"]),
        st.booleans(),
    ),
    max_size=60,
)


@given(MOMENTS, st.integers(1, 6), st.sampled_from([0, 60_000, HOUR]))
@hypothesis_settings(max_examples=150, deadline=None)
def test_never_while_paused_never_more_often_than_allowed_and_once_a_period(moments: list, most: int, distance: int):
    """A night of looks at three targets, with pauses and wishes that come and go; the actions it leads to keep every promise."""
    measure = Measure("act", distance, 30_000, most)
    now, standing, acted = NOW, {}, []
    for step, target, bad, paused, wished in moments:
        now += step
        finding = replace(MENDABLE, target=target, repo_id=5) if bad else fine(target, "well")
        before = standing.get(target, ProbeTarget(target, finding.verdict, "", now))
        holds = {"fleet": [FLEET_PAUSE], "repo": [Pause(PauseScope.REPO, 5, "acme/rocket", "bob", NOW)]}.get(paused, [])
        recent = sum(at > now - HOUR for at, _, _ in acted)
        if refusal(measure, finding, before, holds=holds, recent=recent, wished=wished, now_ms=now) == "":
            assert bad
            assert not paused
            acted.append((now, target, wished))
            standing[target] = replace(before, acts=before.acts + 1, acted_ms=now)
    for target in "abc":
        mine = [(at, wished) for at, name, wished in acted if name == target]
        for (first, _), (second, wished) in itertools.pairwise(mine):
            assert second - first >= (dog.WISH_MS if wished else 30_000)
    for at, _, wished in acted:
        if not wished:
            assert sum(at - HOUR < other <= at for other, _, _ in acted) <= most


# ------------------------------------------------------------------ the loop, on a real store with hand-made probes


class Hands:
    """A probe in hand: what it finds next, how often it was looked at and mended."""

    def __init__(self, *found: Finding, period: float = 30.0, **options: Any) -> None:
        self.found = list(found)
        self.looks = 0
        self.mended: list[str] = []
        self.helps: Callable[[str], str] = lambda target: f"mended {target}"
        self.plugin = Probe("a probe in hand", self.look, period_seconds=period, mend=self.mend, does="mends", **options)

    async def look(self, _reach: Reach) -> Sequence[Finding]:
        self.looks += 1
        return list(self.found)

    async def mend(self, _reach: Reach, finding: Finding) -> str:
        self.mended.append(finding.target)
        return self.helps(finding.target)


class Room:
    """A store, a clock that is set by hand, and watchdogs over it."""

    def __init__(self, folder: Path, url: str = "") -> None:
        self.folder = folder
        self.store = Store(url or f"sqlite:///{folder / 'timmy.db'}")
        self.store.open()
        self.now = NOW
        self.acts: list[tuple[str, str, bool]] = []

    def reach(self, made: Settings, **parts: Any) -> Reach:
        empty = {"forge": None, "chain": None, "entries": list, "names": dict, "hermes": self.folder, "environ": {}}
        return Reach(settings=made, store=self.store, now_ms=lambda: self.now, **(empty | parts))

    def dog(self, known: dict[str, Probe], **changes: Any) -> Watchdog:
        reach = self.reach(settings(self.folder, **changes))
        return Watchdog(
            reach,
            is_leader=lambda: True,
            acted=lambda probe, target, *, ok: self.acts.append((probe, target, ok)),
            scrub=scrubbed,
            known=known,
        )

    async def states(self) -> dict[str, ProbeState]:
        return {state.name: state for state in await self.store.read(rows.states)}

    async def decisions(self, kind: str = "watchdog %") -> list[tuple[str, str, str, str]]:
        d = intents.decisions.c
        statement = sa.select(d.kind, d.result, d.reason, d.actor).where(d.kind.like(kind)).order_by(d.id)
        return [tuple(row) for row in await self.store.read(lambda conn: conn.execute(statement).all())]

    async def pause(self, pause: Pause = FLEET_PAUSE) -> None:
        await self.store.write(lambda conn: pauses.put(conn, pause))

    async def resume(self) -> None:
        await self.store.write(lambda conn: pauses.lift(conn, PauseScope.FLEET, 0, self.now))


def scrubbed(text: str) -> str:
    return text.replace("hunter2hunter2", "[redacted]")


@pytest.fixture
def both(tmp_path: Path, database: str) -> Iterator[Room]:
    """A room on either back end."""
    made = Room(tmp_path, database)
    yield made
    made.store.close()


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Room]:
    made = Room(tmp_path)
    yield made
    made.store.close()


async def turn(watchdog: Watchdog) -> None:
    """One round, until every look it began has ended."""
    await watchdog.round()
    while watchdog._running:
        await asyncio.sleep(0.01)


async def test_a_look_becomes_rows_and_nothing_is_done_by_default(room: Room):
    hands = Hands(MENDABLE, replace(fine("other", "well"), repo_id=7))
    watchdog = room.dog({"hands": hands.plugin})
    await turn(watchdog)
    assert hands.looks == 0, "a new probe waits for its period"
    room.now += 30_000
    await turn(watchdog)
    await turn(watchdog)
    assert (hands.looks, hands.mended, await room.decisions()) == (1, [], [])
    state = (await room.states())["hands"]
    assert (state.verdict, state.broken, state.policy, state.ran_ms, state.due_ms) == (
        "failing",
        False,
        "watch",
        room.now,
        room.now + 30_000,
    )
    assert [(target.name, target.verdict, target.repo_id) for target in state.targets] == [("it", "failing", 0), ("other", "ok", 7)]
    room.now += 30_000
    hands.found = [fine("it", "well")]
    await turn(watchdog)
    state = (await room.states())["hands"]
    assert (state.verdict, [target.name for target in state.targets]) == ("ok", ["it"]), "what is gone is forgotten"


async def test_an_action_is_a_decision_with_before_and_after(both: Room):
    hands = Hands(replace(MENDABLE, reason="broken by hunter2hunter2", repo_id=5, issue=3))
    hands.helps = lambda _target: hands.found.clear() or hands.found.append(fine("it", "well again")) or "put right"
    watchdog = both.dog({"hands": hands.plugin}, policy={"hands": "act"})
    await watchdog.know()
    both.now += 30_000
    await turn(watchdog)
    assert hands.mended == ["it"]
    assert await both.decisions() == [("watchdog hands", "ok", "it: broken by [redacted]. put right. Now: well again", WATCHDOG)]
    assert both.acts == [("hands", "it", True)]
    (target,) = (await both.states())["hands"].targets
    assert (target.verdict, target.acts, target.acted_ms, target.act_result) == ("ok", 1, both.now, "ok")
    trail = await both.store.read(lambda conn: intents.trail(conn, 5, 3))
    assert [row.kind for row in trail] == ["watchdog hands"], "explain shows it on the issue"


async def test_what_does_not_help_is_tried_again_with_growing_distance_and_reset_when_well(room: Room):
    hands = Hands(MENDABLE)

    def no(_target: str) -> str:
        raise MendError("no such key")

    hands.helps = no
    watchdog = room.dog({"hands": hands.plugin}, policy={"hands": "act"}, backoff_minutes=10, actions_per_hour=100)
    await watchdog.know()
    acted = []
    for _ in range(6 * 12):
        room.now += 300_000
        before = len(hands.mended)
        await turn(watchdog)
        if len(hands.mended) > before:
            acted.append((room.now - NOW) // 60_000)
    assert acted == [5, 15, 35, 75, 155, 315], "10, 20, 40, 80, 160 minutes apart"
    assert (await room.decisions())[0][1:3] == ("error", "it: broken. it did not help: no such key. Now: broken")
    assert set(room.acts) == {("hands", "it", False)}
    hands.found = [fine("it", "well")]
    room.now += 300_000
    await turn(watchdog)
    assert (await room.states())["hands"].targets[0].acts == 6, "well for a moment resets nothing"
    room.now += 8 * HOUR
    await turn(watchdog)
    assert (await room.states())["hands"].targets[0].acts == 0


async def test_never_against_a_pause_and_an_operators_wish_in_vain_is_told(room: Room):
    hands = Hands(MENDABLE)
    watchdog = room.dog({"hands": hands.plugin}, policy={"hands": "act"})
    await watchdog.know()
    await room.pause()
    room.now += 30_000
    await turn(watchdog)
    assert (hands.looks, hands.mended, await room.decisions()) == (1, [], []), "it looks, and does nothing"
    await room.store.write(lambda conn: rows.wish(conn, ["hands"], "bob"))
    await turn(watchdog)
    assert (hands.looks, hands.mended) == (2, [])
    assert await room.decisions() == [("watchdog hands", "refused", "it: broken. a pause by alice holds", "bob")]
    await room.resume()
    room.now += 30_000
    await turn(watchdog)
    assert hands.mended == ["it"]


async def test_a_wish_acts_at_once_without_a_policy_and_once(both: Room):
    hands = Hands(MENDABLE)
    watchdog = both.dog({"hands": hands.plugin, "asleep": Hands(MENDABLE).plugin}, policy={"asleep": False})
    assert watchdog.policy_of("asleep") == "off", "YAML reads a bare off as false"
    await watchdog.know()
    assert list(await both.states()) == ["hands"]
    await both.store.write(lambda conn: rows.wish(conn, ["hands", "asleep"], "bob"))
    await turn(watchdog)
    assert hands.mended == ["it"], "not due for half a minute, and only watched: but wished for"
    assert [row[3] for row in await both.decisions()] == ["bob"]
    await turn(watchdog)
    assert (hands.looks, hands.mended) == (2, ["it"]), "a look after the action, and the wish is gone"
    await both.store.write(lambda conn: rows.wish(conn, ["hands"], "carol"))
    await turn(watchdog)
    assert hands.mended == ["it"], "two operators at the same moment are one"


async def test_all_probes_together_act_no_more_than_the_settings_say(both: Room):
    many = [Hands(*(replace(MENDABLE, target=f"{n}{i}") for i in range(4))) for n in range(3)]
    known = {f"p{n}": hands.plugin for n, hands in enumerate(many)}
    watchdog = both.dog(known, policy=dict.fromkeys(known, "act"), actions_per_hour=5)
    await watchdog.know()
    both.now += 30_000
    await turn(watchdog)
    assert sum(len(hands.mended) for hands in many) == 5
    both.now += HOUR + 1
    await turn(watchdog)
    assert sum(len(hands.mended) for hands in many) == 10


async def test_two_leaders_act_once(both: Room, database: str):
    """Each with its own store, as on two hosts; whoever takes the turn has it, and an action belongs to one."""
    other = Room(both.folder, database)
    hands = Hands(*(replace(MENDABLE, target=str(n)) for n in range(4)))
    hands.helps = lambda target: target
    pair = [place.dog({"hands": hands.plugin}, policy={"hands": "act"}, actions_per_hour=100) for place in (both, other)]
    try:
        for watchdog in pair:
            await watchdog.know()
        both.now = other.now = NOW + 30_000
        await asyncio.gather(*(turn(watchdog) for watchdog in pair))
        assert sorted(hands.mended) == ["0", "1", "2", "3"]
        # Even if both had the same turn in hand: the target's row decides.
        finding, standing = MENDABLE, ProbeTarget("0", ProbeVerdict.FAILING, "", NOW, acts=1, acted_ms=NOW + 30_000)
        both.now = other.now = NOW + 3 * HOUR
        claims = await asyncio.gather(
            *(place.store.write(lambda conn: rows.claim_act(conn, "hands", standing, now_ms=both.now)) for place in (both, other))
        )
        assert sorted(claims) == [False, True], finding
    finally:
        other.store.close()


async def test_a_probe_that_hangs_or_raises_is_unknown_and_stops_no_other(room: Room):
    ends = asyncio.Event()

    async def deaf(_reach: Reach) -> Sequence[Finding]:
        while not ends.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await ends.wait()
        return [fine("it", "at last")]

    async def broken(_reach: Reach) -> Sequence[Finding]:
        raise RuntimeError("no hunter2hunter2 here")

    hands = Hands(fine("it", "well"))
    known = {
        "deaf": Probe("ignores its end", deaf, period_seconds=30.0, limit_seconds=0.05),
        "broken": Probe("raises", broken, period_seconds=30.0),
        "hands": hands.plugin,
    }
    watchdog = room.dog(known)
    await watchdog.know()
    room.now += 30_000
    await turn(watchdog)
    states = await room.states()
    assert {name: (state.verdict, state.broken) for name, state in states.items()} == {
        "deaf": ("unknown", True),
        "broken": ("unknown", True),
        "hands": ("ok", False),
    }
    assert states["deaf"].reason == "it did not end within 0.05 s"
    assert states["broken"].reason == "it broke: RuntimeError: no [redacted] here"
    room.now += 30_000
    await turn(watchdog)
    assert (await room.states())["deaf"].reason == "a look before this one still has not ended"
    ends.set()
    await until(lambda: watchdog._hung["deaf"].done())
    room.now += 30_000
    await turn(watchdog)
    assert (await room.states())["deaf"].verdict == "ok"


async def test_an_action_that_hangs_is_an_error_and_ends(room: Room):
    hands = Hands(MENDABLE, mend_seconds=0.05)

    async def never(_reach: Reach, _finding: Finding) -> str:
        await asyncio.sleep(3600)
        return ""

    watchdog = room.dog({"hands": replace(hands.plugin, mend=never)}, policy={"hands": "act"})
    await watchdog.know()
    room.now += 30_000
    await turn(watchdog)
    assert [row[1:3] for row in await room.decisions()] == [("error", "it: broken. it did not end within 0.05 s. Now: broken")]


async def test_a_clock_that_is_set_back_neither_stops_it_nor_lets_it_act_more_often(room: Room):
    hands = Hands(MENDABLE)
    watchdog = room.dog({"hands": hands.plugin}, policy={"hands": "act"}, backoff_minutes=10)
    await watchdog.know()
    room.now += 30_000
    await turn(watchdog)
    assert (hands.looks, len(hands.mended)) == (2, 1)
    room.now -= 24 * HOUR
    await turn(watchdog)
    assert (hands.looks, len(hands.mended)) == (3, 1), "it looks although its next look seems a day away"
    room.now += 9 * 60_000
    await turn(watchdog)
    assert len(hands.mended) == 1
    room.now += 60_001
    await turn(watchdog)
    assert len(hands.mended) == 2, "the distance counts from the moment that was noticed"


async def test_only_the_leader_looks_and_the_loop_ends_when_told(room: Room):
    hands = Hands(fine("it", "well"))
    leads = False
    watchdog = Watchdog(
        room.reach(settings(room.folder, every_seconds={"hands": 0.01}).model_copy(update={"timing": SimpleNamespace(tick_seconds=0.01)})),
        is_leader=lambda: leads,
        acted=lambda *_args, **_more: None,
        scrub=str,
        known={"hands": hands.plugin},
    )
    running = asyncio.create_task(watchdog.run())
    try:
        await asyncio.sleep(0.1)
        assert (hands.looks, await room.states()) == (0, {})
        leads = True
        await until(lambda: room.states())
        room.now += HOUR
        await until(lambda: hands.looks)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_probes_that_left_leave_no_rows_and_unknown_names_are_only_said(room: Room):
    await room.dog({"old": Hands().plugin, "hands": Hands().plugin}).know()
    await room.dog({"hands": Hands().plugin}, policy={"hands": "act", "nonsense": "act"}).know()
    assert {name: state.policy for name, state in (await room.states()).items()} == {"hands": "act"}


async def test_switched_off_it_shows_nothing(room: Room):
    await room.dog({"hands": Hands().plugin}).know()
    await room.dog({"hands": Hands().plugin}, enabled=False).run()
    assert await room.states() == {}


def test_the_verdict_on_the_fleet_knows_them_and_names_no_repository():
    def state(name: str, target: ProbeTarget, **changes: Any) -> ProbeState:
        return ProbeState(name, target.verdict, NOW, NOW, targets=(target,), **changes)

    bad = ProbeVerdict.FAILING
    found = FleetSnapshot(
        NOW,
        probes=(
            state("model", ProbeTarget("default", bad, "runs a/b and should run a/c", NOW)),
            state("stuck", ProbeTarget("s1", bad, "acme/secret#1 took no step", NOW, repo_id=6)),
            state("disk", ProbeTarget("state folder", ProbeVerdict.WARN, "4.0 GiB free", NOW)),
            state("worker", ProbeTarget("n-0", bad, "lost", NOW)),
            ProbeState("clock", ProbeVerdict.UNKNOWN, NOW, NOW, broken=True, reason="it broke"),
        ),
    )
    said = {(reason.code, reason.detail) for reason in judge_fleet(found, Thresholds()).reasons}
    assert said == {
        (Fault.MODEL_DRIFT, "model: default: runs a/b and should run a/c"),
        (Fault.PROBE_FAILING, "stuck: 1 found"),
        (Fault.PROBE_FAILING, "clock: it broke"),
    }


async def test_what_is_overdue_by_far_says_nothing_about_now(room: Room):
    watchdog = room.dog({"hands": Hands(MENDABLE).plugin})
    assert await room.store.read(lambda conn: rows.current(conn, room.now)) == ()
    await watchdog.know()
    assert await room.store.read(lambda conn: rows.current(conn, room.now)) == (), "it has not looked yet"
    room.now += 30_000
    await turn(watchdog)
    assert [state.name for state in await room.store.read(lambda conn: rows.current(conn, room.now))] == ["hands"]
    assert await room.store.read(lambda conn: rows.current(conn, room.now + HOUR)) == ()


# ------------------------------------------------------------------ each probe


def test_every_probe_says_what_it_is_and_what_it_does():
    known = probes()
    assert set(known) == {
        *("alertmanager", "auth", "clock", "disk", "gitea", "model", "pane", "prometheus", "provider", "stuck", "webhook", "worker"),
    }
    for name, probe in known.items():
        assert probe.title, name
        assert 0 < probe.limit_seconds <= probe.period_seconds * 2, name
        assert bool(probe.mend) == bool(probe.does), name
    pages = Path(__file__).parents[1] / "docs" / "watchdog.md"
    assert all(f"| `{name}` |" in pages.read_text() for name in known)


@pytest.mark.parametrize(
    ("wall", "boot", "verdict"),
    [
        (60_000, 60.0, "ok"),
        (62_000, 60.0, "ok"),
        (80_000, 60.0, "warn"),
        (40_000, 60.0, "warn"),
        (7_260_000, 60.0, "failing"),
        (-7_140_000, 60.0, "failing"),
    ],
)
def test_a_clock_that_jumps_is_seen(wall: int, boot: float, verdict: str):
    found = clock.jump(clock.Moment(NOW, 5.0), clock.Moment(NOW + wall, 5.0 + boot))
    assert found.verdict == verdict
    assert ("back" in found.reason) == (wall < boot * 1000 and verdict != "ok")


@pytest.mark.parametrize(("off", "verdict"), [(0, "ok"), (4, "ok"), (-30, "warn"), (30, "warn"), (90, "failing")])
def test_the_clocks_of_both_machines_are_compared(off: int, verdict: str):
    moment = NOW / 1000
    assert clock.compare(formatdate(moment + off, usegmt=True), moment, moment + 0.1).verdict == verdict
    assert clock.compare("yesterday", moment, moment).verdict == "unknown"


@pytest.mark.parametrize(
    ("free", "inodes", "verdict"),
    [(10 * 1024**3, 10**6, "ok"), (2 * 1024**3, 10**6, "warn"), (1024, 10**6, "failing"), (10 * 1024**3, 3, "failing")],
)
def test_the_disk(free: int, inodes: int, verdict: str):
    found = disk.judge(free, inodes, warn=5 * 1024**3, fail=1024**3, can_mend=True)
    assert (found.verdict, found.mendable) == (verdict, verdict != "ok")


async def test_the_disk_by_the_thresholds_of_the_settings(room: Room):
    async def make_room() -> str:
        return "nothing to delete"

    full = room.reach(settings(room.folder / "not" / "there", disk_failing_bytes=2**60), make_room=make_room)
    (found,) = await disk.look(full)
    assert (found.verdict, found.mendable) == ("failing", True)
    assert await disk.mend(full, found) == "nothing to delete"
    (well,) = await disk.look(room.reach(settings(room.folder, disk_failing_bytes=0, disk_warn_bytes=0)))
    assert well.verdict == "ok"
    with pytest.raises(MendError, match="only the service"):
        await disk.mend(room.reach(settings(room.folder)), found)


@pytest.mark.parametrize(
    ("state", "silent", "verdict"),
    [(WorkerState.BUSY, 3, "ok"), (WorkerState.LOST, 60, "warn"), (WorkerState.LOST, 121, "failing"), (WorkerState.DRAINING, 1, "ok")],
)
def test_a_worker_by_its_heartbeat(state: WorkerState, silent: int, verdict: str):
    assert worker.judge(WorkerBeat("n-0", state, NOW - silent * 1000), NOW, 120.0).verdict == verdict


async def test_prometheus_and_alertmanager_only_where_the_settings_name_them(room: Room):
    known = {name: probes()[name] for name in ("prometheus", "alertmanager")}
    assert room.dog(known).probes == {}
    ready = 200

    async def answer(request: web.Request) -> web.Response:
        return web.Response(status=ready if request.path == "/-/ready" else 200)

    app = web.Application()
    app.router.add_get("/-/{what}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        assert (await healthy(url)).verdict == "ok"
        ready = 503
        watchdog = room.dog(known, prometheus_url=url, alertmanager_url="http://127.0.0.1:1")
        states = {state.name: state for state in await watchdog.once(tuple(known), fix=False, by="")}
        assert states["prometheus"].said == "server: /-/ready answers 503"
        assert states["alertmanager"].verdict == "failing"
        assert "127.0.0.1" not in states["alertmanager"].said, "people may read it in a comment"
    finally:
        await runner.cleanup()


# ------------------------------------------------------------------ models: drift, canary, logins


HERMES = """#!/bin/sh
# Writes the configuration as the real program does, and notes how it was called.
env > "$HERMES_HOME/env.txt"
echo "$@" >> "$HERMES_HOME/calls.txt"
home="$HERMES_HOME"; [ "$2" = default ] || home="$HERMES_HOME/profiles/$2"
[ -d "$home" ] || { echo "no such profile" >&2; exit 1; }
[ ! -e "$HERMES_HOME/refuse" ] || exit 0
exec %s - "$home/config.yaml" "$5" "$6" <<'END'
import sys, yaml
path, key, value = sys.argv[1:]
config = yaml.safe_load(open(path)) or {}
block = config.get("model")
config["model"] = {**({"default": block} if isinstance(block, str) else block or {}), key.split(".")[1]: value}
open(path, "w").write(yaml.safe_dump(config))
print(f"Set {key} = {value} in {path}")
END
"""


class Profiles:
    """A Hermes home with profiles, a scripted `hermes` in a folder of PATH, and a model server that they may name."""

    def __init__(self, folder: Path, url: str) -> None:
        self.home = folder / "hermes"
        self.bin = folder / "bin"
        self.bin.mkdir()
        program = self.bin / "hermes"
        program.write_text(HERMES % __import__("sys").executable)
        program.chmod(0o755)
        self.url = url
        self.environ = {"PATH": f"{self.bin}:{os.environ['PATH']}", "HOME": str(folder), "SECRET_KEY": "hunter2hunter2"}

    def write(self, profile: str, block: Any) -> Path:
        path = model.home_of(self.home, profile) / "config.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump({"model": block, "providers": {"desk": {"api": self.url}}}))
        return path

    def calls(self) -> list[str]:
        path = self.home / "calls.txt"
        return path.read_text().splitlines() if path.exists() else []


@contextlib.asynccontextmanager
async def scripted() -> AsyncIterator[ScriptedModel]:
    made = ScriptedModel()
    await made.start()
    try:
        yield made
    finally:
        await made.stop()


@contextlib.asynccontextmanager
async def chained(url: str, now_ms: Callable[[], int], **options: Any) -> AsyncIterator[tuple[ProviderChain, Resolver, MemoryHealth]]:
    resolver = Resolver((ProviderSettings(name="main", base_url=url, model="scripted"),), environ={}, home=Path("/nonexistent"))
    health = MemoryHealth(now_ms)
    chain = ProviderChain(resolver, health=health, now_ms=now_ms, sleep=asyncio.sleep, random=lambda: 0.5, **options)
    try:
        yield chain, resolver, health
    finally:
        await chain.aclose()


async def test_model_watchdog_py_sees_drift_and_has_hermes_mend_it_after_a_canary(room: Room):
    """The expectation map of the old script: root and profiles, both forms of the model block, mended by Hermes' own command."""
    expect = {
        "default": ExpectedModel(provider="desk", model="scripted"),
        "night": ExpectedModel(model="scripted"),
        "absent": ExpectedModel(model="scripted"),
        "torn": ExpectedModel(model="scripted"),
        "well": ExpectedModel(provider="desk", model="other"),
    }
    async with scripted() as server, chained(server.url, lambda: room.now) as (chain, resolver, _):
        profiles = Profiles(room.folder, server.url)
        root = profiles.write("default", {"provider": "desk", "default": "cheap"})
        night = profiles.write("night", {"provider": "desk", "model": "old"})
        torn = profiles.write("torn", "x")
        torn.write_text("model: [")
        profiles.write("well", {"provider": "desk", "default": "other"})
        made = settings(room.folder, expect=expect, policy={"model": "act"}, actions_per_hour=100)
        reach = room.reach(made, chain=chain, entries=resolver, hermes=profiles.home, environ=profiles.environ)
        found = {finding.target: finding for finding in await model.look(reach)}
        assert {name: (finding.verdict, finding.mendable) for name, finding in found.items()} == {
            "default": ("failing", True),
            "night": ("failing", True),
            "absent": ("failing", True),
            "torn": ("failing", False),
            "well": ("ok", False),
        }
        assert found["default"].reason == "runs desk/cheap and should run desk/scripted"
        kept = torn.read_bytes()
        watchdog = Watchdog(
            reach, is_leader=lambda: True, acted=lambda *a, ok: room.acts.append((*a, ok)), scrub=str, known={"model": probes()["model"]}
        )
        states = await watchdog.once(("model",), fix=False, by="")
        assert {target.name: (target.verdict, target.act_result) for target in states[0].targets} == {
            "default": ("ok", "ok"),
            "night": ("ok", "ok"),
            "absent": ("failing", "error"),
            "torn": ("failing", ""),
            "well": ("ok", ""),
        }
        assert profiles.calls() == [
            "-p default config set model.default scripted",
            "-p night config set model.default scripted",
        ]
        assert yaml.safe_load(root.read_text())["model"]["default"] == "scripted"
        assert yaml.safe_load(night.read_text())["model"]["default"] == "scripted"
        assert torn.read_bytes() == kept
        seen = (profiles.home / "env.txt").read_text()
        assert "hunter2hunter2" not in seen
        assert "SECRET" not in seen
        assert ("model", "default", True) in room.acts
        assert ("model", "absent", False) in room.acts
        said = {row[2].partition(":")[0]: row[2] for row in await room.decisions()}
        assert "a gateway that is running may keep the old model" in said["default"]
        assert "this profile could not call" in said["absent"]


async def test_model_watchdog_py_changes_nothing_when_the_canary_fails_or_hermes_refuses(room: Room):
    expect = {"default": ExpectedModel(provider="desk", model="scripted")}
    async with scripted() as server, chained(server.url, lambda: room.now) as (chain, resolver, _):
        profiles = Profiles(room.folder, server.url)
        root = profiles.write("default", "cheap")
        reach = room.reach(
            settings(room.folder, expect=expect), chain=chain, entries=resolver, hermes=profiles.home, environ=profiles.environ
        )
        (drift,) = await model.look(reach)
        assert drift.reason == "runs no provider/cheap and should run desk/scripted"
        (profiles.home / "refuse").touch()
        with pytest.raises(MendError, match="it did not hold"):
            await model.mend(reach, drift)
        with pytest.raises(MendError, match="cannot be run"):
            await model.mend(replace(reach, environ={"PATH": "/nonexistent"}), drift)
        (profiles.home / "refuse").unlink()
        before, calls = root.read_bytes(), len(profiles.calls())
        await server.stop()
        with pytest.raises(MendError, match="desk/scripted does not answer"):
            await model.mend(reach, drift)
        assert (root.read_bytes(), len(profiles.calls())) == (before, calls)


async def test_the_canary_goes_to_what_nothing_holds_back_and_lifts_what_is_down(room: Room):
    async with scripted() as server, chained(server.url, lambda: room.now) as (chain, resolver, health):
        reach = room.reach(settings(room.folder), chain=chain, entries=resolver)
        (found,) = await provider.look(reach)
        assert (found.target, found.verdict) == ("main/scripted", "ok")
        (entry,) = resolver()
        conditions = Conditions(health, now_ms=lambda: room.now, random=lambda: 0.5)
        await conditions.fell_ill(entry, Diagnosis(ErrorClass.BILLING, after=After.DOWN), "no credit", failures=0)
        asked = len(server.requests)
        (found,) = await provider.look(reach)
        assert (found.verdict, found.mendable, found.reason) == ("failing", True, "down: billing: no credit")
        assert len(server.requests) == asked, "one known to be down is not called"
        assert "it answers again" in await provider.mend(reach, found)
        assert [one[2] for one in await chain.availability()] == [EntryState.HEALTHY]
        await server.stop()
        (found,) = await provider.look(reach)
        assert (found.verdict, found.mendable) == ("failing", False)
        with pytest.raises(MendError):
            await provider.mend(reach, found)
    assert provider.soften([fine("a", ""), failing("b", "down")])[1].verdict == "warn", "the chain can work with one"


def test_a_login_by_what_its_key_has_left(room: Room):
    entry = SimpleNamespace(provider="nous", model="hermes-4", login="nous", key_expires_ms=NOW + 900_000)

    def judged(expires_ms: int, state: EntryState = EntryState.HEALTHY, reason: str = "") -> tuple[str, bool]:
        (found,) = auth.logins(
            {"nous": SimpleNamespace(**vars(entry) | {"key_expires_ms": expires_ms})}, {("nous", "hermes-4"): (state, reason)}, NOW
        )
        return found.verdict, found.mendable

    assert judged(NOW + 900_000) == ("ok", False)
    assert judged(NOW + 60_000) == ("warn", True)
    assert judged(NOW - 60_000) == ("warn", True), "it is renewed when a call needs it"
    assert judged(0) == ("unknown", False)
    assert judged(NOW - 60_000, EntryState.DOWN, "auth: logged out of Nous") == ("failing", True)


# ------------------------------------------------------------------ the forge: unreachable, silent, refusing


@contextlib.asynccontextmanager
async def forged(folder: Path) -> AsyncIterator[tuple[ForgeServer, Stage]]:
    server = ForgeServer(folder / "forge")
    await server.start()
    await server.create_user("root1", admin=True)
    stage = await Stage.build(server.url, Secret(await server.create_token("root1", ["all"])), files=FILES)
    try:
        yield server, stage
    finally:
        await stage.close()
        await server.stop()


async def test_gitea_away_silent_and_refusing(room: Room, base: Path):
    async with (
        forged(base) as (server, stage),
        scripted() as model_server,
        chained(model_server.url, lambda: room.now) as (chain, resolver, _),
    ):
        client = GiteaClient(server.url, stage.secrets().forge_token, jitter=lambda: 0.01)
        reach = room.reach(
            stage.settings(room.folder, webhook_port=9, model_url=model_server.url, watchdog={"webhook_silent_minutes": 1}),
            forge=Forge(client),
            chain=chain,
            entries=resolver,
            names=lambda: {stage.repo_id: stage.repo},
        )
        try:
            room.now = int(time.time() * 1000)
            (well,) = await gitea.look(reach)
            assert well.verdict == "ok"
            jumped, agreed = await clock.look(reach)
            assert (jumped.verdict, agreed.verdict) == ("ok", "ok")
            assert [(found.target, found.verdict) for found in await auth.look(reach)] == [("gitea", "ok")]
            room.now += 2 * HOUR
            jumped, agreed = await clock.look(reach)
            assert (jumped.verdict, agreed.verdict) == ("failing", "failing")
            room.now -= 2 * HOUR

            # Silence: a delivery a moment ago is enough; after a long one the hook is looked at and tried.
            await room.store.write(lambda conn: cursors.put(conn, cursors.LAST_DELIVERY, room.now - 5000))
            assert [found.verdict for found in await webhook.look(reach)] == ["ok"]
            await room.store.write(lambda conn: cursors.put(conn, cursors.LAST_DELIVERY, room.now - HOUR))
            (none,) = await webhook.look(reach)
            assert (none.verdict, "is not there" in none.reason, none.repo_id) == ("failing", True, stage.repo_id)

            # The bot may only write: it cannot ask for a test and says so; what moved meanwhile is the evidence.
            alice = stage.people["alice"]
            await _collaborator(alice, stage.repo, stage.people["timmy"].login, "write")
            (found,) = await webhook.look(reach)
            assert (found.verdict, "no administrator" in found.reason) == ("unknown", True)
            await alice.open_issue("moves", "while nobody tells")
            room.now += 180_000
            (found,) = await webhook.look(reach)
            assert (found.verdict, "moved and no delivery told of it" in found.reason) == ("failing", True)
            await _collaborator(alice, stage.repo, stage.people["timmy"].login, "admin")

            await server.stop()
            (away,) = await gitea.look(reach)
            assert (away.verdict, away.mendable) == ("failing", True)
            assert [found.verdict for found in await auth.look(reach)] == ["unknown"]
            assert (await webhook.look(reach))[0].verdict == "unknown"
            assert await gitea.mend(reach, away)
            (held,) = await gitea.look(reach)
            assert (held.verdict, held.mendable) == ("failing", False)
            await server.start()
            (well,) = await gitea.look(reach)
            assert well.verdict == "ok"
            assert await room.store.read(lambda conn: cursors.get(conn, cursors.FORGE_HOLD)) is None
            assert [row[:2] for row in await room.decisions()] == [("watchdog gitea", "lifted")]

            stranger = replace(reach, forge=Forge(GiteaClient(server.url, Secret("not-a-token-of-ours"), jitter=lambda: 0.01)))
            (refused,) = [found for found in await auth.look(stranger) if found.target == "gitea"]
            assert refused.verdict == "failing"
            await stranger.forge.api.close()
        finally:
            await client.close()


async def _collaborator(owner: Any, repo: str, login: str, permission: str) -> None:
    await owner.client.put(f"/repos/{repo}/collaborators/{login}", {"permission": permission})


@pytest.mark.parametrize("where", [pytest.param("live", marks=LIVE)])
async def test_the_probes_of_the_forge_on_a_running_gitea(base: Path, where: str):
    async with make_world(base, live=where == "live") as world:
        reach = world.service.watchdog.reach
        silent = reach.settings.watchdog.model_copy(update={"webhook_silent_minutes": 0.00001})
        quiet = replace(reach, settings=reach.settings.model_copy(update={"watchdog": silent}))
        found = [*await gitea.look(reach), *await clock.look(reach), *await auth.look(reach), *await webhook.look(quiet)]
        assert [(one.target, one.verdict) for one in found] == [
            ("server", "ok"),
            ("jump", "ok"),
            ("gitea", "ok"),
            ("gitea", "ok"),
            (world.stage.repo, "ok"),
        ], found
        await _collaborator(world.alice, world.stage.repo, world.timmy.login, "write")
        (found,) = await webhook.look(quiet)
        assert (found.verdict, "no administrator" in found.reason) == ("unknown", True), found


# ------------------------------------------------------------------ lanes


class Panes:
    """Lanes in hand; `restart` and `mend` note what was started again."""

    def __init__(self, *shown: Shown) -> None:
        self.lanes = list(shown)
        self.started: list[int] = []
        self.willing = True

    async def shown(self) -> list[Shown]:
        return self.lanes

    async def restart(self, pane: Pane) -> bool:
        self.started += [pane.lane or 0] if self.willing else []
        return self.willing

    async def mend(self, *, patient: bool = True) -> list[int]:
        assert not patient
        gone = [lane.row.lane for lane in self.lanes if lane.state is LaneState.GONE and lane.row.wanted == "up"] if self.willing else []
        self.started += gone
        return gone


def lane(number: int, state: LaneState, wanted: str = "up") -> Shown:
    row = Lane("n", number, wanted, "", "alice", 0, "", 2, 0, 0)
    dead = state is LaneState.ENDED
    seen = None if state is LaneState.GONE else Pane(f"%{number}", 0, "", 1, dead, 137 if dead else None, "", 0, lane=number)
    return Shown(row, state, seen)


async def test_a_dead_lane_is_started_again_and_one_that_was_stopped_is_left_alone(room: Room):
    panes = Panes(lane(0, LaneState.RUNNING), lane(1, LaneState.ENDED), lane(2, LaneState.GONE), lane(3, LaneState.GONE, "down"))
    reach = room.reach(settings(room.folder), lanes=panes)
    assert await pane.look(reach) == [], "no lane was ever made here: tmux is not asked"
    await room.store.write(lambda conn: stored_lanes.want(conn, "n", [0], config="", by="alice", now_ms=NOW))
    found = await pane.look(reach)
    assert [(one.target, one.verdict, one.mendable) for one in found] == [
        ("lane 0", "ok", False),
        ("lane 1", "failing", True),
        ("lane 2", "failing", True),
        ("lane 3", "ok", False),
    ]
    for one in found[1:3]:
        assert await pane.mend(reach, one) == "its worker was started again"
    assert panes.started == [1, 2]
    with pytest.raises(MendError, match="not wanted any more"):
        await pane.mend(reach, replace(found[3], mendable=True))
    panes.willing = False
    for one in found[1:3]:
        with pytest.raises(MendError, match="somebody stopped it"):
            await pane.mend(reach, one)
    with pytest.raises(MendError, match="does not look after lanes"):
        await pane.mend(room.reach(settings(room.folder)), found[1])


# ------------------------------------------------------------------ stuck sprints


def view(state: SprintState = SprintState.WORKING, idle: float = 0.0, **changes: Any) -> SprintView:
    fields: dict[str, Any] = {"admitted_n": 1, "updated_ms": NOW - int(idle * 1000)} | changes
    return SprintView(SprintId("s1"), 5, IssueRef("acme", "rocket", 7), state, **fields)


@pytest.mark.parametrize(
    ("sprint", "found"),
    [
        (view(idle=1799), None),
        (view(idle=1801), True),
        (view(SprintState.PREPARING, idle=1801), True),
        (view(SprintState.VETTING, idle=3599), None),
        (view(SprintState.VETTING, idle=3601), True),
        (view(SprintState.PUBLISHING, idle=1801), False),
        (view(SprintState.QUEUED, idle=9999), None),
        (view(idle=9999, stop=Stop.CANCEL, stop_by="alice"), None),
        (view(idle=9999, stop=Stop.REQUEUE, stop_by="alice"), None),
        (view(idle=100, stop=Stop.REQUEUE, stop_by=WATCHDOG), None),
        (view(idle=121, stop=Stop.REQUEUE, stop_by=WATCHDOG), True),
    ],
)
def test_a_sprint_that_takes_no_step_is_stuck_unless_a_person_stopped_it(sprint: SprintView, found: bool | None):
    """`found` is None for what is no finding, else whether something can be done about it."""
    seen = list(stuck.stuck([sprint], settings(), NOW))
    assert [one.mendable for one in seen] == ([] if found is None else [found])
    assert all((one.repo_id, one.issue) == (5, 7) for one in seen)


async def test_a_process_that_does_not_obey_loses_its_sprint(both: Room):
    """Its event loop hangs while its heartbeat goes on: the row is taken from it, and its next write meets none."""
    room, store = both, both.store
    reach = room.reach(settings(room.folder))
    sprint = queue_sprint(store, 7, queued_ms=room.now)

    def run(conn: Any) -> int:
        k = sprints.admit(conn, sprint, room.now)
        here = {"me": "w1", "node_id": "n", "timeout_ms": 1000}
        assert k is not None and sprints.claim(conn, sprint, k, **here)
        for to, before in ((SprintState.PREPARING, SprintState.ADMITTED), (SprintState.WORKING, SprintState.PREPARING)):
            assert sprints.advance(conn, sprint, k, me="w1", to=to, before=[before], now_ms=room.now)
        return k

    async def acts() -> Finding:
        (finding,) = await stuck.look(reach)
        return finding

    k = await store.write(run)
    assert await stuck.look(reach) == []
    room.now += 31 * 60_000
    finding = await acts()
    await store.write(lambda conn: sprints.update(conn, sprint, k, me="w1", now_ms=room.now))
    with pytest.raises(MendError, match="it moved meanwhile"):
        await stuck.mend(reach, finding)
    room.now += 31 * 60_000
    assert await stuck.mend(reach, await acts()) == "it is ended and begun again where it stood"
    assert await stuck.look(reach) == [], "it gets its time to obey"
    room.now += 121_000
    finding = await acts()
    assert await stuck.mend(reach, finding) == "it was taken from a process that does not answer"
    with pytest.raises(MendError, match="it moved meanwhile"):
        await stuck.mend(reach, finding)
    view = await store.read(lambda conn: sprints.get(conn, sprint))
    assert (view.state, view.waiting, view.attempt, view.stop) == ("queued", "requeued", 1, None)
    assert not await store.write(lambda conn: sprints.update(conn, sprint, k, me="w1", now_ms=room.now)), "its late write meets no row"

    k = await store.write(run)
    room.now += 31 * 60_000
    assert await stuck.mend(reach, await acts()) == "it is ended and has failed"
    room.now += 121_000
    assert (await acts()).mendable
    await store.write(lambda conn: sprints.cancel(conn, sprint, by="alice", now_ms=room.now))
    assert await stuck.look(reach) == [], "a person stopped it: that is not ours to end"
    await store.write(lambda conn: conn.execute(sprints.table.update().values(stop=Stop.STALLED, stop_by=WATCHDOG)))
    room.now += 121_000
    finding = await acts()
    assert await stuck.mend(reach, finding) == "it was taken from a process that does not answer"
    view = await store.read(lambda conn: sprints.get(conn, sprint))
    assert (view.state, view.outcome, view.reason) == ("settled", "failed", "stalled")
    trail = await store.read(lambda conn: intents.trail(conn, view.repo_id, 7))
    assert [(row.kind, row.result) for row in trail] == [("requeue", "requeued"), ("settle", "failed")]


@pytest.mark.timeout(240)
async def test_a_hung_model_is_ended_and_begun_again_once_and_then_fails_as_stalled(base: Path):
    """The whole service: a pause holds the watchdog, then it acts once, then the sprint fails; an operator may stop another at the same moment."""
    changes = {
        "policy": {"stuck": "act"},
        "every_seconds": {"stuck": 0.3},
        "stuck_minutes": 0.05,
        "backoff_minutes": 0.001,
        "actions_per_hour": 99,
    }
    async with make_world(base, watchdog=changes, operators=["alice"]) as world:
        issue = await world.alice.open_issue("slug keeps capitals", "script: hang")
        await world.alice.label(issue, "dispatch")
        await until(lambda: world.model.requests)
        await world.store.write(lambda conn: pauses.put(conn, replace(FLEET_PAUSE, since_ms=1)))

        async def seen() -> ProbeState | None:
            found = {state.name: state for state in await world.store.read(rows.states)}.get("stuck")
            return found if found is not None and found.verdict == "failing" else None

        state = await until(seen)
        assert f"{world.stage.repo}#{issue} is working and took no step" in state.said
        looked = state.ran_ms
        await until(lambda: _ran_since(world, looked))
        assert [row.kind for row in await world.trail(issue) if row.kind.startswith("watchdog")] == []
        await world.store.write(lambda conn: pauses.lift(conn, PauseScope.FLEET, 0, int(time.time() * 1000)))

        sprint = await world.settled(issue, 120)
        assert (sprint.outcome, sprint.reason) == ("failed", "stalled")
        kinds = [(row.kind, row.result) for row in await world.trail(issue)]
        assert kinds.count(("requeue", "requeued")) == 1
        assert [kind for kind in kinds if kind[0].startswith("watchdog")] == [("watchdog stuck", "ok")] * 2
        assert sprint.admitted_n == 2
        assert len(world.model.requests) == 2
        read = world.service.metrics.registry.get_sample_value
        assert read("dispatch_watchdog_actions_total", {"probe": "stuck", "result": "ok"}) == 2
        assert "⚠️" in await world.status_comment(issue) or "failed" in (await world.status_comment(issue)).casefold()

        # An operator and the watchdog at the same moment: both are harmless, and the person's word is the last.
        other = await world.alice.open_issue("slug keeps capitals too", "script: hang")
        await world.alice.label(other, "dispatch")
        await until(lambda: len(world.model.requests) == 3)
        await world.store.write(lambda conn: pauses.put(conn, replace(FLEET_PAUSE, since_ms=1)))
        await until(seen)
        resume = world.store.write(lambda conn: pauses.lift(conn, PauseScope.FLEET, 0, int(time.time() * 1000)))
        await asyncio.gather(resume, world.alice.comment(other, "/dispatch cancel"), world.service.watchdog._turn("stuck"))
        sprint = await world.settled(other, 120)
        assert sprint.outcome == "cancelled"

        # People ask it; only an operator may have it act.
        await world.alice.comment(issue, "/dispatch watchdog")
        await world.bob.comment(issue, "/dispatch watchdog fix disk")
        await world.alice.comment(issue, "/dispatch watchdog fix disk")
        await until(lambda: _answered(world, issue, "| `stuck` (may act) |", "needs", "does what helps: `disk`"))

        async def wished() -> bool:
            return {state.name: state for state in await world.store.read(rows.states)}["disk"].ran_ms > 0

        await until(wished)


async def _ran_since(world: Any, ran_ms: int) -> bool:
    return any(state.name == "stuck" and state.ran_ms > ran_ms for state in await world.store.read(rows.states))


async def _answered(world: Any, issue: int, *texts: str) -> bool:
    said = "\n".join(await world.by_bot(issue))
    return all(text in said for text in texts)


@pytest.mark.timeout(240)
async def test_while_gitea_is_away_nothing_is_admitted_and_no_try_is_lost(base: Path):
    changes = {"policy": {"gitea": "act"}, "every_seconds": {"gitea": 0.3}}
    async with make_world(base, watchdog=changes) as world:
        await world.store.write(lambda conn: pauses.put(conn, replace(FLEET_PAUSE, since_ms=1)))
        issue = await world.alice.open_issue("slug keeps capitals", "script: fix")
        await world.alice.label(issue, "dispatch")
        await until(lambda: world.sprint(issue))
        await world.shown(issue)
        quiet = world.service.watchdog.reach
        silent = quiet.settings.watchdog.model_copy(update={"webhook_silent_minutes": 0.00001})
        (delivered,) = await webhook.look(replace(quiet, settings=quiet.settings.model_copy(update={"watchdog": silent})))
        assert (delivered.verdict, delivered.reason) == ("ok", "it was quiet, and a test delivery arrived")
        code, said = await cli(world, "watchdog", "--once", "--json", "disk", "worker", "model")
        assert (code, said) == (
            1,
            "timmy-dispatch: there is no probe 'model' at work; there are: auth, clock, disk, gitea, pane, provider, stuck, webhook, worker\n",
        )
        code, said = await cli(world, "watchdog", "--once", "--json", "disk", "worker", "provider")
        found = {state["name"]: state["verdict"] for state in json.loads(said)}
        assert (found["worker"], found["provider"], found.keys()) == ("ok", "ok", {"disk", "worker", "provider"})
        assert code == (3 if "failing" in found.values() else 0)
        await world.forge.stop()
        # A fleet that is paused is left alone; the hold comes with the end of the pause.
        await until(lambda: _verdict(world, "gitea", "failing"))
        assert await world.store.read(lambda conn: cursors.get(conn, cursors.FORGE_HOLD)) is None
        world.service.leader._is_leader = lambda: False
        await world.store.write(lambda conn: pauses.lift(conn, PauseScope.FLEET, 0, int(time.time() * 1000)))
        await until(lambda: world.store.read(lambda conn: cursors.get(conn, cursors.FORGE_HOLD)))
        world.service.leader._is_leader = lambda: True

        async def waits() -> bool:
            return (await world.sprint(issue)).waiting == "forge"

        await until(waits)
        assert (await world.sprint(issue)).admitted_n == 0
        await until(lambda: _seen(world, "gitea", "nothing is admitted meanwhile"))
        code, said = await cli(world, "watchdog", "--json", "gitea")
        assert (code, "it does not answer" in said) == (3, True)
        assert (await cli(world, "watchdog", "fix", "clock"))[0] == 0
        assert (await cli(world, "watchdog", "--fix"))[0] == 2
        await world.forge.start()
        sprint = await world.settled(issue, 120)
        assert (sprint.outcome, sprint.attempt) == ("pull_request", 1)
        assert await world.store.read(lambda conn: cursors.get(conn, cursors.FORGE_HOLD)) is None


async def _verdict(world: Any, name: str, verdict: str) -> bool:
    return any(state.name == name and state.verdict == verdict for state in await world.store.read(rows.states))


async def _seen(world: Any, name: str, text: str) -> bool:
    return any(state.name == name and text in state.said for state in await world.store.read(rows.states))
