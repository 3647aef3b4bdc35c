"""Leases of the processes that run sprints, by the database's clock; a reaped id never lives again (engine.md, "Lease, reaper, fence")."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from bot.store._base import BIG, database_now_ms, insert, metadata

table = sa.Table(
    "workers",
    metadata,
    sa.Column("executor_id", sa.Text, primary_key=True),
    sa.Column("node_id", sa.Text, nullable=False),
    sa.Column("slot", sa.Integer, nullable=False),
    sa.Column("host", sa.Text, nullable=False),
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("app_version", sa.Text, nullable=False),
    sa.Column("capacity", sa.Integer, nullable=False),
    sa.Column("draining", sa.Boolean, nullable=False, default=False),
    sa.Column("started_ms", BIG, nullable=False),
    sa.Column("beat_ms", BIG, nullable=False),
    sa.Column("reaped_ms", BIG),
)


@dataclass(frozen=True, slots=True)
class Worker:
    """One lease row."""

    executor_id: str
    node_id: str
    slot: int
    host: str
    pid: int
    app_version: str
    capacity: int
    draining: bool
    started_ms: int
    beat_ms: int
    reaped_ms: int | None


COLUMNS = tuple(table.c[name] for name in Worker.__dataclass_fields__)


def enter(conn: Connection, *, executor_id: str, node_id: str, slot: int, host: str, pid: int, app_version: str, capacity: int) -> None:
    """Writes the first lease; must be committed before the engine is launched (a missing row counts as dead)."""
    now = database_now_ms(conn)
    conn.execute(
        table.insert().values(
            executor_id=executor_id,
            node_id=node_id,
            slot=slot,
            host=host,
            pid=pid,
            app_version=app_version,
            capacity=capacity,
            draining=False,
            started_ms=now,
            beat_ms=now,
        )
    )


def beat(conn: Connection, executor_id: str) -> bool:
    """Renews the lease; False means that we were declared dead."""
    now = database_now_ms(conn)
    statement = table.update().where(table.c.executor_id == executor_id, table.c.reaped_ms.is_(None)).values(beat_ms=now)
    return conn.execute(statement).rowcount == 1


def drain(conn: Connection, executor_id: str) -> None:
    """This process takes no new sprint."""
    conn.execute(table.update().where(table.c.executor_id == executor_id).values(draining=True))


def leave(conn: Connection, executor_id: str) -> None:
    """A polite end: the lease is gone, so what it owned is taken over at once."""
    conn.execute(table.delete().where(table.c.executor_id == executor_id))


def live(conn: Connection, timeout_ms: int) -> list[Worker]:
    """Leases neither reaped nor older than the timeout."""
    now = database_now_ms(conn)
    statement = sa.select(*COLUMNS).where(table.c.reaped_ms.is_(None), table.c.beat_ms > now - timeout_ms)
    return [Worker(*row) for row in conn.execute(statement)]


def every(conn: Connection) -> list[Worker]:
    """All lease rows."""
    return [Worker(*row) for row in conn.execute(sa.select(*COLUMNS))]


def holder_of_slot(conn: Connection, node_id: str, slot: int, besides: str) -> list[str]:
    """Executor ids that held this slot of this node before `besides` took its lock: they are dead, the lock proves it."""
    statement = sa.select(table.c.executor_id).where(
        table.c.node_id == node_id, table.c.slot == slot, table.c.executor_id != besides, table.c.reaped_ms.is_(None)
    )
    return list(conn.execute(statement).scalars())


def reap(conn: Connection, executor_id: str) -> bool:
    """Declares an executor dead, also one without a lease (it left politely); True where it had one that stood until now: it crashed."""
    now = database_now_ms(conn)
    standing = table.update().where(table.c.executor_id == executor_id, table.c.reaped_ms.is_(None))
    if conn.execute(standing.values(reaped_ms=now)).rowcount:
        return True
    statement = insert(conn, table).values(
        executor_id=executor_id,
        node_id="",
        slot=-1,
        host="",
        pid=0,
        app_version="",
        capacity=0,
        draining=True,
        started_ms=now,
        beat_ms=0,
        reaped_ms=now,
    )
    conn.execute(statement.on_conflict_do_nothing())
    return False


def dismiss(conn: Connection, executor_id: str) -> bool:
    """Nobody waits for it any more: declared dead, and its row goes, so that what it owned is taken over and it ends if it lives after all; True where it
    had a lease that stood until now.
    """
    crashed = reap(conn, executor_id)
    conn.execute(table.delete().where(table.c.executor_id == executor_id))
    return crashed


def without_lease(conn: Connection, executors: Iterable[str]) -> set[str]:
    """Those of `executors` that have no row at all, or one that is reaped: dead for certain, whatever the clocks say."""
    standing = set(conn.execute(sa.select(table.c.executor_id).where(table.c.reaped_ms.is_(None))).scalars())
    return set(executors) - standing


def forget(conn: Connection, *, before_ms: int) -> None:
    """Drops rows reaped long ago, and those that have been silent for as long and owned nothing, so that nobody reaped them."""
    silent = sa.and_(table.c.reaped_ms.is_(None), table.c.beat_ms < before_ms)
    conn.execute(table.delete().where(sa.or_(table.c.reaped_ms < before_ms, silent)))
