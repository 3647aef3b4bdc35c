"""Asks several sources at once, each within its own deadline: one that hangs is unknown this time, and is not asked again while it hangs."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

from bot.fleet._states import Facets
from bot.models import UserError

T = TypeVar("T")
Row = tuple[Any, ...]
WHY_CHARACTERS = 200
END_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Found:
    """What a source gave: `data` for the stream of samples, `state` (entity -> facets) for what changed, `gauges` (metric -> rows of labels and value).

    `memory` is handed to its next run.
    """

    data: Mapping[str, Any] = field(default_factory=dict)
    state: Mapping[str, Facets] = field(default_factory=dict)
    gauges: Mapping[str, list[Row]] = field(default_factory=dict)
    memory: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Answer:
    """One source in one sample: what it gave, or None and why. `seconds` is how long it took, or was waited for."""

    found: Found | None
    seconds: float
    why: str = ""


Take = Callable[[], Coroutine[Any, Any, Found]]


class Sampler:
    """Runs sources by name. At most one run of each is ever under way."""

    def __init__(self) -> None:
        self._hanging: dict[str, asyncio.Task[Found]] = {}

    @property
    def hanging(self) -> frozenset[str]:
        """Sources whose run of an earlier sample has not ended."""
        return frozenset(name for name, task in self._hanging.items() if not task.done())

    async def take(self, sources: Mapping[str, Take], deadline: float) -> dict[str, Answer]:
        """One answer a source, by name in their order; ends after `deadline` seconds at the latest."""
        answers: dict[str, Answer] = {}
        began = time.perf_counter()
        ended: dict[str, float] = {}
        running: dict[str, asyncio.Task[Found]] = {}
        for name, take in sources.items():
            if name in self.hanging:
                answers[name] = Answer(None, 0.0, "its last run still hangs")
                continue
            task = asyncio.create_task(take())
            task.add_done_callback(partial(_note_end, ended, name))
            running[name] = self._hanging[name] = task
        if running:
            await asyncio.wait(running.values(), timeout=deadline)
        for name, task in running.items():
            if task.done():
                answers[name] = _answer(task, ended.get(name, began) - began)
            else:
                # Whoever drops it needs no word about how it ends later.
                task.add_done_callback(_ignore)
                answers[name] = Answer(None, deadline, f"no answer in {deadline:g} s")
        return {name: answers[name] for name in sources}

    async def close(self) -> None:
        """Lets go of what hangs; a thread that is stuck in the system ends with the process."""
        await _let_go(*self._hanging.values())


async def in_thread(name: str, work: Callable[[], T]) -> T:
    """Runs what blocks on a thread of its own, which holds up neither the loop nor the end of the process, however long it hangs."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(tell: Callable[[], None]) -> None:
        if not future.done():
            tell()

    def run() -> None:
        try:
            tell = partial(future.set_result, work())
        except Exception as error:
            tell = partial(future.set_exception, error)
        # The loop may have been closed while this hung.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(settle, tell)

    threading.Thread(target=run, name=f"collector-{name}", daemon=True).start()
    return await future


class OneAtATime:
    """Work that blocks, each on a thread of its own and within a deadline; while one hangs no second one is begun."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._running: asyncio.Task[Any] | None = None

    async def run(self, work: Callable[[], T], deadline: float) -> T:
        """What `work` gives; raises what it raises, and UserError where it hangs."""
        if self._running is not None and not self._running.done():
            raise UserError(f"{self._name}: what was begun earlier still hangs")
        task = asyncio.create_task(in_thread(self._name, work))
        task.add_done_callback(_ignore)
        self._running = task
        await asyncio.wait({task}, timeout=deadline)
        if not task.done():
            raise UserError(f"{self._name}: not done in {deadline:g} s")
        return task.result()

    async def close(self) -> None:
        """Lets go of what hangs."""
        if self._running is not None:
            await _let_go(self._running)


class Shared(Generic[T]):
    """One read that several sources wait for; while it hangs no second one is begun."""

    def __init__(self, read: Callable[[], Coroutine[Any, Any, T]]) -> None:
        self._read = read
        self._task: asyncio.Task[T] | None = None
        self._fresh = False

    def renew(self) -> None:
        """A new sample begins: the next to ask begins a new read, unless the last one hangs."""
        self._fresh = False

    async def get(self) -> T:
        """What this sample's read gives; raises what it raises."""
        if self._task is None or (not self._fresh and self._task.done()):
            self._task = asyncio.create_task(self._read())
            self._task.add_done_callback(_ignore)
        self._fresh = True
        return await asyncio.shield(self._task)

    async def close(self) -> None:
        """Lets go of a read that hangs."""
        if self._task is not None:
            await _let_go(self._task)


def _note_end(ended: dict[str, float], name: str, _task: object) -> None:
    ended.setdefault(name, time.perf_counter())


async def _let_go(*tasks: asyncio.Task[Any]) -> None:
    """What is nearly done may end; the rest is left."""
    if running := {task for task in tasks if not task.done()}:
        await asyncio.wait(running, timeout=END_SECONDS)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def _answer(task: asyncio.Task[Found], seconds: float) -> Answer:
    error = asyncio.CancelledError() if task.cancelled() else task.exception()
    if error is not None:
        return Answer(None, seconds, f"{type(error).__name__}: {error}"[:WHY_CHARACTERS])
    return Answer(task.result(), seconds)


def _ignore(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()
