"""The collector's files lie outside of every repository, and it writes them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from bot.config import Settings
from bot.doctor import Check, Patient, Probe, ok, warn
from bot.fleet._streams import METRICS, fault_of

OLD_PERIODS = 10


async def run(patient: Patient) -> AsyncIterator[Probe]:
    """One finding."""
    yield await asyncio.to_thread(telemetry, patient.settings, time.time())


def telemetry(settings: Settings, now: float) -> Probe:
    """As of `now` (Unix seconds): the folder, and whether the newest sample is fresh."""
    folder, every = settings.telemetry_dir(), settings.collector.every_seconds
    if fault := fault_of(folder):
        what, _, remedy = fault.partition(": ")
        return warn("telemetry", what, f"{remedy}; until then only the gauges are kept")
    newest = folder / METRICS
    if not newest.exists():
        return ok("telemetry", f"{folder}, no sample yet")
    age = now - newest.stat().st_mtime
    if settings.collector.enabled and age > OLD_PERIODS * every:
        return warn(
            "telemetry",
            f"the newest sample in {folder} is {age:.0f} s old",
            "start the service, and look for `collector.missed` in its log",
        )
    return ok("telemetry", f"{folder}, newest sample {max(0.0, age):.0f} s old")


plugin = Check("telemetry", run, rank=67)
