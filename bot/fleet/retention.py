"""Deletes what was done long ago, rows and files; what decides (sprints, intents, decisions, spend) stays."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa
import structlog
from sqlalchemy.engine import Connection

from bot.models import SprintState
from bot.settings import RetentionSettings
from bot.store import Store, deliveries, outbox, sprints, steps, workers
from bot.workspace import Workspaces

log = structlog.get_logger()

DAY_MS = 86_400_000
SPRINTS_AT_ONCE = 100


@dataclass(frozen=True, slots=True)
class Pruned:
    """How many folders of sprints, kept patches and log files went."""

    folders: int = 0
    patches: int = 0
    logs: int = 0


def prune_rows(conn: Connection, keep: RetentionSettings, now_ms: int) -> None:
    """Deliveries, shown replies, and workers that are gone for a day."""

    def before(days: float) -> int:
        return now_ms - int(days * DAY_MS)

    deliveries.prune(conn, done_before_ms=before(keep.deliveries_days), dead_before_ms=before(keep.dead_letters_days))
    outbox.prune(conn, before_ms=before(keep.replies_days))
    workers.forget(conn, before_ms=before(1.0))


async def prune_journals(store: Store, keep: RetentionSettings, now_ms: int) -> int:
    """What models and tools said in sprints that are over, some sprints a transaction, so that nobody waits long; returns how many sprints."""
    pruned = 0
    while done := await store.write(lambda conn: _prune_journals(conn, before_ms=now_ms - int(keep.journals_days * DAY_MS))):
        pruned += done
    return pruned


def _prune_journals(conn: Connection, *, before_ms: int) -> int:
    c, made, calls = sprints.table.c, steps.table.c, steps.tool_calls.c
    said = sa.or_(
        sa.exists().where(calls.sprint_id == c.id),
        sa.exists().where(made.sprint_id == c.id, made.reply.is_not(sa.null())),
    )
    old = sa.select(c.id).where(c.state == SprintState.SETTLED, c.settled_ms < before_ms, said).limit(SPRINTS_AT_ONCE)
    ids = list(conn.execute(old).scalars())
    if ids:
        conn.execute(steps.tool_calls.delete().where(calls.sprint_id.in_(ids)))
        conn.execute(steps.table.update().where(made.sprint_id.in_(ids)).values(reply=sa.null()))
    return len(ids)


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
