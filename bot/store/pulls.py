"""When our pull requests were merged, closed or opened again: what `sprints.pr_state` says of now, with its moment."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from bot.store import sprints
from bot.store._base import BIG, insert, metadata

table = sa.Table(
    "pull_fates",
    metadata,
    sa.Column("repo_id", BIG, primary_key=True, autoincrement=False),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("state", sa.Text, primary_key=True),
    sa.Column("at_ms", BIG, nullable=False),
    sa.Index("ix_pull_fates_at", "at_ms"),
)


def fate(conn: Connection, repo_id: int, number: int, *, state: str, at_ms: int, now_ms: int) -> int:
    """Records what became of our pull request and when; returns how many sprints it changes, 0 where it is not ours or known already."""
    changed = sprints.pull_fate(conn, repo_id, number, state=state, now_ms=now_ms)
    if changed:
        when = min(at_ms, now_ms) if at_ms > 0 else now_ms
        statement = insert(conn, table).values(repo_id=repo_id, number=number, state=state, at_ms=when)
        conn.execute(statement.on_conflict_do_update(index_elements=["repo_id", "number", "state"], set_={"at_ms": when}))
    return changed
