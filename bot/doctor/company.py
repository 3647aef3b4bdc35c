"""A machine that only runs `worker` lives by another process: a `serve` on the same database, which hears of the forge."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

from sqlalchemy.engine import Connection

from bot.config import Settings
from bot.doctor import Check, Patient, Probe, fail, ok, warn
from bot.lease import LEADER, SERVES
from bot.store import Store, cursors, workers

NAME = "beside a serve"
APART = "start `serve` here first; where it runs on another machine, write the same `database: postgresql://...` on both"


async def run(patient: Patient) -> AsyncIterator[Probe]:
    """One finding."""
    yield await look(patient.settings)


async def look(settings: Settings) -> Probe:
    """Who lives on the database that this machine would share."""
    store = Store(settings.database_url())
    try:
        if store.path is not None and not store.path.exists():
            return fail(NAME, f"the database is a file of this machine, {store.path}, and nobody has made it", APART)
        timeout_ms = int(settings.timing.lease_seconds * 1000)
        count, served = await store.read(lambda conn: _who(conn, settings.state_dir if store.path else None, timeout_ms))
    except Exception:
        return warn(NAME, "cannot be told, because the database cannot be read", "see the check of the database")
    finally:
        store.close()
    if served:
        return ok(NAME, f"a `serve` lives on this database and hears of the forge; workers and it together: {count}")
    remedy = "start `timmy-dispatch serve` on one machine" if store.path is None else APART
    return warn(NAME, "no `serve` lives on this database: what is queued is run, and nothing new comes in", remedy)


def _who(conn: Connection, folder: Path | None, timeout_ms: int) -> tuple[int, bool]:
    """How many processes live, and whether one of them serves: on one machine its slot says so, over several the leader's row."""
    live = workers.live(conn, timeout_ms)
    if folder is None:
        named = cursors.get(conn, LEADER) or {}
        return len(live), bool(named.get("serves")) and any(one.executor_id == named.get("executor") for one in live)
    return len(live), any(_says_serve(folder / f"slot-{one.slot}.lock") for one in live)


def _says_serve(lock: Path) -> bool:
    try:
        return lock.read_bytes() == SERVES
    except OSError:
        return False


plugin = Check(NAME, run, rank=64, only="worker")
