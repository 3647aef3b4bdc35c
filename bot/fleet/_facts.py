"""What the rows tell a sample, read in one transaction: workers, sprints in flight, schedules, providers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from bot.models import IN_FLIGHT
from bot.providers.health import available
from bot.snapshot import FleetSnapshot
from bot.store import lanes, providers, samples, sprints, steps, workers
from bot.store.fleet import snapshot

MOST_SPRINTS = 50


@dataclass(frozen=True, slots=True)
class Facts:
    """`fleet` is everything at a glance; `workers` are the slots of one host by name (`NODE-SLOT`), the newest holder of each.

    `lanes` are those of this host as they are wanted, `sprints` the first in flight with their last step (Unix ms), `open_prs` and `commits`
    are by repository id our open pull requests and the commits that we ever pushed.
    """

    fleet: FleetSnapshot
    workers: Mapping[str, workers.Worker]
    lanes: tuple[lanes.Lane, ...]
    sprints: tuple[Mapping[str, Any], ...]
    open_prs: Mapping[int, int]
    commits: Mapping[int, int]
    schedules: tuple[samples.Schedule, ...]
    providers: Mapping[str, Mapping[str, Any]]


def read(conn: Connection, *, node_id: str, lease_ms: int) -> Facts:
    """As of now."""
    slots: dict[str, workers.Worker] = {}
    for worker in sorted(workers.every(conn), key=lambda each: each.started_ms):
        if worker.node_id == node_id and worker.slot >= 0:
            slots[f"{worker.node_id}-{worker.slot}"] = worker
    return Facts(
        fleet=snapshot(conn, worker_timeout_ms=lease_ms, available=available, node_id=node_id),
        workers=slots,
        lanes=tuple(lanes.of_node(conn, node_id)),
        sprints=tuple(_in_flight(conn)),
        open_prs=sprints.open_prs(conn),
        commits=_commits(conn),
        schedules=samples.every(conn),
        providers=providers.load(conn),
    )


def _commits(conn: Connection) -> dict[int, int]:
    c = sprints.table.c
    pushed = sa.select(c.repo_id, sa.func.count(sa.distinct(c.head_sha))).where(c.pr > 0, c.head_sha != "").group_by(c.repo_id)
    return {row[0]: int(row[1]) for row in conn.execute(pushed)}


def _in_flight(conn: Connection) -> list[Mapping[str, Any]]:
    c, made = sprints.table.c, steps.table.c
    last = sa.select(sa.func.max(made.started_ms)).where(made.sprint_id == c.id).scalar_subquery()
    statement = (
        sa.select(c.id, c.repo, c.issue, c.state, c.steps, c.engine, c.model, c.started_ms, c.progress_ms, last.label("step_ms"))
        .where(c.state.in_(list(IN_FLIGHT)))
        .order_by(c.admitted_ms, c.id)
        .limit(MOST_SPRINTS)
    )
    return [dict(row._mapping) for row in conn.execute(statement)]  # noqa: SLF001 - the library's public name for a row as a mapping
