"""Opens and closes a listener without losing a connection between the event loop and aiohttp."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from aiohttp import web


def _sockets(site: web.BaseSite) -> Sequence[Any]:
    return getattr(site._server, "sockets", None) or ()  # noqa: SLF001 - aiohttp tells them nowhere else


async def close(runner: web.AppRunner) -> None:
    """Stops listening and ends every connection.

    What the event loop has accepted in this very turn is taken in first: before Python 3.12.1 a server that closes
    meanwhile (`_attach` asserts) drops such a socket without closing it.
    """
    loop = asyncio.get_running_loop()
    for site in runner.sites:
        for sock in _sockets(site):
            loop.remove_reader(sock.fileno())
    for _ in range(2):
        await asyncio.sleep(0)
    await runner.cleanup()


async def listen(runner: web.AppRunner, host: str, port: int) -> tuple[web.TCPSite, int]:
    """Starts to listen; returns the site and the port the system gave for 0."""
    site = web.TCPSite(runner, host, port)
    await site.start()
    bound = next((sock.getsockname()[1] for sock in _sockets(site)), port)
    return site, int(bound)
