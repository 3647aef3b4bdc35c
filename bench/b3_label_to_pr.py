"""B3: the label until the pull request can be seen, with a model of three steps that answers at once, on a small repository."""

from __future__ import annotations

import time

from bench.stand import Side, Stand, stand
from bench.table import Row, middle

REST_SECONDS = 0.5
SAMPLES = 5


async def _once(place: Stand, side: Side) -> float:
    alice = side.stage.people["alice"]
    issue = await alice.open_issue("slug keeps capitals", "script: three\n\nPlease mend `lib/slug.sh`.")
    before = await place.pulls(side)
    await place.rest(REST_SECONDS)
    began = time.monotonic()
    await alice.label(issue, "dispatch")

    async def there() -> bool:
        return bool(await place.pulls(side) - before)

    seen = await place.until(side, there)
    [number] = await place.pulls(side) - before

    async def said() -> bool:
        return any(f"#{number}" in body for body in await place.comments(side, issue))

    await place.until(side, said)
    await place.rest(REST_SECONDS)
    return seen - began


async def measure(*, runs: int, live: bool = False) -> list[Row]:
    """SAMPLES issues a run to either side, in turn, after one each to warm up."""
    taken: dict[str, list[float]] = {"ours": [], "floor": []}
    async with stand(live=live) as place:
        ours, floor = await place.side("ours"), await place.side("floor")
        await place.serve(ours)
        await place.floor(floor, "floor_bot.py")
        for number in range(1 + SAMPLES * runs):
            for side in (ours, floor) if number % 2 == 0 else (floor, ours):
                seconds = await _once(place, side)
                if number:
                    taken[side.name].append(seconds)
        kind = place.kind
    return [
        Row(
            "B3",
            f"label -> pull request, {kind}",
            "ms",
            1000 * middle(taken["ours"]),
            1000 * middle(taken["floor"]),
            str(len(taken["ours"])),
            "bare script: clone, edit, test, commit, push, PR, 2 comments",
            most_ratio=1.2 if live else 2.0,
        )
    ]
