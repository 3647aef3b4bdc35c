"""The watchdog's probes: whose turn a look is, what it found of each target, and what was done about it, guarded so that nobody does it twice."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from bot.models import RUNNING, SprintView
from bot.snapshot import Finding, ProbeState, ProbeTarget, ProbeVerdict
from bot.store import intents, sprints
from bot.store._base import BIG, clean, insert, metadata

ACT = "watchdog "
BEGUN, REFUSED, LIFTED = "begun", "refused", "lifted"
# A probe this long overdue is nobody's any more: its last verdict says nothing about now.
OVERDUE_MS = 900_000
# A lease further off than this is of a clock that was set back.
LEASE_MOST_MS = 3_600_000
REASON_CAP = 500

table = sa.Table(
    "probes",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("policy", sa.Text, nullable=False, default=""),
    sa.Column("verdict", sa.Text, nullable=False, default=ProbeVerdict.UNKNOWN),
    sa.Column("broken", sa.Boolean, nullable=False, default=False),
    sa.Column("reason", sa.Text, nullable=False, default=""),
    sa.Column("ran_ms", BIG, nullable=False, default=0),
    sa.Column("due_ms", BIG, nullable=False, default=0),
    sa.Column("lease_until_ms", BIG, nullable=False, default=0),
    sa.Column("wish_by", sa.Text, nullable=False, default=""),
)
targets = sa.Table(
    "probe_targets",
    metadata,
    sa.Column("probe", sa.Text, primary_key=True),
    sa.Column("target", sa.Text, primary_key=True),
    sa.Column("verdict", sa.Text, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("evidence", sa.JSON, nullable=False),
    sa.Column("repo_id", BIG, nullable=False, default=0),
    sa.Column("since_ms", BIG, nullable=False),
    sa.Column("seen_ms", BIG, nullable=False),
    sa.Column("acts", sa.Integer, nullable=False, default=0),
    sa.Column("acted_ms", BIG),
    sa.Column("act_result", sa.Text, nullable=False, default=""),
)
c, t = table.c, targets.c


@dataclass(frozen=True, slots=True)
class Turn:
    """The right to run one probe now; `wished_by` is who asked that it also acts, "" for the clock."""

    name: str
    wished_by: str = ""


def know(conn: Connection, policies: Mapping[str, str], *, first_due_ms: Mapping[str, int], own: bool = True) -> None:
    """Makes the rows equal to the probes there are; one that is new is due at `first_due_ms`, one that is gone leaves nothing behind.

    Where the rows are not the caller's `own`, it only adds what is missing.
    """
    known: dict[str, str] = {row.name: row.policy for row in conn.execute(sa.select(c.name, c.policy))}
    for name in known.keys() - policies.keys() if own else ():
        conn.execute(targets.delete().where(t.probe == name))
        conn.execute(table.delete().where(c.name == name))
    for name, policy in policies.items():
        if name not in known:
            conn.execute(insert(conn, table).values(name=name, policy=policy, due_ms=first_due_ms[name]).on_conflict_do_nothing())
        elif own and known[name] != policy:
            conn.execute(table.update().where(c.name == name).values(policy=policy))


def due(conn: Connection, now_ms: int, periods_ms: Mapping[str, int]) -> list[str]:
    """Probes whose time has come, or that somebody wishes to run; a due moment further off than a period is of a clock that was set back."""
    rows = conn.execute(sa.select(c.name, c.due_ms, c.lease_until_ms, c.wish_by)).all()
    return [
        row.name
        for row in rows
        if row.name in periods_ms
        and not now_ms < row.lease_until_ms <= now_ms + LEASE_MOST_MS
        and (row.wish_by or row.due_ms <= now_ms or row.due_ms > now_ms + periods_ms[row.name])
    ]


def taken(conn: Connection, name: str, now_ms: int) -> bool:
    """Whether somebody has the turn now."""
    lease = conn.execute(sa.select(c.lease_until_ms).where(c.name == name)).scalar()
    return lease is not None and now_ms < int(lease) <= now_ms + LEASE_MOST_MS


def take(conn: Connection, name: str, *, lease_ms: int, now_ms: int) -> Turn | None:
    """Takes the turn until it is `ended` or its lease is over; None where somebody else has it. The wish goes with it."""
    row = conn.execute(sa.select(c.lease_until_ms, c.wish_by).where(c.name == name)).first()
    if row is None or now_ms < row.lease_until_ms <= now_ms + LEASE_MOST_MS:
        return None
    mine = table.update().where(c.name == name, c.lease_until_ms == row.lease_until_ms, c.wish_by == row.wish_by)
    taken = conn.execute(mine.values(lease_until_ms=now_ms + lease_ms, wish_by="")).rowcount == 1
    return Turn(name, row.wish_by) if taken else None


def ended(
    conn: Connection, name: str, found: Collection[Finding], *, broken: str, due_ms: int, distance_ms: Callable[[int], int], now_ms: int
) -> None:
    """What a look found; `broken` is why it came to none. `distance_ms(acts)` is how long after so many actions the next may come.

    A target that has been well for that long begins anew; one that is gone is forgotten after it.
    """
    verdict = ProbeVerdict.UNKNOWN if broken else worst(finding.verdict for finding in found)
    values = {"verdict": verdict, "broken": bool(broken), "reason": clean(broken)[:REASON_CAP], "ran_ms": now_ms, "due_ms": due_ms}
    conn.execute(table.update().where(c.name == name).values(lease_until_ms=0, **values))
    if broken:
        return
    known = {target.name: target for target in _targets_of(conn, name)}
    for finding in found:
        _keep(conn, name, finding, known.get(finding.target), distance_ms=distance_ms, now_ms=now_ms)
    for target in known.keys() - {finding.target for finding in found}:
        before = known[target]
        if before.acted_ms is not None and before.acted_ms + distance_ms(before.acts) > now_ms:
            gone = Finding(target, ProbeVerdict.OK, "gone", repo_id=before.repo_id)
            _keep(conn, name, gone, before, distance_ms=distance_ms, now_ms=now_ms)
        else:
            conn.execute(targets.delete().where(t.probe == name, t.target == target))


def _keep(
    conn: Connection, name: str, finding: Finding, before: ProbeTarget | None, *, distance_ms: Callable[[int], int], now_ms: int
) -> None:
    same = before is not None and before.verdict is finding.verdict
    values: dict[str, object] = {
        "verdict": finding.verdict,
        "reason": clean(finding.reason)[:REASON_CAP],
        "evidence": dict(finding.evidence),
        "repo_id": finding.repo_id,
        "since_ms": before.since_ms if before is not None and same else now_ms,
        "seen_ms": now_ms,
    }
    if before is not None and before.acts and same and finding.verdict is ProbeVerdict.OK:
        values["acts"] = 0 if before.since_ms + distance_ms(before.acts) <= now_ms else before.acts
    statement = insert(conn, targets).values(probe=name, target=finding.target, **{"acts": 0, **values})
    conn.execute(statement.on_conflict_do_update(index_elements=["probe", "target"], set_=values))


def worst(verdicts: Iterable[ProbeVerdict]) -> ProbeVerdict:
    """Failing before unknown before warn before ok; nothing to look at is ok."""
    order = list(ProbeVerdict)
    return max(verdicts, key=order.index, default=ProbeVerdict.OK)


def wish(conn: Connection, names: Iterable[str], by: str) -> None:
    """These probes run at once, and may act on what they find whatever their policy says but for `off`."""
    conn.execute(table.update().where(c.name.in_(list(names))).values(wish_by=clean(by)[:200]))


def standing(conn: Connection, name: str, target: str) -> ProbeTarget | None:
    """The row of one target."""
    return next((found for found in _targets_of(conn, name) if found.name == target), None)


def claim_act(conn: Connection, name: str, seen: ProbeTarget, *, now_ms: int) -> bool:
    """Counts one action on a target; False where somebody acted since `seen` was read."""
    same = t.acted_ms.is_(None) if seen.acted_ms is None else t.acted_ms == seen.acted_ms
    statement = targets.update().where(t.probe == name, t.target == seen.name, t.acts == seen.acts, same)
    return conn.execute(statement.values(acts=t.acts + 1, acted_ms=now_ms, act_result=BEGUN)).rowcount == 1


def set_back(conn: Connection, name: str, target: str, now_ms: int) -> None:
    """The last action lies in the future, because the clock was set back: its distance counts from now."""
    conn.execute(targets.update().where(t.probe == name, t.target == target, t.acted_ms > now_ms).values(acted_ms=now_ms))


def acts_since(conn: Connection, since_ms: int) -> int:
    """Actions of all probes since then."""
    d = intents.decisions.c
    statement = sa.select(sa.func.count()).where(
        d.actor_id == 0, d.made_ms > since_ms, d.kind.startswith(ACT), d.result.not_in([REFUSED, LIFTED])
    )
    return int(conn.execute(statement).scalar_one())


def acted(conn: Connection, name: str, target: str, *, decision: int, result: str, reason: str) -> None:
    """What came of an action, in its decision and in its target's row."""
    d = intents.decisions
    conn.execute(d.update().where(d.c.id == decision).values(result=result, reason=clean(reason)[:2000]))
    conn.execute(targets.update().where(t.probe == name, t.target == target).values(act_result=result))


