"""Keeps the history of the verdict on the fleet: the leader judges by the clock, and a verdict that changes, or that still holds, is a row."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog
from sqlalchemy.engine import Connection

from bot.settings import Settings
from bot.snapshot import Fault, FleetSnapshot, Health, HealthVerdict
from bot.store import Store, spells

log = structlog.get_logger()

LOOK_SECONDS = 5.0
# How often it is written down that a verdict still holds; far below the gap after which it counts as ended.
CONFIRM_MS = 60_000
FAULTS = frozenset(Fault)


class Chronicle:
    """One for each process; only the leader's writes. `judge(connection)` gives the facts and the verdict of this moment."""

    def __init__(
        self,
        store: Store,
        *,
        settings: Settings,
        judge: Callable[[Connection], tuple[FleetSnapshot, Health]],
        is_leader: Callable[[], bool],
    ) -> None:
        self._store = store
        self._judge = judge
        self._is_leader = is_leader
        timing = settings.timing
        self._every = max(timing.tick_seconds, min(LOOK_SECONDS, timing.stall_after_seconds / 4))
        self._told: tuple[str, frozenset[str]] | None = None
        self._told_ms = 0

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                if self._is_leader():
                    await self.round()
                else:
                    self._told = None
            except Exception:
                log.exception("chronicle.round")
            await asyncio.sleep(self._every)

    async def round(self) -> None:
        """One look; nothing is written where nothing changed and what holds was confirmed a moment ago."""
        snapshot, health = await self._store.read(self._judge)
        now, causes = snapshot.now_ms, frozenset(reason.code for reason in health.reasons if reason.code in FAULTS)
        fresh = (str(health.verdict), causes)
        if fresh == self._told and 0 <= now - self._told_ms < CONFIRM_MS:
            return

        def write(conn: Connection) -> bool | None:
            if not self._store.lead(conn, "chronicle"):
                return None
            return spells.note(conn, health.verdict, causes=causes, reason=evidence(snapshot, health), now_ms=now)

        begun = await self._store.write(write)
        if begun is None:
            return
        self._told, self._told_ms = fresh, now
        if begun:
            log.info("fleet.verdict", verdict=health.verdict, reasons=[reason.detail for reason in health.reasons])


def evidence(snapshot: FleetSnapshot, health: Health) -> str:
    """What a verdict began with, in a form that stays true: of a pause who and why, of all else its first reason."""
    if health.verdict is HealthVerdict.PAUSED:
        return f"by {snapshot.paused_by or 'somebody'}" + (f": {snapshot.paused_reason}" if snapshot.paused_reason else "")
    return health.reasons[0].detail
