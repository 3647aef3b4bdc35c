"""Pauses of the fleet and of single repositories: one row each, made by a person, ended by a person or by its time; a restart changes nothing."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from bot.models import Pause, PauseScope
from bot.store._base import BIG, clean, insert, metadata

table = sa.Table(
    "pauses",
    metadata,
    sa.Column("scope", sa.Text, primary_key=True),
    sa.Column("repo_id", BIG, primary_key=True, autoincrement=False),
    sa.Column("repo", sa.Text, nullable=False),
    sa.Column("by", sa.Text, nullable=False),
    sa.Column("since_ms", BIG, nullable=False),
    sa.Column("until_ms", BIG),
    sa.Column("reason", sa.Text, nullable=False),
)
c = table.c
COLUMNS = tuple(c[name] for name in Pause.__dataclass_fields__)


def put(conn: Connection, pause: Pause) -> None:
    """From now on this pause holds, in the place of an earlier one of the same fleet or repository."""
    values = {
        "repo": pause.repo,
        "by": clean(pause.by)[:200],
        "since_ms": pause.since_ms,
        "until_ms": pause.until_ms,
        "reason": clean(pause.reason)[:500],
    }
    statement = insert(conn, table).values(scope=pause.scope, repo_id=pause.repo_id, **values)
    conn.execute(statement.on_conflict_do_update(index_elements=["scope", "repo_id"], set_=values))


def lift(conn: Connection, scope: PauseScope, repo_id: int, now_ms: int) -> Pause | None:
    """Ends a pause; returns it, or None where none held."""
    found = next((pause for pause in current(conn, now_ms) if (pause.scope, pause.repo_id) == (scope, repo_id)), None)
    conn.execute(table.delete().where(c.scope == scope, c.repo_id == repo_id))
    return found


def current(conn: Connection, now_ms: int) -> tuple[Pause, ...]:
    """Every pause that holds at this moment, the fleet's first; one whose time is over holds no more, whoever looks."""
    statement = sa.select(*COLUMNS).where(sa.or_(c.until_ms.is_(None), c.until_ms > now_ms)).order_by(c.repo_id)
    return tuple(Pause(PauseScope(scope), *rest) for scope, *rest in conn.execute(statement))


def renamed(conn: Connection, repo_id: int, full_name: str) -> None:
    """The repository has another address now; the pause is keyed on its id."""
    conn.execute(table.update().where(c.repo_id == repo_id).values(repo=full_name))
