"""The metrics listener: what it answers when all is well, when the store hangs or is away, and when too many ask."""

from __future__ import annotations

import asyncio
import gzip
import subprocess
import threading
import time

import pytest
from prometheus_client import CollectorRegistry

from bot.fleet.health import Thresholds, judge
from bot.metrics import Metrics, Rendered, Vocabulary
from bot.models import SprintState
from bot.snapshot import FleetSnapshot, Health, HealthVerdict, Reason
from bot.web import observability
from bot.web.observability import WAITING_AT_MOST, observability_app
from tests.prometheus_support import ScriptedFleet, binary

WELL = Health(HealthVerdict.WORKING, (Reason("active", "1 running"),))
TEXT = Rendered(b"dispatch_x 1\n", "text/plain; version=0.0.4", "")


def app(**given):
    return observability_app(**({"render": lambda _accept, _compress: TEXT, "health": lambda: WELL} | given))


def failing(*_: object):
    raise OSError("could not connect to postgresql://bot:hunter2@db/timmy")


async def test_metrics_are_rendered_for_what_the_client_takes(aiohttp_client):
    asked = []

    def render(accept: str, compress: bool) -> Rendered:
        asked.append((accept, compress, threading.current_thread().name))
        return Rendered(gzip.compress(b"dispatch_x 1\n"), "application/openmetrics-text; version=1.0.0", "gzip") if compress else TEXT

    client = await aiohttp_client(app(render=render))
    packed = await client.get("/metrics", headers={"Accept": "application/openmetrics-text", "Accept-Encoding": "deflate, GZIP"})
    assert (packed.status, await packed.text()) == (200, "dispatch_x 1\n")
    assert packed.headers["Content-Type"] == "application/openmetrics-text; version=1.0.0"
    assert packed.headers["Content-Encoding"] == "gzip"
    plain = await client.get("/metrics", headers={"Accept": "*/*", "Accept-Encoding": "identity"})
    assert (await plain.text(), plain.headers.get("Content-Encoding")) == ("dispatch_x 1\n", None)
    assert [each[:2] for each in asked] == [("application/openmetrics-text", True), ("*/*", False)]
    assert all(each[2].startswith("observability") for each in asked), "never on the event loop"


@pytest.mark.parametrize("accept", ["text/plain", "application/openmetrics-text;version=1.0.0"])
async def test_the_real_exposition_is_clean(aiohttp_client, accept):
    promtool = binary("promtool")
    fleet = ScriptedFleet(
        lambda now: FleetSnapshot(now, sprints={SprintState.WORKING: 1}, oldest_running_ms=now - 5000, last_progress_ms=now)
    )
    metrics = Metrics(CollectorRegistry(), Vocabulary(version="1", agents=("loop",), chain=(("a", "m"),)))
    metrics.read_store(fleet, lambda each: judge(each, Thresholds()), started_ms=1)
    client = await aiohttp_client(app(render=lambda wanted, compress: metrics.render(wanted, compress=compress)))
    reply = await client.get("/metrics", headers={"Accept": accept})
    body = await reply.text()
    assert 'dispatch_health{verdict="working"} 1.0' in body
    if accept == "text/plain":
        done = await asyncio.to_thread(subprocess.run, [promtool, "check", "metrics"], input=body.encode(), capture_output=True, timeout=30)
        assert (done.returncode, done.stdout + done.stderr) == (0, b"")


async def test_the_process_lives(aiohttp_client):
    client = await aiohttp_client(app(render=failing, health=failing))
    reply = await client.get("/healthz")
    assert (reply.status, await reply.text()) == (200, "ok\n")
    assert (await client.head("/healthz")).status == 200
    assert (await client.post("/healthz")).status == 405


async def test_ready_tells_the_verdict_with_its_reasons(aiohttp_client):
    client = await aiohttp_client(app())
    reply = await client.get("/readyz")
    assert reply.status == 200
    assert await reply.json() == {"ready": True, "verdict": "working", "reasons": [{"code": "active", "detail": "1 running"}]}


async def test_a_stalled_fleet_is_still_ready_for_deliveries(aiohttp_client):
    stalled = Health(HealthVerdict.STALLED, (Reason("stalled", "700 s"),))
    client = await aiohttp_client(app(health=lambda: stalled))
    reply = await client.get("/readyz")
    assert (reply.status, (await reply.json())["verdict"]) == (200, "stalled")


async def test_not_ready_while_starting_or_draining(aiohttp_client):
    client = await aiohttp_client(app(unready=lambda: "draining"))
    reply = await client.get("/readyz")
    body = await reply.json()
    assert (reply.status, body["ready"], body["verdict"]) == (503, False, "working")
    assert body["reasons"][0] == {"code": "not_ready", "detail": "draining"}


async def test_a_store_that_is_away_is_told_without_its_address(aiohttp_client):
    client = await aiohttp_client(app(render=failing, health=failing))
    for path in ("/metrics", "/readyz"):
        reply = await client.get(path)
        said = await reply.text()
        assert reply.status == 503
        assert "OSError" in said
        assert "hunter2" not in said
    assert (await client.get("/readyz")).headers["Content-Type"].startswith("application/json")


async def test_a_store_that_hangs_is_not_waited_for(aiohttp_client, monkeypatch):
    monkeypatch.setattr(observability, "ANSWER_SECONDS", 0.2)
    free = threading.Event()

    def hang(*_: object) -> Rendered:
        free.wait(30)
        return TEXT

    client = await aiohttp_client(app(render=hang, health=hang))
    try:
        began = time.monotonic()
        reply = await client.get("/metrics")
        assert (reply.status, time.monotonic() - began < 5) == (503, True)
        assert "did not answer" in await reply.text()
        assert (await client.get("/readyz")).status == 503
        assert (await client.get("/healthz")).status == 200, "the loop is free"
    finally:
        free.set()


async def test_many_at_once_are_bounded(aiohttp_client):
    free, lock = threading.Event(), threading.Lock()
    running, most = 0, 0

    def slow(_accept: str, _compress: bool) -> Rendered:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        free.wait(30)
        with lock:
            running -= 1
        return TEXT

    client = await aiohttp_client(app(render=slow))
    asked = [asyncio.create_task(client.get("/metrics")) for _ in range(WAITING_AT_MOST + 12)]
    try:
        refused, _ = await asyncio.wait(asked, timeout=10, return_when=asyncio.FIRST_COMPLETED)
        assert refused
        assert (await client.get("/healthz")).status == 200
    finally:
        free.set()
    codes = sorted([(await each).status for each in asked])
    assert codes == [200] * WAITING_AT_MOST + [503] * 12
    assert most <= 2
    assert (await client.get("/metrics")).status == 200, "the places are free again"


async def test_clients_that_leave_free_their_places(aiohttp_client):
    calls = []

    def slow(_accept: str, _compress: bool) -> Rendered:
        calls.append(1)
        time.sleep(0.02)
        return TEXT

    client = await aiohttp_client(app(render=slow))
    for _ in range(3):
        leaving = [asyncio.create_task(client.get("/metrics")) for _ in range(WAITING_AT_MOST)]
        await asyncio.sleep(0.03)
        for each in leaving:
            each.cancel()
        await asyncio.gather(*leaving, return_exceptions=True)
        await asyncio.sleep(0.4)
    assert (await client.get("/metrics")).status == 200
