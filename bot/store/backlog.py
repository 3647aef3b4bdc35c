"""What the rows say about a repository's open issues before one of them is taken: what was tried, what came of it, what holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from bot.models import Pause, PauseScope, Source, SprintState
from bot.store import intents, pauses, skips, sprints

c = sprints.table.c
d = intents.decisions.c

PICK = "launch:"
GIVE_UP = "give_up"


@dataclass(frozen=True, slots=True)
class Past:
    """One issue: how often it was taken from the backlog and when last (Unix ms, 0: never), and its newest sprint ("" where it has none).

    `told` is the number of attempts at which people were told that the bot gives up, 0 where they were not.
    """

    attempts: int = 0
    tried_ms: int = 0
    told: int = 0
    state: str = ""
    outcome: str = ""
    detail: str = ""
    settled_ms: int = 0
    stop_by: str = ""
    pr: int = 0
    pr_state: str = ""


@dataclass(frozen=True, slots=True)
class Backlog:
    """One repository: its issues' past, the skip list, the pause that holds, sprints that may still open a pull request, and picks that wait."""

    past: Mapping[int, Past] = field(default_factory=dict)
    skipped: frozenset[int] = frozenset()
    pause: Pause | None = None
    active: int = 0
    picks_waiting: int = 0


def of_repository(conn: Connection, repo_id: int, now_ms: int) -> Backlog:
    """As of now, in the transaction of the caller."""
    past: dict[int, dict[str, Any]] = {}
    tries = sa.select(d.issue, sa.func.count(sa.distinct(d.intent_key)), sa.func.max(d.made_ms))
    for issue, attempts, tried_ms in conn.execute(tries.where(d.repo_id == repo_id, d.intent_key.startswith(PICK)).group_by(d.issue)):
        past[issue] = {"attempts": int(attempts), "tried_ms": int(tried_ms)}
    for issue, key in conn.execute(sa.select(d.issue, d.intent_key).where(d.repo_id == repo_id, d.kind == GIVE_UP)):
        told = past.setdefault(issue, {})
        told["told"] = max(told.get("told", 0), int(key.rpartition(":")[2]))
    newest = sa.func.row_number().over(partition_by=c.issue, order_by=(c.queued_ms.desc(), c.id.desc())).label("newest")
    columns = (c.issue, c.state, c.outcome, c.detail, c.settled_ms, c.stop_by, c.pr, c.pr_state)
    ranked = sa.select(*columns, newest).where(c.repo_id == repo_id).subquery()
    for row in conn.execute(sa.select(ranked).where(ranked.c.newest == 1)):
        past.setdefault(row.issue, {}).update(
            state=row.state,
            outcome=row.outcome or "",
            detail=row.detail,
            settled_ms=row.settled_ms or 0,
            stop_by=row.stop_by,
            pr=row.pr,
            pr_state=row.pr_state,
        )
    live = [c.repo_id == repo_id, c.state != SprintState.SETTLED]
    active = conn.execute(sa.select(sa.func.count()).where(*live, c.pr == 0)).scalar_one()
    waiting = conn.execute(sa.select(sa.func.count()).where(*live, c.state == SprintState.QUEUED, c.source == Source.SCHEDULE)).scalar_one()
    held = (pause for pause in pauses.current(conn, now_ms) if pause.scope is PauseScope.FLEET or pause.repo_id == repo_id)
    return Backlog(
        past={issue: Past(**values) for issue, values in past.items()},
        skipped=skips.of_repository(conn, repo_id),
        pause=next(held, None),
        active=int(active),
        picks_waiting=int(waiting),
    )
