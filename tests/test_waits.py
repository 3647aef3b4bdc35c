"""The time to wait: median run time of the last sprints x place / capacity, by fleet and by repository; nothing without history or with a free slot."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bot import replies
from bot.fleet.reconcile import Reconciler
from bot.gitea.errors import Forbidden, Unavailable
from bot.models import IssueRef, Limits, OutcomeKind, Source, SprintState
from bot.store import Store, sprints, waits, workers

MINUTE = 60_000
CAPS = waits.Caps(fleet=0, repository=1, lease_ms=60_000)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(f"sqlite:///{tmp_path / 'timmy.db'}")
    made.open()
    yield made
    made.close()


def add(store: Store, name: str, *, repo_id: int = 5, queued_ms: int = 0, **values) -> None:
    def write(conn):
        assert sprints.new(
            conn,
            sprint_id=name,
            repo_id=repo_id,
            issue=IssueRef.of(f"acme/r{repo_id}", int(name[1:])),
            title="",
            source=Source.LABEL,
            priority=5,
            trigger=f"label:{name}",
            requester_id=1,
            requester="bob",
            instructions="",
            options={},
            limits=Limits(1, 1, 1000, 1.0),
            text_hash="",
            base_branch="",
            now_ms=queued_ms,
        )
        if values:
            conn.execute(sprints.table.update().where(sprints.c.id == name).values(**values))

    store.write_sync(write)


def ended(store: Store, name: str, minutes: float, outcome: OutcomeKind = OutcomeKind.PULL_REQUEST) -> None:
    add(store, name, state=SprintState.SETTLED, outcome=outcome, started_ms=1000, settled_ms=1000 + int(minutes * MINUTE))


def worker(store: Store, slots: int) -> None:
    store.write_sync(
        lambda conn: workers.enter(conn, executor_id="w", node_id="n", slot=0, host="h", pid=1, app_version="1", capacity=slots)
    )


def waited(store: Store, name: str, caps: waits.Caps = CAPS) -> int:
    found = store.read_sync(lambda conn: waits.position(conn, name, caps))
    assert found is not None
    return found.wait_ms


def test_nothing_without_history_without_a_worker_and_with_a_free_slot(store: Store) -> None:
    add(store, "s1", queued_ms=1)
    assert waited(store, "s1") == 0
    ended(store, "s90", 10)
    assert waited(store, "s1") == 0, "no worker is alive"
    worker(store, 2)
    assert waited(store, "s1") == 0, "a slot is free"
    add(store, "s2", repo_id=6, queued_ms=2)
    assert waited(store, "s2") == 0
    add(store, "s3", queued_ms=3)
    assert waited(store, "s3") == 15 * MINUTE, (
        "third in line for two slots; and behind another of its repository, of which one may run at a time"
    )
    assert store.read_sync(lambda conn: waits.position(conn, "s90", CAPS)) is None


def test_the_median_times_the_place_by_the_capacity(store: Store) -> None:
    worker(store, 2)
    for n, minutes in enumerate((4, 6, 50)):
        ended(store, f"s{90 + n}", minutes)
    ended(store, "s99", 0.01, OutcomeKind.CANCELLED)
    add(store, "s1", repo_id=1, state=SprintState.WORKING, started_ms=1)
    add(store, "s2", repo_id=2, state=SprintState.WORKING, started_ms=1)
    for n in range(3, 7):
        add(store, f"s{n}", repo_id=n, queued_ms=n)
    assert [waited(store, f"s{n}") for n in range(3, 7)] == [3 * MINUTE, 6 * MINUTE, 9 * MINUTE, 12 * MINUTE]
    assert waited(store, "s6", waits.Caps(fleet=1, repository=1, lease_ms=60_000)) == 24 * MINUTE
    add(store, "s7", repo_id=1, queued_ms=0)
    assert waited(store, "s7") == 15 * MINUTE, "fifth in line, because its repository has its turn already"


@pytest.mark.parametrize(
    ("minutes", "text"),
    [(0.1, "about a minute"), (1.4, "about a minute"), (12.2, "about 12 minutes"), (99, "about 99 minutes"), (180, "about 3 hours")],
)
def test_in_words(minutes: float, text: str) -> None:
    assert replies.about(int(minutes * MINUTE)) == text


class _Forge:
    """Four repositories: one may not be looked at, one has no hook, one is empty, one can send."""

    def __init__(self, *, away: bool = False) -> None:
        self.away = away
        self.asked: list[str] = []
        self.tested: list[str] = []

    async def hooks(self, name: str):
        self.asked.append(name)
        if self.away:
            raise Unavailable("no answer")
        if name == "a/closed":
            raise Forbidden("no")
        return [] if name == "a/bare" else [{"id": 3, "config": {"url": "http://bot/webhook"}}]

    async def test_hook(self, name: str, _hook: int) -> None:
        self.tested.append(name)


class _Repositories:
    def __init__(self, *names: str) -> None:
        self.known = dict(enumerate(names))

    def names(self):
        return self.known

    async def record(self, repo_id: int):
        return {"empty": self.known[repo_id] == "a/empty"}


def reconciler(forge: _Forge, *names: str) -> Reconciler:
    made = Reconciler.__new__(Reconciler)
    made._forge, made._repositories, made._hook_url = forge, _Repositories(*names), "http://bot/webhook"
    return made


async def test_any_repository_that_can_send_a_test_delivery_will_do() -> None:
    forge = _Forge()
    assert await reconciler(forge, "a/closed", "a/bare", "a/empty", "a/good", "a/unasked")._ask_for_test() == ""
    assert forge.tested == ["a/good"]
    assert "a/closed cannot be tried" in await reconciler(_Forge(), "a/closed", "a/bare")._ask_for_test()
    assert "a/bare has no webhook" in await reconciler(_Forge(), "a/bare", "a/empty")._ask_for_test()
    assert "no repository can send" in await reconciler(_Forge(), "a/empty")._ask_for_test()
    away = _Forge(away=True)
    assert "cannot be tried" in await reconciler(away, "a/good", "a/unasked")._ask_for_test()
    assert away.asked == ["a/good"], "a server that is away is not asked once a repository"
