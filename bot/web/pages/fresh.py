"""What many ask for at once is made once: a value per key, no older than a given time, one maker at a time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

MOST = 1_000


class Fresh(Generic[K, V]):
    """`get(key)` is what `make(key)` gave within the last `seconds`; an error is told to all who waited for it and kept no longer than a value."""

    def __init__(self, make: Callable[[K], Awaitable[V]], *, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._make = make
        self._seconds = seconds
        self._clock = clock
        self._known: dict[K, tuple[float, asyncio.Task[V]]] = {}

    async def get(self, key: K) -> V:
        """The value; raises what `make` raises."""
        now = self._clock()
        begun, task = self._known.get(key, (0.0, None))
        if task is None or (task.done() and (now - begun >= self._seconds or task.cancelled())):
            task = asyncio.ensure_future(self._call(key))
            if len(self._known) >= MOST:
                self._known = {one: entry for one, entry in self._known.items() if now - entry[0] < self._seconds}
            self._known[key] = (now, task)
        # Whoever stops waiting must not stop the work of the others.
        return await asyncio.shield(task)

    async def _call(self, key: K) -> V:
        return await self._make(key)
