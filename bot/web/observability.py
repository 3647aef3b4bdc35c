"""The listener for machines that watch: metrics, liveness and readiness, apart from the webhook and never on its event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

import structlog
from aiohttp import web

from bot.metrics import Rendered
from bot.snapshot import Health

WAITING_AT_MOST = 8
ANSWER_SECONDS = 9.0

T = TypeVar("T")

log = structlog.get_logger(__name__)


class Busy(Exception):
    """More requests wait for the store than are worth queueing."""


class _Threads:
    """Two threads for what blocks; a request beyond WAITING_AT_MOST is refused, and one that hangs is not waited for beyond ANSWER_SECONDS."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="observability")
        self._waiting = 0

    async def run(self, work: Callable[[], T]) -> T:
        """The result of `work`, called in a thread; raises Busy, TimeoutError, and what `work` raises."""
        if self._waiting >= WAITING_AT_MOST:
            raise Busy
        self._waiting += 1
        loop = asyncio.get_running_loop()
        future = self._pool.submit(work)
        future.add_done_callback(lambda done: self._ended(loop, done))
        async with asyncio.timeout(ANSWER_SECONDS):
            return await asyncio.wrap_future(future)

    async def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _ended(self, loop: asyncio.AbstractEventLoop, _done: Future[T]) -> None:
        # The thread may outlive both the request and, at the end of the service, the loop.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(self._release)

    def _release(self) -> None:
        self._waiting -= 1


def observability_app(
    *,
    render: Callable[[str, bool], Rendered],
    health: Callable[[], Health],
    unready: Callable[[], str] = lambda: "",
    alerts: Callable[[web.Request], Awaitable[web.Response]] | None = None,
) -> web.Application:
    """The application of the metrics listener.

    `render(accept, compress)` and `health()` may block; they run in a thread. `unready()` is asked on the loop and says why deliveries
    cannot be taken now (starting, draining), or "". `/readyz` answers 503 for that and where the store cannot be read; a stalled fleet
    still takes deliveries, so its verdict alone never makes it 503. `alerts` answers POST /alerts; without it there is no such route.
    """
    threads = _Threads()

    async def metrics(request: web.Request) -> web.Response:
        accept = request.headers.get("Accept", "")
        compress = "gzip" in request.headers.get("Accept-Encoding", "").lower()
        try:
            rendered = await threads.run(lambda: render(accept, compress))
        except Exception as error:
            log.warning("metrics_unavailable", error=repr(error))
            return _unavailable(error)
        headers = {"Content-Type": rendered.content_type, "Cache-Control": "no-store"}
        if rendered.encoding:
            headers["Content-Encoding"] = rendered.encoding
        return web.Response(body=rendered.body, headers=headers)

    async def healthz(_request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(_request: web.Request) -> web.Response:
        why = unready()
        try:
            judged = await threads.run(health)
        except Exception as error:
            log.warning("health_unavailable", error=repr(error))
            return _ready(ready=False, why=why or _cause(error), health=None)
        return _ready(ready=not why, why=why, health=judged)

    async def close(_app: web.Application) -> None:
        await threads.close()

    app = web.Application(client_max_size=4096)
    app.router.add_get("/metrics", metrics)
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    if alerts is not None:
        app.router.add_post("/alerts", alerts)
    app.on_cleanup.append(close)
    return app


def _ready(*, ready: bool, why: str, health: Health | None) -> web.Response:
    reasons = [{"code": reason.code, "detail": reason.detail} for reason in health.reasons] if health else []
    if why:
        reasons.insert(0, {"code": "not_ready", "detail": why})
    body = {"ready": ready, "verdict": health.verdict if health else None, "reasons": reasons}
    return web.json_response(body, status=200 if ready else 503, headers={"Cache-Control": "no-store"})


def _unavailable(error: Exception) -> web.Response:
    return web.Response(status=503, text=_cause(error) + "\n", headers={"Retry-After": "5"})


def _cause(error: Exception) -> str:
    # The text of a database's error may hold its address and user: only the kind of fault is told to a stranger.
    match error:
        case Busy():
            return "too many requests wait for the store"
        case TimeoutError():
            return f"the store did not answer in {ANSWER_SECONDS:g} s"
        case _:
            return f"the store cannot be read ({type(error).__name__}); the log of the service tells more"
