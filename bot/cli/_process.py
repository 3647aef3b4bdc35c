"""A service as a process: private files, no core dump, polite signals, and the exit code of what became of it."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import resource
import signal
import threading
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any

import click
import structlog

from bot.config import Loaded
from bot.failpoints import Failpoints
from bot.logs import configure
from bot.rooms import EX_TEMPFAIL, Rooms, run_until
from bot.service import Service
from bot.worker import Worker

log = structlog.get_logger()

PR_SET_DUMPABLE = 4
STOP_SECONDS = 15.0
OPEN_FILES = 65_536
FAILPOINT_VARIABLE = "TIMMY_DISPATCH_FAILPOINT"


class Signals:
    """How often this process was told to end: once is a wish, twice (or a terminal that hung up) is now."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.now = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._ask)

    def hang_up(self) -> None:
        """Also ends when the terminal goes, unless it was started to outlive it (`nohup`)."""
        if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
            return
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._end)

    def _ask(self) -> None:
        if self.asked.is_set():
            self.now.set()
        self.asked.set()

    def _end(self) -> None:
        self.asked.set()
        self.now.set()


async def run_service(loaded: Loaded, *, level: str = "INFO", json: bool = False) -> int:
    """Starts the service, runs it until SIGTERM or SIGINT; returns the exit code."""
    harden()
    service = Service(loaded.settings, loaded.secrets, environ=os.environ, home=Path.home(), failpoint=_failpoints(loaded))
    configure(service.redactor, level=level, json=json)
    signals = Signals()
    signals.hang_up()
    return await _run(service, signals, signals.asked.wait)


async def run_worker(
    loaded: Loaded, *, level: str = "INFO", json: bool = False, file: Path | None = None, metrics: str = "", drain_seconds: float = 0.0
) -> int:
    """Starts a worker; the first SIGTERM or SIGINT drains it (0 seconds: as long as it takes), the second or SIGHUP ends it now."""
    harden()
    worker = Worker(loaded.settings, loaded.secrets, environ=os.environ, home=Path.home(), failpoint=_failpoints(loaded), metrics=metrics)
    configure(worker.redactor, level=level, json=json, file=file)
    signals = Signals()
    signals.hang_up()

    async def drained() -> None:
        await signals.asked.wait()
        ends = {asyncio.create_task(worker.drain()), asyncio.create_task(signals.now.wait())}
        try:
            await asyncio.wait(ends, timeout=drain_seconds or None, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for end in ends:
                end.cancel()
            await asyncio.gather(*ends, return_exceptions=True)

    return await _run(worker, signals, drained)


async def _run(rooms: Rooms, signals: Signals, ended: Callable[[], Coroutine[Any, Any, object]]) -> int:
    start = asyncio.create_task(rooms.start())
    stopped = asyncio.create_task(signals.asked.wait())
    await asyncio.wait({start, stopped}, return_when=asyncio.FIRST_COMPLETED)
    if not start.done():
        start.cancel()
        await asyncio.gather(start, return_exceptions=True)
        return 0
    stopped.cancel()
    await start
    settle_memory()
    if rooms.sandbox_error:
        click.echo(f"No sandbox: every sprint is refused until this is mended.\n{rooms.sandbox_error}", err=True)
    latest = partial(_end_at_the_latest, rooms.settings.timing.shutdown_seconds + STOP_SECONDS)
    rooms.fatal.add_done_callback(lambda _: latest())

    async def told() -> None:
        await ended()
        latest()

    return await run_until(rooms, told())


def _end_at_the_latest(seconds: float) -> None:
    """A thread that waits for a database that is away is waited for by the interpreter without end; whatever is not recorded by then is taken over."""

    def end() -> None:
        log.warning("service.stop_forced", after_seconds=seconds)
        os._exit(EX_TEMPFAIL)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


def _failpoints(loaded: Loaded) -> Failpoints:
    return Failpoints(os.environ.get(FAILPOINT_VARIABLE, ""), loaded.settings.state_dir / "failpoint")


def settle_memory() -> None:
    """What is there after the start stays to the end: the garbage collector need not walk over it again, which would hold up the loop."""
    gc.collect()
    gc.freeze()


def harden() -> None:
    """New files are private, no other process of this user may read our memory or environment (security.md, "Service secrets"), and files are enough."""
    os.umask(0o077)
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        # The usual 1,024 are soon taken by a crowd of connections and a few dozen sprints; what is started from here sets its own bounds.
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
