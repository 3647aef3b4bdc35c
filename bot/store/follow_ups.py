"""What a follow-up goes by: the remarks and failures it took along, and what it changed, so that each is answered once."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from bot.models import Json, OutcomeKind, Source
from bot.store import sprints
from bot.store._base import BIG, insert, metadata

table = sa.Table(
    "follow_ups",
    metadata,
    sa.Column("sprint_id", sa.Text, primary_key=True),
    sa.Column("repo_id", BIG, nullable=False),
    sa.Column("pull", sa.Integer, nullable=False),
    sa.Column("feedback", sa.JSON),
    sa.Column("changed", sa.JSON),
    sa.Index("ix_follow_ups_pull", "repo_id", "pull"),
)
c = table.c


def begin(conn: Connection, sprint_id: str, *, repo_id: int, pull: int, afresh: bool) -> None:
    """The follow-up begins, or goes on; `afresh` where what it had gathered counts no more."""
    statement = insert(conn, table).values(sprint_id=sprint_id, repo_id=repo_id, pull=pull)
    values = {"pull": pull, **({"feedback": sa.null(), "changed": sa.null()} if afresh else {})}
    conn.execute(statement.on_conflict_do_update(index_elements=["sprint_id"], set_=values))


def feedback(conn: Connection, sprint_id: str) -> Json | None:
    """What was gathered (`bot.feedback.Feedback.stored`), or None."""
    found: Json | None = conn.execute(sa.select(c.feedback).where(c.sprint_id == sprint_id)).scalar()
    return found


def gathered(conn: Connection, sprint_id: str, data: Json) -> None:
    """This is what the agent is told."""
    conn.execute(table.update().where(c.sprint_id == sprint_id).values(feedback=data))


def changed(conn: Connection, sprint_id: str, paths: Sequence[str]) -> None:
    """The files that this round changed."""
    conn.execute(table.update().where(c.sprint_id == sprint_id).values(changed=list(paths)))


def changes(conn: Connection, sprint_id: str) -> list[str]:
    """Those files."""
    return list(conn.execute(sa.select(c.changed).where(c.sprint_id == sprint_id)).scalar() or ())


def earlier(conn: Connection, repo_id: int, pull: int) -> list[Json]:
    """What the follow-ups of a pull request that pushed something had gathered, oldest first: it was answered."""
    s = sprints.table.c
    statement = (
        sa.select(c.feedback)
        .join(sprints.table, s.id == c.sprint_id)
        .where(c.repo_id == repo_id, c.pull == pull, s.outcome == OutcomeKind.UPDATED)
        .order_by(s.settled_ms, s.id)
    )
    return [data for data in conn.execute(statement).scalars() if data]


def tries(conn: Connection, repo_id: int, issue: int) -> list[tuple[str, str]]:
    """(sprint, kind of failure) of the follow-ups by red checks since the last sprint that a person or a review asked for, oldest first."""
    s = sprints.table.c
    statement = sa.select(s.id, s.source, s.options).where(s.repo_id == repo_id, s.issue == issue).order_by(s.queued_ms.desc(), s.id.desc())
    found: list[tuple[str, str]] = []
    for sprint_id, source, options in conn.execute(statement):
        if source != Source.CHECKS:
            break
        found.append((sprint_id, str((options or {}).get("failure", ""))))
    return found[::-1]
