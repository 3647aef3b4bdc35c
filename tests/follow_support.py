"""What the tests of follow-ups share: an issue with its pull request, reviews, statuses, and what the bot said on a pull request."""

from __future__ import annotations

import json
from typing import Any

import sqlalchemy as sa
from talk import issue_with, pulls_of
from world import World, until

from bot.store import sprints

SETTLE = {"follow_ups": {"settle_seconds": 0.2}}


def script(*calls: tuple[str, dict[str, Any]]) -> str:
    """A line that tells the scripted model which calls to make, one a turn."""
    return f"script: calls({json.dumps([list(call) for call in calls])})"


def writes(path: str, text: str, summary: str) -> str:
    """A line that makes the scripted model write one file and finish with this summary."""
    return script(("write_file", {"path": path, "content": text}), ("finish", {"summary": summary}))


async def opened(world: World, command: str = "/dispatch") -> tuple[int, dict[str, Any]]:
    """An issue whose sprint has opened a pull request: (issue, pull)."""
    issue = await issue_with(world)
    await world.alice.comment(issue, command)
    sprint = await world.settled(issue, 90)
    assert sprint.outcome == "pull_request", sprint
    [pull] = await pulls_of(world, issue)
    return issue, pull


async def review(person: Any, pull: int, event: str, body: str, *comments: tuple[str, int, str]) -> dict[str, Any]:
    """A review with comments on lines of the new files, (path, line, text)."""
    lines = [{"path": path, "new_position": line, "body": text} for path, line, text in comments]
    return await person.client.post(f"/repos/{person.repo}/pulls/{pull}/reviews", {"event": event, "body": body, "comments": lines})


async def red(person: Any, sha: str, context: str = "ci/test", description: str = "1 failed", state: str = "failure") -> None:
    """A status of a commit."""
    data = {"state": state, "context": context, "description": description, "target_url": "https://ci.example.org/1"}
    await person.client.post(f"/repos/{person.repo}/statuses/{sha}", data)


async def sprints_of(world: World, issue: int) -> list[Any]:
    """Every sprint of an issue, oldest first."""
    c = sprints.table.c

    def read(conn: Any) -> list[Any]:
        statement = sa.select(c.id).where(c.repo_id == world.stage.repo_id, c.issue == issue).order_by(c.queued_ms, c.id)
        return [sprints.get(conn, sprint) for sprint in conn.execute(statement).scalars()]

    return await world.store.read(read)


async def rounds(world: World, issue: int, count: int, seconds: float = 90.0) -> list[Any]:
    """Waits until an issue has had `count` sprints and all of them are settled and shown."""

    async def there():
        found = await sprints_of(world, issue)
        return found if len(found) >= count and all(view.state == "settled" for view in found) else None

    found = await until(there, seconds)
    await world.shown(issue)
    return found


async def said(world: World, pull: int, start: str) -> list[str]:
    """What the bot said on a pull request and begins so."""
    return [body for body in await world.by_bot(pull) if body.startswith(start)]


async def pull_now(world: World, pull: int) -> dict[str, Any]:
    """A pull request as it is now."""
    return await world.alice.forge.pull(world.stage.repo, pull)


def prompts(world: World) -> list[str]:
    """The task of every conversation with the model so far, each once, oldest first."""
    found = (
        next(message["content"] for message in request.body["messages"] if message["role"] == "user") for request in world.model.requests
    )
    return list(dict.fromkeys(found))


async def looked(world: World) -> None:
    """Waits until nothing is left to be looked at."""

    async def quiet():
        return await world.store.read(lambda conn: conn.exec_driver_sql("select count(*) from pull_looks").scalar() == 0)

    await until(quiet)
