"""A whole world for conversations: the embedded forge or a running Gitea, a scripted model, the bot, and people."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import hmac
import os
import random
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import sqlalchemy as sa

from bot.demo.forge.server import ForgeServer
from bot.demo.model import ScriptedModel
from bot.demo.sample import FILES
from bot.demo.stage import BOT_SCOPES, Person, Stage
from bot.failpoints import Failpoints
from bot.gitea.forge import ROUTES
from bot.reader import ROUTES as READER_ROUTES
from bot.reader import read_route
from bot.redaction import Secret
from bot.service import Service
from bot.store import Store, deliveries, intents, sprints

LIVE_URL, LIVE_TOKEN = os.environ.get("GITEA_URL", ""), os.environ.get("GITEA_ADMIN_TOKEN", "")
LIVE = [
    pytest.mark.live,
    pytest.mark.skipif(not (LIVE_URL and LIVE_TOKEN), reason="GITEA_URL and GITEA_ADMIN_TOKEN of a real Gitea are not set"),
    pytest.mark.timeout(240),
]
FORGES = ["embedded", pytest.param("live", marks=LIVE)]
JITTER_SECONDS = float(os.environ.get("TEST_JITTER_SECONDS", "0"))
"""The bot's writes to the forge wait up to this long, at random: what a test wins only by being late shows itself."""
FAST = {"beat_seconds": 0.5, "lease_seconds": 6.0, "tick_seconds": 0.2, "progress_seconds": 0.2, "queue_poll_seconds": 0.05}


UNSAID = "select count(*) from outbox where projected_rev < rev"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


async def until(what: Callable[[], Any], seconds: float = 45.0, every: float = 0.03) -> Any:
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


