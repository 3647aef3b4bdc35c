"""The state folder is ours alone and its database opens."""

from __future__ import annotations

import os
import stat
from collections.abc import AsyncIterator
from pathlib import Path

from bot.config import Settings
from bot.doctor import Check, Patient, Probe, fail, ok, warn

SEARCH_BITS = 0o011


async def run(patient: Patient) -> AsyncIterator[Probe]:
    """Folder, then database."""
    folder = modes(patient.settings.state_dir)
    yield folder
    yield await database(patient.settings)


def modes(folder: Path) -> Probe:
    """Owned by this user, and closed to others; a root service lets the sandbox's user pass through, but not list (0711)."""
    if not folder.exists():
        return warn("state folder", f"{folder} does not exist yet", "run `timmy-dispatch init`; `serve` makes it too")
    info = folder.stat()
    mode = stat.S_IMODE(info.st_mode)
    allowed = 0o700 | (SEARCH_BITS if os.geteuid() == 0 else 0)
    if not stat.S_ISDIR(info.st_mode):
        return fail("state folder", f"{folder} is not a folder", "name another `state_dir`")
    if info.st_uid != os.geteuid():
        return fail("state folder", f"{folder} belongs to user {info.st_uid}", f"run as that user, or chown -R {os.geteuid()} {folder}")
    if mode & ~allowed:
        return fail("state folder", f"{folder} is open to others (mode {mode:04o})", f"chmod {allowed:o} {folder}")
    return ok("state folder", str(folder))


async def database(settings: Settings) -> Probe:
    """Opens it for reading; a SQLite file that is not there yet is made by `serve`."""
    from bot.store import Store, cursors

    store = Store(settings.database_url())
    try:
        if store.path is not None and not store.path.exists():
            return ok("database", f"{store.path} will be made by `serve`")
        version = await store.read(lambda conn: cursors.get(conn, "schema_version"))
    except Exception as error:
        lines = str(error).splitlines() or [type(error).__name__]
        return fail("database", f"cannot be read: {lines[0]}", "check `database`, the rights on the file, and whether the server runs")
    finally:
        store.close()
    return ok("database", f"opens, schema {version}")


plugin = Check("state", run, rank=65)
