"""Pauses: of the fleet and of repositories by a person, of providers, and those of the configured hours; a restart changes nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from bot.models import Pause, PauseKind, PauseScope
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

# What stands beside the pauses of persons: the configured hours, which a person may lift until they are over, and providers.
holds = sa.Table(
    "holds",
    metadata,
    sa.Column("kind", sa.Text, primary_key=True),
    sa.Column("scope", sa.Text, primary_key=True),
    sa.Column("repo_id", BIG, primary_key=True, autoincrement=False),
    sa.Column("provider", sa.Text, primary_key=True),
    sa.Column("repo", sa.Text, nullable=False),
    sa.Column("by", sa.Text, nullable=False),
    sa.Column("since_ms", BIG, nullable=False),
    sa.Column("until_ms", BIG),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("lifted_ms", BIG),
)
h = holds.c

SHARED = ("scope", "repo_id", "repo", "by", "since_ms", "until_ms", "reason")
_ORDER = (PauseScope.FLEET, PauseScope.REPO, PauseScope.PROVIDER)


def put(conn: Connection, pause: Pause) -> None:
    """From now on this pause holds, in the place of an earlier one of the same kind and scope."""
    values = {
        "repo": pause.repo,
        "by": clean(pause.by)[:200],
        "since_ms": pause.since_ms,
        "until_ms": pause.until_ms,
        "reason": clean(pause.reason)[:500],
    }
    if pause.kind is PauseKind.PERSON and pause.scope is not PauseScope.PROVIDER:
        statement = insert(conn, table).values(scope=pause.scope, repo_id=pause.repo_id, **values)
        conn.execute(statement.on_conflict_do_update(index_elements=["scope", "repo_id"], set_=values))
        return
    key = {"kind": pause.kind, "scope": pause.scope, "repo_id": pause.repo_id, "provider": pause.provider}
    again = insert(conn, holds).values(**key, **values)
    conn.execute(again.on_conflict_do_update(index_elements=list(key), set_={**values, "lifted_ms": None}))


def lift(conn: Connection, scope: PauseScope, repo_id: int, now_ms: int, *, provider: str = "") -> Pause | None:
    """Ends what holds there, a person's pause and hours alike; returns it, or None where nothing held. Hours begin again with the next ones."""
    found = next(
        (pause for pause in current(conn, now_ms) if (pause.scope, pause.repo_id, pause.provider) == (scope, repo_id, provider)), None
    )
    conn.execute(table.delete().where(c.scope == scope, c.repo_id == repo_id))
    here = [h.scope == scope, h.repo_id == repo_id, h.provider == provider]
    conn.execute(holds.delete().where(h.kind == PauseKind.PERSON, *here))
    conn.execute(holds.update().where(h.kind == PauseKind.HOURS, *here).values(lifted_ms=now_ms))
    return found


def current(conn: Connection, now_ms: int) -> tuple[Pause, ...]:
    """Every pause that holds at this moment, the fleet's first, a person's before the hours; one whose time is over holds no more, whoever looks."""
    by_persons = sa.select(*(c[name] for name in SHARED)).where(sa.or_(c.until_ms.is_(None), c.until_ms > now_ms))
    others = sa.select(*(h[name] for name in SHARED), h.provider, h.kind).where(
        sa.or_(h.until_ms.is_(None), h.until_ms > now_ms), h.lifted_ms.is_(None)
    )
    found = [Pause(PauseScope(row[0]), *row[1:]) for row in conn.execute(by_persons)]
    found += [replace(Pause(PauseScope(row[0]), *row[1:8]), kind=PauseKind(row[8])) for row in conn.execute(others)]
    return tuple(sorted(found, key=lambda pause: (_ORDER.index(pause.scope), pause.repo_id, pause.provider, pause.kind is PauseKind.HOURS)))


def paused_providers(conn: Connection, now_ms: int) -> dict[str, Pause]:
    """Provider -> the pause that holds it."""
    found = reversed(current(conn, now_ms))
    return {pause.provider: pause for pause in found if pause.scope is PauseScope.PROVIDER}


def keep_hours(conn: Connection, wanted: Iterable[Pause]) -> list[Pause]:
    """Makes the rows of the hours equal to `wanted`, those that hold now; what a person lifted stays lifted. Returns those that began."""
    known = {
        tuple(row[:3]): row[3]
        for row in conn.execute(sa.select(h.scope, h.repo_id, h.provider, h.since_ms).where(h.kind == PauseKind.HOURS))
    }
    begun = []
    kept = set()
    for pause in wanted:
        key = (str(pause.scope), pause.repo_id, pause.provider)
        kept.add(key)
        if known.get(key) != pause.since_ms:
            put(conn, pause)
            begun.append(pause)
        else:
            here = [h.kind == PauseKind.HOURS, h.scope == pause.scope, h.repo_id == pause.repo_id, h.provider == pause.provider]
            conn.execute(holds.update().where(*here).values(until_ms=pause.until_ms, reason=clean(pause.reason)[:500], repo=pause.repo))
    for scope, repo_id, provider in known.keys() - kept:
        conn.execute(holds.delete().where(h.kind == PauseKind.HOURS, h.scope == scope, h.repo_id == repo_id, h.provider == provider))
    return begun


def renamed(conn: Connection, repo_id: int, full_name: str) -> None:
    """The repository has another address now; the pause is keyed on its id."""
    conn.execute(table.update().where(c.repo_id == repo_id).values(repo=full_name))
    conn.execute(holds.update().where(h.repo_id == repo_id, h.scope == PauseScope.REPO).values(repo=full_name))
