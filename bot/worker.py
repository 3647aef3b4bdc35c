"""A process that only runs sprints: the rooms without a way in, a log that a person can follow, and an end that finishes what it began."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any

import structlog
from sqlalchemy.engine import Connection

from bot.models import EventKind, Json, SprintEvent
from bot.rooms import Rooms
from bot.snapshot import Health
from bot.store import Store, sprints
from bot.web.observability import observability_app

log = structlog.get_logger()

LOOK_SECONDS = 0.2
LAST_WORDS_SECONDS = 2.0
REMEMBERED = 200
TOLD = {
    EventKind.STARTED: "sprint.started",
    EventKind.STAGE_ENDED: "sprint.stage",
    EventKind.STEP_ENDED: "sprint.step",
    EventKind.TOOL_ENDED: "sprint.tool",
    EventKind.REQUEUED: "sprint.requeued",
    EventKind.PULL_REQUEST: "sprint.pull_request",
    EventKind.SETTLED: "sprint.settled",
    EventKind.TAKEN_OVER: "fleet.taken_over",
}
SHOWN = ("stage", "tool", "result", "model", "outcome", "reason", "steps", "number", "seconds", "usd")


class Narrator:
    """One line a fact, in the order in which they happened: which sprint, which issue, step n of m, which tool, what came of it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._queue: asyncio.Queue[SprintEvent] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._known: dict[str, tuple[str, int]] = {}

    def observe(self, event: SprintEvent) -> None:
        """Takes a fact from any thread."""
        if event.kind in TOLD:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._queue.put_nowait, event)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            event = await self._queue.get()
            try:
                await self._tell(event)
            except Exception:
                log.exception("worker.narrator", kind=event.kind)
            finally:
                self._queue.task_done()

    async def said(self, seconds: float = LAST_WORDS_SECONDS) -> None:
        """Waits until everything that happened is told."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._queue.join()

    async def _tell(self, event: SprintEvent) -> None:
        data = event.data
        facts: Json = {}
        if event.sprint_id:
            issue, most = await self._about(event.sprint_id)
            facts = {"sprint": event.sprint_id, "issue": issue}
            if "step" in data:
                facts["step"] = f"{data['step']}/{most}"
        facts |= {name: _short(data[name]) for name in SHOWN if data.get(name) not in (None, "")}
        log.info(TOLD[event.kind], **facts)

    async def _about(self, sprint_id: str) -> tuple[str, int]:
        if sprint_id not in self._known:

            def read(conn: Connection) -> tuple[str, int]:
                view = sprints.get(conn, sprint_id)
                return ("", 0) if view is None else (str(view.issue), view.limits.steps if view.limits is not None else 0)

            if len(self._known) >= REMEMBERED:
                self._known.clear()
            self._known[sprint_id] = await self._store.read(read)
        return self._known[sprint_id]


class Worker(Rooms):
    """Runs sprints beside a `serve`, on the same SQLite file or the same PostgreSQL; `metrics` is an address for its own figures, or ""."""

    narrator: Narrator

    def __init__(self, *args: Any, metrics: str = "", **options: Any) -> None:
        super().__init__(*args, **options)
        self._metrics_address = metrics

    async def drain(self) -> None:
        """Takes nothing more and waits until what it runs has ended; a second call waits too."""
        self._stopping = True
        await asyncio.to_thread(self.lease.drain)
        await self.engine.pause()
        told = -1
        while running := await self.store.read(self._running):
            if running != told:
                log.info("worker.draining", running=running)
                told = running
            await asyncio.sleep(LOOK_SECONDS)
        await self.narrator.said()
        log.info("worker.drained")

    def _running(self, conn: Connection) -> int:
        claimed = sprints.claimed_by(conn, self.lease.executor_id)
        # Taken from the queue a moment ago, and not claimed yet.
        return claimed or int(self.lease.executor_id in self.engine.pending_owners(conn))

    def _works(self) -> list[Coroutine[Any, Any, None]]:
        self.narrator = Narrator(self.store)
        self._observers.append(self.narrator.observe)
        return [*super()._works(), self.narrator.run()]

    async def _listen(self) -> None:
        if not self._metrics_address:
            return
        # What the store says is told by `serve`; here stands what this process alone has counted.
        app = observability_app(
            render=lambda accept, compress: self.metrics.render(accept, compress=compress),
            health=self._health,
            unready=lambda: "draining" if self._stopping else "",
        )
        self.metrics_port = await self._serve(app, self._metrics_address)

    def _health(self) -> Health:
        return self.store.read_sync(self._fleet)[1]

    def _started(self) -> None:
        log.info(
            "worker.started",
            executor=self.lease.executor_id,
            slot=self.lease.slot,
            sprints=self.settings.queue.slots,
            sandbox=self.sandbox.level,
            metrics=self.metrics_port or None,
        )


def _short(value: object) -> object:
    return round(value, 3) if isinstance(value, float) else value
