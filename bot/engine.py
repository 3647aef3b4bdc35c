"""The only file that knows DBOS: the sprint workflow of five coarse steps, its queue, its schedules and their recovery (engine.md)."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any, Protocol

import sqlalchemy as sa
from dbos import DBOS, DBOSClient, DBOSConfig, DBOSPortableJSONSerializer, _sys_db
from dbos._queue import queue_worker_thread
from dbos._serialization import DefaultSerializer
from dbos._utils import retriable_sqlite_exception
from sqlalchemy.engine import Connection, make_url

from bot.models import Json

NAME = "timmy-dispatch"
QUEUE = "sprints"
VERSION = "sprint-1"
MAX_RECOVERIES = 20
PRUNE_BATCH = 500
OWN_THREADS = 16
WORKER_END_SECONDS = 10.0


class Stages(Protocol):
    """The five steps of a sprint. Each answers `{"go": "next"}`, `{"go": "settle"|"requeue", ...}` or `{"go": "gone"}` (not ours, or over)."""

    async def prepare(self, sprint_id: str, k: int) -> Json: ...

    async def work(self, sprint_id: str, k: int) -> Json: ...

    async def vet(self, sprint_id: str, k: int) -> Json: ...

    async def publish(self, sprint_id: str, k: int) -> Json: ...

    async def settle(self, sprint_id: str, k: int, end: Json) -> Json: ...


Scheduled = Callable[[], Awaitable[None]]
Fired = Callable[[str, int], Awaitable[None]]


class UnsafePayload(Exception):
    """A row of the engine is marked as pickle; it is never decoded."""


class _Wakeable(threading.Event):
    """The stop event of the queue's worker; its wait between two polls ends also when it is kicked."""

    def __init__(self) -> None:
        super().__init__()
        self._woken = threading.Event()

    def set(self) -> None:
        super().set()
        self._woken.set()

    def kick(self) -> None:
        self._woken.set()

    def wait(self, timeout: float | None = None) -> bool:
        """True when it is to stop."""
        self._woken.wait(timeout)
        self._woken.clear()
        return self.is_set()


