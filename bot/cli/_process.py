"""A service as a process: private files, no core dump, polite signals, and the exit code of what became of it."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import signal
from pathlib import Path

import click

from bot.config import Loaded
from bot.failpoints import Failpoints
from bot.logs import configure
from bot.service import Service, run_until

PR_SET_DUMPABLE = 4
FAILPOINT_VARIABLE = "TIMMY_DISPATCH_FAILPOINT"


async def run_service(loaded: Loaded, *, level: str = "INFO", json: bool = False) -> int:
    """Starts the service, runs it until SIGTERM or SIGINT; returns the exit code."""
    harden()
    service = Service(
        loaded.settings,
        loaded.secrets,
        environ=os.environ,
        home=Path.home(),
        failpoint=Failpoints(os.environ.get(FAILPOINT_VARIABLE, ""), loaded.settings.state_dir / "failpoint"),
    )
    configure(service.redactor, level=level, json=json)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    start = asyncio.create_task(service.start())
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait({start, stopped}, return_when=asyncio.FIRST_COMPLETED)
    if not start.done():
        start.cancel()
        await asyncio.gather(start, return_exceptions=True)
        return 0
    await start
    settle_memory()
    if service.sandbox_error:
        click.echo(f"No sandbox: every sprint is refused until this is mended.\n{service.sandbox_error}", err=True)
    return await run_until(service, stop.wait())


def settle_memory() -> None:
    """What is there after the start stays to the end: the garbage collector need not walk over it again, which would hold up the loop."""
    gc.collect()
    gc.freeze()


def harden() -> None:
    """New files are private, and no other process of this user may read our memory or environment (security.md, "Service secrets")."""
    os.umask(0o077)
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
