"""The one database: SQLite file in WAL or PostgreSQL; every write goes through one transaction on a thread of its own."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import Connection, make_url

from bot.models import DispatchError
from bot.store import (
    alerts,
    breakers,
    cursors,
    deliveries,
    follow_ups,
    intents,
    lanes,
    outages,
    outbox,
    pauses,
    plans,
    probes,
    providers,
    pulls,
    samples,
    skips,
    spells,
    sprints,
    steps,
    workers,
)
from bot.store._base import metadata
from bot.store._group import GroupWriter
from bot.store._sqlite import assert_usable, install_listener

T = TypeVar("T")

SCHEMA_VERSION = 1
WRITERS = 8
READERS = 4
# Connections beyond the pools' threads: a lease is not beaten late because everybody else writes.
OWN = 1
CONNECT_SECONDS = 10
# A server that vanished without a word (a cut wire, a dead host) is noticed in half a minute, not after the system's two hours.
ALIVE = {"keepalives_idle": "10", "keepalives_interval": "5", "keepalives_count": "4", "tcp_user_timeout": "30000"}
LOCKS = "timmy-dispatch"

# Imported for their tables: whoever creates the schema must know them all.
CONCERNS = (
    alerts,
    breakers,
    cursors,
    deliveries,
    follow_ups,
    intents,
    lanes,
    outages,
    outbox,
    pauses,
    plans,
    probes,
    providers,
    pulls,
    samples,
    skips,
    spells,
    sprints,
    steps,
    workers,
)


class StoreError(DispatchError):
    """The database cannot be used; says why and what to do."""


def is_away(error: BaseException) -> bool:
    """Whether the database could not be reached or used just now: what was asked of it may be asked again, and nothing is wrong with the asking."""
    if isinstance(error, sa.exc.TimeoutError | sa.exc.InterfaceError):
        return True
    if not isinstance(error, sa.exc.OperationalError):
        return isinstance(error, sa.exc.DBAPIError) and error.connection_invalidated
    if isinstance(error.orig, sqlite3.Error):
        return getattr(error.orig, "sqlite_errorname", "").startswith(("SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_FULL", "SQLITE_IOERR"))
    return True


def watched(url: str) -> str:
    """The address of a PostgreSQL server with its connections watched over; what the operator wrote into it holds."""
    parts = make_url(url)
    if parts.get_backend_name() == "sqlite":
        return url
    return parts.update_query_dict({name: value for name, value in ALIVE.items() if name not in parts.query}).render_as_string(
        hide_password=False
    )


def explain(error: BaseException) -> str:
    """In a sentence what is wrong with the database and what to do, or "" where the error is none of a database."""
    if not isinstance(error, sa.exc.DBAPIError):
        return ""
    said = (str(error.orig).strip().splitlines() or [type(error).__name__])[0]
    if not isinstance(error.orig, sqlite3.Error):
        return f"the database cannot be used: {said}. Remedy: see whether the server runs, and what `database` in the configuration names"
    name = getattr(error.orig, "sqlite_errorname", "")
    if name.startswith(("SQLITE_NOTADB", "SQLITE_CORRUPT")):
        return (
            f"the database file is damaged ({said}). Remedy: stop every timmy-dispatch of this state folder, then put a backup in its place, or move "
            "timmy.db, timmy.db-wal and timmy.db-shm away: the next start makes an empty one, and open pull requests are found again in the forge"
        )
    if name.startswith(("SQLITE_FULL", "SQLITE_IOERR", "SQLITE_READONLY", "SQLITE_CANTOPEN")):
        return f"the database file cannot be used ({said}). Remedy: see whether the disk of the state folder is full or read-only, and whose the file is"
    return f"the database cannot be used ({said})"


def may_come_back(error: BaseException) -> bool:
    """Whether a server that could not be reached, or said that it is only starting or ending, is worth waiting for; SQLite's file is here or it is not."""
    if not isinstance(error, sa.exc.OperationalError) or isinstance(error.orig, sqlite3.Error):
        return False
    said = str(error.orig)
    return "FATAL" not in said or any(word in said for word in ("starting up", "shutting down", "recovery", "too many"))


