"""The life of a process that runs sprints: a locked slot, a lease beaten from a thread of its own, who leads, the reaper, the fence."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import re
import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from sqlalchemy.engine import Connection

from bot.models import DispatchError
from bot.store import Store, cursors, sprints, workers

MAX_SLOTS = 64
HELD_POLL = 0.2
STOP_SECONDS = 3.0
SERVES = b"serve"
LEADER = "leader"
NODE = re.compile(rb"[A-Za-z0-9._-]{1,64}\n?")


class Fenced(DispatchError):
    """This process may not act on the sprint any more: its lease is gone or another process owns the row."""


class NoSlot(DispatchError):
    """Every worker slot of this state folder is taken."""


class Lease:
    """Slot lock, lease row and beat of one process start.

    One process keeps each state folder (`keeper`, by a lock in it), and one keeper leads the fleet (`leader`): on SQLite it is the same, on PostgreSQL the
    keepers of all hosts agree by a row, which names the leader as long as its lease is good. A process that hears of the forge (`serves`) goes before
    one that does not: what only the former does (reconciliation) would else be done by nobody.
    `held()` is the fence: true while the last successful beat is younger than timeout - 2 beats, by CLOCK_BOOTTIME (suspend counts).
    `on_reaped` is called from the beat thread when we were declared dead; `on_dead(ids)` in the leader with executors whose work must be taken over.
    """

    def __init__(
        self,
        store: Store,
        *,
        state_dir: Path,
        node_id: str,
        host: str,
        executor_id: str,
        app_version: str,
        capacity: int,
        beat: float,
        timeout: float,
        pending_owners: Callable[[Connection], list[str]],
        on_reaped: Callable[[], None],
        on_dead: Callable[[list[str]], None],
        serves: bool = True,
    ) -> None:
        self.executor_id = executor_id
        self.node_id = node_id
        self.timeout_ms = int(timeout * 1000)
        self.slot = -1
        self.leader = False
        self.keeper = False
        self._serves = serves
        self._store = store
        self._state_dir = state_dir
        self._host = host
        self._app_version = app_version
        self._capacity = capacity
        self._beat = beat
        self._timeout = timeout
        self._pending_owners = pending_owners
        self._on_reaped = on_reaped
        self._on_dead = on_dead
        self._last = 0.0
        self._good_since = 0.0
        self._slot_fd = -1
        self._leader_fd = -1
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self) -> list[str]:
        """Locks a slot and writes the first lease; returns the executors that this slot's lock proves dead."""
        for slot in range(MAX_SLOTS):
            fd = _try_lock(self._state_dir / f"slot-{slot}.lock")
            if fd is not None:
                self.slot, self._slot_fd = slot, fd
                break
        else:
            raise NoSlot(f"all {MAX_SLOTS} worker slots of {self._state_dir} are taken. Remedy: stop a worker")
        started = _boottime()

        def enter(conn: Connection) -> list[str]:
            workers.enter(
                conn,
                executor_id=self.executor_id,
                node_id=self.node_id,
                slot=self.slot,
                host=self._host,
                pid=os.getpid(),
                app_version=self._app_version,
                capacity=self._capacity,
            )
            dead = workers.holder_of_slot(conn, self.node_id, self.slot, self.executor_id)
            _reap(conn, dead)
            return dead

        dead = self._store.write_sync(enter)
        self._last = self._good_since = started
        self._try_lead()
        return dead

    def start(self) -> None:
        """Beats from now on, and lets the processes that hear of nothing step back."""
        os.ftruncate(self._slot_fd, 0)
        if self._serves:
            os.pwrite(self._slot_fd, SERVES, 0)
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)
        self._thread.start()

    def held(self) -> bool:
        """Whether an effect may start."""
        return _boottime() - self._last < self._timeout - 2 * self._beat

    async def wait_held(self) -> None:
        """Until an effect may start: an outage of the database is waited out; whoever was declared dead exits meanwhile."""
        while not self.held():
            await asyncio.sleep(HELD_POLL)

    def drain(self) -> None:
        """Takes no new sprint."""
        self._store.write_sync(lambda conn: workers.drain(conn, self.executor_id))

    def leave(self) -> None:
        """Ends the beat, deletes the lease, frees the slot."""
        self.stop()
        self._store.write_sync(self._gone)
        for fd in (self._slot_fd, self._leader_fd):
            if fd >= 0:
                os.close(fd)
        self._slot_fd = self._leader_fd = -1
        self.leader = self.keeper = False

    def _gone(self, conn: Connection) -> None:
        if (cursors.get(conn, LEADER) or {}).get("executor") == self.executor_id:
            cursors.delete(conn, LEADER)
        workers.leave(conn, self.executor_id)

    def stop(self) -> None:
        """Ends the beat thread."""
        self._stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=min(self._timeout, STOP_SECONDS))

    def _run(self) -> None:
        while not self._stop.wait(self._beat):
            started = _boottime()
            try:
                alive = self._store.write_sync(lambda conn: workers.beat(conn, self.executor_id))
            except Exception:  # noqa: S112 - the database is away: the fence closes by itself, the lease is written when it is back
                continue
            if not alive:
                self._on_reaped()
                return
            if started - self._last > self._timeout - 2 * self._beat:
                # The others may have been kept from beating as long as we were; they get one timeout before any of them counts as dead.
                self._good_since = started
            self._last = started
            try:
                self._lead()
            except Exception:  # noqa: S112 - repeated at the next beat; recovery is level-triggered
                continue

    def _try_lead(self) -> None:
        if not self._serves and self._served():
            if self._leader_fd >= 0:
                os.close(self._leader_fd)
                self._leader_fd = -1
        elif self._leader_fd < 0:
            fd = _try_lock(self._state_dir / "leader.lock")
            if fd is not None:
                self._leader_fd = fd
                os.ftruncate(fd, 0)
                os.pwrite(fd, self.executor_id.encode(), 0)
        self.keeper = self._leader_fd >= 0 or self._stands_in()
        self.leader = self.keeper and (self._store.sqlite or self._elected())

    def _served(self) -> bool:
        """Whether a process that hears of the forge lives in this state folder: it holds its slot, and its lease is good."""
        for slot in range(MAX_SLOTS):
            path = self._state_dir / f"slot-{slot}.lock"
            if slot == self.slot or not path.exists() or path.read_bytes() != SERVES:
                continue
            fd = _try_lock(path)
            if fd is not None:
                os.ftruncate(fd, 0)
                os.close(fd)
            elif any((one.node_id, one.slot) == (self.node_id, slot) for one in self._store.read_sync(self._live)):
                return True
        return False

    def _live(self, conn: Connection) -> list[workers.Worker]:
        return workers.live(conn, self.timeout_ms)

    def _elected(self) -> bool:
        """Whether the row that names the leader of all hosts names us; it may, while the one it names is dead or gives way."""
        told = self._store.read_sync(self._told)
        return self._store.write_sync(self._elect) if told is None else told

    def _told(self, conn: Connection) -> bool | None:
        """Us, another, or nobody who counts."""
        named = cursors.get(conn, LEADER) or {}
        if named.get("executor") == self.executor_id:
            return True
        lives = any(one.executor_id == named.get("executor") for one in self._live(conn))
        return False if lives and (named.get("serves") or not self._serves) else None

    def _elect(self, conn: Connection) -> bool:
        if not self._store.lead(conn, LEADER):
            return False
        told = self._told(conn)
        if told is None:
            cursors.put(conn, LEADER, {"executor": self.executor_id, "serves": self._serves})
        return told is not False

    def _stands_in(self) -> bool:
        """Whoever holds the leader's lock and is stopped lets nobody have it: while its lease is not good, those whose lease is act in its place."""
        if _boottime() - self._good_since < self._timeout:
            return False
        holder = (self._state_dir / "leader.lock").read_text(encoding="ascii")
        return all(worker.executor_id != holder for worker in self._store.read_sync(self._live))

    def _lead(self) -> None:
        self._try_lead()
        if not self.keeper:
            return
        dead = self._free_slots() | set(self.left_behind())
        if _boottime() - self._good_since >= self._timeout:
            dead |= self._stale()
        if not dead:
            return
        reaped = self._store.write_sync(partial(self._reap_if_leading, dead))
        if reaped:
            self._on_dead(sorted(dead))

    def _reap_if_leading(self, dead: set[str], conn: Connection) -> bool:
        if not self._store.lead(conn, "reaper"):
            return False
        _reap(conn, dead)
        return True

    def left_behind(self) -> list[str]:
        """Executors that own work and have no lease any more, because they left politely or were reaped: proof enough, at once."""

        def read(conn: Connection) -> set[str]:
            return workers.without_lease(conn, self._owning(conn) - {self.executor_id})

        return sorted(self._store.read_sync(read))

    def _owning(self, conn: Connection) -> set[str]:
        return set(self._pending_owners(conn)) | set(sprints.owners(conn))

    def _free_slots(self) -> set[str]:
        rows = self._store.read_sync(workers.every)
        dead: set[str] = set()
        for row in rows:
            if row.reaped_ms is None and row.node_id == self.node_id and row.slot >= 0 and row.executor_id != self.executor_id:
                fd = _try_lock(self._state_dir / f"slot-{row.slot}.lock")
                if fd is not None:
                    dead.add(row.executor_id)
                    os.close(fd)
        return dead

    def _stale(self) -> set[str]:
        def read(conn: Connection) -> set[str]:
            live = {worker.executor_id for worker in self._live(conn)}
            return self._owning(conn) - live - {self.executor_id}

        return self._store.read_sync(read)


def node_name(state_dir: Path) -> str:
    """A name of this state folder that outlives restarts and host names; of several that begin at once one names it."""
    path = state_dir / "node"
    # Cut short or overwritten: then the folder gets a new name, and work of the old one is taken over as that of a host that is gone.
    damaged = path.exists() and NODE.fullmatch(path.read_bytes()) is None
    if damaged or not path.exists():
        descriptor, draft = tempfile.mkstemp(prefix=".node.", dir=state_dir)
        try:
            os.write(descriptor, secrets.token_hex(4).encode() + b"\n")
            os.fsync(descriptor)
            if damaged:
                Path(draft).replace(path)
            with contextlib.suppress(FileExistsError, FileNotFoundError):
                os.link(draft, path)
        finally:
            os.close(descriptor)
            Path(draft).unlink(missing_ok=True)
    return path.read_text(encoding="ascii").strip()


def _reap(conn: Connection, executors: Iterable[str]) -> None:
    """Declares executors dead; whose lease stood until now has crashed, and so have its sprints."""
    for executor in executors:
        if workers.reap(conn, executor):
            sprints.count_crash(conn, executor)


def _boottime() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _try_lock(path: Path) -> int | None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return None
    return fd
