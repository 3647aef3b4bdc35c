"""What may go of an issue that is at rest: nothing is under way there, no pull request of ours is open, and nothing has changed for long."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from bot.models import PlanState, SprintState
from bot.store import follow_ups, plans, pulls, sprints, steps

p = plans.table.c
f = follow_ups.table.c
c = sprints.table.c


def at_rest(repo_id: Any, issue: Any, before_ms: int) -> sa.ColumnElement[bool]:
    """No sprint of this issue is live, has an open pull request, was touched since `before_ms`, or is to be shown still."""
    s = sprints.table.alias().c
    moves = sa.or_(s.state != SprintState.SETTLED, s.pr_state == pulls.OPEN, s.updated_ms >= before_ms, s.projected_rev < s.rev)
    return ~sa.exists().where(s.repo_id == repo_id, s.issue == issue, moves)


def old_plans(conn: Connection, *, before_ms: int, limit: int) -> list[str]:
    """Ids of at most `limit` plans that were decided on before then, of issues at rest."""
    old = sa.select(p.id).where(p.state != PlanState.WAITING, p.decided_ms < before_ms, at_rest(p.repo_id, p.issue, before_ms))
    return list(conn.execute(old.limit(limit)).scalars())


def drop_plans(conn: Connection, ids: Sequence[str], *, before_ms: int) -> int:
    """Deletes those of them that are old still; returns how many.

    They are locked first, so that whoever is just deciding by one of them is either seen here or finds it gone.
    """
    conn.execute(sa.select(p.id).where(p.id.in_(ids)).order_by(p.id).with_for_update())
    still = [p.id.in_(ids), p.state != PlanState.WAITING, p.decided_ms < before_ms, at_rest(p.repo_id, p.issue, before_ms)]
    return conn.execute(plans.table.delete().where(*still)).rowcount


def old_follow_ups(conn: Connection, *, before_ms: int, limit: int) -> list[str]:
    """Sprint ids of at most `limit` follow-ups that settled before then, of issues at rest."""
    old = (
        sa.select(f.sprint_id)
        .join(sprints.table, c.id == f.sprint_id)
        .where(c.settled_ms < before_ms, at_rest(c.repo_id, c.issue, before_ms))
    )
    return list(conn.execute(old.limit(limit)).scalars())


def drop_follow_ups(conn: Connection, ids: Sequence[str]) -> int:
    """Deletes what these follow-ups went by; what is settled does not come to life again."""
    return conn.execute(follow_ups.table.delete().where(f.sprint_id.in_(ids))).rowcount


def old_sprints(conn: Connection, *, after: tuple[int, str], before_ms: int, limit: int) -> tuple[list[str], tuple[int, str] | None]:
    """Of the next `limit` sprints that settled before then: those of issues at rest that hold anything `thin` takes; and the place to go on from.

    `after` and that place are (settled_ms, id); None where no more follow.
    """
    holds = sa.or_(
        c.summary != "", sa.exists().where(steps.table.c.sprint_id == c.id), sa.exists().where(steps.tool_calls.c.sprint_id == c.id)
    )
    rests = at_rest(c.repo_id, c.issue, before_ms)
    statement = (
        sa.select(c.id, c.settled_ms, c.checks, holds.label("holds"), rests.label("rests"))
        .where(c.state == SprintState.SETTLED, c.settled_ms < before_ms, c.settled_ms >= after[0])
        .where(sa.or_(c.settled_ms > after[0], c.id > after[1]))
        .order_by(c.settled_ms, c.id)
        .limit(limit)
    )
    rows = conn.execute(statement).all()
    found = [row.id for row in rows if row.rests and (row.holds or _says(row.checks))]
    return found, (rows[-1].settled_ms, rows[-1].id) if len(rows) == limit else None


def thin(conn: Connection, ids: Sequence[str]) -> int:
    """Takes the single steps, what the agent said last and what the checks printed; the rows stay, with outcome, tokens, cost and exit codes."""
    for of in (steps.tool_calls, steps.table):
        conn.execute(of.delete().where(of.c.sprint_id.in_(ids)))
    for row in conn.execute(sa.select(c.id, c.checks).where(c.id.in_(ids))).all():
        silent = [{**check, "output": ""} for check in row.checks]
        conn.execute(sprints.table.update().where(c.id == row.id).values(summary="", checks=silent))
    return len(ids)


def _says(checks: Sequence[Any]) -> bool:
    return any(check.get("output") for check in checks)
