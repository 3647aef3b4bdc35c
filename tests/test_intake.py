"""The webhook over real HTTP: what is refused, what is only counted, and what is durable before its 2xx."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import sqlite3
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from world import World, make_world, until

from bot.config import Secrets
from bot.redaction import Secret

RECORDED = Path(__file__).parent / "data" / "gitea" / "recorded-1.26" / "deliveries"
SECOND = "the-secret-after-the-rotation"
CAP = 1_000_000


@pytest.fixture
async def world(base: Path) -> AsyncIterator[World]:
    """The forge delivers nothing by itself here: what it would have sent is posted by hand."""
    async with make_world(base, start=False, webhook={"max_body_bytes": CAP, "read_timeout_seconds": 0.5}) as made:
        keys = Secrets(made.timmy.token, (made.stage.webhook_secret, Secret(SECOND)))
        await made.start(keys=keys)
        made.forge.drop_deliveries = True
        yield made


async def comment_body(world: World, text: str = "/dispatch status", person: Any = None) -> bytes:
    """The body that Gitea would deliver for a new comment."""
    issue = await world.alice.open_issue("slug keeps capitals", "Please mend it.")
    await (person or world.alice).comment(issue, text)
    return last(world, "issue_comment").body


def last(world: World, event: str) -> Any:
    """The newest delivery of an event that the forge would have sent; the bot's own wish for a test push may come in between."""
    return next(delivery for delivery in reversed(world.forge.deliveries) if delivery.event_type == event)


def signed(body: bytes, *, secret: str, event: str = "issue_comment", **more: str) -> dict[str, str]:
    mac = hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()
    return {
        "Content-Type": "application/json",
        "X-Gitea-Event": event,
        "X-Gitea-Event-Type": event,
        "X-Gitea-Delivery": str(uuid.uuid4()),
        "X-Gitea-Signature": mac,
        **{name.replace("_", "-"): value for name, value in more.items()},
    }


class Poster:
    """Posts bytes as they are, on one session."""

    def __init__(self, world: World, session: aiohttp.ClientSession) -> None:
        self.url = f"http://127.0.0.1:{world.port}/webhook"
        self.secret = world.stage.webhook_secret.reveal()
        self.session = session

    async def __call__(self, body: bytes, headers: dict[str, str] | None = None) -> tuple[int, str]:
        async with self.session.post(self.url, data=body, headers=headers or signed(body, secret=self.secret)) as reply:
            return reply.status, (await reply.text()).strip()


@pytest.fixture
async def post(world: World) -> AsyncIterator[Poster]:
    async with aiohttp.ClientSession(skip_auto_headers=("Content-Type",)) as session:
        yield Poster(world, session)


def rows(world: World) -> int:
    """Rows of another connection than the service's: only what is committed."""
    with sqlite3.connect(world.settings().database_url().removeprefix("sqlite:///")) as conn:
        count = conn.execute("select count(*) from deliveries").fetchone()[0]
    conn.close()
    return count


async def counted(world: World, event: str, result: str) -> float:
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"http://127.0.0.1:{world.service.metrics_port}/metrics") as reply,
    ):
        text = await reply.text()
    name = f'dispatch_webhook_deliveries_total{{event="{event}",result="{result}"}} '
    return float(next(line for line in text.splitlines() if line.startswith(name)).rpartition(" ")[2])


async def raw(world: World, head: str, parts: list[bytes], *, pause: float = 0.0) -> tuple[int, float]:
    """A request written byte by byte: the status that came back, and the seconds until the connection was over."""
    began = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
    try:
        writer.write(head.replace("\n", "\r\n").encode() + b"\r\n")
        for part in parts:
            writer.write(part)
            await writer.drain()
            if pause:
                await asyncio.sleep(pause)
    except ConnectionError:
        pass
    try:
        answer = await asyncio.wait_for(reader.read(4096), 10)
        while await asyncio.wait_for(reader.read(4096), 10):
            pass
    except ConnectionError:
        answer = b""
    writer.close()
    return int(answer.split(b" ")[1]) if answer else 0, time.monotonic() - began