class Engine:
    """DBOS in this process. One at a time; `launch` on the event loop's own thread, after the lease is written, before anything listens."""

    def __init__(
        self,
        url: str,
        *,
        executor_id: str,
        stages: Stages,
        slots: int,
        poll_seconds: float,
        fast_shutdown: bool = False,
        fired: Fired | None = None,
    ) -> None:
        """`fired(name, due)` is told of every fire of a schedule before it runs, with the moment it was due (Unix ms)."""
        self._url = url
        self._fired = fired
        self._executor_id = executor_id
        self._stages = stages
        self._slots = slots
        self._poll = poll_seconds
        self._fast = fast_shutdown
        self._scheduled: dict[str, tuple[str, Scheduled]] = {}
        self._running: set[str] = set()
        self._client: DBOSClient | None = None
        self._wake = _Wakeable()
        self._worker: threading.Thread | None = None
        self._table = "workflow_status" if make_url(url).get_backend_name() == "sqlite" else "dbos.workflow_status"

    def schedule(self, name: str, cron: str, fn: Scheduled) -> None:
        """Runs `fn` by a six-field cron line in UTC, in one process of the fleet a tick; before `launch`."""
        self._scheduled[name] = (cron, fn)

    @property
    def schedules(self) -> dict[str, str]:
        """Name -> cron line."""
        return {name: cron for name, (cron, _) in self._scheduled.items()}

    async def launch(self) -> None:
        """Registers the workflows and begins to take work."""
        _refuse_pickle()
        _wait_for_the_disk()
        logger = logging.getLogger("dbos")
        if not logger.handlers:
            logger.addHandler(logging.NullHandler())
        config: DBOSConfig = {
            "name": NAME,
            "system_database_url": self._url,
            "executor_id": self._executor_id,
            "application_version": VERSION,
            "serializer": DBOSPortableJSONSerializer(),
            "max_executor_threads": 32,
            "sys_db_pool_size": 4 if self._table == "workflow_status" else 20,
            "scheduler_polling_interval_sec": 5,
            "log_level": "WARNING",
        }
        if self._fast:
            config["notification_listener_polling_interval_sec"] = 0.05
        dbos = DBOS(config=config)
        self._register()
        # The library's own worker can only be polled, and looks for new queues once a second; the one below is the same loop, and can be woken.
        DBOS.listen_queues([])
        DBOS.launch()
        await DBOS.set_latest_application_version_async(VERSION)
        _own_default_executor()
        await DBOS.register_queue_async(QUEUE, worker_concurrency=self._slots, polling_interval_sec=self._poll, on_conflict="always_update")
        queue = await DBOS.retrieve_queue_async(QUEUE)
        self._worker = threading.Thread(target=queue_worker_thread, args=(self._wake, dbos, queue), name="queue-sprints", daemon=True)
        self._worker.start()
        self._client = DBOSClient(system_database_url=self._url, application_name=NAME, serializer=DBOSPortableJSONSerializer(), lazy=True)
        if self._scheduled:
            for known in await DBOS.list_schedules_async():
                # One that the configuration no longer names would be fired for ever, at a workflow that nobody knows.
                if known["schedule_name"] not in self._scheduled:
                    await DBOS.delete_schedule_async(known["schedule_name"])
            await DBOS.apply_schedules_async(
                [
                    {"schedule_name": name, "workflow_fn": self._ticks[name], "schedule": cron, "context": {}}
                    for name, (cron, _) in self._scheduled.items()
                ]
            )

    def _register(self) -> None:
        stages = self._stages

        def step(name: str, fn: Callable[..., Awaitable[Json]], **options: Any) -> Callable[..., Awaitable[Json]]:
            async def run(*args: Any) -> Json:
                return _plain(await fn(*args))

            run.__qualname__ = run.__name__ = name
            return DBOS.step(name=name, **options)(run)

        ways = [
            step("prepare", stages.prepare),
            step("work", stages.work, preemptible=True),
            step("vet", stages.vet),
            step("publish", stages.publish),
        ]
        settle = step("settle", stages.settle)

        async def sprint(sprint_id: str, k: int) -> str:
            self._running.add(workflow_id(sprint_id, k))
            try:
                return await through(sprint_id, k)
            finally:
                self._running.discard(workflow_id(sprint_id, k))

        async def through(sprint_id: str, k: int) -> str:
            end: Json = {}
            for way in ways:
                end = await way(sprint_id, k)
                if end["go"] != "next":
                    break
            if end["go"] == "gone":
                return "gone"
            return str((await settle(sprint_id, k, end)).get("result", ""))

        DBOS.workflow(name="sprint", max_recovery_attempts=MAX_RECOVERIES)(sprint)

        self._ticks: dict[str, Any] = {}
        for name, (_, fn) in self._scheduled.items():
            self._ticks[name] = _tick(name, fn, self._fired)

    def enqueue(self, conn: Connection, sprint_id: str, k: int, *, priority: int) -> None:
        """Puts an admitted sprint into the queue, inside the transaction that admits it."""
        if self._client is None:
            raise RuntimeError("the engine is not launched")
        self._client.enqueue_in_transaction(
            conn,
            {
                "queue_name": QUEUE,
                "workflow_name": "sprint",
                "workflow_id": workflow_id(sprint_id, k),
                "priority": priority,
                "workflow_id_reuse_policy": "reject",
                "app_version": VERSION,
            },
            sprint_id,
            k,
        )

    def kick(self) -> None:
        """Something was put into the queue and committed: a free slot looks now, not at its next poll."""
        self._wake.kick()

    async def cancel(self, sprint_id: str, k: int) -> None:
        """DBOS's own cancel: the last resort for a stuck row; nothing of the workflow runs afterwards, the orphan sweep settles."""
        await DBOS.cancel_workflow_async(workflow_id(sprint_id, k))

    def recover(self, executors: Sequence[str]) -> None:
        """Takes over what dead executors left; guarded by owner and status, so twice is harmless."""
        DBOS._recover_pending_workflows(list(executors))  # noqa: SLF001 - no public call does this; pinned by a contract test

    def pending_owners(self, conn: Connection) -> list[str]:
        """Executors that own a running workflow of ours."""
        sql = f"SELECT DISTINCT executor_id FROM {self._table} WHERE status='PENDING' AND application_version=:v"
        return [row[0] for row in conn.execute(sa.text(sql), {"v": VERSION}) if row[0]]

    def lost(self, conn: Connection) -> list[str]:
        """Workflows of sprints that this process owns and does not run: where the database refused to record a step (a full disk), the
        engine lets a workflow go and leaves its row as it was.
        """
        sql = f"SELECT workflow_uuid FROM {self._table} WHERE status='PENDING' AND executor_id=:me AND workflow_uuid LIKE 'sprint:%'"
        return [row[0] for row in conn.execute(sa.text(sql), {"me": self._executor_id}) if row[0] not in self._running]

    def statuses(self, conn: Connection, ids: Sequence[str]) -> dict[str, str]:
        """Workflow id -> status, of those that exist."""
        if not ids:
            return {}
        statement = sa.text(f"SELECT workflow_uuid, status FROM {self._table} WHERE workflow_uuid IN :ids").bindparams(
            sa.bindparam("ids", expanding=True)
        )
        return {row[0]: row[1] for row in conn.execute(statement, {"ids": list(ids)})}

    def foreign(self, conn: Connection) -> list[tuple[str, str]]:
        """(id, version) of live workflows of another version of the sprint's steps."""
        sql = (
            f"SELECT workflow_uuid, application_version FROM {self._table} WHERE status IN ('PENDING', 'ENQUEUED') "
            "AND application_version <> :v AND workflow_uuid LIKE 'sprint:%'"
        )
        return [(row[0], row[1]) for row in conn.execute(sa.text(sql), {"v": VERSION})]

    async def prune(self, before: Mapping[str, datetime]) -> int:
        """Deletes terminal workflows completed before a moment, per id prefix (`sprint:`, `sched-`)."""
        deleted = 0
        for prefix, moment in before.items():
            while True:
                done = await DBOS.list_workflows_async(
                    workflow_id_prefix=prefix,
                    status=["SUCCESS", "ERROR", "CANCELLED", "MAX_RECOVERY_ATTEMPTS_EXCEEDED"],
                    completed_before=moment.astimezone(UTC).isoformat(),
                    limit=PRUNE_BATCH,
                    load_input=False,
                    load_output=False,
                )
                if not done:
                    break
                await DBOS.delete_workflows_async([item.workflow_id for item in done])
                deleted += len(done)
        return deleted

    async def pause(self) -> None:
        """Takes nothing more from the queue; what runs goes on."""
        if self._worker is not None:
            self._wake.set()
            await asyncio.to_thread(self._worker.join, WORKER_END_SECONDS)
            self._worker = None

    async def close(self) -> None:
        """Stops taking work and lets go; running rows stay PENDING and are taken over."""
        if self._client is not None:
            self._client.destroy()
            self._client = None
        await self.pause()
        await asyncio.to_thread(DBOS.destroy, destroy_registry=True)
        _own_default_executor()


