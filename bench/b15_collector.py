"""B15: what one sample of the collector costs, and how long it holds up the event loop, beside the same questions asked one after the other on the loop."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from bench.table import Row, middle
from bot.cli._process import settle_memory
from bot.fleet import _facts, _proc
from bot.fleet.collector import Collector
from bot.settings import Settings
from bot.store import Store, providers, samples, sprints, steps, workers

SAMPLES = 10
WARM = 2
TICK_SECONDS = 0.001
SETTLED, QUEUED, RUNNING, STEPS, WORKERS = 2000, 200, 16, 20, 8
NODE = "bench"
LEASE_MS = 30_000
FORGE_SECONDS = 0.005
REST_SECONDS = 0.8


class _Forge:
    """Answers as a near forge does, without a processor's time of its own."""

    async def repo_by_id(self, repo_id: int) -> dict[str, Any]:
        await asyncio.sleep(FORGE_SECONDS)
        return {"full_name": f"acme/r{repo_id}", "open_issues_count": 12, "open_pr_counter": 3}


@dataclass(frozen=True, slots=True)
class _Side:
    """One contender: `once` takes one sample and returns the bytes that it wrote."""

    name: str
    once: Callable[[], Awaitable[int]]


def _filled(settings: Settings) -> Store:
    """A fleet with a past: sprints that ended, wait and run, their steps, workers, schedules, providers."""
    store = Store(settings.database_url())
    store.open()
    now = time.time_ns() // 1_000_000

    def write(conn: sa.Connection) -> None:
        columns = sprints.table.c
        common = {
            "queued_ms": now,
            "updated_ms": now,
            "progress_ms": now,
            "priority": 5,
            "source": "label",
            "requester_id": 1,
            "requester": "a",
        }
        for column in columns:
            if not column.nullable and column.default is None and column.name not in common:
                common[column.name] = [] if isinstance(column.type, sa.JSON) else 0 if isinstance(column.type, sa.Integer) else ""
        made = []
        for n in range(SETTLED + QUEUED + RUNNING):
            state = "settled" if n < SETTLED else "queued" if n < SETTLED + QUEUED else "working"
            ends = {"outcome": "pull_request", "settled_ms": now} if state == "settled" else {"outcome": None, "settled_ms": None}
            made.append(
                common | ends | {"id": f"s{n}", "repo_id": n % 4, "repo": f"acme/r{n % 4}", "issue": n, "state": state, "trigger": str(n)}
            )
        conn.execute(sprints.table.insert(), made)
        for n in range(RUNNING):
            for step in range(STEPS):
                steps.reserve(conn, f"s{SETTLED + QUEUED + n}", 1, step, usd=0.1, tokens=10, now_ms=now)
        for slot in range(WORKERS):
            workers.enter(conn, executor_id=f"e{slot}", node_id=NODE, slot=slot, host="h", pid=os.getpid(), app_version="1", capacity=2)
        samples.serve(conn, {"launcher": "0 */10 * * * *", "retention": "0 17 3 * * *", "report": "0 0 6 * * *", "exports": 60_000}, now)
        for n in range(3):
            providers.save(conn, f"p{n}/m", {})

    store.write_sync(write)
    return store


def _settings(folder: Path) -> Settings:
    return Settings.model_validate(
        {
            "forge": {"url": "http://127.0.0.1:9"},
            "repositories": [{"name": "acme/r0"}],
            "providers": [{"base_url": "http://127.0.0.1:9", "model": "m"}],
            "state_dir": str(folder),
        }
    )


def _floor(settings: Settings, store: Store) -> Callable[[], Awaitable[int]]:
    """Everything on the loop: one read, /proc, the disk, a line that is on the disk when it returns."""
    path = settings.state_dir / "bare.jsonl"

    async def once() -> int:
        now = time.time_ns() // 1_000_000
        facts = store.read_sync(lambda conn: _facts.read(conn, node_id=NODE, lease_ms=LEASE_MS))
        found = [_proc.process(worker.pid, now_ms=now) for worker in facts.workers.values()]
        told = {
            "workers": [str(process) for process in found],
            "sprints": [dict(row) for row in facts.sprints],
            "running": facts.fleet.running,
            "disk": list(shutil.disk_usage(settings.state_dir)),
        }
        line = json.dumps(told).encode() + b"\n"
        with path.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        return len(line)

    return once


