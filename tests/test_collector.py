"""The collector: a diff that leads from state to state, drift by arithmetic, files that survive crashes, and sources that may hang without holding anybody up."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import threading
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from postgres_support import BACKENDS
from test_launcher import cli
from world import FORGES, make_world, until

from bot.doctor import Mark
from bot.doctor import telemetry as doctor
from bot.fleet import _facts, _proc
from bot.fleet._drift import GRACE_MS, drift, next_fire
from bot.fleet._sampling import Found, OneAtATime, Sampler, Shared, in_thread
from bot.fleet._sources import _agents
from bot.fleet._states import Change, Event, State, diff, is_state
from bot.fleet._streams import EVENTS, LAST, METRICS, Streams, repository_of
from bot.fleet.collector import Clock, Collector, Sample, read_clock
from bot.fleet.lanes import MISUSED, Pane, Topology
from bot.gitea.errors import NotFound, Unavailable
from bot.models import Pause, PauseScope, UserError
from bot.settings import CollectorSettings, Settings
from bot.snapshot import Sampled
from bot.store import Store, lanes, pauses, samples
from bot.store.samples import Schedule

NOW = 1_800_000_000_000
MINUTE = 60_000
NODE = "ab12"

facets = st.dictionaries(st.text(max_size=4), st.text(max_size=4) | st.integers(-3, 3) | st.booleans(), max_size=4)
states = st.dictionaries(st.text(max_size=6), facets, max_size=6)


def applied(state: State, events: Iterable[Event]) -> dict[str, dict[str, Any]]:
    """What a reader of events.jsonl does."""
    found = {entity: dict(each) for entity, each in state.items()}
    for event in events:
        if event.change is Change.GONE:
            del found[event.entity]
            continue
        assert (event.entity in found) == (event.change is Change.CHANGED)
        known = found.setdefault(event.entity, {})
        assert {name: known[name] for name in event.before} == dict(event.before)
        for name in event.before.keys() - event.after.keys():
            del known[name]
        known.update(event.after)
    return found


def exactly(state: State) -> str:
    return json.dumps(state, sort_keys=True)


@settings(deadline=None)
@given(states)
def test_nothing_changed_is_no_event(state: State):
    assert diff(state, state) == []


@settings(deadline=None)
@given(states, states)
def test_the_events_lead_from_the_earlier_state_to_the_later(before: State, after: State):
    events = diff(before, after)
    assert exactly(applied(before, events)) == exactly(after)
    back = diff(after, before)
    assert {event.entity for event in back} == {event.entity for event in events}


@settings(deadline=None)
@given(states, states)
def test_the_order_of_events_is_that_of_their_entities_however_the_states_were_built(before: State, after: State):
    events = diff(before, after)
    assert [event.entity for event in events] == sorted({event.entity for event in events})
    turned = diff(dict(reversed(before.items())), dict(reversed(after.items())))
    assert [json.dumps(event.to_json()) for event in turned] == [json.dumps(event.to_json()) for event in events]


@settings(deadline=None)
@given(states, states)
def test_a_state_and_its_events_are_json(before: State, after: State):
    assert is_state(json.loads(json.dumps(after)))
    for event in diff(before, after):
        assert json.loads(json.dumps(event.to_json()))["entity"] == event.entity


def test_only_what_differs_is_told():
    before: State = {"a": {"x": 1, "y": "old"}, "b": {"z": True}}
    after: State = {"a": {"x": 1, "y": "new", "more": False}, "c": {}}
    assert diff(before, after) == [
        Event(Change.CHANGED, "a", {"y": "old"}, {"more": False, "y": "new"}),
        Event(Change.GONE, "b", {"z": True}, {}),
        Event(Change.APPEARED, "c", {}, {}),
    ]
    assert diff({"a": {"x": True}}, {"a": {"x": 1}}), "true and 1 differ in the file"


@pytest.mark.parametrize("found", [None, [], {"a": 1}, {"a": {"x": None}}, {"a": {"x": [1]}}, {"a": {"x": 1.5}}])
def test_what_is_no_state_is_refused(found: object):
    assert not is_state(found)


# drift

TEN = Schedule("launcher", "0 */10 * * * *", 0, since_ms=NOW)


def at(minutes: float) -> int:
    return NOW + round(minutes * MINUTE)


@pytest.mark.parametrize(
    ("schedule", "now_ms", "seconds", "missed"),
    [
        (TEN, at(1), 0.0, 0),
        (TEN, at(11), 0.0, 0),
        (TEN, at(12), 120.0, 1),
        (TEN, at(35), 25 * 60.0, 3),
        (replace(TEN, expected_ms=at(10), seen_ms=at(10) + 4000), at(19), 4.0, 0),
        (replace(TEN, expected_ms=at(10), seen_ms=at(10) + 4000), at(25), 300.0, 1),
        (Schedule("exports", "", MINUTE, NOW, expected_ms=at(5), seen_ms=at(5) + 1500), at(6), 1.5, 0),
        (Schedule("exports", "", MINUTE, NOW, expected_ms=at(5), seen_ms=at(5)), at(9), 180.0, 4),
    ],
    ids=[
        "never due",
        "due inside the grace",
        "never fired",
        "never fired thrice",
        "a little late",
        "one is missing",
        "by distance",
        "stopped",
    ],
)
def test_drift_is_expected_against_seen(schedule: Schedule, now_ms: int, seconds: float, missed: int):
    assert NOW % (10 * MINUTE) == 0
    found = drift(schedule, now_ms)
    assert (found.seconds, found.missed, found.overdue) == (seconds, missed, missed > 0)


def test_what_was_due_while_nobody_served_or_before_the_clock_jumped_is_nobodys_fault():
    fired_yesterday = replace(TEN, since_ms=NOW, expected_ms=NOW - 1440 * MINUTE, seen_ms=NOW - 1440 * MINUTE)
    assert drift(fired_yesterday, at(1)).missed == 0
    put_forward = replace(TEN, expected_ms=at(10), seen_ms=at(10))
    assert drift(put_forward, at(300)).missed == 29
    assert drift(put_forward, at(300), trusted_ms=at(300)).missed == 0


@settings(deadline=None, max_examples=50)
@given(st.integers(-5000, 5000), st.integers(-5000, 5000), st.integers(-5000, 5000), st.integers(0, 5000))
def test_drift_of_any_clock_is_finite_and_never_of_a_fire_still_to_come(seen: int, since: int, jumped: int, now: int):
    schedule = replace(TEN, since_ms=at(since), expected_ms=at(seen), seen_ms=at(seen) + 1000)
    found = drift(schedule, at(now), trusted_ms=at(jumped))
    assert found.due_ms % (10 * MINUTE) == 0
    if found.overdue:
        assert found.due_ms + GRACE_MS < at(now)
        assert found.seconds == (at(now) - found.due_ms) / 1000
        assert found.missed >= 1
    else:
        assert found.seconds in (0.0, 1.0)


def test_the_next_fire_is_later_also_from_a_fire():
    assert next_fire(TEN, NOW) == at(10)
    assert next_fire(TEN, at(9.5)) == at(10)


# /proc


def test_a_process_is_measured_and_a_dead_one_is_none():
    now = time.time_ns() // 1_000_000
    child = subprocess.Popen(["sleep", "60"])
    try:
        mine = _proc.process(os.getpid(), now_ms=now)
        assert mine is not None
        assert mine.resident > 1_000_000
        assert mine.cpu_seconds > 0
        assert mine.children >= 1
        assert child.pid in _proc.below(os.getpid())
        other = _proc.process(child.pid, now_ms=now)
        assert other is not None
        assert mine.started_ms <= other.started_ms <= now
    finally:
        child.kill()
    until_zombie = time.monotonic() + 20
    while _proc.process(child.pid, now_ms=now) is not None:
        assert time.monotonic() < until_zombie
        time.sleep(0.01)
    child.wait()
    assert _proc.process(child.pid, now_ms=now) is None
    assert len(_proc.boot_id()) == 36


# sources that hang


async def test_a_source_that_hangs_is_unknown_and_is_not_asked_again_while_it_hangs():
    sampler, gate, asked = Sampler(), threading.Event(), []

    async def well() -> Found:
        return Found({"x": 1})

    def stuck() -> Found:
        asked.append(threading.current_thread().name)
        gate.wait(60)
        return Found()

    async def fails() -> Found:
        raise ValueError("no such thing")

    sources = {"well": well, "stuck": lambda: in_thread("stuck", stuck), "fails": fails}
    threads = threading.active_count()
    for _ in range(5):
        found = await sampler.take(sources, 0.1)
        assert found["well"].found == Found({"x": 1})
        assert found["stuck"].found is None
        assert found["fails"].why == "ValueError: no such thing"
    assert asked == ["collector-stuck"]
    assert threading.active_count() <= threads + 1
    assert "still hangs" in found["stuck"].why
    gate.set()
    await until(lambda: not sampler.hanging)
    assert (await sampler.take(sources, 30.0))["stuck"].found == Found()
    await sampler.close()


async def test_letting_go_of_what_hangs_does_not_wait_for_it():
    sampler, files, gate = Sampler(), OneAtATime("files"), threading.Event()
    await sampler.take({"stuck": lambda: in_thread("stuck", lambda: gate.wait(60) and Found())}, 0.01)
    with pytest.raises(UserError, match=r"files: not done in 0.01 s"):
        await files.run(lambda: gate.wait(60), 0.01)
    with pytest.raises(UserError, match="still hangs"):
        await files.run(lambda: gate.wait(60), 0.01)
    began = time.monotonic()
    await sampler.close()
    await files.close()
    assert time.monotonic() - began < 30
    gate.set()


async def test_one_read_serves_all_sources_of_a_sample_and_a_hung_one_is_not_doubled():
    reads, gate = [], asyncio.Event()

    async def read() -> int:
        reads.append(1)
        await gate.wait()
        return len(reads)

    shared = Shared(read)
    first, second = asyncio.create_task(shared.get()), asyncio.create_task(shared.get())
    await asyncio.sleep(0)
    shared.renew()
    third = asyncio.create_task(shared.get())
    await asyncio.sleep(0)
    first.cancel()
    gate.set()
    assert await second == await third == 1
    shared.renew()
    assert await shared.get() == 2


# the files


def clock(minutes: float = 0.0, *, wall: float | None = None, boot: str = "b1") -> Clock:
    """`minutes` since the boot; the wall clock goes with it unless told otherwise."""
    return Clock(at(minutes if wall is None else wall), 1000.0 + minutes * 60, boot)


class Forge:
    """A forge that answers with counts, or not at all."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.silent = False
        self.gone: set[int] = set()

    async def repo_by_id(self, repo_id: int) -> dict[str, Any]:
        self.asked.append(repo_id)
        if self.silent:
            raise Unavailable("connection refused, hush")
        if repo_id in self.gone:
            raise NotFound("it is not there")
        return {"id": repo_id, "full_name": f"alice/r{repo_id}", "open_issues_count": 5, "open_pr_counter": 2}


