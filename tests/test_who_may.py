"""Who may ask for what, seen as a conversation: roles, lists, other bots, a bot that only writes, caps, and refusals that are said once."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from talk import answered, issue_with, reacted, sprint_count, state_is
from world import FORGES, World, make_world, until

from bot import replies
from bot.chatops import Invocation
from bot.cli import _verb
from bot.config import Loaded
from bot.doctor import Mark, Patient, checks, examine, hook
from bot.models import Actor, Ask, IssueRef, RepoId, Source
from bot.store import Store


async def _findings(world: World, *titles: str) -> dict[str, list[Any]]:
    """What `doctor` says of the running service's set-up, by the name of the probe."""
    patient = Patient(world.settings(allow_users=[world.bob.login]), world.stage.secrets(), world.timmy.forge, {}, wait_seconds=2.0)
    found: dict[str, list[Any]] = {}
    async for probe in examine(patient, [check for check in checks() if check.title in titles]):
        found.setdefault(probe.name, []).append(probe)
    return found


async def _issue_reactions(world: World, issue: int) -> set[str]:
    found = await world.alice.client.getitem(f"/repos/{world.stage.repo}/issues/{issue}/reactions")
    return {item["content"] for item in found or ()}


@pytest.mark.parametrize("live", FORGES)
async def test_a_bot_that_only_writes_works_and_doctor_says_which_it_is(base: Path, live: str):
    async with make_world(base, live=live == "live", start=False) as world:
        name = world.stage.repo
        found = await _findings(world, "webhook", "rights")
        assert [probe.detail for probe in found[name]] == ["administrator rights"]
        await world.stage._collaborator("timmy", "write")
        found = await _findings(world, "webhook", "rights")
        [right] = found[name]
        assert (right.mark, "only the users in `allow_users` can trigger" in right.detail) == (Mark.WARN, True)
        [seen] = found[f"{name} hook"]
        assert seen.mark is Mark.WARN, "nothing has come yet, and that is all it can say"
        assert "no delivery of this repository has come so far" in seen.detail
        await world.start(allow_users=[world.bob.login])
        issue = await issue_with(world, "no_change")
        refused = await world.alice.comment(issue, "/dispatch")
        await reacted(world, refused, "confused")
        [reply] = await until(lambda: world.by_bot(issue))
        assert "allow_users" in reply
        await world.bob.comment(issue, "/dispatch run")
        assert (await world.settled(issue)).requester == world.bob.login
        [seen] = (await _findings(world, "webhook"))[f"{name} hook"]
        assert (seen.mark, "deliveries arrive, the last one" in seen.detail) == (Mark.OK, True)


def test_a_hook_elsewhere_is_believed_by_its_deliveries() -> None:
    now = 10 * 86_400_000
    assert hook.elsewhere("a/b", now - 90_000, now).detail.endswith("the last one 1 min ago")
    assert hook.elsewhere("a/b", now - 3 * 3_600_000, now).detail.endswith("the last one 3 hours ago")
    assert hook.unseen("a/b", now - 4 * 86_400_000, now).detail.endswith("the last one 4 days ago")
    assert hook.unseen("a/b", 0, now).mark is Mark.WARN


async def test_a_role_raises_what_a_verb_needs(base: Path):
    async with make_world(base, start=False) as world:
        roles = {"run": "admin", "queue": "write", "status": "read", "cancel": "read"}
        await world.start(repositories=[{"name": world.stage.repo, "roles": roles}])
        issue = await issue_with(world, "slow(30)")
        refused = await world.bob.comment(issue, "/dispatch run")
        stranger = await world.mallory.comment(issue, "/dispatch queue")
        await reacted(world, refused, "confused")
        await reacted(world, stranger, "confused")
        said = await until(lambda: _count(world, issue, 2))
        assert any(f"`/dispatch run` needs administrator rights here, and `{world.bob.login}` has write access" in text for text in said)
        assert any("`/dispatch queue` needs write access here" in text for text in said)
        await world.alice.comment(issue, "/dispatch run")
        await state_is(world, issue, "working")
        # A lower level than usual changes nothing.
        cancel = await world.mallory.comment(issue, "/dispatch cancel")
        await reacted(world, cancel, "confused")
        status = await world.mallory.comment(issue, "/dispatch status")
        await reacted(world, status, "rocket")
        await world.bob.comment(issue, "/dispatch cancel")
        assert (await world.settled(issue)).outcome == "cancelled"


async def _count(world: World, issue: int, number: int) -> list[str] | None:
    said = await world.by_bot(issue)
    return said if len(said) >= number else None


