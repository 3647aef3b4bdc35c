"""B14: how long the event loop stands still while 10,000 series are scraped, beside a handler that renders on the loop."""

from __future__ import annotations

import asyncio
import gzip
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web
from prometheus_client import CollectorRegistry

from bench.table import Row, middle, quantile
from bot.cli._process import settle_memory
from bot.metrics import Metrics, Vocabulary
from bot.snapshot import Health, HealthVerdict, Reason
from bot.web.observability import observability_app

SERIES = 10_000
SCRAPES = 20
WARM = 2
TICK_SECONDS = 0.001
CLIENT = """
import sys, time, urllib.request
head = {"Accept": "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5", "Accept-Encoding": "gzip"}
for _ in range(int(sys.argv[2])):
    urllib.request.urlopen(urllib.request.Request(sys.argv[1], headers=head), timeout=30).read()
    time.sleep(0.1)
"""


def _full() -> Metrics:
    """A registry of at least SERIES series, all of them ours."""
    models = 0
    while True:
        models += 20
        names = tuple(("p", f"model-{number}") for number in range(models))
        metrics = Metrics(CollectorRegistry(), Vocabulary(version="1", agents=("loop", "acp", "hermes"), chain=names))
        if sum(len(family.samples) for family in metrics.registry.collect()) >= SERIES:
            return metrics


def _ours(metrics: Metrics) -> web.Application:
    well = Health(HealthVerdict.IDLE, (Reason("empty", "nothing"),))
    return observability_app(render=lambda accept, compress: metrics.render(accept, compress=compress), health=lambda: well)


def _floor(metrics: Metrics) -> web.Application:
    """As the library's own handler does it: everything on the loop."""

    async def render(request: web.Request) -> web.Response:
        rendered = metrics.render(request.headers.get("Accept", ""), compress=False)
        body = gzip.compress(rendered.body)
        return web.Response(body=body, headers={"Content-Type": rendered.content_type, "Content-Encoding": "gzip"})

    app = web.Application()
    app.router.add_get("/metrics", render)
    return app


@asynccontextmanager
async def _listening(app: web.Application) -> AsyncIterator[str]:
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/metrics"
    finally:
        await runner.cleanup()


async def _scrape(url: str, count: int) -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", CLIENT, url, str(count))
    if await process.wait():
        raise RuntimeError("the scrapes failed")


async def _stalls(app: web.Application) -> list[float]:
    """How late (milliseconds) each tick of a timer came while another process scraped."""
    late: list[float] = []

    async def tick() -> None:
        while True:
            due = time.perf_counter() + TICK_SECONDS
            await asyncio.sleep(TICK_SECONDS)
            late.append((time.perf_counter() - due) * 1000)

    async with _listening(app) as url:
        await _scrape(url, WARM)
        timer = asyncio.create_task(tick())
        try:
            await _scrape(url, SCRAPES)
        finally:
            timer.cancel()
    return late


async def measure(*, runs: int) -> list[Row]:
    """The longest stall of each run, and the median of those."""
    metrics = _full()
    settle_memory()
    taken: dict[str, list[list[float]]] = {"ours": [], "floor": []}
    for number in range(runs):
        sides = [("ours", _ours), ("floor", _floor)]
        for name, make in sides if number % 2 == 0 else sides[::-1]:
            taken[name].append(await _stalls(make(metrics)))
    samples = f"{runs} x {SCRAPES} scrapes"
    rows = []
    for name, share, most in (("longest stall", 1.0, 20.0), ("p99 stall", 0.99, None)):
        values = {side: middle([quantile(one, share) for one in runs_of]) for side, runs_of in taken.items()}
        rows.append(
            Row(
                "B14",
                f"/metrics with 10,000 series, {name}",
                "ms",
                values["ours"],
                values["floor"],
                samples,
                "rendering on the loop",
                most_ours=most,
            )
        )
    return rows
