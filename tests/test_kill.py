"""kill -9 at every named point: after a restart there is one pull request, one status comment and one terminal state (DESIGN, promise 3)."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from served import ServedWorld
from world import make_world, until

from bot.failpoints import POINTS

RECONCILE = {"every_seconds": 2, "leave_to_webhook_seconds": 1}


async def survive(world: ServedWorld, point: str) -> None:
    """Killed at `point` and started again, the bot brings the issue to its one end."""
    process = await world.serve(failpoint=point)
    await world.listening()
    issue = await world.alice.open_issue("slug keeps capitals", "script: fix\n\nPlease mend `lib/slug.sh`.")
    comment = await world.alice.comment(issue, "/dispatch")
    assert await until(lambda: _ended(process), 30) == -signal.SIGKILL, world.log()[-3000:]
    await world.serve(failpoint=point)
    await world.listening()
    sprint = await world.settled(issue, 40)
    assert sprint.outcome == "pull_request", (sprint, await world.trail(issue))
    await one_of_each(world, issue)
    assert await world.labels(issue) == {"dispatch/review"}
    assert await world.reactions(comment) == {"eyes", "rocket"}
    calls = [request for request in world.model.requests if request]
    assert len(calls) <= 8, "a stored step was asked again"


async def one_of_each(world: ServedWorld, issue: int) -> None:
    """One open pull request, and one status comment that names it."""
    pulls = await world.pulls()
    assert [pull["state"] for pull in pulls] == ["open"]
    said = await world.by_bot(issue)
    assert len(said) == 1, said
    assert f"#{pulls[0]['number']}" in said[0]


@pytest.mark.parametrize("point", POINTS)
async def test_killed_at(base: Path, point: str):
    async with make_world(base, kind=ServedWorld, start=False, reconcile=RECONCILE) as world:
        await survive(world, point)


async def _ended(process):
    return process.returncode