async def test_other_bots_our_own_acts_and_the_same_refusal_twice(base: Path):
    async with make_world(base, start=False, commands_per_person=4) as world:
        await world.start(allow_bots=["helper[bot]"])
        issue = await issue_with(world, "no_change")
        ref, decide = IssueRef.parse(f"{world.stage.repo}#{issue}"), world.service.decider.decide

        def label(event: int, actor: Actor) -> Ask:
            key = f"label:{event}"
            return Ask(key, RepoId(world.stage.repo_id), ref, actor, Source.LABEL, "run", asked_ms=1)

        # The server's own Actions user, and a bot that nobody listed: no words, but it is seen.
        for event, actor in ((9001, Actor(-2, "gitea-actions")), (9002, Actor(77, "other[bot]"))):
            verdict = await decide(label(event, actor))
            assert verdict is not None
            assert (verdict.result, verdict.reply.name) == ("denied", "")
        await until(lambda: _seen(world, issue))
        assert await world.by_bot(issue) == []
        # One that is listed still needs the right.
        verdict = await decide(label(9003, Actor(78, "helper[bot]")))
        assert verdict is not None
        assert verdict.result == "denied"
        [reply] = await until(lambda: world.by_bot(issue))
        assert "`helper[bot]`, who has no write access" in reply
        # The same person, the same thing, another label event: no second comment.
        assert await decide(label(9004, Actor(78, "helper[bot]"))) is not None
        # What the bot itself does asks nothing.
        await world.timmy.label(issue, "dispatch")
        await world.timmy.comment(issue, "/dispatch run")
        await world.timmy.edit_issue(issue, assignees=[world.timmy.login])
        # Four commands are free; what goes beyond is told once, then only shown.
        for _ in range(4):
            await answered(world, issue)
        over = [await world.alice.comment(issue, f"/dispatch {verb}") for verb in ("queue", "status", "help")]
        for comment in over:
            await reacted(world, comment, "confused")
        await world.shown(issue)
        said = await world.by_bot(issue)
        # One refusal, four answers, one word on the cap, and the comment that the bot wrote as a person would.
        assert len(said) == 1 + 4 + 1 + 1
        assert len([text for text in said if "which is the most I take" in text]) == 1
        # The cap is one of a person and an issue.
        await reacted(world, await world.bob.comment(issue, "/dispatch status"), "rocket")
        other = await issue_with(world, "no_change", "another")
        await answered(world, other)
        assert await sprint_count(world, issue) == 0
        assert world.model.requests == []


async def _seen(world: World, issue: int) -> bool:
    return "confused" in await _issue_reactions(world, issue)


async def test_too_late_to_cancel_names_the_pull_request(base: Path):
    """A person who cancels while the pull request is being opened, or after, is told so; a close of the issue changes nothing either."""
    async with make_world(base) as world:
        issue = await issue_with(world)
        held = world.forge.fail_next(1, status=200, match=r"POST .*/pulls$", delay=6.0)
        await world.alice.label(issue, "dispatch")
        await state_is(world, issue, "publishing")
        comment = await world.alice.comment(issue, "/dispatch cancel")
        await reacted(world, comment, "confused")
        said = await until(lambda: _texts(world, issue, "Too late to cancel"))
        assert "the sprint is already at publishing its pull request. Close that if you do not want it" in said[0]
        sprint = await world.settled(issue)
        assert (sprint.outcome, held.left) == ("pull_request", 0)
        [pull] = await world.pulls()
        late = await world.bob.comment(issue, "/dispatch cancel")
        await reacted(world, late, "confused")
        await until(lambda: _texts(world, issue, "There is nothing to cancel"))
        assert f"#{pull['number']}" in await world.status_comment(issue)
        assert replies.too_late({"pr": pull["number"], "state": "settled"}).startswith("Too late to cancel: the sprint is already past")


async def test_explain_on_the_terminal_tells_what_is_in_the_way_and_needs_no_forge(base: Path):
    async with make_world(base) as world:
        issue = await issue_with(world)
        await reacted(world, await world.alice.comment(issue, "/dispatch skip not now"), "rocket")
        loaded = Loaded(world.settings(), world.stage.secrets())

        def explain() -> str:
            store = Store(loaded.settings.database_url())
            store.open()
            try:
                ask = _verb._ask(store, IssueRef.parse(f"{world.stage.repo}#{issue}"), "explain", Invocation("explain"))
                verdict = _verb._at_best(store, loaded, ask)
            finally:
                store.close()
            assert verdict.result == "ok"
            return replies.on_terminal(verdict.reply)

        said = await asyncio.to_thread(explain)
        assert "In the way of a start now" in said
        assert f"{world.alice.login} has put this issue on the skip list" in said
        assert "asked for `skip`" in said
        await world.stop()
        await world.forge.stop()
        said = await asyncio.to_thread(explain)
        assert "The forge does not answer just now" in said
        assert "asked for `skip`" in said


async def _texts(world: World, issue: int, words: str) -> list[str]:
    return [text for text in await world.by_bot(issue) if words in text]
