"""The same bot on PostgreSQL: conversations, kill points, and a database that goes away and comes back."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from postgres_support import PostgresServer, require
from served import ServedWorld
from test_conversation import (
    issue_with,
    test_cancel_in_the_middle_kills_and_says_so,
    test_comment_is_acknowledged_and_runs,
    test_label_becomes_a_pull_request,
    test_limit_keeps_partial_work_as_a_draft,
    test_merged_pull_request_is_recorded,
    test_retry_updates_the_same_pull_request,
    test_stranger_is_refused_once_with_the_reason,
)
from test_kill import RECONCILE, one_of_each, survive
from world import World, make_world, until

pytestmark = pytest.mark.postgres

__all__ = [
    "test_cancel_in_the_middle_kills_and_says_so",
    "test_comment_is_acknowledged_and_runs",
    "test_label_becomes_a_pull_request",
    "test_limit_keeps_partial_work_as_a_draft",
    "test_merged_pull_request_is_recorded",
    "test_retry_updates_the_same_pull_request",
    "test_stranger_is_refused_once_with_the_reason",
]


@pytest.fixture
async def world(base: Path, postgres_server: PostgresServer) -> AsyncIterator[World]:
    """The conversations that are imported here are held over PostgreSQL."""
    async with make_world(base, database=postgres_server.database()) as made:
        yield made


@pytest.mark.parametrize(
    "point", ["inbox.decided", "admit.before_commit", "work.tool_running", "push.after", "settle.row", "projector.sent"]
)
async def test_killed_at(base: Path, postgres_server: PostgresServer, point: str):
    database = postgres_server.database()
    async with make_world(base, kind=ServedWorld, start=False, reconcile=RECONCILE, database=database) as world:
        await survive(world, point)


async def test_the_database_goes_away_and_comes_back(base: Path):
    """For twice the lease: nobody is reaped, nothing is doubled, the same process goes on."""
    require()
    server = PostgresServer()
    try:
        server.start()
        timing = {"beat_seconds": 0.5, "lease_seconds": 3.0}
        async with make_world(base, kind=ServedWorld, start=False, database=server.database(), timing=timing) as world:
            process = await world.serve()
            await world.listening()
            issue = await issue_with(world, "slow(1)")
            await world.alice.label(issue, "dispatch")
            await until(lambda: len(world.model.requests) >= 2)
            await asyncio.to_thread(server.stop, signal.SIGQUIT)
            await asyncio.sleep(6)
            await asyncio.to_thread(server.start)
            world.store._read_engine.dispose()
            sprint = await world.settled(issue, 60)
            assert sprint.outcome == "pull_request", (sprint, world.log()[-4000:])
            assert process.returncode is None
            assert "lease.take_over" not in world.log()
            await one_of_each(world, issue)
            assert len(world.model.requests) <= 8
    finally:
        server.remove()
