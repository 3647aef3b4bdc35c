"""Verified deliveries that a handler wants: one insert before the 2xx, taken once at a time, done or given up."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from bot.store._base import BIG, clean, insert, metadata

table = sa.Table(
    "deliveries",
    metadata,
    sa.Column("hash", sa.Text, primary_key=True),
    sa.Column("event_type", sa.Text, nullable=False),
    sa.Column("delivery", sa.Text, nullable=False),
    sa.Column("body", sa.LargeBinary, nullable=False),
    sa.Column("received_ms", BIG, nullable=False),
    sa.Column("done_ms", BIG),
    sa.Column("error", sa.Text),
    sa.Column("tries", sa.Integer, nullable=False, default=0),
    sa.Column("due_ms", BIG, nullable=False, default=0),
    sa.Index("ix_deliveries_open", "due_ms", sqlite_where=sa.text("done_ms IS NULL"), postgresql_where=sa.text("done_ms IS NULL")),
)

LEASE_MS = 5_000
MAX_TRIES = 5
NOT_YET_MS = 86_400_000


@dataclass(frozen=True, slots=True)
class Delivery:
    """One row taken for handling; `tries` counts this one, `error` is what the last one came to, None if it came to no end."""

    hash: str
    event_type: str
    delivery: str
    body: bytes
    received_ms: int
    tries: int
    error: str | None


def add(conn: Connection, *, digest: str, event_type: str, delivery: str, body: bytes, now_ms: int) -> bool:
    """Stores a delivery; False where the same event type and body is here already."""
    statement = (
        insert(conn, table)
        .values(hash=digest, event_type=event_type, delivery=clean(delivery), body=body, received_ms=now_ms, tries=0, due_ms=0)
        .on_conflict_do_nothing()
        .returning(table.c.hash)
    )
    return conn.execute(statement).first() is not None


def newest(conn: Connection, *, limit: int) -> list[tuple[int, bytes]]:
    """(received, body) of the last deliveries, newest first."""
    statement = sa.select(table.c.received_ms, table.c.body).order_by(table.c.received_ms.desc()).limit(limit)
    return [(int(row[0]), bytes(row[1])) for row in conn.execute(statement)]


def take(conn: Connection, digest: str, now_ms: int) -> Delivery | None:
    """Claims one open row for LEASE_MS; None if somebody has it or it is done."""
    statement = (
        table.update()
        .where(table.c.hash == digest, table.c.done_ms.is_(None), table.c.due_ms <= now_ms)
        .values(due_ms=now_ms + LEASE_MS, tries=table.c.tries + 1)
        .returning(*(table.c[name] for name in Delivery.__dataclass_fields__))
    )
    row = conn.execute(statement).first()
    return None if row is None else Delivery(*row)


def renew(conn: Connection, digest: str, now_ms: int) -> None:
    """Keeps a claimed row for another LEASE_MS."""
    conn.execute(table.update().where(table.c.hash == digest, table.c.done_ms.is_(None)).values(due_ms=now_ms + LEASE_MS))


def due(conn: Connection, now_ms: int, *, limit: int = 200) -> list[str]:
    """Hashes of open rows whose time has come, oldest first."""
    statement = (
        sa.select(table.c.hash).where(table.c.done_ms.is_(None), table.c.due_ms <= now_ms).order_by(table.c.received_ms).limit(limit)
    )
    return list(conn.execute(statement).scalars())


def done(conn: Connection, digest: str, now_ms: int) -> None:
    """Handled well."""
    conn.execute(table.update().where(table.c.hash == digest).values(done_ms=now_ms, error=None))


def later(conn: Connection, digest: str, *, error: str, due_ms: int) -> None:
    """Handled badly or not yet: offered again at `due_ms`."""
    conn.execute(table.update().where(table.c.hash == digest).values(error=clean(error)[:2000], due_ms=due_ms))


def dead(conn: Connection, digest: str, *, error: str, now_ms: int) -> None:
    """Given up: kept with its error until an operator replays it."""
    conn.execute(table.update().where(table.c.hash == digest).values(error=clean(error)[:2000], done_ms=now_ms))


def dead_letters(conn: Connection) -> list[tuple[str, str, str, int]]:
    """(hash, event type, error, received_ms) of all that were given up."""
    statement = sa.select(table.c.hash, table.c.event_type, table.c.error, table.c.received_ms).where(
        table.c.done_ms.is_not(None), table.c.error.is_not(None)
    )
    return [(row[0], row[1], row[2], row[3]) for row in conn.execute(statement.order_by(table.c.received_ms))]


def replay(conn: Connection, digest: str) -> bool:
    """Opens a dead letter again; False if there is no such row."""
    statement = table.update().where(table.c.hash.startswith(digest), table.c.done_ms.is_not(None))
    return conn.execute(statement.values(done_ms=None, error=None, tries=0, due_ms=0)).rowcount > 0


def prune(conn: Connection, *, done_before_ms: int, dead_before_ms: int) -> int:
    """Deletes what was done and what was given up long ago; what is open stays."""
    finished = sa.and_(table.c.done_ms < done_before_ms, table.c.error.is_(None))
    given_up = sa.and_(table.c.done_ms < dead_before_ms, table.c.error.is_not(None))
    return conn.execute(table.delete().where(sa.or_(finished, given_up))).rowcount
