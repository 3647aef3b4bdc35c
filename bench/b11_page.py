"""B11: from a fleet that stalls to the page, through the real Prometheus and Alertmanager with the files we ship, and silence while idle, full or paused."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from aiohttp import web

from bench.stand import Process, Side, Stand, free_port, stand
from bench.table import Row, middle

ROOT = Path(__file__).parents[1]
SHIPPED_SECONDS = 600.0
FAST_SECONDS, FAST_HOLD = 6.0, 0.05
HOLD_SECONDS = 60.0
ALLOWED_SECONDS = 90.0
SLOW = "script: slow(0.5)\n\nPlease mend `lib/slug.sh`."


@dataclass(slots=True)
class Watch:
    """A running pair and what it has sent."""

    prometheus: str
    pages: list[tuple[float, list[str], str]] = field(default_factory=list)

    def firing(self) -> list[tuple[float, list[str]]]:
        """(Unix seconds, names) of every page."""
        return [(at, names) for at, names, status in self.pages if status == "firing"]

    async def value(self, expr: str) -> float | None:
        """The only value of an expression, None where there is none."""
        async with aiohttp.ClientSession() as session, session.get(f"{self.prometheus}/api/v1/query", params={"query": expr}) as reply:
            found = (await reply.json())["data"]["result"]
        return float(found[0]["value"][1]) if found else None

    async def until(self, expr: str, seconds: float) -> None:
        """Until an expression has a value."""
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(aiohttp.ClientError):
                if await self.value(expr) is not None:
                    return
            if time.monotonic() > deadline:
                raise RuntimeError(f"not within {seconds} s: {expr}")
            await asyncio.sleep(0.3)


def _needs(*names: str) -> str:
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        raise RuntimeError(f"{names[0]} is not installed (Debian: apt install prometheus prometheus-alertmanager)")
    return found


@contextlib.asynccontextmanager
async def _watched(side: Side, *, fast: bool) -> AsyncIterator[Watch]:
    """The pair as `timmy-dispatch monitor` configures it; `fast` shortens scrapes, thresholds, holds and waits."""
    prometheus, alertmanager = _needs("prometheus"), _needs("prometheus-alertmanager", "alertmanager")
    ports, folder = (free_port(), free_port()), side.folder / "monitor"
    watch = Watch(f"http://127.0.0.1:{ports[0]}")
    async with _pager(watch) as pager:
        argv = [
            sys.executable,
            "-P",
            "-m",
            "bot",
            "-c",
            str(side.folder / "dispatch.yml"),
            "monitor",
            "--write-only",
            "--data",
            str(folder),
        ]
        argv += ["--page", pager, "--prometheus-port", str(ports[0]), "--alertmanager-port", str(ports[1])]
        await asyncio.to_thread(subprocess.run, argv, check=True, capture_output=True)
        if fast:
            await asyncio.to_thread(_shorten, folder)
        config = yaml.safe_load((folder / "prometheus.yml").read_text())
        (folder / "prometheus.yml").write_text(yaml.safe_dump({**config, "rule_files": []}))
        pair = [
            Process(
                [
                    alertmanager,
                    f"--config.file={folder / 'alertmanager.yml'}",
                    f"--storage.path={folder / 'am'}",
                    f"--web.listen-address=127.0.0.1:{ports[1]}",
                    "--cluster.listen-address=",
                ],
                folder / "alertmanager.log",
            ),
            Process(
                [
                    prometheus,
                    f"--config.file={folder / 'prometheus.yml'}",
                    f"--storage.tsdb.path={folder / 'data'}",
                    f"--web.listen-address=127.0.0.1:{ports[0]}",
                    *(["--rules.alert.resend-delay=1s"] if fast else []),
                ],
                folder / "prometheus.log",
            ),
        ]
        try:
            await watch.until("count(up == 1) == 3", 60)
            # Targets are found some seconds after the start: rules from the start would page that the bot is down.
            (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
            pair[1].send(signal.SIGHUP)
            await watch.until("ALERTS", 60)
            yield watch
        finally:
            for each in pair:
                await each.stop()


@contextlib.asynccontextmanager
async def _pager(watch: Watch) -> AsyncIterator[str]:
    async def take(request: web.Request) -> web.Response:
        data = await request.json()
        watch.pages.append((time.time(), [alert["labels"]["alertname"] for alert in data["alerts"]], data["status"]))
        return web.Response()

    app = web.Application()
    app.router.add_post("/", take)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/"
    finally:
        await runner.cleanup()


def _shorten(folder: Path) -> None:
    argv = [sys.executable, "-W", "ignore", str(ROOT / "grafana/build.py"), "--out", str(folder / "grafana")]
    subprocess.run([*argv, "--stall-after", str(FAST_SECONDS), "--hold", str(FAST_HOLD)], check=True, capture_output=True)
    config: dict[str, Any] = yaml.safe_load((folder / "prometheus.yml").read_text())
    config["global"] |= {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(folder / "grafana/alerts/*.yml")]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    routing: dict[str, Any] = yaml.safe_load((folder / "alertmanager.yml").read_text())
    for route in (routing["route"], *routing["route"]["routes"]):
        route |= {"group_wait": "100ms", "group_interval": "500ms"}
    (folder / "alertmanager.yml").write_text(yaml.safe_dump(routing))


async def _silent(place: Stand, side: Side, watch: Watch, settle: float) -> None:
    """Idle, full, then paused with work waiting, each for longer than a stall takes to page."""
    alice = side.stage.people["alice"]
    await asyncio.sleep(settle)
    _expect_silence(watch, "idle")
    issues = [await alice.open_issue(f"slow {number}", SLOW) for number in range(8)]
    for issue in issues:
        await alice.label(issue, "dispatch")
    began = time.monotonic()
    while time.monotonic() - began < settle or len(await place.pulls(side)) < len(issues) // 2:
        if time.monotonic() - began > 5 * settle:
            raise RuntimeError("the full fleet did not get on")
        await asyncio.sleep(0.5)
    _expect_silence(watch, "full")
    await alice.comment(issues[0], "/dispatch pause fleet")
    await watch.until("max(dispatch_paused) == 1", 30)
    waiting = await alice.open_issue("waits", SLOW)
    await alice.label(waiting, "dispatch")
    await watch.until("sum(dispatch_sprints{state=~'waiting|queued'}) >= 1", 30)
    await asyncio.sleep(settle)
    _expect_silence(watch, "paused")
    await alice.comment(issues[0], "/dispatch resume fleet")
    await watch.until("max(dispatch_sprints{state=~'queued|working|waiting'}) == 0 and max(dispatch_paused) == 0", 120)


def _expect_silence(watch: Watch, what: str) -> None:
    if watch.firing():
        raise RuntimeError(f"paged while {what}: {watch.firing()}")


async def _run(*, fast: bool) -> float:
    """Seconds from the moment nothing moved and work waited to the page, beyond the threshold."""
    threshold = FAST_SECONDS if fast else SHIPPED_SECONDS
    async with stand() as place:
        side = await place.side("ours")
        await place.serve(
            side, timing={"stall_after_seconds": threshold}, operators=[side.stage.people["alice"].login], queue={"max_per_repository": 2}
        )
        async with _watched(side, fast=fast) as watch:
            if fast:
                await _silent(place, side, watch, threshold + HOLD_SECONDS * FAST_HOLD + 4)
            await place.model.stop()
            alice = side.stage.people["alice"]
            issue = await alice.open_issue("nobody is there", "script: fix")
            await alice.label(issue, "dispatch")
            await watch.until("max(dispatch_queue_oldest_enqueued_timestamp_seconds)", 60)
            deadline = time.monotonic() + threshold + 300
            while not any("DispatchFleetStalled" in names for _, names in watch.firing()):
                if time.monotonic() > deadline:
                    raise RuntimeError(f"no page; received {watch.pages}")
                await asyncio.sleep(0.1)
            at = next(at for at, names in watch.firing() if "DispatchFleetStalled" in names)
            moments = "dispatch_queue_oldest_enqueued_timestamp_seconds", "dispatch_fleet_last_progress_timestamp_seconds"
            since = max([await watch.value(f"max({name})") or 0.0 for name in moments])
            others = {name for _, names in watch.firing() for name in names} - {"DispatchFleetStalled"}
            if others:
                raise RuntimeError(f"paged besides: {others}")
    return at - since - threshold


async def measure(*, runs: int, fast: bool = True) -> list[Row]:
    """`fast` runs with compressed times and proves the silence too; else once with the files as they are shipped (11 minutes)."""
    taken = [await _run(fast=fast) for _ in range(runs if fast else 1)]
    # What a page may take beyond the threshold: its hold, and as much again of scrape, evaluation and waiting.
    allowed = HOLD_SECONDS * FAST_HOLD + 5.0 if fast else ALLOWED_SECONDS
    what = f"stalled -> page, beyond the threshold of {FAST_SECONDS if fast else SHIPPED_SECONDS:g} s" + (
        ", compressed" if fast else ", as shipped"
    )
    return [
        Row("B11", what, "s", middle(taken), None, str(len(taken)), "silent while idle, full, paused" if fast else "-", most_ours=allowed)
    ]
