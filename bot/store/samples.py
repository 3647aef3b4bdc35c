"""What the collector saw last, one row a source and host, and when each schedule last fired: what the gauges show survives a restart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from bot.snapshot import Collected
from bot.store._base import BIG, insert, metadata

table = sa.Table(
    "samples",
    metadata,
    sa.Column("source", sa.Text, primary_key=True),
    sa.Column("node_id", sa.Text, primary_key=True),
    sa.Column("since_ms", BIG, nullable=False),
    sa.Column("tried_ms", BIG, nullable=False),
    sa.Column("succeeded_ms", BIG),
    sa.Column("gauges", sa.JSON, nullable=False),
)
schedules = sa.Table(
    "schedules",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("cron", sa.Text, nullable=False),
    sa.Column("every_ms", BIG, nullable=False, default=0),
    sa.Column("since_ms", BIG, nullable=False),
    sa.Column("expected_ms", BIG),
    sa.Column("seen_ms", BIG),
)


@dataclass(frozen=True, slots=True)
class Schedule:
    """What fires by the clock: by a cron line (six fields, UTC), or else every `every_ms`.

    `since_ms` is when a process last began to serve it, `expected_ms` for when its last fire was due, `seen_ms` when that fire came.
    """

    name: str
    cron: str
    every_ms: int
    since_ms: int
    expected_ms: int | None = None
    seen_ms: int | None = None


def put(conn: Connection, node_id: str, found: Mapping[str, Mapping[str, Any] | None], now_ms: int) -> None:
    """What the sources of one host gave: their gauges, or None for one that was missed (what it gave before stays)."""
    for source, gauges in sorted(found.items()):
        succeeded = None if gauges is None else now_ms
        statement = insert(conn, table).values(
            source=source, node_id=node_id, since_ms=now_ms, tried_ms=now_ms, succeeded_ms=succeeded, gauges=dict(gauges or {})
        )
        changes: dict[str, Any] = {"tried_ms": now_ms}
        if gauges is not None:
            changes |= {"succeeded_ms": now_ms, "gauges": statement.excluded.gauges}
        conn.execute(statement.on_conflict_do_update(index_elements=["source", "node_id"], set_=changes))


def forget(conn: Connection, node_id: str, *, keep: tuple[str, ...] = ()) -> None:
    """Drops the rows of one host but those of the sources in `keep`: what nobody collects any more would look stale for ever."""
    conn.execute(table.delete().where(table.c.node_id == node_id, table.c.source.not_in(keep)))


def collected(conn: Connection, node_id: str = "") -> Collected:
    """The last sample of one host, for the gauges; without a name the newest of any host, source by source."""
    of_host = sa.select(table).order_by(table.c.tried_ms, table.c.node_id)
    rows = conn.execute(of_host.where(table.c.node_id == node_id) if node_id else of_host).all()
    merged: dict[str, dict[tuple[str, ...], float]] = {}
    for row in rows:
        for gauge, values in row.gauges.items():
            merged.setdefault(gauge, {}).update({tuple(labels): float(value) for *labels, value in values})
    succeeded: dict[str, int] = {}
    for row in rows:
        succeeded[row.source] = max(succeeded.get(row.source, 0), row.succeeded_ms or row.since_ms)
    return Collected(succeeded, merged)


def serve(conn: Connection, served: Mapping[str, str | int], now_ms: int) -> None:
    """These schedules (name -> cron line, or milliseconds between two rounds) are served from now on, and no others."""
    conn.execute(schedules.delete().where(schedules.c.name.not_in(list(served))))
    for name, timing in sorted(served.items()):
        cron, every = (timing, 0) if isinstance(timing, str) else ("", timing)
        statement = insert(conn, schedules).values(name=name, cron=cron, every_ms=every, since_ms=now_ms)
        changes = {"cron": cron, "every_ms": every, "since_ms": now_ms}
        conn.execute(statement.on_conflict_do_update(index_elements=["name"], set_=changes))


def fired(conn: Connection, name: str, *, seen_ms: int, expected_ms: int | None = None) -> None:
    """A schedule fired; without `expected_ms` it was due one period after it was last seen."""
    due: Any = expected_ms
    if expected_ms is None:
        due = sa.func.coalesce(schedules.c.seen_ms, schedules.c.since_ms) + schedules.c.every_ms
    conn.execute(schedules.update().where(schedules.c.name == name).values(expected_ms=due, seen_ms=seen_ms))


def every(conn: Connection) -> tuple[Schedule, ...]:
    """All schedules, by name."""
    columns = [schedules.c[name] for name in Schedule.__dataclass_fields__]
    return tuple(Schedule(*row) for row in conn.execute(sa.select(*columns).order_by(schedules.c.name)))
