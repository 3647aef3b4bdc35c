"""Opens and closes a listener without losing a connection between the event loop and aiohttp, and keeps a crowd of connections from taking every descriptor."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from typing import Any

import structlog
from aiohttp import web

from bot.models import DispatchError

log = structlog.get_logger()

MOST_CONNECTIONS = 512
BACKLOG = 128
TOLD_SECONDS = 60.0


def _sockets(site: web.BaseSite) -> Sequence[Any]:
    return getattr(site._server, "sockets", None) or ()  # noqa: SLF001 - aiohttp tells them nowhere else


async def close(runner: web.AppRunner) -> None:
    """Stops listening and ends every connection.

    What the event loop has accepted in this very turn is taken in first: before Python 3.12.1 a server that closes
    meanwhile (`_attach` asserts) drops such a socket without closing it.
    """
    await _drain([sock for site in runner.sites for sock in _sockets(site)])
    await runner.cleanup()


async def _drain(sockets: Sequence[Any]) -> None:
    loop = asyncio.get_running_loop()
    for sock in sockets:
        loop.remove_reader(sock.fileno())
    for _ in range(2):
        await asyncio.sleep(0)


class CannotListen(DispatchError):
    """The address is taken, or none of this machine."""


class Door:
    """The listener of one application, with about `most` connections at a time.

    aiohttp keeps a connection that sends nothing, or half a header, for its whole keep-alive time, and whoever opens a thousand of them takes the
    descriptors that git, the database and the sandbox need. Where there are too many, the one that waits longest since its last answer goes, so
    that whoever comes with a whole request is served meanwhile.
    """

    def __init__(self, app: web.Application, *, most: int = MOST_CONNECTIONS, **options: Any) -> None:
        """`options` are those of `web.AppRunner`."""
        self._most = most
        self._answered: dict[web.RequestHandler, float] = {}
        self._told = 0.0
        self._dropped = 0
        self._server: asyncio.Server | None = None
        app.on_response_prepare.append(self._note)
        self._runner = web.AppRunner(app, **options)

    async def open(self, host: str, port: int) -> int:
        """Listens; returns the port, the one the system gave for 0."""
        await self._runner.setup()
        try:
            self._server = await asyncio.get_running_loop().create_server(self._take_in, host, port, backlog=BACKLOG)
        except OSError as error:
            why = os.strerror(error.errno) if error.errno else str(error)
            raise CannotListen(
                f"cannot listen on {host}:{port}: {why}. Remedy: see whether another timmy-dispatch runs here, or configure another address"
            ) from error
        return int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """As `close` does."""
        server, self._server = self._server, None
        if server is not None:
            await _drain(server.sockets)
            server.close()
        await self._runner.cleanup()

    async def _note(self, request: web.Request, _response: web.StreamResponse) -> None:
        self._answered[request.protocol] = time.monotonic()

    def _take_in(self) -> web.RequestHandler:
        server = self._runner.server
        if server is None:
            raise RuntimeError("the listener is not set up")
        there = server.connections
        if len(there) >= self._most:
            self._make_room([one for one in there if one.transport is not None and not one.transport.is_closing()])
        return server()

    def _make_room(self, there: Sequence[web.RequestHandler]) -> None:
        # Those that were never answered come first; in each half whoever came or was answered first.
        self._answered = {one: self._answered[one] for one in there if one in self._answered}
        going = sorted(there, key=lambda one: self._answered.get(one, 0.0))[: max(0, len(there) - self._most + 1)]
        for one in going:
            one.force_close()
        self._dropped += len(going)
        if going and time.monotonic() - self._told >= TOLD_SECONDS:
            self._told = time.monotonic()
            log.warning("listener.crowded", connections=len(there), dropped=self._dropped, remedy="put a reverse proxy before this address")