async def test_bad_signatures_are_401_and_leave_no_row(world: World, post: Poster):
    body = await comment_body(world)
    good = signed(body, secret=post.secret)
    mac = good["X-Gitea-Signature"]
    sha1 = hmac.new(post.secret.encode(), body, hashlib.sha1).hexdigest()
    without = {name: value for name, value in good.items() if name != "X-Gitea-Signature"}
    bad = [
        without,
        {**without, "X-Gitea-Signature": ""},
        {**without, "X-Gitea-Signature": mac.upper()},
        {**without, "X-Gitea-Signature": f"sha256={mac}"},
        {**without, "X-Gitea-Signature": mac[:-1]},
        {**without, "X-Gitea-Signature": mac + "0"},
        {**without, "X-Gitea-Signature": "é" * 64},
        {**without, "X-Gitea-Signature": "ａ" * 64},
        {**without, "X-Gitea-Signature": "sekret"},
        {**without, "X-Hub-Signature": f"sha1={sha1}"},
        {**without, "X-Gitea-Signature": sha1},
        {**good, "X-Hub-Signature-256": "sha256=" + "0" * 64},
        signed(body, secret="another secret"),
        signed(body + b" ", secret=post.secret),
        signed(body, secret=""),
    ]
    for headers in bad:
        status, text = await post(body, headers)
        assert status == 401, (headers, status, text)
        assert post.secret not in text
    assert rows(world) == 0
    assert await counted(world, "other", "bad_signature") == len(bad)
    assert (await post(body, good))[0] == 202
    assert rows(world) == 1


async def test_what_is_no_delivery_is_refused_with_its_reason(world: World, post: Poster):
    body = await comment_body(world)
    for broken in (b"", b"{", b'{"a": NaN}', b"[]", b"null", b"\xff\xfe{}", b"[" * 100_000, b'{"action": "created"}'):
        assert (await post(broken, signed(broken, secret=post.secret)))[0] == 400, broken[:40]
    status, text = await post(b"payload=" + body, signed(body, secret=post.secret, Content_Type="application/x-www-form-urlencoded"))
    assert status == 415
    assert "application/json" in text
    assert (await post(body, signed(body, secret=post.secret, Content_Type="text/plain")))[0] == 415
    for name in ("", "../etc", "Issue Comment", "é"):
        assert (await post(body, {**signed(body, secret=post.secret), "X-Gitea-Event-Type": name}))[0] == 400
    async with post.session.get(post.url) as reply:
        assert reply.status == 405
    async with post.session.post(post.url + "/../alerts", data=body) as reply:
        assert reply.status == 404
    assert rows(world) == 0
    assert (await post(body))[0] == 202


