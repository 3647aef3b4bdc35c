"""Every worker that did not leave politely shows that it lives; whoever is lost has its work taken over by the leader."""

from __future__ import annotations

from collections.abc import Sequence

from bot.fleet.health import Thresholds
from bot.fleet.probes import Probe, Reach, ago, failing, fine, notable
from bot.providers.health import available
from bot.snapshot import Finding, WorkerBeat, WorkerState
from bot.store import fleet


async def look(reach: Reach) -> Sequence[Finding]:
    """The lease of every slot."""
    timeout_ms = int(reach.settings.timing.lease_seconds * 1000)
    found = await reach.store.read(lambda conn: fleet.snapshot(conn, worker_timeout_ms=timeout_ms, available=available))
    lost = Thresholds.of(reach.settings).worker_lost
    return [judge(worker, found.now_ms, lost) for worker in found.workers] or [failing("fleet", "no worker is there")]


def judge(worker: WorkerBeat, now_ms: int, lost_seconds: float) -> Finding:
    """One slot; `lost_seconds` is the silence after which people are told (seconds)."""
    silent = (now_ms - worker.beat_ms) / 1000
    text, evidence = f"{worker.state.value}, last sign of life {ago(silent)} ago", {"beat_ms": worker.beat_ms}
    if worker.state is not WorkerState.LOST:
        return fine(worker.name, text, **evidence)
    return failing(worker.name, text, **evidence) if silent > lost_seconds else notable(worker.name, text, **evidence)


plugin = Probe("heartbeats of the workers", look, period_seconds=30.0)
