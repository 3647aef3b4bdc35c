"""The real bot under the real Prometheus and Alertmanager: a fleet whose model is gone pages, while it was paused or idle it did not."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from test_alerts import TOKEN, Ops
from world import make_world

from bot.models import Pause, PauseScope
from bot.store import pauses
from tests.prometheus_support import monitoring

STALL = 4.0
HOLD = 0.03
# The minute between the end of the window of failed notifications and that of the page that mutes them must be some rounds of Prometheus.
DOWN_HOLD = 0.06


@pytest.mark.prometheus
@pytest.mark.timeout(240)
async def test_the_page_arrives(base: Path, tmp_path: Path):
    timing = {"stall_after_seconds": STALL}
    async with make_world(base, timing=timing) as world:
        target = f"127.0.0.1:{world.service.metrics_port}"
        generated = ["--stall-after", str(STALL), "--hold", str(HOLD)]
        async with monitoring(tmp_path, target, generated=generated) as watched:

            def stalled() -> list:
                return [note for note in watched.sent() if "DispatchFleetStalled" in note.names]

            async def verdict(name: str) -> bool:
                return await watched.value(f'dispatch_health{{verdict="{name}"}}') == 1

            await watched.until(lambda: verdict("idle"), 30, "an idle fleet")

            await world.store.write(lambda conn: pauses.put(conn, Pause(PauseScope.FLEET, 0, "", "alice", since_ms=1)))
            await world.model.stop()
            issue = await world.alice.open_issue("slug keeps capitals", "script: fix")
            await world.alice.label(issue, "dispatch")
            await watched.until(lambda: verdict("paused"), 30, "a paused fleet")
            await asyncio.sleep(STALL + 60 * HOLD + 3)
            assert not stalled(), "a paused fleet paged"

            await world.store.write(lambda conn: pauses.lift(conn, PauseScope.FLEET, 0, now_ms=2))
            await watched.until(stalled, 60, "the page of a fleet whose model is gone")
            assert await verdict("stalled")

            await world.model.start(port=int(world.model.url.rsplit(":", 1)[1].partition("/")[0]))
            sprint = await world.settled(issue, 120)
            assert sprint.outcome == "pull_request"
            await watched.until(lambda: verdict("idle"), 30, "an idle fleet again")
            await watched.until(lambda: watched.sent(status="resolved"), 60, "the resolution")


@pytest.mark.prometheus
@pytest.mark.timeout(300)
async def test_a_bot_that_is_down_is_one_page_and_one_issue(base: Path, tmp_path: Path):
    """Its own mirror is down with it: that must page for nothing more, and after the recovery nothing comes but its end."""
    async with make_world(base, kind=Ops) as world:
        listen = f"127.0.0.1:{world.service.metrics_port}"
        generated = ["--hold", str(DOWN_HOLD)]
        async with monitoring(tmp_path, listen, generated=generated, mirror=f"http://{listen}/alerts", token=TOKEN) as watched:
            await asyncio.sleep(3)
            assert watched.sent() == []
            await world.stop()
            await watched.until(lambda: watched.sent(), 60, "the page of a bot that is down")
            failing = 'ALERTS{alertname="DispatchNotificationsFailing",alertstate="firing"}'
            await watched.until(lambda: watched.query(failing), 120, "a mirror that cannot be reached")
            await world.start(metrics={"listen": listen})
            await watched.until(lambda: watched.sent(status="resolved"), 120, "the resolution")
            await watched.until(lambda: _closed(world), 90, "the issue closes again")
            assert {name for note in watched.sent() for name in note.names} == {"DispatchBotDown"}
            assert [each["title"] for each in await world.issues()] == ["Alert: DispatchBotDown"]


async def _closed(world: Ops) -> bool:
    return [state for state, _ in await world.states()] == ["closed"]