class House:
    """A collector with a store of its own and a clock that the test sets."""

    def __init__(self, base: Path, **given: Any) -> None:
        self.settings = Settings(
            forge={"url": "http://127.0.0.1:9"},
            repositories=({"name": "alice/r1"},),
            providers=({"base_url": "http://127.0.0.1:9", "model": "m"},),
            state_dir=base / "state",
            collector=CollectorSettings(**{"deadline_seconds": 30.0, "every_seconds": 600.0, **given}),
        )
        self.settings.state_dir.mkdir(exist_ok=True)
        self.store = Store(self.settings.database_url())
        self.store.open()
        self.forge = Forge()
        self.clock = clock()
        self.missed: list[str] = []
        self.names = {1: "alice/r1"}
        self.collector = self.made()

    def made(self) -> Collector:
        return Collector(
            self.store,
            self.forge,
            settings=self.settings,
            node_id=NODE,
            repositories=lambda: self.names,
            environ={"PATH": os.environ["PATH"]},
            is_keeper=lambda: True,
            missed=self.missed.append,
            scrub=lambda text: text.replace("hush", "***"),
            clock=lambda: self.clock,
        )

    async def sample(self, minutes: float, **more: Any) -> Sample:
        self.clock = clock(minutes, **more)
        return await self.collector.collect()

    @property
    def folder(self) -> Path:
        return self.settings.telemetry_dir()

    def lines(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def gauges(self) -> Any:
        return self.store.read_sync(lambda conn: samples.collected(conn, NODE))


@pytest.fixture
async def house(base: Path):
    house = House(base)
    yield house
    await house.collector.close()
    house.store.close()


async def test_samples_are_lines_events_are_what_changed_and_all_of_it_is_private(house: House):
    first = await house.sample(0)
    assert [event["event"] for event in first.events] == ["began"]
    assert first.missed == ()
    assert list(first.record["sources"]) == list(Sampled)
    second = await house.sample(1)
    assert second.events == ()
    house.store.write_sync(lambda conn: samples.serve(conn, {"launcher": "0 */10 * * * *"}, at(1)))
    third = await house.sample(2)
    assert [(event["event"], event["entity"]) for event in third.events] == [("appeared", "cron/launcher")]
    lines = house.lines(METRICS)
    assert [line["wall_ms"] for line in lines] == [at(0), at(1), at(2)]
    assert {line["schema"] for line in lines} == {1}
    assert lines[0]["boot_seconds"] == 1000.0
    assert lines[2]["sources"]["disk"]["free"] > 0
    assert house.lines(EVENTS) == [*first.events, *third.events]
    assert house.folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in house.folder.iterdir()} == {0o600}
    assert not list(house.folder.glob("*.tmp"))


