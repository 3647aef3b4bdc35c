"""How much room the fleet takes, by what takes it, so that retention can be judged before the disk is full."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

from bot.config import Settings
from bot.doctor import Check, Patient, Probe, ok, warn
from bot.fleet.sizes import size_of

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
STEP = 1024


async def run(patient: Patient) -> AsyncIterator[Probe]:
    """One finding with all the sizes."""
    yield await asyncio.to_thread(sizes, patient.settings)


def sizes(settings: Settings) -> Probe:
    """Database, folders of sprints, exports, telemetry; a warning where together they take more than what is left free."""
    folder = settings.state_dir
    if not folder.exists():
        return ok("sizes", f"{folder} does not exist yet")
    address = settings.database_url()
    database = Path(address.removeprefix("sqlite:///"))
    files = [database.with_name(database.name + end) for end in ("", "-wal", "-shm")]
    sprints, exports = folder / "sprints", folder / "exports"
    count = sum(path.is_dir() and not path.name.startswith(".") for path in sprints.iterdir()) if sprints.is_dir() else 0
    found = {
        **({"database": sum(path.stat().st_size for path in files if path.exists())} if address.startswith("sqlite:") else {}),
        f"{count} sprint folders": size_of(sprints),
        "exports": size_of(exports),
        "telemetry": size_of(settings.telemetry_dir()),
    }
    told = ", ".join(f"{name} {human(size)}" for name, size in found.items())
    free = shutil.disk_usage(folder).free
    if sum(found.values()) > free:
        return warn("sizes", f"{told}, and {human(free)} are free", "lower the days under `retention`, or make room")
    return ok("sizes", told)


def human(size: float) -> str:
    """`12.3 MiB`."""
    for unit in UNITS[:-1]:
        if size < STEP:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= STEP
    return f"{size:.1f} {UNITS[-1]}"


plugin = Check("sizes", run, rank=66)
