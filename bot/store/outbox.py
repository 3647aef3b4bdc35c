"""Replies and reactions that the forge must come to show: a row a key, a revision to reach, repeated until it is shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from bot.models import Reply
from bot.store._base import BIG, clean, insert, metadata

table = sa.Table(
    "outbox",
    metadata,
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("repo_id", BIG, nullable=False),
    sa.Column("repo", sa.Text, nullable=False),
    sa.Column("issue", sa.Integer, nullable=False),
    sa.Column("comment_id", BIG, nullable=False, default=0),
    sa.Column("reaction", sa.Text, nullable=False, default=""),
    sa.Column("reacted", sa.Text, nullable=False, default=""),
    sa.Column("reply", sa.JSON),
    sa.Column("forge_id", BIG),
    sa.Column("received_ms", BIG, nullable=False, default=0),
    sa.Column("made_ms", BIG, nullable=False),
    sa.Column("rev", sa.Integer, nullable=False, default=1),
    sa.Column("projected_rev", sa.Integer, nullable=False, default=0),
    sa.Column("tries", sa.Integer, nullable=False, default=0),
    sa.Column("due_ms", BIG, nullable=False, default=0),
    sa.Column("error", sa.Text),
    sa.Index("ix_outbox_open", "due_ms", sqlite_where=sa.text("projected_rev < rev"), postgresql_where=sa.text("projected_rev < rev")),
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing to be shown; `reacted` is the reaction already there, `forge_id` the comment already made."""

    key: str
    repo_id: int
    repo: str
    issue: int
    comment_id: int
    reaction: str
    reacted: str
    reply: dict[str, Any] | None
    forge_id: int | None
    received_ms: int
    made_ms: int
    rev: int
    tries: int


COLUMNS = tuple(table.c[name] for name in Entry.__dataclass_fields__)


def reply_key(intent_key: str) -> str:
    """The key, and hidden marker, of the answer to an intent."""
    return f"reply:{intent_key}"


def received(conn: Connection, *, key: str, repo_id: int, repo: str, issue: int, comment_id: int, received_ms: int, now_ms: int) -> None:
    """A command was seen: 👀 goes out at once, whatever will be decided."""
    conn.execute(
        insert(conn, table)
        .values(
            key=key,
            repo_id=repo_id,
            repo=repo,
            issue=issue,
            comment_id=comment_id,
            reaction="eyes",
            reacted="",
            received_ms=received_ms,
            made_ms=now_ms,
            rev=1,
            projected_rev=0,
            tries=0,
            due_ms=0,
        )
        .on_conflict_do_nothing()
    )


def show(conn: Connection, *, key: str, repo_id: int, repo: str, issue: int, comment_id: int, reply: Reply, now_ms: int) -> None:
    """What is to be shown for `key` is now this reply and reaction; raises the revision."""
    data = {"name": reply.name, "data": reply.data} if reply.name else None
    statement = insert(conn, table).values(
        key=key,
        repo_id=repo_id,
        repo=repo,
        issue=issue,
        comment_id=comment_id,
        reaction=reply.reaction or "",
        reacted="",
        reply=data,
        received_ms=now_ms,
        made_ms=now_ms,
        rev=1,
        projected_rev=0,
        tries=0,
        due_ms=0,
    )
    conn.execute(
        statement.on_conflict_do_update(
            index_elements=["key"],
            set_={"reaction": statement.excluded.reaction, "reply": statement.excluded.reply, "rev": table.c.rev + 1, "due_ms": 0},
        )
    )


def work(conn: Connection, now_ms: int, *, limit: int = 100) -> list[tuple[int, int]]:
    """(repo_id, issue) of what is due, oldest first, each issue once."""
    statement = (
        sa.select(table.c.repo_id, table.c.issue, sa.func.min(table.c.made_ms))
        .where(table.c.projected_rev < table.c.rev, table.c.due_ms <= now_ms)
        .group_by(table.c.repo_id, table.c.issue)
        .order_by(sa.func.min(table.c.made_ms))
        .limit(limit)
    )
    return [(row[0], row[1]) for row in conn.execute(statement)]


def take(conn: Connection, repo_id: int, issue: int, *, now_ms: int, lease_ms: int) -> list[Entry]:
    """Claims all that is due on one issue for `lease_ms`; `tries` counts this one, 1 means that nothing was ever sent for it."""
    statement = (
        table.update()
        .where(table.c.repo_id == repo_id, table.c.issue == issue, table.c.projected_rev < table.c.rev, table.c.due_ms <= now_ms)
        .values(due_ms=now_ms + lease_ms, tries=table.c.tries + 1)
        .returning(*COLUMNS)
    )
    return sorted((Entry(*row) for row in conn.execute(statement)), key=lambda entry: entry.made_ms)


def reacted(conn: Connection, key: str, reaction: str) -> None:
    """This reaction stands on the comment now."""
    conn.execute(table.update().where(table.c.key == key).values(reacted=reaction))


def commented(conn: Connection, key: str, forge_id: int) -> None:
    """The reply is this comment of the forge."""
    conn.execute(table.update().where(table.c.key == key).values(forge_id=forge_id))


def shown(conn: Connection, key: str, rev: int) -> None:
    """Revision `rev` is what people see."""
    values = {"projected_rev": rev, "tries": 0, "error": None, "due_ms": 0}
    conn.execute(table.update().where(table.c.key == key, table.c.projected_rev < rev).values(**values))


def failed(conn: Connection, key: str, *, error: str, due_ms: int) -> None:
    """Not shown; tried again at `due_ms`."""
    conn.execute(table.update().where(table.c.key == key).values(error=clean(error)[:2000], due_ms=due_ms))


def prune(conn: Connection, *, before_ms: int) -> int:
    """Deletes what was shown long ago."""
    return conn.execute(table.delete().where(table.c.projected_rev >= table.c.rev, table.c.made_ms < before_ms)).rowcount
