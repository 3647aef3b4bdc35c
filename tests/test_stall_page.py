"""The real Prometheus and Alertmanager on the committed rules at compressed times: a stalled fleet pages, a paused, idle or full one does not."""

from __future__ import annotations

import asyncio
import functools
import re
import time

import pytest
from prometheus_client import CollectorRegistry

from bot.fleet.health import Thresholds, judge
from bot.metrics import Metrics, Vocabulary
from bot.models import SprintState, WaitingReason
from bot.snapshot import FleetSnapshot, WorkerBeat, WorkerState
from bot.web.observability import observability_app
from tests.prometheus_support import ROOT, ScriptedFleet, monitoring, now_ms, served

STALL = 3.0
HOLD = 0.03
SETTLE = STALL + 60 * HOLD + 2.5
HOUR = 3_600_000
BEATS = 2


def workers(now: int) -> tuple[WorkerBeat, ...]:
    return (WorkerBeat("host-0", WorkerState.BUSY, now - 500), WorkerBeat("host-1", WorkerState.BUSY, now - 900))


def idle(now: int) -> FleetSnapshot:
    held = {WaitingReason.APPROVAL: 2}
    return FleetSnapshot(
        now, sprints={SprintState.QUEUED: 2}, waiting=held, last_progress_ms=now - HOUR, last_success_ms=now - HOUR, workers=workers(now)
    )


def full(now: int) -> FleetSnapshot:
    """Every slot taken for long, a long queue behind; the last tool call ended a second ago."""
    return FleetSnapshot(
        now,
        sprints={SprintState.QUEUED: 40, SprintState.WORKING: 2},
        waiting={WaitingReason.SLOT: 40},
        oldest_runnable_ms=now - HOUR,
        oldest_running_ms=now - HOUR,
        last_progress_ms=now - 1000,
        workers=workers(now),
    )


def stuck(since: int, now: int, *, paused: bool = False) -> FleetSnapshot:
    """All slots taken by hung sprints with live heartbeats, and work queued."""
    return FleetSnapshot(
        now,
        sprints={SprintState.QUEUED: 1, SprintState.WORKING: 2},
        waiting={WaitingReason.SLOT: 1},
        oldest_runnable_ms=since,
        oldest_running_ms=since,
        last_progress_ms=since,
        workers=workers(now),
        paused=paused,
        paused_by="ops" if paused else "",
    )


@pytest.mark.prometheus
@pytest.mark.timeout(120)
async def test_a_stalled_fleet_pages_and_paused_idle_and_full_ones_do_not(tmp_path):
    fleet = ScriptedFleet(idle)
    verdict = functools.partial(judge, thresholds=Thresholds(stall_after=STALL, worker_lost=STALL))
    metrics = Metrics(CollectorRegistry(), Vocabulary(version="test"))
    metrics.read_store(fleet, verdict, started_ms=now_ms())
    metrics.sandbox_probed(ok=True)
    app = observability_app(
        render=lambda accept, compress: metrics.render(accept, compress=compress),
        health=lambda: verdict(fleet.snapshot()),
    )
    generated = ["--stall-after", str(STALL), "--worker-lost", str(STALL), "--hold", str(HOLD)]
    async with served(app) as target, monitoring(tmp_path, target, generated=generated) as pair:
        await pair.until(lambda: len(pair.sent("deadman")) >= 1, 10, "the Watchdog beats")

        await asyncio.sleep(SETTLE)
        assert await pair.value("dispatch:fleet_since_progress:seconds") > STALL
        assert await pair.query("dispatch:queue_oldest:age_seconds") == []
        assert pair.sent() == [], "idle, waiting for a person"

        fleet.make = full
        await asyncio.sleep(SETTLE)
        assert await pair.value("dispatch:queue_oldest:age_seconds") > STALL
        assert await pair.value("dispatch:fleet_since_progress:seconds") < STALL
        assert pair.sent() == [], "full"

        paused_at = now_ms()
        fleet.make = functools.partial(stuck, paused_at, paused=True)
        await asyncio.sleep(SETTLE)
        assert await pair.value("dispatch:queue_oldest:age_seconds") > STALL
        assert await pair.value("dispatch:fleet_since_progress:seconds") > STALL
        assert await pair.value('dispatch_health{verdict="paused"}') == 1
        assert pair.sent() == [], "paused"

        stuck_at = now_ms()
        fleet.make = functools.partial(stuck, stuck_at)
        await pair.until(lambda: pair.sent(), SETTLE + 10, "the page of the stalled fleet")
        page = pair.sent()[0]
        delay = page.at - stuck_at / 1000
        assert page.names == ["DispatchFleetStalled"]
        assert delay >= STALL + 60 * HOLD
        assert await pair.value('dispatch_health{verdict="stalled"}') == 1
        told = page.body["alerts"][0]
        assert told["labels"] == {
            "alertname": "DispatchFleetStalled",
            "fleet": "timmy",
            "job": "timmy-dispatch",
            "service": "timmy-dispatch",
            "severity": "critical",
        }
        assert re.match(r"The oldest runnable sprint has been queued for \d\.\d+s, ", told["annotations"]["description"])
        assert (ROOT / told["annotations"]["runbook_url"]).is_file()

        recovered = time.time()
        fleet.make = full
        await pair.until(lambda: pair.sent(status="resolved"), 10, "the resolution")
        print(f"stalled to page {delay:.1f} s with a threshold of {STALL:g} s; recovery to resolved {time.time() - recovered:.1f} s")
        assert {name for each in pair.sent() for name in each.names} == {"DispatchFleetStalled"}
        assert len(pair.sent("deadman")) >= BEATS
