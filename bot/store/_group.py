"""One commit for all writes that wait: on SQLite every commit is a flush of the disk, and what comes in a busy moment shares one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import Connection

T = TypeVar("T")

TOGETHER = 32


class GroupWriter:
    """The one writer thread of a SQLite file. Each write is a transaction to its caller: whole or not at all, and durable when its result is there."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._thread = ThreadPoolExecutor(1, "store-write")
        self._waiting: deque[tuple[Callable[[Connection], Any], Future[Any]]] = deque()

    def submit(self, fn: Callable[[Connection], T]) -> Future[T]:
        """Queues a write; its future may be cancelled until it begins."""
        future: Future[T] = Future()
        self._waiting.append((fn, future))
        self._thread.submit(self._round)
        return future

    def close(self) -> None:
        """Waits for everything queued."""
        self._thread.shutdown(wait=True)

    def _round(self) -> None:
        batch: list[tuple[Callable[[Connection], Any], Future[Any]]] = []
        while self._waiting and len(batch) < TOGETHER:
            fn, future = self._waiting.popleft()
            if future.set_running_or_notify_cancel():
                batch.append((fn, future))
        if not batch:
            return
        try:
            with self._engine.begin() as conn:
                results = [(fn(conn), None) for fn, _ in batch] if len(batch) == 1 else [_apart(conn, fn) for fn, _ in batch]
        except BaseException as error:
            for _, future in batch:
                future.set_exception(error)
            return
        for (_, future), (value, failure) in zip(batch, results, strict=True):
            if failure is None:
                future.set_result(value)
            else:
                future.set_exception(failure)


def _apart(conn: Connection, fn: Callable[[Connection], Any]) -> tuple[Any, Exception | None]:
    """A write that fails takes back what it did and leaves its neighbours alone; a database that fails fails them all."""
    part = conn.begin_nested()
    try:
        value = fn(conn)
    except sa.exc.OperationalError:
        raise
    except Exception as error:
        part.rollback()
        return None, error
    part.commit()
    return value, None