async def _stalls(once: Callable[[], Awaitable[int]]) -> float:
    """How late (milliseconds) the latest tick of a timer came while samples were taken."""
    late: list[float] = []

    async def tick() -> None:
        while True:
            due = time.perf_counter() + TICK_SECONDS
            await asyncio.sleep(TICK_SECONDS)
            late.append((time.perf_counter() - due) * 1000)

    timer = asyncio.create_task(tick())
    try:
        for _ in range(SAMPLES):
            await once()
            await asyncio.sleep(0.02)
    finally:
        timer.cancel()
        with suppress(asyncio.CancelledError):
            await timer
    return max(late)


async def _costs(once: Callable[[], Awaitable[int]]) -> tuple[float, float, float, float]:
    """(wall, processor, processor of the loop's thread: milliseconds; bytes) of one sample, without a timer beside it."""
    wall, processor, loop, written = time.perf_counter(), time.process_time(), time.thread_time(), 0
    for _ in range(SAMPLES):
        written += await once()
    ends = time.perf_counter() - wall, time.process_time() - processor, time.thread_time() - loop
    return ends[0] * 1000 / SAMPLES, ends[1] * 1000 / SAMPLES, ends[2] * 1000 / SAMPLES, written / SAMPLES


async def measure(*, runs: int) -> list[Row]:
    """The median over the runs of each figure."""
    folder = Path(tempfile.mkdtemp(prefix="timmy-bench-", dir="/var/tmp"))
    settings = _settings(folder)
    store = _filled(settings)
    collector = Collector(
        store,
        _Forge(),
        settings=settings,
        node_id=NODE,
        repositories=lambda: {n: f"acme/r{n}" for n in range(4)},
        environ={"PATH": os.environ["PATH"]},
        is_keeper=lambda: True,
        missed=lambda _source: None,
        scrub=lambda text: text,
    )

    async def ours() -> int:
        sample = await collector.collect()
        if sample.missed:
            raise RuntimeError(f"the collector missed {', '.join(sample.missed)}")
        return sample.written

    async def nothing() -> int:
        await asyncio.sleep(REST_SECONDS)
        return 0

    sides = [_Side("ours", ours), _Side("floor", _floor(settings, store))]
    taken: dict[str, list[tuple[float, ...]]] = {"ours": [], "floor": []}
    idle: list[float] = []
    try:
        for side in sides:
            for _ in range(WARM):
                await side.once()
        settle_memory()
        for number in range(runs):
            for side in sides if number % 2 == 0 else sides[::-1]:
                taken[side.name].append((await _stalls(side.once), *await _costs(side.once)))
            idle.append(await _stalls(nothing))
    finally:
        await collector.close()
        store.close()
        shutil.rmtree(folder, ignore_errors=True)
    values = {name: [middle([one[place] for one in found]) for place in range(5)] for name, found in taken.items()}
    samples_of, on_loop = f"{runs} x {SAMPLES} samples", "the same asked on the loop"
    stall, wall, processor, loop, written = zip(values["ours"], values["floor"], strict=True)
    return [
        Row("B15", "collector, longest stall", "ms", *stall, samples_of, on_loop, most_ratio=1.0),
        Row("B15", "collector, longest stall", "ms", stall[0], middle(idle), samples_of, "a loop with nothing to do"),
        Row("B15", "collector, a sample, wall (the forge is asked over 0.75 s)", "ms", *wall, samples_of, on_loop),
        Row("B15", "collector, a sample, processor", "ms", *processor, samples_of, on_loop),
        Row("B15", "collector, a sample, processor of the loop's thread", "ms", *loop, samples_of, on_loop, most_ratio=1.0),
        Row("B15", "collector, a sample, written", "B", *written, samples_of, on_loop),
    ]