async def test_large_and_slow_bodies_are_cut_off(world: World, post: Poster):
    head = (
        f"POST /webhook HTTP/1.1\nHost: localhost:{world.port}\nContent-Type: application/json\n"
        f"X-Gitea-Event-Type: issue_comment\nX-Gitea-Signature: {'0' * 64}\n"
    )
    size = 20 * 1024 * 1024
    status, seconds = await raw(world, head + f"Content-Length: {size}\n", [b"x" * 1000])
    assert (status, seconds < 2) == (413, True)
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    status, seconds = await raw(world, head + "Transfer-Encoding: chunked\n", [chunk] * (size // 65536))
    assert status in (413, 0), "a reset may overtake the answer while the client still writes"
    assert seconds < 5
    status, _ = await raw(world, head + "Transfer-Encoding: chunked\n", [chunk] * (CAP // 65536 + 1))
    assert status == 413
    status, seconds = await raw(world, head + "Content-Length: 1000\n", [b"x"] * 20, pause=0.1)
    assert status in (408, 0)
    assert seconds < 5
    status, seconds = await raw(world, head + "Content-Length: 1000\n", [b"x"])
    assert (status, seconds < 3) == (408, True)
    exact = b" " * (CAP - 2) + b"{}"
    assert (await post(exact))[0] == 400
    assert (await post(exact + b" "))[0] == 413
    assert rows(world) == 0
    assert (await post(await comment_body(world)))[0] == 202


async def test_a_client_that_goes_away_in_the_middle_is_no_fault_of_ours(world: World, post: Poster):
    head = "POST /webhook HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"
    for _ in range(3):
        _, writer = await asyncio.open_connection("127.0.0.1", world.port)
        writer.write(head.encode())
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.close()
    await asyncio.sleep(0.8)
    assert await counted(world, "other", "error") == 0
    assert (await post(await comment_body(world)))[0] == 202


async def test_nobody_else_waits_for_slow_bodies(base: Path):
    async with make_world(base, webhook={"read_timeout_seconds": 20}) as world:
        head = "POST /webhook HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"
        held = []
        for _ in range(100):
            _, writer = await asyncio.open_connection("127.0.0.1", world.port)
            writer.write(head.encode())
            held.append(writer)
        await asyncio.sleep(0.3)
        issue = await world.alice.open_issue("slug keeps capitals", "script: no_change")
        comment = await world.alice.comment(issue, "/dispatch status")

        async def answered():
            return "rocket" in await world.reactions(comment)

        await until(answered, 10)
        for writer in held:
            writer.close()


async def test_what_nobody_wants_is_counted_and_leaves_no_row(world: World, post: Poster):
    body = await comment_body(world)
    data = json.loads(body)
    foreign = {**data, "repository": {**data["repository"], "id": 4711, "full_name": "else/where"}}
    renamed = {**data, "repository": {**data["repository"], "id": 4711}}
    own = {**data, "sender": {**data["sender"], "id": world.timmy.id, "login": "somebody"}}
    for payload, words in ((foreign, "not served"), (own, "own event")):
        text = json.dumps(payload).encode()
        status, said = await post(text)
        assert (status, words in said) == (200, True), said
    assert (await post(json.dumps(renamed).encode()))[0] == 200, "another repository may not borrow the name of one of ours"
    assert await counted(world, "issue_comment", "ignored") == 3
    label = json.dumps({**data, "action": "no_such_action"}).encode()
    assert (await post(label))[1] == "nobody handles this event"
    unknown = json.dumps({"action": "x", "repository": data["repository"], "sender": data["sender"]}).encode()
    assert (await post(unknown, signed(unknown, secret=post.secret, event="moon_phase")))[0] in (200, 400)
    assert rows(world) == 0
    assert world.model.requests == []


async def test_a_test_push_is_seen_and_an_own_one_too(world: World, post: Poster):
    await world.alice.forge.test_hook(world.stage.repo, (await world.alice.forge.hooks(world.stage.repo))[0]["id"])
    delivery = last(world, "push")
    assert world.service.intake.last_test_ms == 0
    assert await post(delivery.body, signed(delivery.body, secret=post.secret, event="push")) == (200, "test delivery received")
    assert world.service.intake.last_test_ms > 0
    from bot.store import cursors

    assert await world.store.read(lambda conn: cursors.get(conn, cursors.LAST_TEST_PUSH)) == world.service.intake.last_test_ms
    assert rows(world) == 0


async def test_five_copies_in_four_milliseconds_are_one_row_and_one_answer(world: World, post: Poster):
    body = await comment_body(world)
    data = json.loads(body)
    answers = await asyncio.gather(*(post(body) for _ in range(5)))
    assert sorted(status for status, _ in answers) == [200, 200, 200, 200, 202]
    assert rows(world) == 1
    other = signed(body, secret=post.secret, event="pull_request_comment")
    status, said = await post(body, other)
    assert status in (202, 400), said
    issue = data["issue"]["number"]

    async def quiet():
        def read(conn: Any):
            return conn.exec_driver_sql("select count(*) from deliveries where done_ms is null").scalar() == 0

        return await world.store.read(read)

    await until(quiet)
    await world.shown(issue)
    assert len(await world.by_bot(issue)) == 1
    assert await world.reactions(data["comment"]["id"]) == {"eyes", "rocket"}


async def test_either_of_two_secrets_is_taken_while_they_are_rotated(world: World, post: Poster):
    first, second = await comment_body(world), await comment_body(world, "/dispatch queue")
    assert (await post(first))[0] == 202
    assert (await post(second, signed(second, secret=SECOND)))[0] == 202
    assert (await post(first, signed(first, secret=SECOND)))[1] == "received before"
    assert rows(world) == 2


async def test_a_row_is_on_the_disk_before_its_2xx_and_without_it_there_is_none(world: World, post: Poster):
    body = await comment_body(world)
    pragma = await world.store.read(lambda conn: conn.exec_driver_sql("pragma synchronous").scalar())
    assert pragma == 2, "FULL"
    assert (await post(body))[0] == 202
    assert rows(world) == 1

    class Broken:
        async def write(self, _work: Any) -> Any:
            raise OSError("no space left on device")

    intake, store = world.service.intake, world.service.intake._store
    intake._store = Broken()
    other = await comment_body(world, "/dispatch queue")
    try:
        status, said = await post(other)
        assert (status, "no space" in said) == (503, False)
    finally:
        intake._store = store
    assert rows(world) == 1
    assert (await post(other))[0] == 202, "nothing of the failed one is remembered"


async def test_every_recorded_delivery_gets_an_answer(world: World, post: Poster):
    answers = {}
    for path in sorted(RECORDED.glob("*.body")):
        body, event = path.read_bytes(), path.stem.rpartition(".")[2]
        answers[path.stem] = (await post(body, signed(body, secret=post.secret, event=event)))[0]
    assert len(answers) > 30
    assert set(answers.values()) == {200}, answers
    assert rows(world) == 0, "all of them are of another repository"
