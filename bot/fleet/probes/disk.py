"""There is room where the sprints work; what retention allows to delete may be deleted before its hour."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bot.fleet.probes import MendError, Probe, Reach, failing, fine, notable
from bot.snapshot import Finding

GIBIBYTE = 1024**3
LEAST_INODES = 1000


async def look(reach: Reach) -> Sequence[Finding]:
    """The file system of the state folder."""
    limits = reach.settings.watchdog
    free, inodes = await asyncio.to_thread(free_of, reach.settings.state_dir)
    return [judge(free, inodes, warn=limits.disk_warn_bytes, fail=limits.disk_failing_bytes, can_mend=reach.make_room is not None)]


def judge(free: int, inodes: int | None, *, warn: int, fail: int, can_mend: bool) -> Finding:
    """Free bytes and files against the two thresholds (bytes); None: this file system does not count files."""
    text = f"{free / GIBIBYTE:.1f} GiB free" + (f", {inodes} files" if inodes is not None and inodes < LEAST_INODES else "")
    evidence = {"free_bytes": free, "free_inodes": inodes}
    if free < fail or (inodes is not None and inodes < LEAST_INODES):
        return replace(failing("state folder", text, **evidence), mendable=can_mend)
    if free < warn:
        return replace(notable("state folder", text, **evidence), mendable=can_mend)
    return fine("state folder", text, **evidence)


def free_of(folder: Path) -> tuple[int, int | None]:
    """(bytes, files) that may still be written below a folder that need not be there yet; None where files are not counted."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize, found.f_favail if found.f_files else None


async def mend(reach: Reach, _finding: Finding) -> str:
    """Retention, now."""
    if reach.make_room is None:
        raise MendError("only the service itself may delete files")
    return await reach.make_room()


plugin = Probe("room for the sprints", look, period_seconds=60.0, mend=mend, does="deletes what retention allows")
