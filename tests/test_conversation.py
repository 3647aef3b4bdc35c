"""Conversations: a label or a comment goes in; reactions, one status comment, labels and a pull request come out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from world import FORGES, World, make_world, until

BODY = "script: {script}\n\nPlease mend `lib/slug.sh`."


@pytest.fixture(params=FORGES)
async def world(request: pytest.FixtureRequest, base: Path) -> AsyncIterator[World]:
    """Every conversation is held on the embedded forge, and on a real Gitea where the variables name one."""
    async with make_world(base, live=request.param == "live") as made:
        yield made


async def issue_with(world: World, script: str = "fix", title: str = "slug keeps capitals") -> int:
    return await world.alice.open_issue(title, BODY.format(script=script))


async def test_label_becomes_a_pull_request(world: World):
    issue = await issue_with(world)
    await world.alice.label(issue, "dispatch")
    sprint = await world.settled(issue)
    assert (sprint.outcome, sprint.reason) == ("pull_request", ""), sprint
    [pull] = await world.pulls()
    assert pull["state"] == "open"
    assert f"Closes #{issue}" in pull["body"]
    assert pull["head"]["label"] == f"dispatch/issue-{issue}"
    assert await world.labels(issue) == {"dispatch", "dispatch/review"}
    [status] = await world.by_bot(issue)
    assert f"#{pull['number']}" in status
    trail = await world.trail(issue)
    assert [(entry.kind, entry.result) for entry in trail] == [("run", "ok"), ("admit", "ok"), ("settle", "pull_request")]
    assert trail[0].actor == world.alice.login


async def test_comment_is_acknowledged_and_runs(world: World):
    issue = await issue_with(world)
    comment = await world.bob.comment(issue, "Please look at this.\n\n/dispatch run steps=20\nkeep it POSIX")
    sprint = await world.settled(issue)
    assert sprint.outcome == "pull_request"
    assert sprint.requester == world.bob.login
    assert sprint.limits.steps == 20
    assert await world.reactions(comment) == {"eyes", "rocket"}
    assert len(await world.by_bot(issue)) == 1


async def test_stranger_is_refused_once_with_the_reason(world: World):
    issue = await issue_with(world)
    first = await world.mallory.comment(issue, "/dispatch")
    await until(lambda: world.by_bot(issue))
    second = await world.mallory.comment(issue, "/dispatch run")
    await until(lambda: _has(world, second, "confused"))
    assert await world.reactions(first) == {"eyes", "confused"}
    [reply] = await world.by_bot(issue)
    assert world.mallory.login in reply
    assert await world.sprint(issue) is None
    assert world.model.requests == []
    assert await world.pulls() == []


async def _has(world: World, comment: int, reaction: str) -> bool:
    return reaction in await world.reactions(comment)


async def test_quotes_and_code_never_trigger(world: World):
    issue = await issue_with(world)
    body = "> /dispatch\n\n```\n/dispatch\n```\n\n    /dispatch\n\nWrite `/dispatch` to start.\n\n<!--\n/dispatch\n-->"
    silent = await world.alice.comment(issue, body)
    loud = await world.alice.comment(issue, "/dispatch status")
    await until(lambda: _has(world, loud, "rocket"))
    assert await world.reactions(silent) == set()
    assert await world.sprint(issue) is None


async def test_typo_gets_a_suggestion(world: World):
    issue = await issue_with(world)
    comment = await world.alice.comment(issue, "/dispatch cancle")
    await until(lambda: _has(world, comment, "confused"))
    [reply] = await until(lambda: world.by_bot(issue))
    assert "cancel" in reply


async def test_edited_comment_runs_only_what_is_new_as_its_editor(world: World):
    issue = await issue_with(world)
    comment = await world.mallory.comment(issue, "I would like this.")
    await world.mallory.edit_comment(comment, "I would like this.\n\n/dispatch")
    await until(lambda: _has(world, comment, "confused"))
    assert await world.sprint(issue) is None
    await world.alice.edit_comment(comment, "I would like this.\n\n/dispatch\n\n/dispatch run")
    sprint = await world.settled(issue)
    assert sprint.requester == world.alice.login


async def test_cancel_in_the_middle_kills_and_says_so(world: World):
    issue = await issue_with(world, "slow(30)")
    await world.alice.label(issue, "dispatch")
    await until(lambda: world.model.requests)
    started = asyncio.get_running_loop().time()
    await world.alice.comment(issue, "/dispatch cancel")
    sprint = await world.settled(issue)
    assert sprint.outcome == "cancelled"
    assert asyncio.get_running_loop().time() - started < 6
    assert "ancelled" in await world.status_comment(issue)
    assert await world.labels(issue) == {"dispatch"}
    assert await world.pulls() == []


async def test_no_change_is_not_success(world: World):
    issue = await issue_with(world, "no_change")
    await world.alice.label(issue, "dispatch")
    sprint = await world.settled(issue)
    assert sprint.outcome == "no_change"
    assert await world.labels(issue) == {"dispatch"}
    assert await world.pulls() == []


async def test_protected_path_is_refused_and_the_patch_kept(world: World):
    issue = await issue_with(world, "touch_workflow")
    await world.alice.label(issue, "dispatch")
    sprint = await world.settled(issue)
    assert (sprint.outcome, sprint.reason) == ("refused", "policy")
    assert ".gitea" in sprint.detail
    assert await world.labels(issue) == {"dispatch", "dispatch/blocked"}
    assert await world.pulls() == []
    assert world.service.workspaces.kept_patch(sprint.id)


async def test_limit_keeps_partial_work_as_a_draft(world: World):
    issue = await issue_with(world, "endless")
    await world.alice.comment(issue, "/dispatch steps=4")
    sprint = await world.settled(issue)
    assert sprint.outcome == "budget"
    assert sprint.steps <= 5
    assert await world.labels(issue) >= {"dispatch/failed"}


async def test_garbage_from_the_model_ends_in_a_terminal_state(world: World):
    issue = await issue_with(world, "no_tool_call")
    await world.alice.label(issue, "dispatch")
    sprint = await world.settled(issue)
    assert sprint.outcome in ("no_change", "failed")


async def test_retry_updates_the_same_pull_request(world: World):
    issue = await issue_with(world)
    await world.alice.label(issue, "dispatch")
    await world.settled(issue)
    [pull] = await world.pulls()
    comment = await world.alice.comment(issue, "/dispatch retry")
    await until(lambda: _has(world, comment, "rocket"))
    sprint = await world.settled(issue)
    assert sprint.outcome == "updated", sprint
    assert [entry["number"] for entry in await world.pulls()] == [pull["number"]]
    assert len(await world.by_bot(issue)) == 2


async def test_closing_the_issue_cancels(world: World):
    issue = await issue_with(world, "slow(30)")
    await world.alice.label(issue, "dispatch")
    await until(lambda: world.model.requests)
    await world.alice.edit_issue(issue, state="closed")
    assert (await world.settled(issue)).outcome == "cancelled"


async def test_removing_the_label_cancels_only_what_it_started(world: World):
    issue = await issue_with(world, "slow(3)")
    await world.alice.label(issue, "dispatch")
    await until(lambda: world.model.requests)
    await world.alice.unlabel(issue, "dispatch")
    assert (await world.settled(issue)).outcome == "cancelled"
    other = await issue_with(world, "slow(1)", "another")
    await world.alice.comment(other, "/dispatch")
    await until(lambda: len(world.model.requests) > 1)
    await world.alice.label(other, "dispatch")
    await world.alice.unlabel(other, "dispatch")
    assert (await world.settled(other, 60)).outcome != "cancelled"


async def test_merged_pull_request_is_recorded(world: World):
    issue = await issue_with(world)
    await world.alice.label(issue, "dispatch")
    await world.settled(issue)
    [pull] = await world.pulls()
    await world.alice.merge(pull["number"])

    async def merged():
        return (await world.sprint(issue)).pr_state == "merged"

    await until(merged)
    await world.shown(issue)
    assert "dispatch/review" not in await world.labels(issue)


async def test_a_named_model_is_asked_first(base: Path):
    async with make_world(base) as world:
        one = {"name": "one", "base_url": world.model.url, "model": "scripted-1"}
        await world.stop()
        await world.start(providers=[one, {**one, "name": "two", "model": "scripted-2"}])
        issue = await issue_with(world)
        await world.alice.comment(issue, "/dispatch run model=scripted-2")
        sprint = await world.settled(issue)
        assert (sprint.outcome, sprint.provider, sprint.model) == ("pull_request", "two", "scripted-2")
