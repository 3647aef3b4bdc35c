"""B5: one wish said in every way at once, every delivery five times under new ids and in any order; what counts is how many sprints, pulls and comments."""

from __future__ import annotations

import asyncio
import sqlite3
import sys
import time
from contextlib import closing

from bench.stand import Side, Stand, stand
from bench.table import Row, middle

COPIES = 5
QUIET_SECONDS = 2.0


async def _terminal(side: Side, *words: str) -> None:
    argv = [sys.executable, "-P", "-m", "bot", "-c", str(side.folder / "dispatch.yml"), *words]
    null = asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(*argv, stdout=null, stderr=null)
    await process.wait()


def _count(side: Side, query: str, *values: object) -> int:
    with closing(sqlite3.connect(f"file:{side.folder / 'state' / 'timmy.db'}?mode=ro", uri=True)) as conn:
        return int(conn.execute(query, values).fetchone()[0])


async def _once(place: Stand, side: Side) -> tuple[float, tuple[int, int, int]]:
    assert place.forge is not None
    alice, bob = side.stage.people["alice"], side.stage.people["bob"]
    issue = await alice.open_issue("slug keeps capitals", "script: three\n\nPlease mend `lib/slug.sh`.")
    pulls = await place.pulls(side)
    began = time.monotonic()
    await asyncio.gather(
        alice.label(issue, "dispatch"),
        bob.comment(issue, "/dispatch"),
        alice.comment(issue, "/dispatch run\n\n/dispatch run"),
        _terminal(side, "run", f"{side.stage.repo}#{issue}"),
        _terminal(side, "launch"),
    )

    async def settled() -> bool:
        query = "SELECT count(*) FROM sprints WHERE issue = ? AND state = 'settled' AND projected_rev >= rev"
        return await asyncio.to_thread(_count, side, query, issue) > 0

    ended = await place.until(side, settled)
    for delivery in list(place.forge.deliveries):
        if delivery.event_type in ("issue_label", "issue_comment"):
            await place.forge.replay(delivery)
    await place.forge.drain()

    async def caught_up() -> bool:
        return await asyncio.to_thread(_count, side, "SELECT count(*) FROM deliveries WHERE done_ms IS NULL") == 0

    await place.until(side, caught_up)
    await asyncio.sleep(QUIET_SECONDS)
    sprints = await asyncio.to_thread(_count, side, "SELECT count(*) FROM sprints WHERE issue = ?", issue)
    opened = len(await place.pulls(side) - pulls)
    status = sum("key=sprint:" in body for body in await place.comments(side, issue))
    return ended - began, (sprints, opened, status)


async def measure(*, runs: int) -> list[Row]:
    """One storm a run; the most that any of them left behind."""
    seconds: list[float] = []
    left: list[tuple[int, int, int]] = []
    async with stand() as place:
        assert place.forge is not None
        side = await place.side("ours")
        await place.serve(side)
        place.forge.hooks.copies, place.forge.hooks.order = COPIES, "random"
        for _ in range(runs):
            took, counts = await _once(place, side)
            seconds.append(took)
            left.append(counts)
    if any(0 in counts for counts in left):
        raise RuntimeError(f"a storm left nothing behind (sprints, pull requests, status comments): {left}")
    samples, said = str(runs), f"label, 4 commands, cron, terminal; each x{COPIES}, then replayed"
    names = ("sprints", "pull requests", "status comments")
    rows = [
        Row("B5", f"duplicate storm: {name}", "", max(counts[n] for counts in left), None, samples, said, most_ours=1.0)
        for n, name in enumerate(names)
    ]
    return [*rows, Row("B5", "duplicate storm: until its end", "ms", 1000 * middle(seconds), None, samples, said)]
