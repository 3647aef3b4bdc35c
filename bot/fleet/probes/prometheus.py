"""Prometheus answers, where the settings name it: without it nobody is paged."""

from __future__ import annotations

from collections.abc import Sequence

from bot.fleet.probes import Probe, Reach
from bot.fleet.probes._http import healthy
from bot.snapshot import Finding


async def look(reach: Reach) -> Sequence[Finding]:
    """Its health, then whether it is ready."""
    return [await healthy(reach.settings.watchdog.prometheus_url)]


plugin = Probe("Prometheus", look, period_seconds=60.0, wanted=lambda settings: bool(settings.watchdog.prometheus_url))
