"""A whole world for conversations: the embedded forge, a scripted model, the bot, and people."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

from bot.demo.forge.server import ForgeServer
from bot.demo.model import ScriptedModel
from bot.demo.sample import FILES
from bot.demo.stage import Person, Stage
from bot.failpoints import Failpoints
from bot.redaction import Secret
from bot.service import Service
from bot.store import Store, intents, sprints

FAST = {"beat_seconds": 0.5, "lease_seconds": 6.0, "tick_seconds": 0.2, "progress_seconds": 0.2, "queue_poll_seconds": 0.05}


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


async def until(what: Callable[[], Any], seconds: float = 20.0, every: float = 0.03) -> Any:
    """Waits for a condition (plain or coroutine function) to be truthy; fails with its last value."""
    deadline = time.monotonic() + seconds
    while True:
        value = what()
        if asyncio.iscoroutine(value):
            value = await value
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {what.__qualname__} gave {value!r}")
        await asyncio.sleep(every)


class World:
    """A stage, a scripted model and the bot; people talk to it through the forge and look at what it shows."""

    def __init__(self, stage: Stage, model: ScriptedModel, state_dir: Path, forge: ForgeServer | None, **changes: Any) -> None:
        self.stage = stage
        self.model = model
        self.state_dir = state_dir
        self.forge = forge
        self.changes = changes
        self.port = free_port()
        self.service: Service | None = None
        self.events: list[Any] = []

    @property
    def alice(self) -> Person:
        return self.stage.people["alice"]

    @property
    def bob(self) -> Person:
        return self.stage.people["bob"]

    @property
    def mallory(self) -> Person:
        return self.stage.people["mallory"]

    @property
    def timmy(self) -> Person:
        return self.stage.people["timmy"]

    @property
    def store(self) -> Store:
        assert self.service is not None
        return self.service.store

    def settings(self, **more: Any):
        base: dict[str, Any] = {"timing": FAST, "sandbox": {"kind": "none"}, "reconcile": {"every_seconds": 3600}}
        for key, value in {**self.changes, **more}.items():
            base[key] = {**base[key], **value} if isinstance(value, dict) and isinstance(base.get(key), dict) else value
        return self.stage.settings(self.state_dir, webhook_port=self.port, model_url=self.model.url, **base)

    async def start(self, *, failpoint: Failpoints | None = None, **more: Any) -> Service:
        self.service = Service(
            self.settings(**more),
            self.stage.secrets(),
            environ={},
            home=self.state_dir,
            failpoint=failpoint,
            fast_shutdown=True,
            observers=[self.events.append],
        )
        await self.service.start()
        return self.service

    async def stop(self) -> None:
        if self.service is not None:
            service, self.service = self.service, None
            await service.stop()

    # what a person sees

    async def comments(self, issue: int) -> list[dict[str, Any]]:
        return await self.alice.forge.comments(self.stage.repo, issue)

    async def by_bot(self, issue: int) -> list[str]:
        return [comment["body"] for comment in await self.comments(issue) if comment["user"]["id"] == self.timmy.id]

    async def status_comment(self, issue: int) -> str:
        found = [body for body in await self.by_bot(issue) if "key=sprint:" in body]
        return found[-1] if found else ""

    async def labels(self, issue: int) -> set[str]:
        return {label["name"] for label in (await self.alice.forge.issue(self.stage.repo, issue)).get("labels") or ()}

    async def reactions(self, comment_id: int) -> set[str]:
        owner, _, repo = self.stage.repo.partition("/")
        found = await self.alice.client.getitem(
            "/repos/{owner}/{repo}/issues/comments/{id}/reactions", owner=owner, repo=repo, id=comment_id
        )
        return {item["content"] for item in found or ()}

    async def pulls(self) -> list[dict[str, Any]]:
        return await self.alice.forge.pulls(self.stage.repo, "all")

    async def sprint(self, issue: int):
        """The newest sprint of an issue, from the store."""

        def read(conn: Any):
            found = sprints.newest(conn, self.stage.repo_id, issue)
            return sprints.get(conn, found) if found else None

        return await self.store.read(read)

    async def settled(self, issue: int, seconds: float = 30.0):
        """Waits for the newest sprint of an issue to be settled and shown; returns it."""

        async def over():
            view = await self.sprint(issue)
            return view if view is not None and view.state == "settled" else None

        view = await until(over, seconds)
        await self.shown(issue)
        return view

    async def shown(self, issue: int) -> None:
        async def quiet():
            def read(conn: Any):
                return (
                    not sprints.show_work(conn, 2**60)
                    and conn.exec_driver_sql("select count(*) from outbox where projected_rev < rev").scalar() == 0
                )

            return await self.store.read(read)

        await until(quiet)

    async def trail(self, issue: int):
        return await self.store.read(lambda conn: intents.trail(conn, self.stage.repo_id, issue))


@contextlib.contextmanager
def base_folder() -> Iterator[Path]:
    """A folder that another user can pass through, as a root service's state folder must be (pytest's own are 0700)."""
    path = Path(tempfile.mkdtemp(prefix="timmy-test-", dir="/var/tmp"))
    path.chmod(0o711)
    try:
        yield path
    finally:
        subprocess.run(["chmod", "-R", "u+rwX", str(path)], check=False)
        shutil.rmtree(path, ignore_errors=True)


@contextlib.asynccontextmanager
async def make_world(
    base: Path, *, personality: str = "1.26", start: bool = True, hook: bool = True, **changes: Any
) -> AsyncIterator[World]:
    forge = ForgeServer(base / "forge", personality=personality)
    await forge.start()
    model = ScriptedModel()
    await model.start()
    await forge.create_user("root1", admin=True)
    token = await forge.create_token("root1", ["all"])
    stage = await Stage.build(forge.url, Secret(token), files=FILES)
    world = World(stage, model, base / "state", forge, **changes)
    try:
        if hook:
            await stage.hook(f"http://127.0.0.1:{world.port}/webhook")
        if start:
            await world.start()
        yield world
    finally:
        await world.stop()
        await stage.close()
        await model.stop()
        await forge.stop()
