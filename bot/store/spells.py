"""The history of the verdict on the fleet: one row from the moment a verdict was first seen until another one was, or until nobody looked any more."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from bot.figures import SPELLS, TROUBLED, Spell, VerdictTime
from bot.snapshot import HealthVerdict
from bot.store._base import BIG, clean, metadata

# A verdict that nobody confirmed for so long ended when it was seen last: the service was away, and what was then is not known.
GAP_MS = 180_000
REASON_CAP = 300

table = sa.Table(
    "spells",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("verdict", sa.Text, nullable=False),
    sa.Column("from_ms", BIG, nullable=False),
    sa.Column("seen_ms", BIG, nullable=False),
    sa.Column("over", sa.Boolean, nullable=False),
    sa.Column("causes", sa.Text, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Index("ix_spells_seen", "seen_ms"),
    sa.Index("ix_spells_from", "from_ms"),
)
c = table.c


def note(conn: Connection, verdict: HealthVerdict, *, causes: Iterable[str], reason: str, now_ms: int) -> bool:
    """The verdict that holds now, with the codes of its faults and its first evidence; True where it begins. Whatever faults join it later are added."""
    row = conn.execute(sa.select(table).where(c.over.is_(False)).order_by(c.id.desc()).limit(1)).first()
    codes = set(causes)
    if row is not None and row.verdict == verdict and row.seen_ms <= now_ms <= row.seen_ms + GAP_MS:
        joined = ",".join(sorted(codes | set(filter(None, row.causes.split(",")))))
        conn.execute(table.update().where(c.id == row.id).values(seen_ms=now_ms, causes=joined))
        return False
    known_until = sa.case((c.seen_ms + GAP_MS < now_ms, c.seen_ms), (c.seen_ms > now_ms, c.seen_ms), else_=now_ms)
    conn.execute(table.update().where(c.over.is_(False)).values(over=True, seen_ms=known_until))
    values = {"causes": ",".join(sorted(codes)), "reason": clean(reason)[:REASON_CAP]}
    conn.execute(table.insert().values(verdict=verdict, from_ms=now_ms, seen_ms=now_ms, over=False, **values))
    return True


def between(conn: Connection, *, since_ms: int, until_ms: int, now_ms: int) -> tuple[tuple[VerdictTime, ...], tuple[Spell, ...], int]:
    """What of the history lies in a window: the time of each verdict, the longest first; the worst spells in order of time, at most SPELLS; and for how
    long (ms) nobody judged, counted from the first verdict ever known.
    """
    lasts = sa.and_(c.over.is_(False), c.seen_ms + GAP_MS >= now_ms, c.seen_ms <= now_ms)
    end = sa.case((lasts, now_ms), else_=c.seen_ms)
    last = sa.case((end > until_ms, until_ms), else_=end)
    length = last - sa.case((c.from_ms < since_ms, since_ms), else_=c.from_ms)
    inside = [c.from_ms < until_ms, end > since_ms]
    sums = sa.select(c.verdict, sa.func.count(), sa.func.sum(length), sa.func.max(length)).where(*inside).group_by(c.verdict)
    times = [VerdictTime(str(row[0]), int(row[1]), int(row[2]), int(row[3])) for row in conn.execute(sums)]
    worst = sa.case({name: place for place, name in enumerate(TROUBLED)}, value=c.verdict)
    columns = (c.verdict, c.from_ms, end.label("end"), lasts.label("lasts"), length.label("length"), c.causes, c.reason)
    listed = sa.select(*columns).where(*inside, c.verdict.in_(TROUBLED)).order_by(worst, c.from_ms.desc(), c.id.desc()).limit(SPELLS)
    spells = [_spell(row) for row in conn.execute(listed)]
    first = conn.execute(sa.select(sa.func.min(c.from_ms))).scalar()
    watched_since = max(since_ms, until_ms if first is None else int(first))
    unwatched = min(until_ms, now_ms) - watched_since - sum(one.total_ms for one in times)
    return (
        tuple(sorted(times, key=lambda one: (-one.total_ms, one.verdict))),
        tuple(sorted(spells, key=lambda one: (one.from_ms, one.verdict))),
        max(0, unwatched),
    )


def _spell(row: Any) -> Spell:
    causes = tuple(filter(None, row.causes.split(",")))
    return Spell(row.verdict, int(row.from_ms), int(row.end), int(row.length), lasts=bool(row.lasts), causes=causes, reason=row.reason)


def prune(conn: Connection, *, before_ms: int) -> None:
    """Forgets what was over before then."""
    conn.execute(table.delete().where(c.over.is_(True), c.seen_ms < before_ms))
