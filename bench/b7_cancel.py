"""B7: `/dispatch cancel` while a tool sleeps and while a model hangs, until nothing of it runs and its comment says so."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from bench.stand import Side, Stand, stand
from bench.table import Row

SLEEP = "86317"
CASES = {"a tool sleeps": f"sleeper({SLEEP})", "a model hangs": "hang"}


def _sleeping() -> bool:
    """Whether the command of the sprint lives anywhere on this machine."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if words[0] == b"sleep" and SLEEP.encode() in words[1:2]:
            return True
    return False


async def _once(place: Stand, side: Side, script: str) -> float:
    alice = side.stage.people["alice"]
    issue = await alice.open_issue("slug keeps capitals", f"script: {script}\n\nPlease mend `lib/slug.sh`.")
    asked = len(place.model.requests)
    await alice.label(issue, "dispatch")

    async def runs() -> bool:
        return _sleeping() if script.startswith("sleeper") else len(place.model.requests) > asked

    await place.until(side, runs)
    await asyncio.sleep(1.0)
    began = time.monotonic()
    await alice.comment(issue, "/dispatch cancel")

    async def ended() -> bool:
        said = any("key=sprint:" in body and "Cancelled" in body for body in await place.comments(side, issue))
        return said and not _sleeping()

    return await place.until(side, ended) - began


async def measure(*, runs: int) -> list[Row]:
    """The slowest of `runs` of each case."""
    rows = []
    async with stand() as place:
        side = await place.side("ours")
        await place.serve(side)
        for name, script in CASES.items():
            taken = [await _once(place, side, script) for _ in range(runs)]
            rows.append(Row("B7", f"cancel while {name}, slowest", "ms", 1000 * max(taken), None, str(runs), "a bound", most_ours=2000.0))
    return rows