def shape(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(path, kind) of everything in a JSON value; lists are one path, null says nothing."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from shape(item, f"{path}.{key}")
            yield f"{path}.{key}", "key"
    elif isinstance(value, list):
        for item in value:
            yield from shape(item, f"{path}[]")
    elif value is not None:
        yield path, type(value).__name__


class Recorded(Service):
    """The service, with every request to the forge, its reply and every delivery noted in `notes`."""

    notes: World

    def _build_forge(self) -> None:
        super()._build_forge()
        client, notes = self.client, self.notes
        tell, exchange = client._on_request, client._exchange

        def note(route: str, method: str, outcome: int | str, attempt: int, seconds: float) -> None:
            notes.requests.add((method, route, outcome))
            tell(route, method, outcome, attempt, seconds)

        async def look(method: str, url: str, route: str, data: object, attempt: int) -> Any:
            if JITTER_SECONDS and method != "GET":
                await asyncio.sleep(random.uniform(0, JITTER_SECONDS))
            reply, headers = await exchange(method, url, route, data, attempt)
            notes.reply_shapes |= {(f"{method} {route}", *found) for found in shape(reply)}
            notes.reply_headers |= {(f"{method} {route}", name) for name in headers if name in ("X-Total-Count", "Link", "Content-Type")}
            return reply, headers

        client._on_request, client._exchange = note, look

    def _build_rooms(self, me: Any) -> None:
        super()._build_rooms(me)
        take, notes = self.intake._take, self.notes

        async def note(event: Any) -> tuple[int, str, str]:
            answer = await take(event)
            what = f"{event.event_type} {event.action or ''}".strip()
            notes.heard.append((what, answer[1], answer[2]))
            notes.payload_shapes |= {(what, *found) for found in shape(event.data)}
            return answer

        self.intake._take = note


class World:
    """A stage, a scripted model and the bot; people talk to it through the forge and look at what it shows."""

    def __init__(self, stage: Stage, model: ScriptedModel, state_dir: Path, forge: ForgeServer | None, **changes: Any) -> None:
        self.stage = stage
        self.model = model
        self.state_dir = state_dir
        self.forge = forge
        self.changes = changes
        self.port = free_port()
        self.service: Recorded | None = None
        self.requests: set[tuple[str, str, int | str]] = set()
        self.heard: list[tuple[str, str, str]] = []
        self.reply_shapes: set[tuple[str, str, str]] = set()
        self.reply_headers: set[tuple[str, str]] = set()
        self.payload_shapes: set[tuple[str, str, str]] = set()
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
        base: dict[str, Any] = {
            "timing": FAST,
            "sandbox": {"kind": "none"},
            "reconcile": {"every_seconds": 3600},
            "collector": {"enabled": False},
        }
        for key, value in {**self.changes, **more}.items():
            base[key] = {**base[key], **value} if isinstance(value, dict) and isinstance(base.get(key), dict) else value
        return self.stage.settings(self.state_dir, webhook_port=self.port, model_url=self.model.url, **base)

    async def start(self, *, failpoint: Failpoints | None = None, keys: Any = None, **more: Any) -> Service:
        self.service = Recorded(
            self.settings(**more),
            keys or self.stage.secrets(),
            environ={},
            home=self.state_dir,
            failpoint=failpoint,
            fast_shutdown=True,
            observers=[self.events.append],
        )
        self.service.notes = self
        await self.service.start()
        return self.service

    async def stop(self) -> None:
        if self.service is not None:
            service, self.service = self.service, None
            await service.stop()

    # what people do beyond the API of Person

    @contextlib.asynccontextmanager
    async def browser(self, person: Person) -> AsyncIterator[aiohttp.ClientSession]:
        """A browser in which somebody has signed in with the password."""
        async with aiohttp.ClientSession(self.stage.url, cookie_jar=aiohttp.CookieJar(unsafe=True)) as session:
            login = {"user_name": person.login, "password": person.password}
            async with session.post("/user/login", data=login, allow_redirects=False) as reply:
                assert reply.status == 303, reply.status
            yield session

    async def web_issue(self, person: Person, title: str, body: str, *labels: str) -> int:
        """An issue by the web form, which takes labels from everybody; returns its number."""
        known = {label["name"]: str(label["id"]) for label in await self.alice.forge.labels(self.stage.repo)}
        form = {"title": title, "content": body, "label_ids": ",".join(known[name] for name in labels)}
        path = f"/{self.stage.repo}/issues/new"
        async with self.browser(person) as session, session.post(path, data=form, allow_redirects=False) as reply:
            where = reply.headers["Location"] if reply.status == 303 else (await reply.json())["redirect"]
        return int(where.rpartition("/")[2])

    async def web_comment(self, person: Person, issue: int, text: str) -> None:
        """A comment as a browser sends it."""
        path = f"/{self.stage.repo}/issues/{issue}/comments"
        async with self.browser(person) as session, session.post(path, data={"content": text}, allow_redirects=False) as reply:
            assert reply.status in (200, 303), reply.status

    async def edit_repo(self, **fields: object) -> None:
        """Settings of the repository, as its owner."""
        owner, _, name = self.stage.repo.partition("/")
        await self.alice.client.patch("/repos/{owner}/{repo}", fields, owner=owner, repo=name)

    async def protect(self, branch: str) -> None:
        """Nobody may push to this branch any more."""
        fields = {"rule_name": branch, "branch_name": branch, "enable_push": False}
        await self.alice.client.post(f"/repos/{self.stage.repo}/branch_protections", fields)

    async def new_token(self, person: Person, name: str) -> Secret:
        """Another token for somebody."""
        data = {"name": name, "scopes": list(BOT_SCOPES)}
        async with self._with_password(person) as session, session.post(f"/api/v1/users/{person.login}/tokens", json=data) as reply:
            return Secret((await reply.json())["sha1"])

    async def revoke(self, person: Person, name: str = "stage") -> None:
        """Takes a token away."""
        async with self._with_password(person) as session, session.delete(f"/api/v1/users/{person.login}/tokens/{name}") as reply:
            assert reply.status == 204, reply.status

    def _with_password(self, person: Person) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(self.stage.url, headers={"Authorization": aiohttp.encode_basic_auth(person.login, person.password)})

    async def rename(self, name: str) -> None:
        """Another name for the repository; the people go on under the new one."""
        await self.edit_repo(name=name)
        self.moved(f"{self.stage.repo.partition('/')[0]}/{name}")

    def moved(self, full_name: str) -> None:
        """The people know the new address."""
        self.stage.repo = full_name
        self.stage.people = {role: dataclasses.replace(person, repo=full_name) for role, person in self.stage.people.items()}

    async def stored(self) -> list[tuple[str, bytes]]:
        """(event type, body) of every delivery that the bot keeps, oldest first."""
        columns = (deliveries.table.c.event_type, deliveries.table.c.body)
        statement = sa.select(*columns).order_by(deliveries.table.c.received_ms)
        return [(row[0], bytes(row[1])) for row in await self.store.read(lambda conn: conn.execute(statement).all())]

    async def send(self, event_type: str, body: bytes, *, secret: str = "") -> tuple[int, str]:
        """One more delivery of this body under a new UUID, straight to the bot; returns its answer."""
        key = secret or self.stage.webhook_secret.reveal()
        headers = {
            "Content-Type": "application/json",
            "X-Gitea-Event": event_type,
            "X-Gitea-Event-Type": event_type,
            "X-Gitea-Delivery": str(uuid.uuid4()),
            "X-Gitea-Signature": hmac.new(key.encode(), body, hashlib.sha256).hexdigest(),
        }
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"http://127.0.0.1:{self.port}/webhook", data=body, headers=headers) as reply,
        ):
            return reply.status, (await reply.text()).strip()

    # what a person sees

    async def comments(self, issue: int) -> list[dict[str, Any]]:
        return await self.alice.forge.comments(self.stage.repo, issue)

    async def told_all(self, seconds: float = 5.0) -> None:
        """Waits until every answer and reaction decided so far is on the forge; not longer, for a test may hold them back."""
        deadline = time.monotonic() + seconds
        while self.service is not None and time.monotonic() < deadline:
            if await self.store.read(lambda conn: conn.exec_driver_sql(UNSAID).scalar()) == 0:
                return
            await asyncio.sleep(0.02)

    async def by_bot(self, issue: int) -> list[str]:
        await self.told_all()
        return [comment["body"] for comment in await self.comments(issue) if comment["user"]["id"] == self.timmy.id]

    async def status_comment(self, issue: int) -> str:
        found = [body for body in await self.by_bot(issue) if "key=sprint:" in body]
        return found[-1] if found else ""

    async def labels(self, issue: int) -> set[str]:
        return {label["name"] for label in (await self.alice.forge.issue(self.stage.repo, issue)).get("labels") or ()}

    async def reactions(self, comment_id: int) -> set[str]:
        await self.told_all()
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

    async def settled(self, issue: int, seconds: float = 60.0):
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
                return not sprints.show_work(conn, 2**60) and conn.exec_driver_sql(UNSAID).scalar() == 0

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
    base: Path,
    *,
    kind: type[World] | None = None,
    personality: str = "1.26",
    start: bool = True,
    hook: bool = True,
    live: bool = False,
    files: Mapping[str, str] = FILES,
    **changes: Any,
) -> AsyncIterator[Any]:
    """The embedded forge, or with `live` the Gitea of GITEA_URL: there `forge` is None, every name is unique, and all of it is removed at the end."""
    async with contextlib.AsyncExitStack() as ends:
        forge = None
        if not live:
            forge = ForgeServer(base / "forge", personality=personality)
            await forge.start()
            ends.push_async_callback(forge.stop)
            await forge.create_user("root1", admin=True)
        url = forge.url if forge else LIVE_URL
        token = await forge.create_token("root1", ["all"]) if forge else LIVE_TOKEN
        model = ScriptedModel()
        await model.start()
        ends.push_async_callback(model.stop)
        suffix = f"-{secrets.token_hex(4)}" if live else ""
        stage = await Stage.build(url, Secret(token), files=files, suffix=suffix)
        ends.push_async_callback(stage.close)
        if live:
            ends.push_async_callback(stage.remove)
        world = (kind or World)(stage, model, base / "state", forge, **changes)
        ends.push_async_callback(world.stop)
        if hook:
            await stage.hook(f"http://127.0.0.1:{world.port}/webhook")
        if start:
            await world.start()
        yield world
        asked = {read_route(route) for _, route, _ in world.requests}
        assert asked <= {*ROUTES, *READER_ROUTES}, "a route that is no value of the metric label `endpoint`"