def _own_default_executor() -> None:
    """DBOS makes its own pool the loop's default executor; sixteen of our sleeping threads would hold a start up (engine.md, "Traps")."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(OWN_THREADS, "default"))


def workflow_id(sprint_id: str, k: int) -> str:
    """`sprint:<id>:<k>`, k = times admitted."""
    return f"sprint:{sprint_id}:{k}"


def parse_workflow_id(text: str) -> tuple[str, int]:
    """The other way."""
    _, sprint_id, k = text.split(":")
    return sprint_id, int(k)


def _tick(name: str, fn: Scheduled, fired: Fired | None) -> Any:
    async def run(due_ms: int) -> Json:
        if fired is not None:
            await fired(name, due_ms)
        await fn()
        return {}

    run.__qualname__ = run.__name__ = f"{name}.run"
    once = DBOS.step(name=f"{name}.run")(run)

    async def tick(at: datetime, context: Any) -> None:  # noqa: ARG001 - the engine's signature for schedules
        await once(int(at.timestamp() * 1000))

    tick.__qualname__ = tick.__name__ = name
    return DBOS.workflow(name=name)(tick)


def _plain(value: Json) -> Json:
    """What a replay will read, also in the live run: tuples are lists, no lone surrogates, no NUL (engine.md, "JSON, text and pickle")."""
    plain: Json = _valid(json.loads(json.dumps(value)))
    return plain


def _valid(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace("\0", "").encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, list):
        return [_valid(item) for item in value]
    if isinstance(value, dict):
        return {_valid(key): _valid(item) for key, item in value.items()}
    return value


def _wait_for_the_disk() -> None:
    """What the engine cannot record because SQLite's disk is full it tries again, as where a server is away; else it would let go of the workflow."""
    original = retriable_sqlite_exception

    def retriable(error: Exception) -> bool:
        said = str(getattr(error, "orig", None) or error)
        return original(error) or "database or disk is full" in said or "disk I/O error" in said

    setattr(_sys_db, "retriable_sqlite_exception", retriable)  # noqa: B010 - the library has no switch for it


def _refuse_pickle() -> None:
    def deserialize(self: Any, serialized_data: str) -> Any:  # noqa: ARG001 - the replaced method's signature
        raise UnsafePayload("a row of the engine is marked as pickle; it is not decoded")

    setattr(DefaultSerializer, "deserialize", deserialize)  # noqa: B010 - the library has no switch for it
