"""Rows of what holds work back, on both back ends: pauses end by their time, skips stay, a priority changes only what waits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fleet_support import Fleet, now_ms, queue_sprint

from bot.models import LogLine, Pause, PauseScope, RepositoryLoad, Skip, SprintState
from bot.store import Store, fleet, pauses, skips, sprints, steps

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
