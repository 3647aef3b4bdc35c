"""Keeps what holds work back by itself: the configured hours and the breaker, as rows; it never touches what a person paused."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog
from sqlalchemy.engine import Connection

from bot.fleet import breaker as rules
from bot.hours import pauses_of
from bot.models import Breaker, Pause, PauseScope
from bot.settings import Settings
from bot.store import Store, breakers, intents, pauses

log = structlog.get_logger()

RECENT = 200
# Failures of another day are no reason to hold a fleet that was started anew.
LOOK_BACK_MS = 86_400_000


class Holds:
    """One look a tick, in the leader's process; every change is one transaction that reads what it changes."""

    def __init__(
        self,
        store: Store,
        *,
        settings: Settings,
        repositories: Callable[[], dict[int, str]],
        is_leader: Callable[[], bool],
        kick_queue: Callable[[], None],
        now_ms: Callable[[], int],
    ) -> None:
        self._store = store
        self._settings = settings
        self._repositories = repositories
        self._is_leader = is_leader
        self._kick_queue = kick_queue
        self._now_ms = now_ms
        self._hours: list[Pause] | None = None

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                if self._is_leader():
                    await self.round()
                else:
                    self._hours = None
            except Exception:
                log.exception("holds.round")
            await asyncio.sleep(self._settings.timing.tick_seconds)

    async def round(self) -> None:
        """What the hours and the breaker want now; nothing is written where nothing changed."""
        hours = pauses_of(self._settings, self._repositories(), self._now_ms())
        changed = hours != self._hours
        if changed:
            await self._store.write(lambda conn: self._keep_hours(conn, hours))
            self._hours = hours
        if await self._store.read(self._something_to_do):
            changed |= await self._store.write(self._keep_breakers)
        if changed:
            self._kick_queue()

    def _keep_hours(self, conn: Connection, wanted: list[Pause]) -> None:
        now = self._now_ms()
        for pause in pauses.keep_hours(conn, wanted):
            what = {PauseScope.FLEET: "the whole fleet", PauseScope.REPO: pause.repo}.get(pause.scope, f"the provider {pause.provider}")
            why = f"{what} is paused by {pause.by}" + (f": {pause.reason}" if pause.reason else "")
            intents.decide(conn, repo_id=pause.repo_id, issue=0, kind="hours", result="paused", reason=why, now_ms=now)

    def _something_to_do(self, conn: Connection) -> bool:
        """A look without the writer's lock; the write looks again."""
        return any(self._plan(conn))

    def _plan(self, conn: Connection) -> tuple[list[Breaker], list[tuple[Breaker, str]], list[tuple[Breaker, str]]]:
        """(to open, to save with what is told, to close with the reason)."""
        policy, now = self._settings.breaker, self._now_ms()
        ends = breakers.ends(conn, after_ms=now - LOOK_BACK_MS, limit=RECENT, neutral=rules.NEUTRAL)
        opened = breakers.opened(conn)
        watched = {(one.scope, one.repo_id, one.provider) for one in opened}
        new = [
            one
            for one in rules.to_open(ends, policy, breakers.closed_since(conn), now)
            if (one.scope, one.repo_id, one.provider) not in watched
        ]
        saved, closed = [], []
        for one in opened:
            good = rules.works_again(one, ends)
            if not rules.is_watched(one, policy):
                closed.append((one, "it is switched off in the configuration"))
            elif good is not None:
                closed.append((one, f"sprint {good.sprint_id} ended as {good.outcome}"))
            elif one.probe and (after := rules.after_probe(one, breakers.probe_now(conn, one.probe), policy, now)):
                saved.append(after)
            elif not one.probe and (again := rules.after_use(one, ends, policy, now)):
                saved.append(again)
        return new, saved, closed

    def _keep_breakers(self, conn: Connection) -> bool:
        # The lock of admission: a try is taken in the same order in which it is judged.
        if not self._store.lead(conn, "admission"):
            return False
        now = self._now_ms()
        new, saved, closed = self._plan(conn)
        for one in new:
            breakers.save(conn, one)
            breakers.tell(
                conn, one, "opened", f"{one.failures} sprints in a row failed ({one.reason}) in {breakers.name_of(one)}", now_ms=now
            )
            log.warning("breaker.opened", scope=one.scope, repo=one.repo, provider=one.provider, failures=one.failures, reason=one.reason)
        for one, result in saved:
            breakers.save(conn, one)
            breakers.tell(conn, one, result, f"{one.probes} tries failed; the next in {(one.due_ms - now) // 1000} s", now_ms=now)
        for one, why in closed:
            breakers.close(conn, (one.scope, one.repo_id, one.provider), now_ms=now, why=why)
            log.info("breaker.closed", scope=one.scope, repo=one.repo, provider=one.provider, why=why)
        return bool(new or saved or closed)
