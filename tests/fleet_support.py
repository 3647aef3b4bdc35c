"""The engine room without forge, model or git: store, lease, DBOS and leader over stages that only note that they ran."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from bot.engine import VERSION, Engine
from bot.failpoints import Failpoints
from bot.leader import Leader
from bot.lease import Lease
from bot.models import IssueRef, Limits, Outcome, OutcomeKind, RepoId, Source, SprintState, Usage
from bot.settings import Settings
from bot.store import Store, sprints

REPO = RepoId(7)


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def settings(state_dir: Path, **changes: Any) -> Settings:
    data: dict[str, Any] = {
        "forge": {"url": "http://127.0.0.1:1"},
        "repositories": [{"name": "alice/slug", "max_running": 100}],
        "state_dir": state_dir,
        "providers": [{"name": "scripted", "base_url": "http://127.0.0.1:1/v1", "model": "scripted"}],
        "timing": {"beat_seconds": 0.2, "lease_seconds": 2.0, "tick_seconds": 0.1, "queue_poll_seconds": 0.05},
        "queue": {"slots": 4, "max_per_repository": 100},
    }
    for key, value in changes.items():
        data[key] = {**data[key], **value} if isinstance(data.get(key), dict) else value
    return Settings.model_validate(data)


def queue_sprint(
    store: Store, issue: int, *, repo_id: int = REPO, priority: int = 5, queued_ms: int | None = None, sprint_id: str = ""
) -> str | None:
    """A queued sprint; None where the issue has an active one."""
    name = sprint_id or secrets.token_hex(6)
    made = store.write_sync(
        lambda conn: sprints.new(
            conn,
            sprint_id=name,
            repo_id=repo_id,
            issue=IssueRef.of("alice/slug", issue),
            title="",
            source=Source.COMMAND,
            priority=priority,
            trigger=f"test:{name}",
            requester_id=1,
            requester="alice",
            instructions="",
            options={},
            limits=Limits(steps=10, seconds=60, tokens=1000, usd=1.0),
            text_hash="",
            base_branch="main",
            now_ms=now_ms() if queued_ms is None else queued_ms,
        )
    )
    return name if made else None


def state(store: Store, sprint_id: str) -> str:
    return store.read_sync(lambda conn: sprints.field(conn, sprint_id, "state")).state


class Notes:
    """Stages that claim, note their name and go on; `hold` names the one that waits for `go`."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.ran: list[tuple[str, str, int]] = []
        self.hold = ""
        self.go = asyncio.Event()
        self.answer: dict[str, Any] = {"go": "next"}

    async def _stage(self, name: str, sprint_id: str, k: int) -> dict[str, Any]:
        lease, store = self.fleet.lease, self.fleet.store
        mine = await store.write(
            lambda conn: sprints.claim(conn, sprint_id, k, me=lease.executor_id, node_id=lease.node_id, timeout_ms=lease.timeout_ms)
        )
        if not mine:
            return {"go": "gone"}
        self.ran.append((name, sprint_id, k))
        if self.hold == name:
            await self.go.wait()
        return {**self.answer, "go": "settle"} if name == "publish" else self.answer

    async def prepare(self, sprint_id: str, k: int) -> dict[str, Any]:
        return await self._stage("prepare", sprint_id, k)

    async def work(self, sprint_id: str, k: int) -> dict[str, Any]:
        return await self._stage("work", sprint_id, k)

    async def vet(self, sprint_id: str, k: int) -> dict[str, Any]:
        return await self._stage("vet", sprint_id, k)

    async def publish(self, sprint_id: str, k: int) -> dict[str, Any]:
        return await self._stage("publish", sprint_id, k)

    async def settle(self, sprint_id: str, k: int, end: dict[str, Any]) -> dict[str, Any]:
        lease, store = self.fleet.lease, self.fleet.store
        await store.write(
            lambda conn: sprints.settle(
                conn, sprint_id, k, me=lease.executor_id, outcome=Outcome(OutcomeKind.NO_CHANGE), spent=Usage(), steps=0, now_ms=now_ms()
            )
        )
        self.ran.append(("settle", sprint_id, k))
        return {"result": "settled"}


class Fleet:
    """One process of the fleet; `dead` and `reaped` note what its lease said."""

    def __init__(
        self,
        url: str,
        state_dir: Path,
        *,
        failpoint: Callable[[str], None] | None = None,
        node: str = "n1",
        serves: bool = True,
        **changes: Any,
    ) -> None:
        state_dir.mkdir(parents=True, exist_ok=True)
        self.settings = settings(state_dir, **changes)
        self.store = Store(url)
        self.store.open()
        self.dead: list[list[str]] = []
        self.reaped = 0
        self.notes = Notes(self)
        timing = self.settings.timing
        executor = f"{node}-{secrets.token_hex(4)}"
        self.engine = Engine(url, executor_id=executor, stages=self.notes, slots=4, poll_seconds=0.05, fast_shutdown=True)
        self.lease = Lease(
            self.store,
            state_dir=state_dir,
            node_id=node,
            host="h",
            executor_id=executor,
            app_version=VERSION,
            capacity=self.settings.queue.slots,
            beat=timing.beat_seconds,
            timeout=timing.lease_seconds,
            pending_owners=self.engine.pending_owners,
            on_reaped=self._reaped,
            on_dead=self._dead,
            serves=serves,
        )
        self.leader = Leader(
            self.store,
            self.engine,
            settings=self.settings,
            is_leader=lambda: True,
            observe=lambda _event: None,
            kick_projector=lambda: None,
            repo_ids=lambda: {REPO: "alice/slug"},
            failpoint=failpoint or Failpoints(),
            now_ms=now_ms,
        )

    def _reaped(self) -> None:
        self.reaped += 1

    def _dead(self, ids: list[str]) -> None:
        self.dead.append(ids)
        self.engine.recover(ids)

    async def running(self, sprint_id: str, step: str, seconds: float = 20.0) -> None:
        """Looks at the queue until this step of the sprint runs."""
        deadline = time.monotonic() + seconds
        while all((name, one) != (step, sprint_id) for name, one, _ in self.notes.ran):
            assert time.monotonic() < deadline, (self.notes.ran, state(self.store, sprint_id))
            await self.leader.round()
            await asyncio.sleep(0.05)

    def over(self, sprint_id: str) -> bool:
        """Whether it is settled, and its run in this process has ended too."""
        return state(self.store, sprint_id) == SprintState.SETTLED and not any(f":{sprint_id}:" in run for run in self.engine._running)

    async def settled(self, sprint_id: str, seconds: float = 30.0) -> None:
        deadline = time.monotonic() + seconds
        while state(self.store, sprint_id) != SprintState.SETTLED:
            assert time.monotonic() < deadline, (self.notes.ran, state(self.store, sprint_id))
            await self.leader.round()
            await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def launched(url: str, state_dir: Path, *, beat: bool = True, kind: type[Fleet] = Fleet, **options: Any) -> AsyncIterator[Fleet]:
    fleet = kind(url, state_dir, **options)
    fleet.lease.take()
    await fleet.engine.launch()
    if beat:
        fleet.lease.start()
    try:
        yield fleet
    finally:
        fleet.notes.go.set()
        await fleet.engine.close()
        fleet.lease.leave()
        fleet.store.close()
