"""Rows of what holds work back, on both back ends: pauses end by their time, skips stay, a priority changes only what waits."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from fleet_support import Fleet, now_ms, queue_sprint, settings

from bot.fleet.holds import Holds
from bot.hours import pauses_of, span_of
from bot.models import Breaker, LogLine, Pause, PauseKind, PauseScope, RepositoryLoad, Skip, SprintState
from bot.providers.chain import AllCoolingError, ProviderChain
from bot.providers.entries import Entry
from bot.providers.health import EntryHealth, EntryState
from bot.providers.openai_client import Reply as Answer
from bot.redaction import Secret
from bot.settings import PauseHoursSettings
from bot.store import Store, breakers, fleet, outages, pauses, skips, sprints, steps
from bot.stored_health import StoredHealth

FLEET = Pause(PauseScope.FLEET, 0, "", "root", 1000, 5000, "moving\0 house")
REPO = Pause(PauseScope.REPO, 7, "alice/slug", "alice", 1000)


@pytest.fixture
def store(database: str) -> Iterator[Store]:
    made = Store(database)
    made.open()
    yield made
    made.close()


def test_a_pause_holds_until_its_time_and_is_lifted_once(store: Store) -> None:
    for pause in (REPO, FLEET):
        store.write_sync(lambda conn, pause=pause: pauses.put(conn, pause))

    def current(now: int) -> list[tuple[str, str]]:
        return [(pause.scope, pause.reason) for pause in store.read_sync(lambda conn: pauses.current(conn, now))]

    assert current(4999) == [("fleet", "moving house"), ("repo", "")]
    assert current(5000) == [("repo", "")]
    assert store.write_sync(lambda conn: pauses.lift(conn, PauseScope.FLEET, 0, 5000)) is None
    again = Pause(PauseScope.REPO, 7, "alice/slug", "bob", 2000, None, "again")
    store.write_sync(lambda conn: pauses.put(conn, again))
    store.write_sync(lambda conn: pauses.renamed(conn, 7, "alice/snail"))
    [held] = store.read_sync(lambda conn: pauses.current(conn, 5000))
    assert (held.by, held.reason, held.repo) == ("bob", "again", "alice/snail")
    assert store.write_sync(lambda conn: pauses.lift(conn, PauseScope.REPO, 7, 5000)) == held
    assert store.write_sync(lambda conn: pauses.lift(conn, PauseScope.REPO, 7, 5000)) is None


def test_the_snapshot_tells_of_the_fleets_pause_only(store: Store) -> None:
    def look():
        return store.read_sync(lambda conn: fleet.snapshot(conn, worker_timeout_ms=1000, available=lambda _health, _now: True))

    store.write_sync(lambda conn: pauses.put(conn, REPO))
    assert not look().paused
    end = now_ms() + 60_000
    store.write_sync(lambda conn: pauses.put(conn, Pause(PauseScope.FLEET, 0, "", "root", 1000, end, "moving")))
    seen = look()
    assert (seen.paused, seen.paused_by, seen.paused_since_ms, seen.paused_until_ms, seen.paused_reason) == (
        True,
        "root",
        1000,
        end,
        "moving",
    )
    store.write_sync(lambda conn: pauses.put(conn, Pause(PauseScope.FLEET, 0, "", "root", 1000, now_ms() - 1, "over")))
    assert not look().paused


def test_the_skip_list(store: Store) -> None:
    store.write_sync(lambda conn: skips.put(conn, Skip(7, 1, "alice", 1000, "later")))
    store.write_sync(lambda conn: skips.put(conn, Skip(7, 1, "bob", 2000)))
    store.write_sync(lambda conn: skips.put(conn, Skip(8, 1, "bob", 2000)))
    assert store.read_sync(lambda conn: skips.get(conn, 7, 1)) == Skip(7, 1, "bob", 2000)
    assert store.read_sync(lambda conn: skips.of_repository(conn, 7)) == {1}
    assert store.write_sync(lambda conn: skips.remove(conn, 7, 1)) == Skip(7, 1, "bob", 2000)
    assert store.write_sync(lambda conn: skips.remove(conn, 7, 1)) is None
    assert store.read_sync(lambda conn: skips.get(conn, 8, 1)) is not None


def test_only_what_waits_gets_another_priority(store: Store) -> None:
    queue_sprint(store, 1, sprint_id="a")
    queue_sprint(store, 2, sprint_id="b")
    assert store.write_sync(lambda conn: sprints.prioritise(conn, "b", 1, now_ms()))
    assert store.read_sync(sprints.positions) == {"b": 1, "a": 2}
    store.write_sync(lambda conn: sprints.admit(conn, "a", now_ms()))
    assert not store.write_sync(lambda conn: sprints.prioritise(conn, "a", 1, now_ms()))
    assert store.read_sync(fleet.load) == (RepositoryLoad(7, "alice/slug", 1, 1),)


def test_the_last_things_a_sprint_did(store: Store) -> None:
    def write(conn) -> None:
        for n in (1, 2):
            steps.reserve(conn, "a", 1, n, usd=0.1, tokens=1, now_ms=1)
            for i in (0, 1):
                steps.tool_started(conn, "a", 1, n, i, call_id="c", tool="read_file", arguments="{}", now_ms=1)
            steps.tool_ended(conn, "a", 1, n, 0, result=f"result {n}", now_ms=2)
        steps.reserve(conn, "a", 1, 3, usd=0.1, tokens=1, now_ms=1)
        steps.failed(conn, "a", 1, 3, error="timeout", billed=False, now_ms=2)

    store.write_sync(write)
    assert store.read_sync(lambda conn: steps.latest(conn, "a", limit=4)) == [
        LogLine(1, 1, "read_file", "{}", None),
        LogLine(1, 2, "read_file", "{}", "result 2"),
        LogLine(1, 2, "read_file", "{}", None),
        LogLine(1, 3, "", "", "timeout"),
    ]


def at(text: str, zone: str = "UTC") -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp() * 1000)


@pytest.mark.parametrize(
    ("hours", "days", "zone", "now", "span"),
    [
        ("22:00-06:00", (), "UTC", "2026-03-02T23:30", ("2026-03-02T22:00", "2026-03-03T06:00")),
        ("22:00-06:00", (), "UTC", "2026-03-03T05:59", ("2026-03-02T22:00", "2026-03-03T06:00")),
        ("22:00-06:00", (), "UTC", "2026-03-03T06:00", None),
        ("22:00-06:00", ("mon",), "UTC", "2026-03-03T05:00", ("2026-03-02T22:00", "2026-03-03T06:00")),
        ("22:00-06:00", ("mon",), "UTC", "2026-03-02T05:00", None),
        ("00:00-24:00", ("sat", "sun"), "UTC", "2026-03-08T23:59", ("2026-03-08T00:00", "2026-03-09T00:00")),
        ("00:00-24:00", ("sat", "sun"), "UTC", "2026-03-09T00:00", None),
        ("22:00-06:00", (), "Europe/Berlin", "2026-03-02T22:00", ("2026-03-02T22:00", "2026-03-03T06:00")),
        # The night in which the clocks go forward has one hour less.
        ("22:00-06:00", (), "Europe/Berlin", "2026-03-29T04:00", ("2026-03-28T22:00", "2026-03-29T06:00")),
    ],
)
def test_hours(hours: str, days: tuple[str, ...], zone: str, now: str, span: tuple[str, str] | None) -> None:
    policy = PauseHoursSettings(hours=hours, days=days, timezone=zone)
    assert span_of(policy, at(now, zone)) == (span and (at(span[0], zone), at(span[1], zone)))


def test_the_configuration_holds_a_fleet_a_repository_and_a_provider(tmp_path: Path) -> None:
    night = {"hours": "22:00-06:00", "reason": "backup"}
    made = settings(
        tmp_path,
        pause_hours=[night, {"hours": "23:00-07:00", "reason": "long backup"}],
        repositories=[{"name": "alice/slug", "pause_hours": [night]}],
        providers=[{"name": "dear", "base_url": "http://127.0.0.1:1/v1", "model": "m", "pause_hours": [night]}],
    )
    found = pauses_of(made, {7: "alice/slug"}, at("2026-03-02T23:30"))
    assert [(pause.scope, pause.repo_id, pause.provider, pause.reason, pause.kind) for pause in found] == [
        ("fleet", 0, "", "long backup", "hours"),
        ("repo", 7, "", "backup", "hours"),
        ("provider", 0, "dear", "backup", "hours"),
    ]
    assert pauses_of(made, {7: "alice/slug"}, at("2026-03-02T12:00")) == []


def test_hours_are_rows_that_a_person_may_lift_until_they_begin_anew(store: Store) -> None:
    night = Pause(PauseScope.FLEET, 0, "", "the configured hours", 1000, 5000, "backup", kind=PauseKind.HOURS)

    def keep(*wanted: Pause) -> list[Pause]:
        return store.write_sync(lambda conn: pauses.keep_hours(conn, wanted))

    def current(now: int) -> list[str]:
        return [f"{pause.scope} {pause.by}" for pause in store.read_sync(lambda conn: pauses.current(conn, now))]

    assert keep(night) == [night]
    assert keep(night) == []
    store.write_sync(lambda conn: pauses.put(conn, FLEET))
    assert current(2000) == ["fleet root", "fleet the configured hours"]
    assert store.write_sync(lambda conn: pauses.lift(conn, PauseScope.FLEET, 0, 2000)).by == "root"
    assert current(2000) == []
    assert keep(night) == [], "what a person lifted stays lifted"
    assert current(2000) == []
    tomorrow = replace(night, since_ms=10_000, until_ms=15_000)
    assert keep(tomorrow) == [tomorrow]
    assert current(11_000) == ["fleet the configured hours"]
    assert keep() == []
    assert current(11_000) == []


async def test_hours_and_paused_providers_hold_and_owe_nothing(database: str, base: Path) -> None:
    night = {"hours": "00:00-24:00", "reason": "backup"}
    made = Fleet(database, base / "state", repositories=[{"name": "alice/slug", "max_running": 100, "pause_hours": [night]}])
    store = made.store
    holds = Holds(
        store,
        settings=made.settings,
        repositories=lambda: {7: "alice/slug"},
        is_leader=lambda: True,
        kick_queue=lambda: None,
        now_ms=now_ms,
    )
    queue_sprint(store, 1, sprint_id="a")

    def look():
        store.write_sync(made.leader._admit)
        row = store.read_sync(lambda conn: sprints.field(conn, "a", "waiting_reason", "waiting_note"))
        seen = store.read_sync(lambda conn: fleet.snapshot(conn, worker_timeout_ms=1000, available=lambda _health, _now: True))
        return row.waiting_reason, row.waiting_note.partition(",")[0], seen.oldest_runnable_ms is None

    await holds.round()
    assert look() == ("quiet_hours", "this repository", True)
    store.write_sync(lambda conn: pauses.lift(conn, PauseScope.REPO, 7, now_ms()))
    await holds.round()
    assert look()[0] == "no_worker"
    for name in ("nous", "other"):
        made.leader._providers = lambda: ("nous", "other")
        store.write_sync(lambda conn, name=name: pauses.put(conn, Pause(PauseScope.PROVIDER, 0, "", "root", 1, None, "", name)))
        held = look()
        assert (held[0] == "paused") == (name == "other"), "one provider is left to work with"
    assert held == ("paused", "the provider nous", True)
    assert list(store.read_sync(lambda conn: pauses.paused_providers(conn, now_ms()))) == ["other", "nous"]
    store.write_sync(lambda conn: pauses.lift(conn, PauseScope.PROVIDER, 0, now_ms(), provider="nous"))
    assert look()[0] == "no_worker"
    store.close()


async def test_one_paused_repository_does_not_hold_another(database: str, base: Path) -> None:
    made = Fleet(database, base / "state")
    store = made.store
    queue_sprint(store, 1, sprint_id="held", repo_id=7)
    queue_sprint(store, 2, sprint_id="behind", repo_id=7)
    queue_sprint(store, 1, sprint_id="free", repo_id=8)
    store.write_sync(lambda conn: pauses.put(conn, REPO))
    store.write_sync(lambda conn: made.leader._admit(conn))

    def row(name: str):
        return store.read_sync(lambda conn: sprints.field(conn, name, "waiting_reason", "waiting_note", "rev"))

    note = "this repository, by alice"
    assert [row(name)[:2] for name in ("held", "behind")] == [("paused", note)] * 2
    assert row("free").waiting_reason == "no_worker"
    assert row("behind").rev > 1, "the comment of whoever waits behind says so too"
    queue_sprint(store, 3, sprint_id="newcomer", repo_id=7)
    store.write_sync(lambda conn: made.leader._admit(conn))
    assert (row("newcomer").waiting_reason, row("newcomer").rev) == ("paused", 2)
    store.write_sync(lambda conn: pauses.lift(conn, PauseScope.REPO, 7, now_ms()))
    store.write_sync(lambda conn: made.leader._admit(conn))
    assert row("behind").waiting_reason is None
    assert store.read_sync(lambda conn: sprints.get(conn, "held")).state is SprintState.QUEUED
    store.close()


async def test_the_chain_passes_over_what_is_held(store: Store) -> None:
    class Client:
        def __init__(self) -> None:
            self.asked: list[str] = []

        async def call(self, entry: Entry, *_: object, **_more: object) -> Answer:
            self.asked.append(entry.provider)
            return Answer({"role": "assistant", "content": "ok"}, "stop", None)

        async def aclose(self) -> None:
            pass

    client, health = Client(), StoredHealth(store, now_ms)
    entries = [Entry(name, "m", "http://127.0.0.1:1/v1", Secret("no-key-required")) for name in ("nous", "other")]
    chain = ProviderChain(lambda: entries, health=health, now_ms=now_ms, sleep=asyncio.sleep, random=lambda: 0.0, client=client)

    async def ask() -> str:
        deadline = asyncio.get_running_loop().time() + 10
        return (await chain.complete([{"role": "user", "content": "x"}], [], max_tokens=100, deadline=deadline)).provider

    async def hold(name: str, until_ms: int | None = None) -> None:
        pause = Pause(PauseScope.PROVIDER, 0, "", "root", 1, until_ms, "", name)
        await store.write(lambda conn: pauses.put(conn, pause))

    assert await ask() == "nous"
    await hold("nous")
    assert await ask() == "other"
    breaker = Breaker(PauseScope.PROVIDER, 0, "", "other", 1, now_ms() + 60_000, 5, "llm")
    await store.write(lambda conn: breakers.save(conn, breaker))
    with pytest.raises(AllCoolingError, match="its breaker is open") as caught:
        await ask()
    assert caught.value.until_ms == breaker.due_ms
    await hold("other")
    with pytest.raises(AllCoolingError, match="nous is paused by root; other is paused by root") as caught:
        await ask()
    assert caught.value.until_ms == 0, "people want it so: nothing is owed"
    assert client.asked == ["nous", "other"]
    await hold("nous", now_ms() - 1)
    assert await ask() == "nous"
    await health.save("nous/m", EntryHealth(EntryState.COOLING, now_ms() + 50_000, "rate_limit", 1))
    await health.save("nous/m", EntryHealth())
    [one] = await store.read(lambda conn: outages.between(conn, since_ms=0, until_ms=2**62, now_ms=now_ms()))
    assert (one.name, one.count, one.reason) == ("nous/m", 1, "rate_limit")
    await chain.aclose()
