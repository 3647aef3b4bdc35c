"""Small named facts of the service: schema version, reconcile cursors, last delivery; one row each."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from bot.store._base import insert, metadata

table = sa.Table("facts", metadata, sa.Column("name", sa.Text, primary_key=True), sa.Column("value", sa.JSON, nullable=False))

LAST_DELIVERY = "last_delivery_ms"
LAST_TEST_PUSH = "last_test_push_ms"
LAST_PROGRESS = "last_progress_ms"
LAST_SUCCESS = "last_success_ms"
STARTED = "initialised_ms"
FORGE_HOLD = "forge_hold"
OWN_HOOKS = "own_hooks"


def get(conn: Connection, name: str) -> Any:
    """The value of `name`, or None."""
    return conn.execute(sa.select(table.c.value).where(table.c.name == name)).scalar()


def put(conn: Connection, name: str, value: Any) -> None:
    """Sets `name`; the last writer wins."""
    statement = insert(conn, table).values(name=name, value=value)
    conn.execute(statement.on_conflict_do_update(index_elements=["name"], set_={"value": statement.excluded.value}))


def setdefault(conn: Connection, name: str, value: Any) -> Any:
    """Sets `name` only if it is absent; returns what stands."""
    conn.execute(insert(conn, table).values(name=name, value=value).on_conflict_do_nothing())
    return get(conn, name)


def delete(conn: Connection, name: str) -> None:
    """Forgets `name`."""
    conn.execute(table.delete().where(table.c.name == name))
