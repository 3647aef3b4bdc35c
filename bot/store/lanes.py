"""What the operator wants of each lane, and how often it was started again: one row a lane of a state folder, so that nothing resurrects what was stopped."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from bot.store._base import BIG, clean, insert, metadata

UP, DOWN = "up", "down"

table = sa.Table(
    "lanes",
    metadata,
    sa.Column("node_id", sa.Text, primary_key=True),
    sa.Column("lane", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("wanted", sa.Text, nullable=False),
    sa.Column("why", sa.Text, nullable=False),
    sa.Column("by", sa.Text, nullable=False),
    sa.Column("changed_ms", BIG, nullable=False),
    sa.Column("config", sa.Text, nullable=False),
    sa.Column("restarts", sa.Integer, nullable=False),
    sa.Column("started_ms", BIG, nullable=False),
    sa.Column("due_ms", BIG, nullable=False),
)
c = table.c


@dataclass(frozen=True, slots=True)
class Lane:
    """One lane of one state folder. `wanted` is up or down, `restarts` in a row, `due_ms` the earliest next start; `config` the file its worker reads."""

    node_id: str
    lane: int
    wanted: str
    why: str
    by: str
    changed_ms: int
    config: str
    restarts: int
    started_ms: int
    due_ms: int


COLUMNS = tuple(c[name] for name in Lane.__dataclass_fields__)


def of_node(conn: Connection, node_id: str) -> list[Lane]:
    """The lanes of a state folder, by number."""
    return [Lane(*row) for row in conn.execute(sa.select(*COLUMNS).where(c.node_id == node_id).order_by(c.lane))]


def want(conn: Connection, node_id: str, lanes: Iterable[int], *, config: str, by: str, now_ms: int) -> None:
    """From now on these are wanted up, whatever stopped them, and their restarts count anew; those that were wanted before keep their history."""
    fresh = {"config": config, "restarts": 0, "due_ms": 0}
    turned = {"wanted": UP, "why": "", "by": clean(by)[:200], "changed_ms": now_ms}
    for lane in lanes:
        here = (c.node_id == node_id, c.lane == lane)
        known = conn.execute(table.update().where(*here).values(**fresh)).rowcount
        if known:
            conn.execute(table.update().where(*here, c.wanted != UP).values(**turned))
        else:
            conn.execute(insert(conn, table).values(node_id=node_id, lane=lane, started_ms=0, **fresh, **turned).on_conflict_do_nothing())


def unwant(conn: Connection, node_id: str, lanes: Iterable[int], *, why: str, by: str, now_ms: int) -> int:
    """From now on these stay down; returns how many were wanted up."""
    statement = table.update().where(c.node_id == node_id, c.lane.in_(list(lanes)), c.wanted == UP)
    return conn.execute(statement.values(wanted=DOWN, why=clean(why)[:500], by=clean(by)[:200], changed_ms=now_ms)).rowcount


def start(conn: Connection, seen: Lane, *, restarts: int, due_ms: int, now_ms: int) -> bool:
    """Takes a start upon oneself; False where somebody else did meanwhile, or the lane is not wanted any more."""
    guard = (c.node_id == seen.node_id, c.lane == seen.lane, c.wanted == UP, c.started_ms == seen.started_ms, c.restarts == seen.restarts)
    return conn.execute(table.update().where(*guard).values(started_ms=now_ms, restarts=restarts, due_ms=due_ms)).rowcount == 1
