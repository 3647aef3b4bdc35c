"""Gitea answers; while it does not, nothing is admitted that would only come back, so that no sprint loses a try to an outage."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from sqlalchemy.engine import Connection

from bot.fleet.probes import WATCHDOG, Probe, Reach, ago, failing, fine, notable
from bot.gitea.errors import ForgeError, is_transient
from bot.snapshot import Finding
from bot.store import cursors, intents, probes

TARGET = "server"
ANSWER_SECONDS = 15.0
AGAIN_SECONDS = 5.0
# Nobody who looks any more must not hold the fleet.
HOLD_MS = 120_000


async def look(reach: Reach) -> Sequence[Finding]:
    """Asks for the version, which needs no right; a hold is renewed while nobody answers, and lifted when somebody does."""
    began = asyncio.get_running_loop().time()
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            version = await reach.forge.version()
    except (TimeoutError, ForgeError) as error:
        why = str(error) if isinstance(error, ForgeError) else f"no answer within {ANSWER_SECONDS:.0f} s"
        if isinstance(error, ForgeError) and not is_transient(error):
            await _lift(reach)
            return [notable(TARGET, f"it answers, but not as it should: {why}")]
        held = await _renew(reach)
        found = failing(TARGET, f"it does not answer: {why}" + ("; nothing is admitted meanwhile" if held else ""), held=held)
        return [replace(found, mendable=not held)]
    await _lift(reach)
    seconds = asyncio.get_running_loop().time() - began
    return [fine(TARGET, f"{version} answers", seconds=round(seconds, 3))]


async def mend(reach: Reach, _finding: Finding) -> str:
    """Holds admission back."""
    now = reach.now_ms()
    await reach.store.write(lambda conn: cursors.put(conn, cursors.FORGE_HOLD, {"since_ms": now, "until_ms": now + HOLD_MS}))
    return "nothing is admitted until it answers; what waits keeps its place and its tries"


async def _renew(reach: Reach) -> bool:
    """Whether admission is held; then it is for a while longer."""

    def write(conn: Connection) -> bool:
        held = cursors.get(conn, cursors.FORGE_HOLD)
        if held is None or held["until_ms"] < reach.now_ms():
            return False
        cursors.put(conn, cursors.FORGE_HOLD, {**held, "until_ms": reach.now_ms() + HOLD_MS})
        return True

    return await reach.store.write(write)


async def _lift(reach: Reach) -> None:
    if await reach.store.read(lambda conn: cursors.get(conn, cursors.FORGE_HOLD)) is None:
        return
    now = reach.now_ms()

    def write(conn: Connection) -> None:
        held = cursors.get(conn, cursors.FORGE_HOLD)
        if held is None:
            return
        cursors.delete(conn, cursors.FORGE_HOLD)
        reason = f"Gitea answers again after {ago((now - held['since_ms']) / 1000)}: sprints are admitted again"
        intents.decide(conn, repo_id=0, issue=0, kind=f"{probes.ACT}gitea", result=probes.LIFTED, reason=reason, now_ms=now, actor=WATCHDOG)

    await reach.store.write(write)
    reach.kick_queue()


plugin = Probe(
    "whether Gitea answers",
    look,
    period_seconds=30.0,
    again_seconds=AGAIN_SECONDS,
    mend=mend,
    does="holds admission until it answers",
    distance_seconds=60.0,
)
