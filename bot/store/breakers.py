"""Breakers: one row each, open while `open` is true; a closed one keeps the moment from which failures count anew."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from bot.models import Breaker, OutcomeKind, PauseScope, SprintState
from bot.store import intents, sprints
from bot.store._base import BIG, clean, insert, metadata

table = sa.Table(
    "breakers",
    metadata,
    sa.Column("scope", sa.Text, primary_key=True),
    sa.Column("repo_id", BIG, primary_key=True, autoincrement=False),
    sa.Column("provider", sa.Text, primary_key=True),
    sa.Column("repo", sa.Text, nullable=False),
    sa.Column("open", sa.Boolean, nullable=False),
    sa.Column("since_ms", BIG, nullable=False),
    sa.Column("due_ms", BIG, nullable=False),
    sa.Column("failures", sa.Integer, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("probes", sa.Integer, nullable=False),
    sa.Column("probe", sa.Text, nullable=False),
)
c = table.c
COLUMNS = tuple(c[name] for name in Breaker.__dataclass_fields__)
KEY = ("scope", "repo_id", "provider")

Key = tuple[PauseScope, int, str]
FLEET: Key = (PauseScope.FLEET, 0, "")


@dataclass(frozen=True, slots=True)
class End:
    """How one sprint ended, and when (Unix ms); `provider` is the one that answered it last."""

    sprint_id: str
    repo_id: int
    repo: str
    provider: str
    outcome: str
    reason: str
    at_ms: int


def opened(conn: Connection) -> tuple[Breaker, ...]:
    """Those that are open, the fleet's first."""
    rows = conn.execute(sa.select(*COLUMNS).where(c.open.is_(True)).order_by(c.repo_id, c.provider))
    return tuple(Breaker(PauseScope(scope), *rest) for scope, *rest in rows)


def closed_since(conn: Connection) -> dict[Key, int]:
    """Of those that were open before: since when they are closed."""
    rows = conn.execute(sa.select(c.scope, c.repo_id, c.provider, c.since_ms).where(c.open.is_(False)))
    return {(PauseScope(row[0]), row[1], row[2]): row[3] for row in rows}


def save(conn: Connection, breaker: Breaker) -> None:
    """It is open, in this state."""
    values = {
        "repo": breaker.repo,
        "open": True,
        "since_ms": breaker.since_ms,
        "due_ms": breaker.due_ms,
        "failures": breaker.failures,
        "reason": clean(breaker.reason)[:200],
        "probes": breaker.probes,
        "probe": breaker.probe,
    }
    statement = insert(conn, table).values(scope=breaker.scope, repo_id=breaker.repo_id, provider=breaker.provider, **values)
    conn.execute(statement.on_conflict_do_update(index_elements=list(KEY), set_=values))


def close(conn: Connection, key: Key, *, now_ms: int, why: str, actor: str = "") -> Breaker | None:
    """Closes it; returns what it was, or None where it was not open. What failed before counts no more."""
    found = next((one for one in opened(conn) if (one.scope, one.repo_id, one.provider) == key), None)
    here = [c.scope == key[0], c.repo_id == key[1], c.provider == key[2], c.open.is_(True)]
    if conn.execute(table.update().where(*here).values(open=False, since_ms=now_ms, probe="", probes=0)).rowcount and found:
        tell(conn, found, "closed", why, now_ms=now_ms, actor=actor)
    return found


def take_probe(conn: Connection, breaker: Breaker, sprint_id: str, issue: int, repo_id: int, now_ms: int) -> None:
    """This sprint is the one try."""
    here = [c.scope == breaker.scope, c.repo_id == breaker.repo_id, c.provider == breaker.provider, c.open.is_(True), c.probe == ""]
    if conn.execute(table.update().where(*here).values(probe=sprint_id)).rowcount:
        why = f"try {breaker.probes + 1} of the breaker of {name_of(breaker)}"
        intents.decide(conn, repo_id=repo_id, issue=issue, kind="breaker", result="probe", reason=why, sprint_id=sprint_id, now_ms=now_ms)


def tell(conn: Connection, breaker: Breaker, result: str, reason: str, *, now_ms: int, actor: str = "") -> None:
    """One decision row."""
    intents.decide(conn, repo_id=breaker.repo_id, issue=0, kind="breaker", result=result, reason=reason, now_ms=now_ms, actor=actor)


def name_of(breaker: Breaker) -> str:
    """What it holds, in words."""
    return {PauseScope.FLEET: "the whole fleet", PauseScope.REPO: breaker.repo}.get(breaker.scope, f"the provider {breaker.provider}")


def ends(conn: Connection, *, after_ms: int, limit: int, neutral: Collection[OutcomeKind]) -> list[End]:
    """The newest sprints that settled after a moment with an outcome that is not `neutral`, the newest first."""
    s = sprints.table.c
    columns = (s.id, s.repo_id, s.repo, s.provider, s.outcome, s.reason, s.settled_ms)
    where = [s.settled_ms > after_ms, s.outcome.not_in(list(neutral))]
    rows = conn.execute(sa.select(*columns).where(*where).order_by(s.settled_ms.desc(), s.id.desc()).limit(limit))
    return [End(*row) for row in rows]


def probe_now(conn: Connection, sprint_id: str) -> tuple[SprintState, str, str] | None:
    """(state, outcome or "", reason) of a try; None where the sprint is gone."""
    s = sprints.table.c
    row = conn.execute(sa.select(s.state, s.outcome, s.reason).where(s.id == sprint_id)).first()
    return None if row is None else (SprintState(row[0]), row[1] or "", row[2])
