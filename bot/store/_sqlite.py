"""Makes an old SQLite fit for the engine: `unixepoch('subsec')` before 3.42, WAL and full synchronisation on every connection (engine.md)."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from bot.models import DispatchError

SUBSEC_SINCE = (3, 42)


class UnusableSQLite(DispatchError):
    """This SQLite cannot serve; names the remedy."""


def install_listener() -> None:
    """Registers the class-level listener once; every engine made later (ours, the engine's own) gets it."""
    if not sa.event.contains(sa.Engine, "connect", _connected):
        sa.event.listen(sa.Engine, "connect", _connected)


def assert_usable(path: Path) -> None:
    """Proves on a throw-away connection that the moments the engine asks for exist and that WAL works on this file system."""
    engine = sa.create_engine(f"sqlite:///{path}")
    try:
        with engine.connect() as conn:
            if conn.exec_driver_sql("select unixepoch('subsec')").scalar() is None:
                raise UnusableSQLite(
                    f"SQLite {sqlite3.sqlite_version} lacks unixepoch('subsec'). Remedy: SQLite 3.42 or newer, or PostgreSQL"
                )
            mode = conn.exec_driver_sql("PRAGMA journal_mode").scalar()
            if mode != "wal":
                raise UnusableSQLite(
                    f"{path} cannot use write-ahead logging (journal mode {mode}); it may lie on a network file system. "
                    "Remedy: put the state folder on a local disk, or use PostgreSQL"
                )
    finally:
        engine.dispose()


def _connected(conn: Any, _record: Any) -> None:
    if not isinstance(conn, sqlite3.Connection):
        return
    if sqlite3.sqlite_version_info < SUBSEC_SINCE:
        conn.create_function("unixepoch", -1, _unixepoch)
    conn.execute("PRAGMA journal_mode=WAL")
    conn.execute("PRAGMA synchronous=FULL")


def _unixepoch(*args: str) -> float | int:
    now = time.time()
    return now if "subsec" in args else int(now)