class Store:
    """Connections to the database and the two ways to use it.

    SQLite has one writer thread (fewer contenders, shorter tails: engine.md, "Our tables beside DBOS's"), `BEGIN IMMEDIATE`, and one commit for all
    writes that wait; PostgreSQL a pool.
    `write` and `read` run `fn(connection)` in a transaction on another thread and return its value; an exception rolls back.
    """

    def __init__(self, url: str) -> None:
        self.url = make_url(watched(url))
        self.sqlite = self.url.get_backend_name() == "sqlite"
        install_listener()
        if self.sqlite:
            self._write_engine = _sqlite_engine(self.url, immediate=True, pool=1 + OWN)
            self._read_engine = _sqlite_engine(self.url, immediate=False, pool=READERS + OWN)
        else:
            psycopg = self.url.set(drivername="postgresql+psycopg")
            options: dict[str, Any] = {"max_overflow": 0, "pool_pre_ping": True, "connect_args": {"connect_timeout": CONNECT_SECONDS}}
            self._write_engine = sa.create_engine(psycopg, pool_size=WRITERS + OWN, json_serializer=json.dumps, **options)
            self._read_engine = sa.create_engine(psycopg, pool_size=READERS + OWN, **options)
        self._group = GroupWriter(self._write_engine) if self.sqlite else None
        self._writer = ThreadPoolExecutor(WRITERS, "store-write")
        self._reader = ThreadPoolExecutor(READERS, "store-read")

    @property
    def path(self) -> Path | None:
        """The SQLite file, or None on PostgreSQL."""
        return Path(self.url.database) if self.sqlite and self.url.database else None

    def open(self) -> None:
        """Creates what is missing; refuses a database of a later version or a SQLite that cannot serve the engine."""
        if self.path is not None:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Before SQLite makes it: its write-ahead log takes over the mode.
            self.path.touch(mode=0o600)
            self.path.chmod(0o600)
            assert_usable(self.path)
        with self._write_engine.begin() as conn:
            if not self.sqlite:
                # Two processes that start at once would both create the tables.
                conn.execute(sa.text("SELECT pg_advisory_xact_lock(hashtext(:name))"), {"name": f"{LOCKS}.schema"})
            metadata.create_all(conn)
            version = cursors.get(conn, "schema_version")
            if version is not None and version > SCHEMA_VERSION:
                raise StoreError(
                    f"the database has schema {version}, this program knows {SCHEMA_VERSION}. Remedy: start the newer timmy-dispatch"
                )
            cursors.put(conn, "schema_version", SCHEMA_VERSION)

    async def write(self, fn: Callable[[Connection], T]) -> T:
        """Runs `fn` in one write transaction on the writer's thread; it is durable when this returns."""
        if self._group is not None:
            return await asyncio.wrap_future(self._group.submit(fn))
        return await asyncio.get_running_loop().run_in_executor(self._writer, self.write_sync, fn)

    async def read(self, fn: Callable[[Connection], T]) -> T:
        """Runs `fn` in one read transaction; never waits for a writer on SQLite (WAL)."""
        return await asyncio.get_running_loop().run_in_executor(self._reader, self.read_sync, fn)

    def write_sync(self, fn: Callable[[Connection], T]) -> T:
        """`write` on the calling thread (command line, lease thread)."""
        with self._write_engine.begin() as conn:
            return fn(conn)

    def read_sync(self, fn: Callable[[Connection], T]) -> T:
        """`read` on the calling thread."""
        with self._read_engine.connect() as conn:
            return fn(conn)

    def lead(self, conn: Connection, work: str) -> bool:
        """Whether this transaction may do `work`, which one process of the fleet does at a time.

        On SQLite the file lock of the leader decided that before; on PostgreSQL every state folder has a leader, and this lock decides among them.
        """
        if self.sqlite:
            return True
        held = conn.execute(sa.text("SELECT pg_try_advisory_xact_lock(hashtext(:name))"), {"name": f"{LOCKS}.{work}"})
        return bool(held.scalar_one())

    def close(self) -> None:
        """Waits for what is under way and gives the connections back."""
        if self._group is not None:
            self._group.close()
        self._writer.shutdown(wait=True)
        self._reader.shutdown(wait=True)
        self._write_engine.dispose()
        self._read_engine.dispose()


def _sqlite_engine(url: sa.URL, *, immediate: bool, pool: int) -> sa.Engine:
    engine = sa.create_engine(url, pool_size=pool, max_overflow=0, poolclass=sa.QueuePool, connect_args={"check_same_thread": False})

    def connected(conn: sqlite3.Connection, _record: Any) -> None:
        conn.isolation_level = None
        conn.execute("PRAGMA busy_timeout=30000")
        conn.execute("PRAGMA foreign_keys=ON")
        if not immediate:
            conn.execute("PRAGMA query_only=ON")

    def begin(conn: Connection) -> None:
        conn.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")

    sa.event.listen(engine, "connect", connected)
    sa.event.listen(engine, "begin", begin)
    return engine
