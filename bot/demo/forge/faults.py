"""What can be made to go wrong between the bot and the forge, and the log of all requests that tests assert on."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from multidict import CIMultiDict

from bot.demo.forge.api import JSON_TYPE, LOGIN, PREFIX, ROUTE

Match = Callable[[web.Request], bool] | str | re.Pattern[str]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
API_ONLY: Final = re.compile(f" {PREFIX}/")
_HTML: Final = "<html><head><title>{0}</title></head><body><h1>{0} Bad day</h1></body></html>\n"


@dataclass(slots=True)
class Seen:
    """One request as it arrived. `status` is 0 until it is answered, and for ever when the connection was reset."""

    method: str
    path: str
    query: str = ""
    route: str = ""
    status: int = 0
    json: Any = None
    login: str = ""
    fault: bool = False
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        return f"{self.method} {self.path} -> {self.status}"


@dataclass(slots=True)
class Fault:
    """A failure for the next `left` matching requests. `after_effect` lets the act happen and spoils only the answer."""

    left: int
    status: int = 502
    match: Match = API_ONLY
    after_effect: bool = False
    html: bool = False
    reset: bool = False
    truncate: bool = False
    delay: float = 0.0
    headers: Mapping[str, str] = field(default_factory=dict)

    def applies(self, request: web.Request) -> bool:
        if self.left <= 0:
            return False
        if callable(self.match):
            return self.match(request)
        return re.search(self.match, f"{request.method} {request.path}") is not None


class Faults:
    """The pending faults, oldest first, and the request log."""

    def __init__(self) -> None:
        self.pending: list[Fault] = []
        self.requests: list[Seen] = []

    def _take(self, request: web.Request) -> Fault | None:
        for fault in self.pending:
            if fault.applies(request):
                fault.left -= 1
                return fault
        return None

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        headers = dict(request.headers)
        if "Authorization" in headers:
            headers["Authorization"] = headers["Authorization"].partition(" ")[0]  # the scheme, never the secret
        seen = Seen(request.method, request.path, request.query_string, headers=headers)
        self.requests.append(seen)
        if request.path.startswith(PREFIX) and request.body_exists:
            try:
                seen.json = json.loads(await request.read() or b"null")
            except ValueError:
                seen.json = None
        fault = self._take(request)
        seen.fault = fault is not None
        try:
            reply = await self._spoil(request, handler, fault) if fault else await handler(request)
        except web.HTTPException as error:
            seen.status = error.status
            raise
        finally:
            seen.login, seen.route = request.get(LOGIN, ""), request.get(ROUTE, "")
        seen.status = 0 if fault and fault.reset else reply.status
        return reply

    async def _spoil(self, request: web.Request, handler: Handler, fault: Fault) -> web.StreamResponse:
        real = await _unseen(request, handler) if fault.after_effect or fault.truncate else None
        if fault.delay:
            await asyncio.sleep(fault.delay)
        if fault.truncate and isinstance(real, web.Response):
            return await _half(request, real)
        if fault.reset:
            if request.transport is not None:
                request.transport.abort()
            return web.Response(status=499)
        if fault.delay and fault.status == 200:  # noqa: PLR2004
            return real if real is not None else await handler(request)
        if fault.html:
            return web.Response(status=fault.status, text=_HTML.format(fault.status), content_type="text/html", headers=fault.headers)
        body = json.dumps({"message": "", "url": ""}).encode()
        return web.Response(status=fault.status, body=body, headers={"Content-Type": JSON_TYPE, **fault.headers})


class _Sink(AbstractStreamWriter):
    """Swallows what a handler streams."""

    async def write(self, chunk: bytes | bytearray | memoryview) -> None:
        """Drops it."""

    async def write_eof(self, chunk: bytes = b"") -> None:
        """Drops it."""

    async def drain(self) -> None:
        """Nothing waits."""

    def enable_compression(self, encoding: str = "deflate", strategy: int | None = None) -> None:
        """Nothing is sent."""

    def enable_chunking(self) -> None:
        """Nothing is sent."""

    async def write_headers(self, status_line: str, headers: CIMultiDict[str]) -> None:
        """Drops them."""


async def _unseen(request: web.Request, handler: Handler) -> web.StreamResponse:
    """The act with its answer kept back, also where the handler streams it, as git's does."""
    writer = request._payload_writer  # noqa: SLF001 - the one place through which a streamed answer goes
    request._payload_writer = _Sink()  # noqa: SLF001
    try:
        return await handler(request)
    finally:
        request._payload_writer = writer  # noqa: SLF001


async def _half(request: web.Request, real: web.Response) -> web.StreamResponse:
    """The true headers, half the body, and the end of the connection."""
    body = real.body if isinstance(real.body, bytes) else b""
    reply = web.StreamResponse(status=real.status, headers={"Content-Type": real.headers.get("Content-Type", JSON_TYPE)})
    reply.content_length = max(len(body), 2)
    reply.force_close()
    await reply.prepare(request)
    await reply.write(body[: len(body) // 2] or b"{")
    if request.transport is not None:
        request.transport.close()
    return reply
