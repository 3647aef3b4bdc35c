"""Deletes what was done long ago, rows and files; what decides (the rows of sprints, intents, decisions, spend) stays."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import sqlalchemy as sa
import structlog
from sqlalchemy.engine import Connection

from bot.figures import LONGEST_MS
from bot.models import SprintState
from bot.settings import RetentionSettings
from bot.store import Store, aged, deliveries, outbox, pulls, spells, sprints, steps, workers
from bot.workspace import Workspaces

log = structlog.get_logger()

DAY_MS = 86_400_000
SPRINTS_AT_ONCE = 100
# A sprint has as many steps as its limits allow: fewer at a time where those go.
THINNED_AT_ONCE = 20
LOOKED_AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class Pruned:
    """How many folders of sprints, kept patches and log files went."""

    folders: int = 0
    patches: int = 0
    logs: int = 0


@dataclass(frozen=True, slots=True)
class Aged:
    """How many plans and follow-ups went, and how many sprints were thinned."""

    plans: int = 0
    follow_ups: int = 0
    sprints: int = 0


def prune_rows(conn: Connection, keep: RetentionSettings, now_ms: int) -> None:
    """Deliveries, shown replies, workers that are gone for a day, and the verdicts of long ago."""

    def before(days: float) -> int:
        return now_ms - int(days * DAY_MS)

    deliveries.prune(conn, done_before_ms=before(keep.deliveries_days), dead_before_ms=before(keep.dead_letters_days))
    outbox.prune(conn, before_ms=before(keep.replies_days))
    workers.forget(conn, before_ms=before(1.0))
    spells.prune(conn, before_ms=before(keep.verdicts_days))


async def prune_journals(store: Store, keep: RetentionSettings, now_ms: int) -> int:
    """What models and tools said in sprints that are over, some sprints a transaction, so that nobody waits long; returns how many sprints."""
    pruned = 0
    while keep.journals_days:
        before_ms = now_ms - int(keep.journals_days * DAY_MS)
        # Looked for on a reader: most of what is old was pruned before, and finding that out holds nobody up there.
        ids = await store.read(partial(_old_journals, before_ms=before_ms))
        if not ids:
            break
        await store.write(partial(_prune_journals, ids=ids))
        pruned += len(ids)
    return pruned


def _old_journals(conn: Connection, *, before_ms: int) -> list[str]:
    c, made, calls = sprints.table.c, steps.table.c, steps.tool_calls.c
    said = sa.or_(
        sa.exists().where(calls.sprint_id == c.id),
        sa.exists().where(made.sprint_id == c.id, made.reply.is_not(sa.null())),
    )
    # Who looks at a pull request that is open still may want to know how it came about.
    over = sa.and_(c.state == SprintState.SETTLED, c.settled_ms < before_ms, c.pr_state != pulls.OPEN)
    return list(conn.execute(sa.select(c.id).where(over, said).limit(SPRINTS_AT_ONCE)).scalars())


def _prune_journals(conn: Connection, *, ids: list[str]) -> None:
    conn.execute(steps.tool_calls.delete().where(steps.tool_calls.c.sprint_id.in_(ids)))
    conn.execute(steps.table.update().where(steps.table.c.sprint_id.in_(ids)).values(reply=sa.null()))


async def prune_aged(store: Store, keep: RetentionSettings, now_ms: int) -> Aged:
    """What issues at rest hold of long ago: plans that were decided on, what follow-ups went by, the weight of sprints. 0 days keep it for ever.

    Looked for on a reader and taken in small transactions, so that nobody waits long.
    """
    gone = follow_up_rows = 0
    while keep.plans_days:
        before_ms = now_ms - int(keep.plans_days * DAY_MS)
        ids = await store.read(partial(aged.old_plans, before_ms=before_ms, limit=SPRINTS_AT_ONCE))
        dropped = await store.write(partial(aged.drop_plans, ids=ids, before_ms=before_ms)) if ids else 0
        gone += dropped
        if not dropped:
            break
    while keep.follow_ups_days:
        before_ms = now_ms - int(keep.follow_ups_days * DAY_MS)
        ids = await store.read(partial(aged.old_follow_ups, before_ms=before_ms, limit=SPRINTS_AT_ONCE))
        if not ids:
            break
        follow_up_rows += await store.write(partial(aged.drop_follow_ups, ids=ids))
    found = Aged(gone, follow_up_rows, await _thin_sprints(store, keep, now_ms))
    if found != Aged():
        log.info("retention.aged", plans=found.plans, follow_ups=found.follow_ups, sprints=found.sprints)
    return found


async def _thin_sprints(store: Store, keep: RetentionSettings, now_ms: int) -> int:
    """A report counts the single steps of its window: what the longest one reaches stays, whatever the days are."""
    before_ms = now_ms - max(int(keep.sprints_days * DAY_MS), LONGEST_MS)
    thinned = 0
    place: tuple[int, str] | None = (0, "") if keep.sprints_days else None
    while place is not None:
        ids, place = await store.read(partial(aged.old_sprints, after=place, before_ms=before_ms, limit=LOOKED_AT_ONCE))
        for start in range(0, len(ids), THINNED_AT_ONCE):
            thinned += await store.write(partial(aged.thin, ids=ids[start : start + THINNED_AT_ONCE]))
    return thinned


async def prune_files(store: Store, workspaces: Workspaces, exports: Path, keep: RetentionSettings, now_ms: int) -> Pruned:
    """Folders and patches of sprints that are over since long or that no row knows, and old log files, of this state folder."""
    held = await store.read(lambda conn: _ends(conn, [*workspaces.folders(), *workspaces.patches()]))
    before = now_ms - int(keep.workspaces_days * DAY_MS)
    folders = patches = 0
    for sprint_id, touched_ms in workspaces.folders().items():
        if _over(held.get(sprint_id, touched_ms), before):
            folders += await _removed(workspaces, sprint_id)
    for sprint_id, touched_ms in workspaces.patches().items():
        if _over(held.get(sprint_id, touched_ms), before):
            workspaces.forget_patch(sprint_id)
            patches += 1
    logs = await asyncio.to_thread(_prune_logs, exports, now_ms - int(keep.logs_days * DAY_MS))
    found = Pruned(folders, patches, logs)
    if folders or patches or logs:
        log.info("retention.files", folders=folders, patches=patches, logs=logs)
    return found


async def _removed(workspaces: Workspaces, sprint_id: str) -> bool:
    """One folder that cannot be removed (the sandbox is away, or the disk is broken) does not keep the others."""
    try:
        await workspaces.remove(sprint_id)
    except Exception as error:
        log.warning("retention.stuck", sprint=sprint_id, error=str(error))
        return False
    return True


def _over(end_ms: int | None, before_ms: int) -> bool:
    """`end_ms` is when the sprint settled (or, without a row, when its folder was touched last); None while it is live."""
    return end_ms is not None and end_ms < before_ms


def _ends(conn: Connection, ids: list[str]) -> dict[str, int | None]:
    """Sprint id -> when it settled, None while it has not."""
    c = sprints.table.c
    parts = [ids[start : start + 500] for start in range(0, len(ids), 500)]
    return {row.id: row.settled_ms for part in parts for row in conn.execute(sa.select(c.id, c.settled_ms).where(c.id.in_(part)))}


def _prune_logs(exports: Path, before_ms: int) -> int:
    """By when they were written; a log is written when its sprint settles."""
    removed = 0
    for path in (exports / "logs").glob("*.log"):
        if path.stat().st_mtime * 1000 < before_ms:
            path.unlink(missing_ok=True)
            removed += 1
    return removed
