"""The skip list: issues that a person does not want worked on, whoever asks, until somebody takes them off again."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from bot.models import Skip
from bot.store._base import BIG, clean, insert, metadata

table = sa.Table(
    "skips",
    metadata,
    sa.Column("repo_id", BIG, primary_key=True, autoincrement=False),
    sa.Column("issue", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("by", sa.Text, nullable=False),
    sa.Column("since_ms", BIG, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
)
c = table.c
COLUMNS = tuple(c[name] for name in Skip.__dataclass_fields__)


def get(conn: Connection, repo_id: int, issue: int) -> Skip | None:
    """The entry of one issue, or None."""
    row = conn.execute(sa.select(*COLUMNS).where(c.repo_id == repo_id, c.issue == issue)).first()
    return None if row is None else Skip(*row)


def put(conn: Connection, skip: Skip) -> None:
    """Puts an issue on the list; a later word replaces an earlier one."""
    values = {"by": clean(skip.by)[:200], "since_ms": skip.since_ms, "reason": clean(skip.reason)[:500]}
    statement = insert(conn, table).values(repo_id=skip.repo_id, issue=skip.issue, **values)
    conn.execute(statement.on_conflict_do_update(index_elements=["repo_id", "issue"], set_=values))


def remove(conn: Connection, repo_id: int, issue: int) -> Skip | None:
    """Takes an issue off the list; returns the entry, or None where there was none."""
    found = get(conn, repo_id, issue)
    conn.execute(table.delete().where(c.repo_id == repo_id, c.issue == issue))
    return found


def of_repository(conn: Connection, repo_id: int) -> frozenset[int]:
    """The numbers of every issue of a repository that is on the list."""
    return frozenset(conn.execute(sa.select(c.issue).where(c.repo_id == repo_id)).scalars())
