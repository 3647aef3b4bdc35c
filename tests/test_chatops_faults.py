"""Conversations under faults: people who act within a second of each other, a draft that is gone on with, a forge that is away in the middle of it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from talk import answered, issue_with, one_of_each, pulls_of, reacted, sprint_count, state_is
from world import FORGES, World, make_world, until


@pytest.mark.parametrize("live", FORGES)
async def test_people_within_a_second_of_each_other(base: Path, live: str):
    async with make_world(base, live=live == "live") as world:
        await world.alice.comment(await issue_with(world, title="holds"), "/dispatch pause repo")

        async def paused():
            return await world.store.read(lambda conn: conn.exec_driver_sql("select count(*) from pauses").scalar())

        await until(paused)
        # A label set and unset within a second starts nothing, and set again it is a new wish.
        flicker = await issue_with(world, title="flicker")
        await world.alice.label(flicker, "dispatch")
        await world.alice.unlabel(flicker, "dispatch")
        await answered(world, flicker)

        async def nothing_active():
            sprint = await world.sprint(flicker)
            return sprint is None or sprint.state == "settled"

        await until(nothing_active)
        before = await sprint_count(world, flicker)
        await world.alice.label(flicker, "dispatch")
        await state_is(world, flicker, "queued")
        assert await sprint_count(world, flicker) == before + 1

        # A comment edited while its sprint is queued: what is new in it meets the sprint that is there.
        edited = await issue_with(world, title="edited")
        comment = await world.alice.comment(edited, "/dispatch run steps=9")
        await state_is(world, edited, "queued")
        await world.alice.edit_comment(comment, "/dispatch run steps=5")
        await until(lambda: _said(world, edited, "This issue is already queued"))
        await world.alice.edit_comment(comment, "never mind")
        await answered(world, edited)
        sprint = await world.sprint(edited)
        assert (sprint.state, sprint.limits.steps, await sprint_count(world, edited)) == ("queued", 9, 1)

        # Two people at once: one cancels, the other retries. Whoever comes first, at most one sprint is active and both are answered.
        both = await issue_with(world, title="both")
        await world.alice.comment(both, "/dispatch")
        await state_is(world, both, "queued")
        stop, again = await asyncio.gather(world.alice.comment(both, "/dispatch cancel"), world.bob.comment(both, "/dispatch retry"))
        await reacted(world, stop, "rocket")
        await reacted(world, again, "rocket")
        count = await sprint_count(world, both)
        sprint = await world.sprint(both)
        assert (count, sprint.state) in ((1, "settled"), (2, "queued"))

        await world.alice.comment(both, "/dispatch resume repo")
        for issue in (flicker, edited):
            await one_of_last(world, issue)


async def one_of_last(world: World, issue: int) -> None:
    sprint = await world.settled(issue, 120)
    assert sprint.outcome == "pull_request", sprint
    assert len(await pulls_of(world, issue)) == 1


async def _said(world: World, issue: int, words: str):
    return [text for text in await world.by_bot(issue) if words in text]


@pytest.mark.parametrize("live", FORGES)
async def test_retry_goes_on_with_a_draft_and_fresh_begins_anew(base: Path, live: str):
    async with make_world(base, live=live == "live", start=False) as world:
        await world.start(repositories=[{"name": world.stage.repo, "checks": ["test -f OTHER.md"]}])
        issue = await issue_with(world, 'write({"NOTE.md": "first"})')
        await world.alice.comment(issue, "/dispatch")
        sprint = await world.settled(issue)
        assert (sprint.outcome, sprint.reason) == ("failed", "checks")
        [draft] = await world.pulls()
        assert draft["title"].startswith("WIP:")
        assert await _files(world, draft["number"]) == {"NOTE.md"}

        await world.alice.edit_issue(issue, body='script: write({"OTHER.md": "second"})')
        await world.alice.comment(issue, "/dispatch retry")
        await _settled_as(world, issue, 2)
        [pull] = await world.pulls()
        assert pull["number"] == draft["number"]
        assert await _files(world, pull["number"]) == {"NOTE.md", "OTHER.md"}, "what was there is gone on with"
        assert not pull["title"].startswith("WIP:")

        await world.alice.comment(issue, "/dispatch retry fresh")
        sprint = await _settled_as(world, issue, 3)
        assert sprint.instructions == ""
        [pull] = await world.pulls()
        assert await _files(world, pull["number"]) == {"OTHER.md"}, "begun from the base branch"


async def _settled_as(world: World, issue: int, number: int):
    async def there():
        return await sprint_count(world, issue) == number

    await until(there)
    sprint = await world.settled(issue)
    assert sprint.outcome == "updated", sprint
    return sprint


async def _files(world: World, pull: int) -> set[str]:
    found = await world.alice.client.getitem(f"/repos/{world.stage.repo}/pulls/{pull}/files")
    return {item["filename"] for item in found}


async def test_the_forge_is_away_in_the_middle_of_everything(base: Path):
    """One issue is being worked on, one waits, one is asked for while the forge is gone: each ends with one pull request and one status comment."""
    async with make_world(base) as world:
        working = await issue_with(world, "slow(1)", "at work")
        await world.alice.label(working, "dispatch")
        await state_is(world, working, "working")
        waiting = await issue_with(world, title="waits")
        await world.bob.comment(waiting, "/dispatch")
        await state_is(world, waiting, "queued")
        asked = await issue_with(world, title="asked meanwhile")
        world.forge.drop_deliveries = True
        comment = await world.alice.comment(asked, "/dispatch run")
        body = next(delivery.body for delivery in reversed(world.forge.deliveries) if delivery.event_type == "issue_comment")
        await world.forge.stop()
        assert await world.send("issue_comment", body) == (202, "stored")
        await asyncio.sleep(5)
        # Nobody has lost or finished anything meanwhile.
        assert (await world.sprint(working)).state != "settled"
        assert (await world.sprint(waiting)).state != "settled"
        assert await world.sprint(asked) is None
        world.forge.drop_deliveries = False
        await world.forge.start()
        for issue in (working, waiting, asked):
            await one_of_each(world, issue)
        await reacted(world, comment, "rocket")


async def test_the_time_to_wait_is_told_from_history(base: Path):
    async with make_world(base) as world:
        first = await issue_with(world, "slow(1)", "history")
        await world.alice.label(first, "dispatch")
        assert "should begin in" not in await world.status_comment(first)
        await world.settled(first)
        busy = await issue_with(world, "slow(30)", "busy")
        await world.alice.label(busy, "dispatch")
        await state_is(world, busy, "working")
        behind = await issue_with(world, title="behind")
        await world.alice.label(behind, "dispatch")

        async def told():
            status = await world.status_comment(behind)
            return status if "begin in about a minute" in status else None

        status = await until(told)
        assert "next in line" in status
        text = await until(lambda: _answer(world, behind))
        assert "next in line, to begin in about a minute" in text
        await world.alice.comment(busy, "/dispatch cancel")
        assert (await world.settled(behind)).outcome == "pull_request"


async def _answer(world: World, issue: int) -> str:
    await answered(world, issue, "/dispatch status")
    found = [text for text in await world.by_bot(issue) if "**Now:**" in text]
    return found[-1] if found else ""
