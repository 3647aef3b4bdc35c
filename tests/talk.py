"""Short words for conversations: file an issue, wait for the answer, count what became of it."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from world import World, until

from bot.store import sprints

BODY = "script: {script}\n\nPlease mend `lib/slug.sh`."


async def issue_with(world: World, script: str = "fix", title: str = "slug keeps capitals", person: Any = None) -> int:
    """An issue whose text tells the scripted model what to do."""
    return await (person or world.alice).open_issue(title, BODY.format(script=script))


async def sprint_count(world: World, issue: int) -> int:
    """Sprints that an issue ever had."""
    table = sprints.table
    statement = sa.select(sa.func.count()).where(table.c.repo_id == world.stage.repo_id, table.c.issue == issue)
    return await world.store.read(lambda conn: conn.execute(statement).scalar())


async def reacted(world: World, comment: int, reaction: str, seconds: float = 45.0) -> None:
    """Waits for a reaction on a comment."""

    async def there():
        return reaction in await world.reactions(comment)

    await until(there, seconds)


async def answered(world: World, issue: int, text: str = "/dispatch status") -> int:
    """One more command and its answer: what was sent before it has arrived by then."""
    comment = await world.alice.comment(issue, text)
    await reacted(world, comment, "rocket")
    return comment


async def state_is(world: World, issue: int, *states: str, seconds: float = 45.0) -> Any:
    """Waits until the newest sprint of an issue is in one of these states; returns it."""

    async def there():
        view = await world.sprint(issue)
        return view if view is not None and view.state in states else None

    return await until(there, seconds)


async def pulls_of(world: World, issue: int) -> list[dict[str, Any]]:
    """The pull requests whose branch is one of an issue's."""
    stem = f"dispatch/issue-{issue}"
    return [pull for pull in await world.pulls() if pull["head"]["label"] == stem or pull["head"]["label"].startswith(stem + "-")]


async def one_of_each(world: World, issue: int) -> Any:
    """The sprint of an issue once it has settled with exactly one pull request and one status comment."""
    sprint = await world.settled(issue, 90)
    assert sprint.outcome == "pull_request", sprint
    [pull] = await pulls_of(world, issue)
    assert pull["state"] == "open"
    [status] = await world.by_bot(issue)
    assert f"#{pull['number']}" in status
    assert await world.labels(issue) >= {"dispatch/review"}
    assert await sprint_count(world, issue) == 1
    return sprint
