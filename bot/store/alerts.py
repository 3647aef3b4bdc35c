"""Alert groups as Alertmanager tells of them, and how far the issue that mirrors each has come; a row is durable before Alertmanager hears "taken"."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from bot.models import Json
from bot.store._base import BIG, clean, insert, metadata

# A notification that Alertmanager sent again inside one flush may come after the next one: this long a word may be an old one.
LATE_MS = 120_000
# Alertmanager repeats what fires; a group it has not spoken of for so long has ended without a word (muted while it resolved).
QUIET_MS = 86_400_000
FORGET_MS = 30 * 86_400_000

table = sa.Table(
    "alerts",
    metadata,
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("labels", sa.JSON, nullable=False),
    sa.Column("alerts", sa.JSON, nullable=False),
    sa.Column("heard_ms", BIG, nullable=False),
    sa.Column("rev", sa.Integer, nullable=False, default=1),
    sa.Column("projected_rev", sa.Integer, nullable=False, default=0),
    sa.Column("told", sa.JSON, nullable=False),
    sa.Column("plan", sa.JSON),
    sa.Column("count", sa.Integer, nullable=False, default=0),
    sa.Column("issue", sa.Integer),
    sa.Column("mark", sa.Integer, nullable=False, default=0),
    sa.Column("opened", sa.Boolean, nullable=False, default=False),
    sa.Column("closed_ms", BIG, nullable=False, default=0),
    sa.Column("tries", sa.Integer, nullable=False, default=0),
    sa.Column("due_ms", BIG, nullable=False, default=0),
    sa.Column("error", sa.Text),
)
c = table.c


@dataclass(frozen=True, slots=True)
class Alert:
    """One alert of a notification. `starts_us` is when it began (Unix microseconds): a later one of the same fingerprint is a new occurrence."""

    fingerprint: str
    firing: bool
    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    starts_us: int


@dataclass(frozen=True, slots=True)
class Notice:
    """One notification: the labels the group is formed by, its alerts, and whether Alertmanager left some out."""

    labels: Mapping[str, str]
    alerts: tuple[Alert, ...]
    truncated: bool

    @property
    def key(self) -> str:
        """The group, by the labels it is formed by and not by `groupKey`, which changes when somebody edits the routing."""
        text = json.dumps(sorted(self.labels.items()), ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Group:
    """A row. `alerts` by fingerprint, each as a Json of Alert with `at_ms` (when it was last heard of). `told` are the fingerprints that the issue
    says are firing. `plan` is what was begun on the forge and not recorded as done. `count` numbers what was written, for its markers; `mark` is the
    number of the issue's own.
    """

    key: str
    labels: Mapping[str, str]
    alerts: Mapping[str, Json]
    rev: int
    projected_rev: int
    told: tuple[str, ...]
    plan: Json | None
    count: int
    issue: int | None
    mark: int
    opened: bool
    closed_ms: int
    tries: int

    @property
    def firing(self) -> tuple[str, ...]:
        """Fingerprints that fire, in order."""
        return tuple(sorted(name for name, alert in self.alerts.items() if alert["firing"]))


NAMES = tuple(Group.__dataclass_fields__)
COLUMNS = tuple(c[name] for name in NAMES)


def heard(conn: Connection, notice: Notice, now_ms: int) -> bool:
    """Takes a notification in; True where it changed anything but the time. Repeats and words that come late change nothing."""
    key = notice.key
    conn.execute(
        insert(conn, table)
        .values(key=key, labels=_cleaned(notice.labels), alerts={}, heard_ms=now_ms, told=[], rev=0)
        .on_conflict_do_nothing()
    )
    before: dict[str, Json] = conn.execute(sa.select(c.alerts).where(c.key == key).with_for_update()).scalar_one()
    after = merged(before, notice, now_ms)
    changed = _facts(before) != _facts(after)
    values: dict[str, Any] = {"alerts": after, "heard_ms": now_ms}
    if changed:
        values |= {"rev": c.rev + 1, "due_ms": 0}
    conn.execute(table.update().where(c.key == key).values(**values))
    return changed


def merged(before: Mapping[str, Json], notice: Notice, now_ms: int) -> dict[str, Json]:
    """What is known after a notification. A later start wins; of one start the end wins, unless it is long past: then it fires again."""
    after = {name: alert for name, alert in before.items() if alert["firing"] or alert["at_ms"] > now_ms - QUIET_MS}
    for alert in notice.alerts:
        known = after.get(alert.fingerprint)
        if known is not None:
            if alert.starts_us < known["starts_us"]:
                continue
            late = alert.starts_us == known["starts_us"] and alert.firing and not known["firing"] and known["at_ms"] > now_ms - LATE_MS
            if late:
                continue
        data = asdict(alert)
        data |= {"labels": _cleaned(alert.labels), "annotations": _cleaned(alert.annotations), "at_ms": now_ms}
        after[alert.fingerprint] = data
    if not notice.truncated:
        named = {alert.fingerprint for alert in notice.alerts}
        for name, known in after.items():
            if known["firing"] and name not in named and known["at_ms"] < now_ms - LATE_MS:
                after[name] = {**known, "firing": False, "at_ms": now_ms}
    return after


def sweep(conn: Connection, now_ms: int) -> int:
    """Ends what nobody has spoken of for long, and forgets groups that ended long ago; returns how many it ended."""
    ended = 0
    for row in conn.execute(sa.select(c.key, c.alerts).where(c.heard_ms < now_ms - QUIET_MS)).all():
        alerts: dict[str, Json] = row.alerts
        if any(alert["firing"] for alert in alerts.values()):
            over = {name: {**alert, "firing": False} for name, alert in alerts.items()}
            conn.execute(table.update().where(c.key == row.key).values(alerts=over, rev=c.rev + 1, due_ms=0))
            ended += 1
    old = table.delete().where(c.heard_ms < now_ms - FORGET_MS, c.projected_rev >= c.rev, c.opened.is_(False))
    conn.execute(old)
    return ended


def take(conn: Connection, *, now_ms: int, lease_ms: int) -> Group | None:
    """Claims the group that has waited longest to be shown; None where nothing is due."""
    key = conn.execute(sa.select(c.key).where(c.projected_rev < c.rev, c.due_ms <= now_ms).order_by(c.due_ms, c.heard_ms).limit(1)).scalar()
    if key is None:
        return None
    statement = (
        table.update()
        .where(c.key == key, c.projected_rev < c.rev, c.due_ms <= now_ms)
        .values(due_ms=now_ms + lease_ms, tries=c.tries + 1)
        .returning(*COLUMNS)
    )
    row = conn.execute(statement).first()
    return None if row is None else _group(row)


def get(conn: Connection, key: str) -> Group:
    """The row as it is now; raises NoResultFound for an unknown key."""
    return _group(conn.execute(sa.select(*COLUMNS).where(c.key == key)).one())


def every(conn: Connection) -> list[Group]:
    """All rows."""
    return [_group(row) for row in conn.execute(sa.select(*COLUMNS).order_by(c.key))]


def begun(conn: Connection, key: str, plan: Json) -> None:
    """This will be done on the forge next; until `done` a retry looks for it before it does it."""
    conn.execute(table.update().where(c.key == key).values(plan=plan, count=plan["n"]))


def done(conn: Connection, key: str, **values: Any) -> None:
    """The plan is done; `values` are the columns it changed."""
    conn.execute(table.update().where(c.key == key).values(plan=None, tries=0, error=None, **values))


def shown(conn: Connection, key: str, rev: int) -> None:
    """Revision `rev` is what people see."""
    conn.execute(table.update().where(c.key == key, c.projected_rev < rev).values(projected_rev=rev, tries=0, error=None, due_ms=0))


def failed(conn: Connection, key: str, *, error: str, due_ms: int) -> None:
    """Not shown; tried again at `due_ms`."""
    conn.execute(table.update().where(c.key == key).values(error=clean(error)[:2000], due_ms=due_ms))


def _group(row: Any) -> Group:
    data = dict(zip(NAMES, row, strict=True))
    data["told"] = tuple(data["told"])
    return Group(**data)


def _facts(alerts: Mapping[str, Json]) -> dict[str, Json]:
    return {name: {key: value for key, value in alert.items() if key != "at_ms"} for name, alert in alerts.items() if alert["firing"]}


def _cleaned(texts: Mapping[str, str]) -> dict[str, str]:
    return {clean(name): clean(text) for name, text in texts.items()}