async def test_the_gauges_come_from_the_rows_and_survive_a_missed_sample(house: House):
    await house.sample(0)
    house.forge.silent = True
    sample = await house.sample(1)
    assert sample.missed == ("gitea",)
    assert house.missed == ["gitea"]
    assert "refused" in sample.record["sources"]["gitea"]["why"]
    [event] = sample.events
    assert (event["entity"], event["before"], event["after"]) == ("source/gitea", {"status": "ok"}, {"status": "unknown"})
    found = house.gauges()
    assert found.succeeded_ms == {**dict.fromkeys(Sampled, at(1)), "gitea": at(0)}
    assert found.gauges["gitea_open_issues"] == {(): 5.0}
    assert found.gauges["gitea_open_pull_requests"] == {("bot",): 0.0, ("people",): 2.0}
    assert found.gauges["disk_size_bytes"][()] > 0
    house.forge.silent = False
    sample = await house.sample(2)
    assert [event["entity"] for event in sample.events] == ["source/gitea"], "what was known before has not come anew"
    house.store.write_sync(lambda conn: samples.forget(conn, NODE, keep=("disk",)))
    assert set(house.gauges().succeeded_ms) == {"disk"}


async def test_the_forge_is_asked_about_some_repositories_at_a_time_and_all_in_turn(base: Path):
    house = House(base, repositories_a_sample=2)
    house.names = {number: f"alice/r{number}" for number in (1, 2, 3)}
    await house.sample(0)
    assert house.forge.asked == [1, 2]
    assert "gitea_open_issues" not in house.gauges().gauges, "a sum of some is no sum"
    house.collector = house.made()
    await house.sample(1)
    assert house.forge.asked == [1, 2, 3, 1]
    assert house.gauges().gauges["gitea_open_issues"] == {(): 15.0}
    house.forge.gone = {1, 2, 3}
    assert (await house.sample(2)).missed == (), "a repository that is gone does not keep the others"
    await house.collector.close()
    house.store.close()


