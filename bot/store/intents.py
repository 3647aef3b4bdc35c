"""Intents and decisions: a key is inserted in the transaction that decides, so the same wish is decided once, whoever brings it again."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from bot.models import Ask, Decision, SprintId, SprintView
from bot.store._base import BIG, clean, insert, metadata

table = sa.Table(
    "intents",
    metadata,
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("decision_id", sa.Integer),
    sa.Column("result", sa.Text, nullable=False),
    sa.Column("sprint_id", sa.Text),
    sa.Column("made_ms", BIG, nullable=False),
)

decisions = sa.Table(
    "decisions",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("made_ms", BIG, nullable=False),
    sa.Column("repo_id", BIG, nullable=False),
    sa.Column("issue", sa.Integer, nullable=False),
    sa.Column("sprint_id", sa.Text),
    sa.Column("intent_key", sa.Text, nullable=False, default=""),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("result", sa.Text, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("actor_id", BIG, nullable=False, default=0),
    sa.Column("actor", sa.Text, nullable=False, default=""),
    sa.Index("ix_decisions_issue", "repo_id", "issue", "id"),
    sa.Index("ix_decisions_actor", "actor_id", "made_ms"),
)


@dataclass(frozen=True, slots=True)
class Intent:
    """The stored answer to a wish."""

    key: str
    result: str
    sprint_id: SprintId | None


def get(conn: Connection, key: str) -> Intent | None:
    """The stored answer, or None where this wish is new."""
    row = conn.execute(sa.select(table.c.key, table.c.result, table.c.sprint_id).where(table.c.key == key)).first()
    return None if row is None else Intent(row[0], row[1], row[2] and SprintId(row[2]))


def claim(conn: Connection, key: str, now_ms: int) -> bool:
    """Takes the key inside the deciding transaction; False where it exists (then nothing else may be done)."""
    statement = insert(conn, table).values(key=key, result="", made_ms=now_ms).on_conflict_do_nothing().returning(table.c.key)
    return conn.execute(statement).first() is not None


def answer(conn: Connection, ask: Ask, *, result: str, reason: str, sprint_id: SprintId | None, now_ms: int) -> int:
    """Stores the decision on `ask` and points the intent to it; returns the decision's id."""
    decision = decide(
        conn,
        repo_id=ask.repo_id,
        issue=ask.issue.number,
        kind=ask.verb or "unreadable",
        result=result,
        reason=reason,
        sprint_id=sprint_id,
        intent_key=ask.key,
        actor_id=ask.actor.id,
        actor=ask.actor.login,
        now_ms=now_ms,
    )
    conn.execute(table.update().where(table.c.key == ask.key).values(decision_id=decision, result=result, sprint_id=sprint_id))
    return decision


def decide(
    conn: Connection,
    *,
    repo_id: int,
    issue: int,
    kind: str,
    result: str,
    reason: str,
    now_ms: int,
    sprint_id: str | None = None,
    intent_key: str = "",
    actor_id: int = 0,
    actor: str = "",
) -> int:
    """One row of `decisions`; returns its id."""
    statement = (
        decisions.insert()
        .values(
            made_ms=now_ms,
            repo_id=repo_id,
            issue=issue,
            kind=kind,
            result=result,
            reason=clean(reason)[:2000],
            sprint_id=sprint_id,
            intent_key=intent_key,
            actor_id=actor_id,
            actor=clean(actor)[:200],
        )
        .returning(decisions.c.id)
    )
    return int(conn.execute(statement).scalar_one())


def decide_of(conn: Connection, view: SprintView, *, kind: str, result: str, reason: str, now_ms: int, actor: str = "") -> int:
    """The same, about one sprint."""
    issue = view.issue.number
    return decide(
        conn, repo_id=view.repo_id, issue=issue, kind=kind, result=result, reason=reason, now_ms=now_ms, sprint_id=view.id, actor=actor
    )


def trail(conn: Connection, repo_id: int, issue: int, *, limit: int = 50) -> list[Decision]:
    """The decisions about an issue, oldest first, the newest `limit` of them."""
    columns = decisions.c
    statement = (
        sa.select(columns.made_ms, columns.kind, columns.result, columns.reason, columns.actor, columns.sprint_id, columns.intent_key)
        .where(columns.repo_id == repo_id, columns.issue == issue)
        .order_by(columns.id.desc())
        .limit(limit)
    )
    return [Decision(*row) for row in reversed(conn.execute(statement).all())]


def asked_by(conn: Connection, actor_id: int, repo_id: int, issue: int, since_ms: int) -> int:
    """How many wishes of one person about one issue were decided since then (the cap of gitea.md, "Loops")."""
    columns = decisions.c
    statement = sa.select(sa.func.count()).where(
        columns.actor_id == actor_id,
        columns.made_ms >= since_ms,
        columns.repo_id == repo_id,
        columns.issue == issue,
        columns.intent_key.startswith("command:"),
    )
    return int(conn.execute(statement).scalar_one())


def refused_before(
    conn: Connection, *, repo_id: int, issue: int, actor_id: int, kind: str | None, reason: str, since_ms: int, result: str = "denied"
) -> bool:
    """Whether the same refusal was given to the same person here before, of that kind or of any: a second comment would only be noise."""
    columns = decisions.c
    kinds = [] if kind is None else [columns.kind == kind]
    statement = (
        sa.select(columns.id)
        .where(
            columns.repo_id == repo_id,
            columns.issue == issue,
            columns.actor_id == actor_id,
            *kinds,
            columns.result == result,
            columns.reason == clean(reason)[:2000],
            columns.made_ms >= since_ms,
        )
        .limit(1)
    )
    return conn.execute(statement).first() is not None
