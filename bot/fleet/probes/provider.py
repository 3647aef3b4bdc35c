"""The chain can answer: a small canary goes to every provider that nothing holds back; one known to be down is asked only as an action."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from bot.fleet.probes import MendError, Probe, Reach, ago, failing, fine, notable
from bot.providers.entries import Entry
from bot.providers.health import EntryState
from bot.snapshot import Finding, ProbeVerdict


async def look(reach: Reach) -> Sequence[Finding]:
    """Every entry at once; while one of them is well, what is wrong with another is only a warning."""
    entries = list(reach.entries())
    known = await reach.chain.availability()
    if not entries:
        return [failing("chain", "no provider can be used")]
    asked = [_look(reach, entry, state, until_ms, reason) for entry, (_, _, state, until_ms, reason) in zip(entries, known, strict=True)]
    return soften(await asyncio.gather(*asked))


def soften(found: Sequence[Finding]) -> list[Finding]:
    """The chain can work with one healthy entry."""
    if all(finding.verdict is not ProbeVerdict.OK for finding in found):
        return list(found)
    return [replace(one, verdict=ProbeVerdict.WARN) if one.verdict is ProbeVerdict.FAILING else one for one in found]


async def _look(reach: Reach, entry: Entry, state: EntryState, until_ms: int, reason: str) -> Finding:
    match state:
        case EntryState.PAUSED:
            return replace(fine(entry.name, reason or "paused"), provider=entry.provider)
        case EntryState.DOWN:
            return replace(failing(entry.name, f"down: {reason}"), provider=entry.provider, mendable=True)
        case EntryState.COOLING:
            left = ago((until_ms - reach.now_ms()) / 1000)
            return replace(notable(entry.name, f"left alone for another {left}: {reason}"), provider=entry.provider)
        case EntryState.HALF_OPEN:
            return replace(notable(entry.name, f"tried again with the next call: {reason}"), provider=entry.provider, mendable=True)
        case _:
            canary = await reach.chain.ping(entry)
            made = fine(entry.name, f"answers, {canary.seconds:.1f} s") if canary.ok else failing(entry.name, canary.text)
            return replace(made, provider=entry.provider, evidence={"seconds": round(canary.seconds, 2)})


async def mend(reach: Reach, finding: Finding) -> str:
    """A canary that comes back lifts whatever held the entry."""
    entry = next((entry for entry in reach.entries() if entry.name == finding.target), None)
    if entry is None:
        raise MendError("it is not in the chain any more")
    canary = await reach.chain.ping(entry)
    if not canary.ok:
        raise MendError(canary.text)
    reach.kick_queue()
    return f"it answers again, {canary.seconds:.1f} s"


plugin = Probe("whether the models answer", look, period_seconds=900.0, mend=mend, does="asks one that is down again", limit_seconds=60.0)
