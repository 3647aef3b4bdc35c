"""Health of model providers, shared by all workers and kept over restarts; one caller at a time probes an entry that cooled down."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from bot.store._base import BIG, insert, metadata

table = sa.Table(
    "providers",
    metadata,
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("health", sa.JSON, nullable=False),
    sa.Column("lease_until_ms", BIG, nullable=False, default=0),
)


def load(conn: Connection) -> dict[str, dict[str, Any]]:
    """Entry key (`provider/model`) -> its health record."""
    return {row[0]: row[1] for row in conn.execute(sa.select(table.c.key, table.c.health))}


def save(conn: Connection, key: str, health: dict[str, Any]) -> None:
    """Stores the health record of one entry."""
    statement = insert(conn, table).values(key=key, health=health, lease_until_ms=0)
    conn.execute(statement.on_conflict_do_update(index_elements=["key"], set_={"health": statement.excluded.health}))


def try_lease(conn: Connection, key: str, *, seconds: float, now_ms: int) -> bool:
    """True for exactly one caller until `seconds` have passed."""
    conn.execute(insert(conn, table).values(key=key, health={}, lease_until_ms=0).on_conflict_do_nothing())
    statement = table.update().where(table.c.key == key, table.c.lease_until_ms <= now_ms)
    return conn.execute(statement.values(lease_until_ms=now_ms + int(seconds * 1000))).rowcount == 1


def release(conn: Connection, key: str) -> None:
    """Gives the probe's lease back."""
    conn.execute(table.update().where(table.c.key == key).values(lease_until_ms=0))
