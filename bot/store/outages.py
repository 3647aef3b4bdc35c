"""The history of providers' outages: one row from the first failure until the provider answers again, or until its last cool-down is over."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from bot.figures import Downtime
from bot.store._base import BIG, clean, metadata

table = sa.Table(
    "outages",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("provider", sa.Text, nullable=False),
    sa.Column("from_ms", BIG, nullable=False),
    sa.Column("until_ms", BIG),
    sa.Column("over", sa.Boolean, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Index("ix_outages_open", "provider", "over"),
    sa.Index("ix_outages_from", "from_ms"),
)
c = table.c


def began(conn: Connection, provider: str, *, reason: str, until_ms: int | None, now_ms: int) -> None:
    """The entry (`provider/model`, or `provider/*`) cannot be called until then; None: until somebody mends it. One that lasts is only prolonged."""
    values: dict[str, Any] = {"until_ms": until_ms, "reason": clean(reason)[:300]}
    here = [c.provider == provider, c.over.is_(False)]
    if not conn.execute(table.update().where(*here).values(**values)).rowcount:
        conn.execute(table.insert().values(provider=provider, from_ms=now_ms, over=False, **values))


def ended(conn: Connection, provider: str, now_ms: int) -> None:
    """It answered: the outage was over then, or earlier where its cool-down was."""
    earlier = sa.case((sa.and_(c.until_ms.is_not(None), c.until_ms < now_ms), c.until_ms), else_=now_ms)
    conn.execute(table.update().where(c.provider == provider, c.over.is_(False)).values(over=True, until_ms=earlier))


def between(conn: Connection, *, since_ms: int, until_ms: int, now_ms: int) -> tuple[Downtime, ...]:
    """What of the outages lies in a window, by entry, the longest first. One that lasts counts until now, a cool-down until its end."""
    end = sa.case((c.until_ms.is_(None), now_ms), (sa.and_(c.over.is_(False), c.until_ms > now_ms), now_ms), else_=c.until_ms)
    statement = sa.select(c.provider, c.from_ms, end, c.reason).where(c.from_ms < until_ms, end > since_ms).order_by(c.from_ms, c.id)
    found: dict[str, list[Any]] = {}
    for provider, from_ms, to_ms, reason in conn.execute(statement):
        found.setdefault(provider, []).append((max(from_ms, since_ms), min(to_ms, until_ms), reason))
    made = [
        Downtime(provider, len(parts), sum(to - since for since, to, _ in parts), max(to - since for since, to, _ in parts), parts[-1][2])
        for provider, parts in found.items()
    ]
    return tuple(sorted(made, key=lambda one: (-one.total_ms, one.name)))
