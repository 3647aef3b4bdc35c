"""The place of a queued sprint and how long it may take until it begins, judged by how long the last sprints ran; nothing is said without history."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from bot.models import OutcomeKind, Position
from bot.settings import Settings
from bot.store import sprints, workers

COUNTED = 200
SAMPLE = 20
c = sprints.c


@dataclass(frozen=True, slots=True)
class Caps:
    """Most sprints at once in the fleet (0: as many as there are slots) and in one repository; silence after which a worker counts as dead (ms)."""

    fleet: int
    repository: int
    lease_ms: int


def caps(settings: Settings, full_name: str) -> Caps:
    """The caps that hold for a repository."""
    known = settings.repository(full_name)
    most = min(known.max_running if known else settings.queue.max_per_repository, settings.queue.max_per_repository)
    return Caps(settings.queue.max_running, most, int(settings.timing.lease_seconds * 1000))


def position(conn: Connection, sprint_id: str, limits: Caps) -> Position | None:
    """The place in line with the time to wait; None where the sprint does not wait."""
    place = sprints.position(conn, sprint_id)
    if place is None:
        return None
    wait = 0 if place > COUNTED else expected_ms(conn, sprint_id, place=place, limits=limits)
    return Position(min(place, COUNTED), min(place - 1, COUNTED), place > COUNTED, wait)


def expected_ms(conn: Connection, sprint_id: str, *, place: int, limits: Caps) -> int:
    """Median run time x place / capacity, in the fleet or in its repository, whichever is later; 0 without history, or where a slot is free."""
    run = _run_ms(conn)
    capacity = sum(worker.capacity for worker in workers.live(conn, limits.lease_ms) if not worker.draining)
    capacity = min(capacity, limits.fleet or capacity)
    if not run or not capacity:
        return 0
    mine = sprints.field(conn, sprint_id, "repo_id", "priority", "queued_ms")
    before = sa.or_(
        c.priority < mine.priority,
        sa.and_(
            c.priority == mine.priority, sa.or_(c.queued_ms < mine.queued_ms, sa.and_(c.queued_ms == mine.queued_ms, c.id <= sprint_id))
        ),
    )
    here = int(conn.execute(sa.select(sa.func.count()).where(sprints.QUEUED, c.repo_id == mine.repo_id, before)).scalar_one())
    flying = sprints.in_flight(conn)
    if place + sum(flying.values()) <= capacity and here + flying.get(mine.repo_id, 0) <= limits.repository:
        return 0
    # Of its own repository those before it, waiting or running, must have ended.
    first = (here - 1 + flying.get(mine.repo_id, 0)) / limits.repository
    return int(max(place / capacity, first) * run)


def _run_ms(conn: Connection) -> int:
    """Median run time of the last sprints that nobody cancelled; 0 without any."""
    statement = (
        sa.select(c.settled_ms - c.started_ms)
        .where(c.settled_ms.is_not(None), c.started_ms.is_not(None), c.outcome != OutcomeKind.CANCELLED)
        .order_by(c.settled_ms.desc())
        .limit(SAMPLE)
    )
    times = sorted(int(row[0]) for row in conn.execute(statement))
    return max(1, times[len(times) // 2]) if times else 0
