"""B2: a comment with a command until its 👀 can be seen at the forge."""

from __future__ import annotations

import asyncio
import time

from bench.stand import Side, Stand, stand
from bench.table import Row, middle, quantile

PER_ISSUE = 10
PAUSE_SECONDS = 0.25
LIVE_COMMENTS = 20


async def _once(place: Stand, side: Side, issue: int, number: int) -> float:
    if place.forge is not None:
        await place.forge.drain()
    began = time.monotonic()
    if place.forge is not None:
        # Straight into the forge: what its own API takes to store the comment is not ours.
        entry = await place.forge.comment(side.stage.repo, issue, side.stage.people["alice"].login, f"/dispatch status\n\n{number}")
        comment = entry.id
    else:
        comment = await side.stage.people["alice"].comment(issue, f"/dispatch status\n\n{number}")
    seen = await place.until(side, lambda: place.eyes(side, issue, comment))
    await place.rest(PAUSE_SECONDS)
    return seen - began


async def measure(*, runs: int, comments: int = 40, live: bool = False) -> list[Row]:
    """`comments` comments a run to either side, in turn; on a real forge fewer and slower."""
    taken: dict[str, list[float]] = {"ours": [], "floor": []}
    async with stand(live=live) as place:
        ours, floor = await place.side("ours"), await place.side("floor")
        await place.serve(ours)
        await place.floor(floor, "floor_bot.py")
        issues: dict[str, int] = {}
        for number in range(-2, (min(comments, LIVE_COMMENTS) if live else comments) * runs):
            for side in (ours, floor):
                if number % PER_ISSUE == 0 or side.name not in issues:
                    issues[side.name] = await side.stage.people["alice"].open_issue("how far is it")
                    await asyncio.sleep(PAUSE_SECONDS)
                seconds = await _once(place, side, issues[side.name], number)
                if number >= 0:
                    taken[side.name].append(seconds)
        kind = place.kind
    rows = []
    for name, share, most in (("p50", 0.5, 100.0), ("p99", 0.99, 500.0)):
        values = {side: 1000 * (middle(found) if share == 0.5 else quantile(found, share)) for side, found in taken.items()}
        rows.append(
            Row(
                "B2",
                f"comment -> 👀, {kind}, {name}",
                "ms",
                values["ours"],
                values["floor"],
                str(len(taken["ours"])),
                "aiohttp + HMAC + the reaction",
                most_ratio=1.3 if live and share == 0.5 else None,
                most_ours=None if live else most,
            )
        )
    return rows