def states(conn: Connection) -> tuple[ProbeState, ...]:
    """Every probe with its targets, worst target first; one that has not run yet has `ran_ms` 0."""
    order = list(ProbeVerdict)
    of: dict[str, list[ProbeTarget]] = {}
    for row in conn.execute(sa.select(targets)).all():
        of.setdefault(row.probe, []).append(_target(row))
    found = []
    for row in conn.execute(sa.select(table).order_by(c.name)).all():
        worst_first = sorted(of.get(row.name, ()), key=lambda target: (-order.index(target.verdict), target.name))
        probe = ProbeState(row.name, ProbeVerdict(row.verdict), int(row.ran_ms), int(row.due_ms), bool(row.broken), row.reason)
        found.append(replace(probe, policy=row.policy, wished_by=row.wish_by, targets=tuple(worst_first)))
    return tuple(found)


def current(conn: Connection, now_ms: int) -> tuple[ProbeState, ...]:
    """Those that ran and are not overdue by far: what a gauge and the verdict on the fleet may say of them."""
    return tuple(probe for probe in states(conn) if probe.ran_ms and now_ms <= probe.due_ms + OVERDUE_MS)


def running(conn: Connection) -> list[SprintView]:
    """Every sprint that runs, the oldest first."""
    columns = sprints.table.c
    statement = sa.select(*sprints.VIEW_COLUMNS).where(columns.state.in_(list(RUNNING))).order_by(columns.started_ms, columns.id)
    return [sprints.view(row) for row in conn.execute(statement)]


def _targets_of(conn: Connection, name: str) -> list[ProbeTarget]:
    return [_target(row) for row in conn.execute(sa.select(targets).where(t.probe == name).order_by(t.target)).all()]


def _target(row: Any) -> ProbeTarget:
    return ProbeTarget(
        name=row.target,
        verdict=ProbeVerdict(row.verdict),
        reason=row.reason,
        since_ms=int(row.since_ms),
        repo_id=int(row.repo_id),
        acts=int(row.acts),
        acted_ms=None if row.acted_ms is None else int(row.acted_ms),
        act_result=row.act_result,
    )
