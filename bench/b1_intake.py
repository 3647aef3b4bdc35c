"""B1: a signed delivery of 12 KB until its durable 2xx, at 50 a second, by a client that does not wait for answers before it sends on."""

from __future__ import annotations

import asyncio
import json
import time

import aiohttp

from bench.stand import Side, Stand, http, stand
from bench.table import Row, middle, quantile

BYTES = 12 * 1024
RATE = 50.0
WARM_SECONDS = 1.0


async def _template(place: Stand, side: Side) -> dict[str, object]:
    """A true comment event of this repository, padded to BYTES; it holds no command, so that taking it in is all there is to do."""
    assert place.forge is not None
    alice = side.stage.people["alice"]
    issue = await alice.open_issue("a long talk")
    await alice.comment(issue, "a word")
    await place.forge.drain()
    found = next(item for item in reversed(place.forge.deliveries) if item.event_type == "issue_comment")
    return dict(found.data)


def _body(template: dict[str, object], number: int) -> bytes:
    data = json.loads(json.dumps(template))
    data["comment"]["id"] = 1_000_000 + number
    text = f"word {number} "
    data["comment"]["body"] = text
    rest = BYTES - len(json.dumps(data).encode())
    data["comment"]["body"] = text + "x" * max(0, rest)
    return json.dumps(data).encode()


async def _post(session: aiohttp.ClientSession, side: Side, body: bytes, due: float) -> float:
    headers = side.signed("issue_comment", body)
    delay = due - time.monotonic()
    if delay > 0:
        await asyncio.sleep(delay)
    async with session.post(side.url, data=body, headers=headers) as reply:
        await reply.read()
        if reply.status != 202:
            raise RuntimeError(f"{side.name} answered {reply.status}")
    return time.monotonic() - due


async def _round(session: aiohttp.ClientSession, side: Side, template: dict[str, object], first: int, seconds: float) -> list[float]:
    """Seconds from the moment a delivery was due to its answer, of those after the first second."""
    bodies = [_body(template, first + number) for number in range(int(RATE * (seconds + WARM_SECONDS)))]
    began = time.monotonic() + 0.2
    taken = await asyncio.gather(*(_post(session, side, body, began + number / RATE) for number, body in enumerate(bodies)))
    return list(taken[int(RATE * WARM_SECONDS) :])


async def measure(*, runs: int, seconds: float = 20.0) -> list[Row]:
    """Rounds of both, in turn; the quantiles of each round, and the median of those."""
    async with stand() as place:
        ours, floor = await place.side("ours"), await place.side("floor")
        template = await _template(place, ours)
        await place.serve(ours)
        await place.floor(floor, "floor_intake.py")
        taken: dict[str, list[list[float]]] = {"ours": [], "floor": []}
        async with http() as session:
            for number in range(runs):
                for side in (ours, floor) if number % 2 == 0 else (floor, ours):
                    first = (number * 2 + (side is floor)) * 100_000
                    taken[side.name].append(await _round(session, side, template, first, seconds))
                    await asyncio.sleep(1.0)
    rows = []
    for name, share, most in (("p50", 0.5, None), ("p99", 0.99, 1.5)):
        values = {side: 1000 * middle([quantile(one, share) for one in rounds]) for side, rounds in taken.items()}
        rows.append(
            Row(
                "B1",
                f"delivery -> durable 2xx, 50/s, {name}",
                "ms",
                values["ours"],
                values["floor"],
                f"{runs} x {len(taken['ours'][0])}",
                "aiohttp + HMAC + one insert (WAL, FULL)",
                most_ratio=most,
                most_ours=100.0 if most else None,
            )
        )
    return rows
