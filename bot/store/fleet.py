"""One snapshot of the fleet in one read transaction: what the gauges, the verdict and the pages show (observability.md, the `S` rows)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from bot.models import IN_FLIGHT, RUNNING, OutcomeKind, PauseScope, RepositoryLoad, SprintState, WaitingReason
from bot.snapshot import FleetSnapshot, WorkerBeat, WorkerState
from bot.store import breakers, cursors, deliveries, outbox, pauses, probes, providers, samples, sprints, workers
from bot.store._base import database_now_ms

c = sprints.table.c
RUNNABLE = [reason for reason in WaitingReason if reason.runnable]


def snapshot(
    conn: Connection, *, worker_timeout_ms: int, available: Callable[[dict[str, Any], int], bool], node_id: str = ""
) -> FleetSnapshot:
    """All facts at this moment; `available(health, now_ms)` reads a provider's health record, `node_id` is the host whose samples count."""
    now = database_now_ms(conn)
    counts = {SprintState(row[0]): int(row[1]) for row in conn.execute(_by(c.state).where(c.state != SprintState.SETTLED))}
    waiting = {
        WaitingReason(row[0]): int(row[1])
        for row in conn.execute(_by(c.waiting_reason).where(c.state == SprintState.QUEUED, c.waiting_reason.is_not(None)))
    }
    owed = sa.or_(
        sa.and_(c.state == SprintState.QUEUED, sa.or_(c.waiting_reason.is_(None), c.waiting_reason.in_(RUNNABLE))),
        c.state == SprintState.ADMITTED,
    )
    inbox = deliveries.table.c
    out = outbox.table.c
    behind_sprints = conn.execute(sa.select(sa.func.count(), sa.func.min(c.updated_ms)).where(c.projected_rev < c.rev)).one()
    behind_outbox = conn.execute(sa.select(sa.func.count(), sa.func.min(out.made_ms)).where(out.projected_rev < out.rev)).one()
    held = pauses.current(conn, now)
    pause = next((pause for pause in held if pause.scope is PauseScope.FLEET), None)
    return FleetSnapshot(
        now_ms=now,
        sprints=counts,
        waiting=waiting,
        oldest_runnable_ms=conn.execute(sa.select(sa.func.min(c.queued_ms)).where(owed)).scalar(),
        oldest_running_ms=conn.execute(sa.select(sa.func.min(c.started_ms)).where(c.state.in_(list(RUNNING)))).scalar(),
        last_progress_ms=conn.execute(sa.select(sa.func.max(c.progress_ms))).scalar(),
        last_success_ms=conn.execute(
            sa.select(sa.func.max(c.settled_ms)).where(c.outcome.in_([OutcomeKind.PULL_REQUEST, OutcomeKind.UPDATED]))
        ).scalar(),
        last_delivery_ms=cursors.get(conn, cursors.LAST_DELIVERY),
        inbox_backlog=int(conn.execute(sa.select(sa.func.count()).where(inbox.done_ms.is_(None))).scalar_one()),
        inbox_oldest_ms=conn.execute(sa.select(sa.func.min(inbox.received_ms)).where(inbox.done_ms.is_(None))).scalar(),
        inbox_dead=int(conn.execute(sa.select(sa.func.count()).where(inbox.done_ms.is_not(None), inbox.error.is_not(None))).scalar_one()),
        outbox_backlog=int(behind_sprints[0]) + int(behind_outbox[0]),
        outbox_oldest_ms=min((moment for moment in (behind_sprints[1], behind_outbox[1]) if moment is not None), default=None),
        workers=tuple(_beats(conn, now, worker_timeout_ms)),
        paused=pause is not None,
        paused_by=pause.by if pause else "",
        paused_since_ms=pause.since_ms if pause else None,
        paused_until_ms=pause.until_ms if pause else None,
        paused_reason=pause.reason if pause else "",
        providers=_providers(conn, now, available),
        paused_providers={pause.provider: pause.by for pause in reversed(held) if pause.scope is PauseScope.PROVIDER},
        breakers=breakers.opened(conn),
        probes=probes.current(conn, now),
        collected=samples.collected(conn, node_id),
    )


def load(conn: Connection) -> tuple[RepositoryLoad, ...]:
    """What each repository with live sprints has in flight and in the queue, the busiest first."""
    flying = sa.func.sum(sa.case((c.state != SprintState.QUEUED, 1), else_=0))
    statement = (
        sa.select(c.repo_id, sa.func.max(c.repo), flying, sa.func.count() - flying)
        .where(c.state != SprintState.SETTLED)
        .group_by(c.repo_id)
    )
    found = [RepositoryLoad(row[0], row[1], int(row[2]), int(row[3])) for row in conn.execute(statement)]
    return tuple(sorted(found, key=lambda one: (-one.in_flight, -one.queued, one.repo)))


def _by(column: sa.Column[Any]) -> sa.Select[Any]:
    return sa.select(column, sa.func.count()).group_by(column)


def _beats(conn: Connection, now_ms: int, timeout_ms: int) -> list[WorkerBeat]:
    claimed = sa.select(c.executor_id, sa.func.count()).where(c.state.in_(list(IN_FLIGHT)), c.executor_id.is_not(None))
    busy = {row[0]: int(row[1]) for row in conn.execute(claimed.group_by(c.executor_id))}
    latest: dict[tuple[str, int], workers.Worker] = {}
    for worker in workers.every(conn):
        place = (worker.node_id, worker.slot)
        if worker.slot >= 0 and (place not in latest or latest[place].started_ms < worker.started_ms):
            latest[place] = worker
    beats = []
    for (node, slot), worker in sorted(latest.items()):
        if worker.reaped_ms is not None or worker.beat_ms <= now_ms - timeout_ms:
            state = WorkerState.LOST
        elif worker.draining:
            state = WorkerState.DRAINING
        else:
            state = WorkerState.BUSY if worker.executor_id in busy else WorkerState.IDLE
        running = busy.get(worker.executor_id, 0)
        beats.append(WorkerBeat(f"{node}-{slot}", state, worker.beat_ms, slots=worker.capacity, running=running))
    return beats


def _providers(conn: Connection, now_ms: int, available: Callable[[dict[str, Any], int], bool]) -> dict[str, bool]:
    found: dict[str, bool] = {}
    for key, health in providers.load(conn).items():
        name = key.partition("/")[0]
        found[name] = found.get(name, False) or available(health, now_ms)
    return found
