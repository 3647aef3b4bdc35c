"""Writes that wait share a commit, and are still transactions of their own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from bot.store import Store, cursors


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(f"sqlite:///{tmp_path}/a.db")
    made.open()
    yield made
    made.close()


async def burst(store: Store, *writes, commits: list[int]):
    """Runs writes that all waited behind one; `commits` gets one entry a commit of the burst."""
    gate, begun = threading.Event(), threading.Event()
    held = asyncio.ensure_future(store.write(lambda conn: (begun.set(), gate.wait(5))))
    await asyncio.to_thread(begun.wait, 5)
    tasks = [asyncio.ensure_future(store.write(fn)) for fn in writes]
    await asyncio.sleep(0.01)
    sa.event.listen(store._write_engine, "commit", lambda conn: commits.append(1))
    commits.clear()
    gate.set()
    await held
    return tasks


async def kept(store: Store, *names: str):
    return await store.read(lambda conn: [cursors.get(conn, name) for name in names])


async def test_a_burst_is_one_commit_and_all_of_it_is_there(store: Store):
    commits: list[int] = []
    tasks = await burst(store, *(lambda conn, n=n: cursors.put(conn, f"c{n}", n) or n for n in range(10)), commits=commits)
    assert await asyncio.gather(*tasks) == list(range(10))
    assert await kept(store, "c0", "c9") == [0, 9]
    assert len(commits) <= 2  # the one held open before, and the burst


async def test_one_that_fails_takes_back_its_own_and_no_more(store: Store):
    def bad(conn):
        cursors.put(conn, "bad", 1)
        raise ValueError("no")

    tasks = await burst(store, lambda conn: cursors.put(conn, "a", 1), bad, lambda conn: cursors.put(conn, "b", 2), commits=[])
    first, failed, last = await asyncio.gather(*tasks, return_exceptions=True)
    assert (first, last) == (None, None)
    assert isinstance(failed, ValueError)
    assert await kept(store, "a", "bad", "b") == [1, None, 2]


async def test_a_database_that_fails_fails_all_and_keeps_nothing(store: Store):
    tasks = await burst(
        store,
        lambda conn: cursors.put(conn, "a", 1),
        lambda conn: conn.exec_driver_sql("select * from no_such_table"),
        lambda conn: cursors.put(conn, "b", 2),
        commits=[],
    )
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(error, sa.exc.OperationalError) for error in found)
    assert await kept(store, "a", "b") == [None, None]
    await store.write(lambda conn: cursors.put(conn, "b", 3))
    assert await kept(store, "b") == [3]


async def test_cancelled_before_it_begins_it_never_runs(store: Store):
    gate, begun = threading.Event(), threading.Event()
    held = asyncio.ensure_future(store.write(lambda conn: (begun.set(), gate.wait(5))))
    await asyncio.to_thread(begun.wait, 5)
    task = asyncio.ensure_future(store.write(lambda conn: cursors.put(conn, "a", 1)))
    await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    gate.set()
    await held
    assert await kept(store, "a") == [None]
