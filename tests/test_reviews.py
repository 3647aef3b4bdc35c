"""A review that requests changes is worked off on the same branch, each comment answered once, and the reviewer asked again."""

from __future__ import annotations

from pathlib import Path

import pytest
from follow_support import SETTLE, looked, opened, prompts, pull_now, review, rounds, said, writes
from talk import answered, sprint_count
from world import FORGES, World, make_world, until


@pytest.mark.parametrize("where", [*FORGES, "1.22"])
async def test_a_review_is_worked_off_on_the_same_branch(base: Path, where: str):
    async with make_world(base, live=where == "live", personality="1.22" if where == "1.22" else "1.26", **SETTLE) as world:
        issue, pull = await opened(world)
        number, head, title, body = pull["number"], pull["head"]["sha"], pull["title"], pull["body"]
        await until(lambda: heard(world, "push"))

        order = writes("EMPTY.md", "empty\n", "Empty input is described.\n\nC1: it is written down now")
        await review(world.bob, number, "COMMENT", "I only look.", ("lib/slug.sh", 2, "a thought"))
        await review(world.bob, number, "REQUEST_CHANGES", f"What about empty input?\n\n{order}", ("lib/slug.sh", 3, "say it here"))
        [_, second] = await rounds(world, issue, 2)

        assert (second.outcome, second.source, second.pr, second.branch) == ("updated", "review", number, pull["head"]["label"])
        now = await pull_now(world, number)
        assert (now["title"], now["body"], now["state"]) == (title, body, "open")
        assert (second.base_sha, second.lease_sha, second.head_sha) == (head, head, now["head"]["sha"])
        assert await world.labels(issue) == {"dispatch/review"}
        status = await world.status_comment(issue)
        assert (
            status.startswith(f"✅ **Done: [pull request #{number}]") and "is updated" in status and "Empty input is described." in status
        )
        task = prompts(world)[-1]
        assert f"# Follow-up on pull request #{number}" in task and "What about empty input?" in task
        assert "C1, " in task and "`lib/slug.sh:2`" in task and "a thought" in task and "`lib/slug.sh:3`" in task
        assert "@@" in task, "no hunk"

        [taken] = await said(world, number, "🔧 **I take up the review by")
        assert f"told on #{issue}" in taken
        [ended] = await said(world, number, "✅ **Updated** with")
        assert "C1:" not in ended and "`lib/slug.sh:2`" in ended and "it is written down now" in ended
        assert "`lib/slug.sh:3`" in ended and "not changed in this round" in ended
        await until(lambda: asked_again(world, number))

        # a second delivery of the same review, an approval, and a stranger who may not ask for anything
        [(event, raw)] = [item for item in await world.stored() if item[0] == "pull_request_review_rejected"]
        assert (await world.send(event, raw.replace(b'"number"', b' "number"', 1)))[0] == 202
        await review(world.bob, number, "APPROVED", "Good.")
        await review(world.mallory, number, "REQUEST_CHANGES", "No!")
        await review(world.mallory, number, "REQUEST_CHANGES", "Still no!")
        await until(lambda: refused(world, number))
        await looked(world)
        await answered(world, number, "/dispatch status")
        await until(lambda: told(world, number, f"done: pull request #{number}"))
        await looked(world)
        assert len(await said(world, number, "Not started:")) == 1
        assert await sprint_count(world, issue) == 2
        assert len(await said(world, number, "✅ **Updated** with")) == 1


def heard(world: World, what: str) -> bool:
    return any(event.startswith(what) for event, _, _ in world.heard)


async def asked_again(world: World, number: int) -> bool:
    reviews = await world.alice.forge.reviews(world.stage.repo, number)
    timeline = await world.alice.forge.timeline(world.stage.repo, number)
    requests = [item for item in timeline if item["type"] == "review_request"]
    return len(requests) == 1 and any(item["state"] == "REQUEST_REVIEW" for item in reviews)


async def told(world: World, number: int, words: str) -> bool:
    """The reaction comes before the comment."""
    return any(words in body for body in await world.by_bot(number))


async def refused(world: World, number: int) -> bool:
    return len(await said(world, number, "Not started: `mallory")) == 1