async def test_a_clock_that_is_put_forward_or_back_is_said_and_makes_nothing_late(house: House):
    house.store.write_sync(lambda conn: samples.serve(conn, {"launcher": "0 */10 * * * *"}, at(0)))
    house.store.write_sync(lambda conn: samples.fired(conn, "launcher", seen_ms=at(10), expected_ms=at(10)))
    await house.sample(11)
    forward = await house.sample(12, wall=312)
    assert forward.record["clock_jump_seconds"] == 300 * 60
    assert [(event["entity"], event["after"]) for event in forward.events] == [("clock/wall", {"jumps": 1})]
    assert forward.record["sources"]["cron"]["schedules"][0]["missed"] == 0
    back = await house.sample(13, wall=13)
    assert back.record["clock_jump_seconds"] == -300 * 60
    assert [event["entity"] for event in back.events] == ["clock/wall"]
    assert back.record["sample"] > forward.record["sample"], "samples stay in order"
    slow = await house.sample(14, wall=14.02)
    assert slow.events == ()
    # A missed fire after the jump is one.
    late = await house.sample(32)
    assert late.record["sources"]["cron"]["schedules"][0]["missed"] == 2
    assert [event["entity"] for event in late.events] == ["cron/launcher"]
    assert house.gauges().gauges["schedule_drift_seconds"] == {("launcher",): 12 * 60.0}
    # Another boot compares nothing.
    again = await house.sample(2, wall=400, boot="b2")
    assert again.record["clock_jump_seconds"] == 0


