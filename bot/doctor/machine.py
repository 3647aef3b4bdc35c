"""This machine has what sprints need: git, space, and no environment that changes who the engine thinks it is."""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

from bot.doctor import Check, Patient, Probe, fail, ok, warn
from bot.fleet.probes.disk import GIBIBYTE, free_of

OLDEST_GIT = (2, 34)
LEAST_BYTES = 1024**3
SPRINTS_WORTH = 2


async def run(patient: Patient) -> AsyncIterator[Probe]:
    """Git, disk, environment."""
    yield await git()
    settings = patient.settings
    need = LEAST_BYTES + SPRINTS_WORTH * settings.queue.slots * settings.sandbox.workspace_bytes
    yield disk(settings.state_dir, need)
    if patient.environ.get("DBOS__CLOUD", "").lower() == "true":
        yield fail(
            "environment", "DBOS__CLOUD is set, which takes the workflows' identity from elsewhere", "unset DBOS__CLOUD for this service"
        )
    if patient.environ.get("PYTHONPATH"):
        yield warn("environment", "PYTHONPATH is set and may put other code in the place of ours", "unset PYTHONPATH for this service")


async def git() -> Probe:
    """Found, and young enough for what the host side asks of it."""
    path = shutil.which("git")
    if path is None:
        return fail("git", "git is not installed", "apt install git")
    process = await asyncio.create_subprocess_exec(
        path, "--version", stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    output, _ = await process.communicate()
    text = output.decode("utf-8", "replace").strip()
    numbers = re.search(r"(\d+)\.(\d+)", text)
    if numbers is None or (int(numbers[1]), int(numbers[2])) < OLDEST_GIT:
        return fail("git", f"'{text}' is too old", f"install git {OLDEST_GIT[0]}.{OLDEST_GIT[1]} or later")
    return ok("git", text)


def disk(folder: Path, need: int) -> Probe:
    """Free space where the sprints work; `need` is what all slots together may take (bytes)."""
    free, _ = free_of(folder)
    detail = f"{free / GIBIBYTE:.1f} GiB free in {folder}"
    if free < LEAST_BYTES:
        return fail("disk", detail, "make room, or move `state_dir` to a larger file system")
    if free < need:
        return warn(
            "disk",
            f"{detail}, and {need / GIBIBYTE:.0f} GiB may be needed",
            "make room, or lower `queue.slots` or `sandbox.workspace_bytes`",
        )
    return ok("disk", detail)


plugin = Check("machine", run, rank=60)
