"""Every worker that did not leave politely shows that it lives; what a lost one held is taken over, and one that is gone for good is waited for no more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sqlalchemy.engine import Connection

from bot.fleet.health import Thresholds
from bot.fleet.probes import MendError, Probe, Reach, ago, failing, fine, notable
from bot.providers.health import available
from bot.snapshot import Finding, WorkerBeat, WorkerState
from bot.store import fleet, sprints, workers
from bot.store._base import database_now_ms

# Until then people are told that a worker is lost; after it the alarm says nothing new, and a machine that was given up would keep the fleet degraded.
GONE_SECONDS = 3600.0


async def look(reach: Reach) -> Sequence[Finding]:
    """The lease of every slot."""
    timeout_ms = int(reach.settings.timing.lease_seconds * 1000)
    found = await reach.store.read(lambda conn: fleet.snapshot(conn, worker_timeout_ms=timeout_ms, available=available))
    lost = Thresholds.of(reach.settings).worker_lost
    return [judge(worker, found.now_ms, lost) for worker in found.workers] or [failing("fleet", "no worker is there")]


def judge(worker: WorkerBeat, now_ms: int, lost_seconds: float) -> Finding:
    """One slot; `lost_seconds` is the silence after which people are told (seconds). The leader takes work over by itself: where some is left that long, or
    the worker is gone for good, an action helps.
    """
    silent = (now_ms - worker.beat_ms) / 1000
    text, evidence = f"{worker.state.value}, last sign of life {ago(silent)} ago", {"beat_ms": worker.beat_ms}
    if worker.state is not WorkerState.LOST:
        return fine(worker.name, text, **evidence)
    if worker.running:
        text += f", {worker.running} of its sprints not taken over yet"
    found = failing(worker.name, text, **evidence) if silent > lost_seconds else notable(worker.name, text, **evidence)
    return replace(found, mendable=silent > lost_seconds and (worker.running > 0 or silent > GONE_SECONDS))


async def mend(reach: Reach, finding: Finding) -> str:
    """Whoever is lost has no lease any more: the leader takes over what it had at its next beat; a process that lives after all ends and begins anew."""
    timeout_ms, beat_ms = int(reach.settings.timing.lease_seconds * 1000), finding.evidence["beat_ms"]

    def write(conn: Connection) -> int:
        before = database_now_ms(conn) - timeout_ms
        rows = [row for row in workers.every(conn) if row.slot >= 0 and f"{row.node_id}-{row.slot}" == finding.target]
        latest = max(rows, key=lambda row: row.started_ms, default=None)
        if latest is None or latest.beat_ms != beat_ms or (latest.reaped_ms is None and latest.beat_ms > before):
            raise MendError("it lives again, or is gone already")
        held = 0
        for row in rows:
            held += sprints.claimed_by(conn, row.executor_id)
            if workers.dismiss(conn, row.executor_id):
                sprints.count_crash(conn, row.executor_id)
        return held

    held = await reach.store.write(write)
    reach.kick_queue()
    return "nobody waits for it any more" + (f"; what it held is taken over ({held})" if held else "")


plugin = Probe(
    "heartbeats of the workers",
    look,
    period_seconds=30.0,
    mend=mend,
    does="takes from a lost worker what it still holds, and stops waiting for one that is gone for an hour",
)