@pytest.mark.parametrize(
    "left",
    [b"", b'{"schema":1,"sta', b"[]", b'{"schema":2,"state":{}}', b'{"schema":1,"state":{"a":1}}', b"\xff\xfe", b'{"schema":1}'],
    ids=["empty", "cut", "list", "newer", "shape", "bytes", "lacking"],
)
async def test_a_state_of_another_kind_is_set_aside_and_a_new_one_begins(house: House, left: bytes):
    await house.sample(0)
    (house.folder / LAST).write_bytes(left)
    sample = await house.sample(1)
    assert [event["event"] for event in sample.events] == ["began"]
    assert (house.folder / "last_state.unreadable.json").read_bytes() == left
    assert (await house.sample(2)).events == ()


async def test_what_a_file_says_of_the_past_is_used_only_in_its_shape(house: House):
    await house.sample(0)
    last = json.loads((house.folder / LAST).read_text())
    for strange in (
        {"gitea": {"1": {"repository": "alice/r1", "open_issues": "many"}}, "disk": {"at_ms": at(1), "sizes": {"sprints": None}}},
        {"gitea": 5, "disk": []},
    ):
        (house.folder / LAST).write_text(json.dumps(last | {"memory": strange}))
        assert (await house.sample(1)).missed == ()


async def test_a_state_that_is_a_link_is_not_followed(house: House, base: Path):
    await house.sample(0)
    (base / "elsewhere").write_text("precious")
    (house.folder / LAST).unlink()
    (house.folder / LAST).symlink_to(base / "elsewhere")
    await house.sample(1)
    assert (base / "elsewhere").read_text() == "precious"
    assert not (house.folder / LAST).is_symlink()
    for name in (METRICS, EVENTS):
        (house.folder / name).unlink()
        (house.folder / name).symlink_to(base / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        await house.sample(2)
    assert (base / "elsewhere").read_text() == "precious"


async def test_events_that_a_crash_kept_out_are_added_once_and_torn_lines_are_cut(house: House):
    await house.sample(0)
    house.forge.silent = True
    await house.sample(1)
    whole = (house.folder / EVENTS).read_bytes()
    first = whole.splitlines(keepends=True)[0]
    (house.folder / EVENTS).write_bytes(first + b'{"schema":1,"samp')
    with (house.folder / METRICS).open("ab") as file:
        file.write(b'{"schema":1,"torn')
    await house.sample(2)
    assert (house.folder / EVENTS).read_bytes() == whole
    assert [line["wall_ms"] for line in house.lines(METRICS)] == [at(0), at(1), at(2)]
    await house.sample(3)
    assert (house.folder / EVENTS).read_bytes() == whole


async def test_full_files_are_set_aside_and_the_oldest_go(base: Path):
    streams = Streams(base / "t", rotate_bytes=1000, keep_files=2)
    streams.prepare()
    for number in range(40):
        streams._append(METRICS, json.dumps({"n": number, "pad": "x" * 80}).encode() + b"\n")
    kept = sorted(path.name for path in (base / "t").iterdir())
    assert len(kept) == 3
    assert all(path.stat().st_size <= 1000 for path in (base / "t").iterdir())
    numbers = [json.loads(line)["n"] for name in kept for line in (base / "t" / name).read_text().splitlines()]
    assert sorted(numbers) == list(range(min(numbers), 40))


async def test_a_folder_that_others_may_read_is_neither_used_nor_changed(base: Path):
    (base / "shared").mkdir(mode=0o755)
    (base / "shared").chmod(0o755)
    house = House(base, folder=base / "shared")
    with pytest.raises(UserError, match="open to others"):
        await house.sample(0)
    assert (base / "shared").stat().st_mode & 0o777 == 0o755
    assert not list((base / "shared").iterdir())
    await house.collector.close()
    house.store.close()


@pytest.mark.parametrize("kind", ["work tree", "linked work tree", "bare"])
async def test_nothing_is_written_inside_a_repository(base: Path, kind: str):
    root = base / "repo"
    if kind == "linked work tree":
        root.mkdir()
        (root / ".git").write_text("gitdir: /nowhere\n")
    else:
        subprocess.run(["git", "init", "-q", *(["--bare"] if kind == "bare" else []), str(root)], check=True)
    (base / "link").symlink_to(root)
    house = House(base, folder=base / "link" / "deep" / "er")
    assert repository_of(house.folder) == root
    with pytest.raises(UserError, match=r"lies in the git repository .* set `collector.folder`"):
        await house.sample(0)
    assert not house.folder.exists()
    assert set(house.gauges().succeeded_ms) == set(Sampled), "the gauges need no files"
    await house.collector.close()
    house.store.close()


async def test_the_doctor_tells_where_the_samples_are_and_how_old(house: House):
    assert doctor.telemetry(house.settings, 0.0).detail.endswith("no sample yet")
    await house.sample(0)
    written = (house.folder / METRICS).stat().st_mtime
    assert doctor.telemetry(house.settings, written + 5).mark == Mark.OK
    old = doctor.telemetry(house.settings, written + 6001)
    assert (old.mark, "6001 s old" in old.detail) == (Mark.WARN, True)
    (house.settings.state_dir / ".git").mkdir()
    assert "lies in the git repository" in doctor.telemetry(house.settings, written).detail


async def test_two_writers_take_turns(house: House):
    other = house.made()
    for _ in range(3):
        await asyncio.gather(house.collector.collect(), other.collect())
    numbers = [line["sample"] for line in house.lines(METRICS)]
    assert len(numbers) == 6
    assert numbers == sorted(set(numbers))
    assert [event["event"] for event in house.lines(EVENTS)] == ["began"]
    streams = Streams(house.folder, rotate_bytes=10_000, keep_files=1)
    with streams.alone(0.0), pytest.raises(UserError, match="another sample is being written"), streams.alone(0.1):
        pass
    await other.close()


async def test_an_agent_is_a_lane_that_is_meant_to_be_up(house: House):
    def agents() -> Any:
        return house.gauges().gauges.get("agent_up", {})

    await house.sample(0)
    assert agents() == {}
    house.store.write_sync(lambda conn: lanes.want(conn, NODE, (0, 1), config="dispatch.yml", by="alice", now_ms=at(0)))
    house.store.write_sync(lambda conn: lanes.want(conn, "elsewhere", (2,), config="dispatch.yml", by="alice", now_ms=at(0)))
    await house.sample(1)
    assert agents() == {("lane-0",): 0.0, ("lane-1",): 0.0}, "there is no session, or no tmux at all"
    house.store.write_sync(lambda conn: lanes.unwant(conn, NODE, (1,), why="lanes down", by="alice", now_ms=at(1)))
    await house.sample(2)
    assert agents() == {("lane-0",): 0.0}
    house.store.write_sync(lambda conn: pauses.put(conn, Pause(PauseScope.FLEET, 0, "", "alice", since_ms=at(2))))
    await house.sample(3)
    assert agents() == {}


@pytest.mark.parametrize(
    ("wanted", "dead", "status", "told"),
    [
        ("up", False, None, [("lane-3", 1)]),
        ("up", True, 1, [("lane-3", 0)]),
        ("up", True, None, [("lane-3", 0)]),
        ("down", False, None, []),
        ("down", True, 0, []),
        ("down", True, None, []),
        ("down", True, MISUSED, [("lane-3", 0)]),
    ],
    ids=["lives", "failed", "killed", "on its way down", "drained", "ended by a person", "refused its configuration"],
)
async def test_an_agent_lives_while_its_pane_does(house: House, wanted: str, dead: bool, status: int | None, told: list[tuple[str, int]]):
    row = lanes.Lane(NODE, 3, wanted, "", "alice", at(0), "dispatch.yml", 0, at(0), 0)
    pane = Pane("%1", 0, "lane 3", 4711, dead, status, "python", 0, 3)
    facts = house.store.read_sync(lambda conn: _facts.read(conn, node_id=NODE, lease_ms=60_000))
    assert list(_agents(replace(facts, lanes=(row,)), Topology("timmy", ours=True, panes=(pane,), taken=at(0)))) == told


async def test_a_store_that_is_away_leaves_the_rest_of_the_sample(house: House):
    await house.sample(0)
    house.store.write_sync(lambda conn: conn.exec_driver_sql("ALTER TABLE workers RENAME TO gone"))
    sample = await house.sample(1)
    assert set(sample.missed) == {"tmux", "processes", "cron", "gitea", "sprints", "providers"}
    assert sample.record["sources"]["disk"]["status"] == "ok"
    assert "hush" not in json.dumps(sample.record)


async def test_the_loop_goes_on_after_rounds_that_failed(base: Path):
    house = House(base, every_seconds=0.05, deadline_seconds=5.0)
    house.clock = read_clock()
    (house.settings.state_dir / "telemetry").write_text("a file where the folder should be")
    task = asyncio.create_task(house.collector.run())
    await until(lambda: house.gauges().succeeded_ms)
    (house.settings.state_dir / "telemetry").unlink()
    await until(lambda: len(house.lines(METRICS)) >= 2)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    house.store.close()


# the rows


@pytest.mark.parametrize("database", BACKENDS, indirect=True)
def test_samples_and_fires_are_rows(database: str):
    store = Store(database)
    store.open()
    try:

        def write(conn: Any) -> None:
            samples.put(conn, "a", {"disk": {"disk_free_bytes": [[5]]}, "gitea": None}, NOW)
            samples.put(conn, "b", {"disk": {"disk_free_bytes": [[7]]}}, NOW + 1)
            samples.put(conn, "a", {"disk": None, "gitea": {"gitea_open_pull_requests": [["bot", 1], ["people", 2]]}}, NOW + 2)
            samples.serve(conn, {"launcher": "0 */10 * * * *", "exports": MINUTE, "gone": MINUTE}, NOW)
            samples.serve(conn, {"launcher": "0 */5 * * * *", "exports": MINUTE}, NOW + 3)
            samples.fired(conn, "launcher", seen_ms=NOW + 9, expected_ms=NOW + 7)
            samples.fired(conn, "nobody", seen_ms=NOW)
            samples.fired(conn, "exports", seen_ms=NOW + MINUTE)
            samples.fired(conn, "exports", seen_ms=NOW + 3 * MINUTE)

        store.write_sync(write)
        found = store.read_sync(lambda conn: [samples.collected(conn, node) for node in ("a", "b", "")])
        assert found[0].succeeded_ms == {"disk": NOW, "gitea": NOW + 2}
        assert found[0].gauges["gitea_open_pull_requests"] == {("bot",): 1.0, ("people",): 2.0}
        assert [each.gauges["disk_free_bytes"][()] for each in found[:2]] == [5.0, 7.0]
        assert found[2].succeeded_ms == {"disk": NOW + 1, "gitea": NOW + 2}, "of any host"
        assert store.read_sync(samples.every) == (
            Schedule("exports", "", MINUTE, NOW + 3, NOW + 2 * MINUTE, NOW + 3 * MINUTE),
            Schedule("launcher", "0 */5 * * * *", 0, NOW + 3, NOW + 7, NOW + 9),
        )
        store.write_sync(lambda conn: samples.serve(conn, {}, NOW))
        store.write_sync(lambda conn: samples.forget(conn, "a"))
        assert store.read_sync(samples.every) == ()
        assert set(store.read_sync(lambda conn: samples.collected(conn, "a")).succeeded_ms) == set()
        assert set(store.read_sync(lambda conn: samples.collected(conn, "b")).succeeded_ms) == {"disk"}
    finally:
        store.close()


# in the whole bot


@pytest.mark.parametrize("forge", FORGES)
async def test_the_running_bot_is_sampled_and_the_command_works_beside_it(base: Path, forge: str):
    given = {"enabled": True, "every_seconds": 3.0, "deadline_seconds": 30.0}
    async with make_world(base, live=forge == "live", collector=given) as world:
        service = world.service
        await world.alice.open_issue("one", "as told")
        await world.alice.open_issue("two", "as told")

        def rendered() -> str:
            return service.metrics.render("", compress=False).body.decode()

        await until(lambda: "dispatch_gitea_open_issues " in rendered())
        text = rendered()
        worker = f'worker="{service.lease.node_id}-{service.lease.slot}"'
        for name in (
            f"dispatch_worker_memory_bytes{{{worker}}} ",
            f"dispatch_worker_start_timestamp_seconds{{{worker}}} ",
            'dispatch_schedule_drift_seconds{schedule="retention"} ',
            'dispatch_schedule_drift_seconds{schedule="exports"} ',
            "dispatch_disk_free_bytes ",
            'dispatch_disk_used_bytes{place="database"} ',
            *(f'dispatch_collector_last_success_timestamp_seconds{{collector="{name}"}} ' for name in Sampled),
        ):
            assert name in text, name
        assert 'dispatch_collector_errors_total{collector="tmux"} ' in text
        command = ("telemetry", "collect", "--once")
        (code, plain), (also, as_json) = await asyncio.gather(cli(world, *command), cli(world, *command, "--json"))
        assert (code, also) == (0, 0), plain + as_json
        for source in Sampled:
            assert f"  {source}" in plain
        record = json.loads(as_json)
        [repository] = record["sources"]["gitea"]["repositories"]
        assert repository["repository"] == world.stage.repo
        assert [repository[name] for name in ("open_issues", "open_pulls", "bot_pulls")] == [2, 0, 0]
        assert record["sources"]["processes"]["workers"][0]["pid"] == os.getpid()
        folder = world.state_dir / "telemetry"
        numbers = [json.loads(line)["sample"] for line in (folder / METRICS).read_text().splitlines()]
        assert record["sample"] in numbers
        assert numbers == sorted(set(numbers))
        everything = "".join(path.read_text() for path in folder.iterdir())
        assert world.timmy.token.reveal() not in everything
        await service._fired("retention", 1)
        assert (await world.store.read(samples.every))[-1].expected_ms == 1
