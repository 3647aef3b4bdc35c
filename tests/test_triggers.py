"""What starts a sprint besides the label and the command: an assignment and a mention, how they are taken back, found later and switched off."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from talk import answered, issue_with, one_of_each, pulls_of, reacted, sprint_count, state_is
from test_handlers import ALICE, BOB, TIMMY, Desk, changed, findings, recorded
from world import FORGES, World, make_world, until

from bot.chatops import LabelAdded, TextEdited, mentions, unheard
from bot.models import Actor, Ask, IssueRef, RepoId, Source
from bot.settings import RepositorySettings

ASSIGNED = LabelAdded(123, BOB, 1_795_554_000_000)


@pytest.fixture(params=FORGES)
async def world(request: pytest.FixtureRequest, base: Path) -> AsyncIterator[World]:
    """Each conversation on the embedded forge, and on a real Gitea where the variables name one."""
    async with make_world(base, live=request.param == "live") as made:
        yield made


@pytest.mark.parametrize(
    "text",
    [
        "@timmy please",
        "Could @Timmy do this?",
        "please, @TIMMY.",
        "(@timmy)",
        "- a list\n- @timmy: mend it",
        "# @timmy, the title",
        "words\r\n@timmy\r\nwords",
        "> quoted\n\n@timmy, answer",
        "| a | b |\n|---|---|\n| x | @timmy |",
        "<b>@timmy</b>",
    ],
)
def test_a_word_to_the_bot(text: str) -> None:
    assert mentions(text, "timmy")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "timmy",
        "@timmy2 and @timmy-bot and @timmy_x",
        "@timmy/team",
        "x@timmy.example and me@timmy",
        "@timmy.example",
        "> @timmy in a quote",
        "> quoted\nlazy @timmy",
        "`@timmy`",
        "```\n@timmy\n```",
        "````\n```\n@timmy\n````",
        "```\r\n@timmy, never closed",
        "    @timmy",
        "- item\n\n      @timmy in code in a list",
        "<!-- @timmy -->",
        "<!--\n\n@timmy\n\n-->",
        "text <!-- @timmy --> text",
        "[the @timmy](https://x.example)",
        "<https://x.example/@timmy>",
        "/dispatch run @timmy",
        "@timmy\n\n<!-- timmy-dispatch:v1 key=reply:x -->",
    ],
)
def test_no_word_to_the_bot(text: str) -> None:
    assert not mentions(text, "timmy")
    assert not mentions(text, "")


@pytest.mark.parametrize("version", ["1.26", "1.22"])
async def test_an_assignment_is_credited_to_whom_the_timeline_names(version: str) -> None:
    event, desk = recorded("assigned-to-bot", version), Desk(ASSIGNED)
    (ask,) = await findings(event, desk)
    assert isinstance(ask, Ask)
    assert (ask.key, ask.source, ask.verb, ask.actor) == ("assignment:123", Source.ASSIGNMENT, "run", BOB)
    assert ask.delivered_hash
    assert await findings(event, Desk(None)) == []
    assert await findings(event, Desk(LabelAdded(123, Actor(TIMMY, "timmy"), 1))) == []
    assert await findings(changed(event, issue__state="closed"), Desk(ASSIGNED)) == []
    assert await findings(changed(event, issue__assignees=[{"id": 99}]), Desk(ASSIGNED)) == []


async def test_an_unassignment_stops_only_what_that_assignment_started() -> None:
    event = recorded("unassigned")
    (ask,) = await findings(event, Desk(None, "assignment:123"))
    assert isinstance(ask, Ask)
    assert (ask.key, ask.verb, ask.options) == ("unassign:123", "cancel", {"only_trigger": "assignment:123"})
    assert await findings(event, Desk(None, "label:123")) == []
    assert await findings(event, Desk(None, "command:1:x:0")) == []
    assert await findings(event, Desk(None, "")) == []
    # Assigned again meanwhile: this delivery is late.
    assert await findings(event, Desk(ASSIGNED, "assignment:123")) == []


async def test_a_mention_in_the_text_is_asked_for_by_its_author() -> None:
    event = changed(recorded("issue-opened"), issue__body="Hi @Timmy!")
    (ask,) = await findings(event)
    assert isinstance(ask, Ask)
    number = event.data["issue"]["number"]
    assert (ask.key, ask.source, ask.verb, ask.actor.id) == (f"mention:5:{number}", Source.MENTION, "run", event.sender_id)
    assert await findings(changed(event, issue__body="about `@timmy`")) == []


async def test_an_edit_asks_only_where_it_brought_the_mention_in() -> None:
    event = recorded("body-edited")
    with_word = changed(event, issue__body="now @timmy", changes={"body": {"from": "before"}})
    edited, ask = await findings(with_word)
    assert isinstance(edited, TextEdited)
    assert isinstance(ask, Ask)
    assert (ask.key.partition(":")[0], ask.actor.id) == ("mention", event.sender_id)
    [only] = await findings(changed(with_word, changes={"body": {"from": "@timmy before"}}))
    assert isinstance(only, TextEdited)
    [only] = await findings(changed(with_word, changes={"title": {"from": "x"}}))
    assert isinstance(only, TextEdited)


def test_what_is_no_trigger_is_not_heard() -> None:
    settings = Desk.settings.model_copy(update={"triggers": ("label", "command")})
    repository = RepositorySettings(name="acme/rocket")

    def ask(key: str) -> Ask:
        return Ask(
            key=key, repo_id=RepoId(5), issue=IssueRef.of("acme/rocket", 1), actor=ALICE, source=Source.COMMAND, verb="run", asked_ms=1
        )

    for key in ("assignment:1", "mention:5:1", "addressed:5:1"):
        verdict = unheard(ask(key), settings, repository)
        assert verdict is not None
        assert "no trigger here" in verdict.reason
        assert verdict.reply.name == ""
        assert unheard(ask(key), settings, repository.model_copy(update={"triggers": ("assignment", "mention")})) is None
    for key in ("label:1", "command:1:x:0", "unassign:1", "closed:5:1:0", "launch:5:1:1", "terminal:x"):
        assert unheard(ask(key), settings, repository) is None
    off = repository.model_copy(update={"triggers": ()})
    assert unheard(ask("label:1"), settings, off) is not None
    assert unheard(ask("command:1:x:0"), settings, off) is None


async def test_an_assignment_becomes_a_pull_request_and_its_end_stops_only_its_own(world: World):
    issue = await issue_with(world)
    await world.bob.edit_issue(issue, assignees=[world.timmy.login])
    sprint = await one_of_each(world, issue)
    assert (sprint.source, sprint.requester) == ("assignment", world.bob.login)
    assert "by assignment" in await world.status_comment(issue)

    slow = await issue_with(world, "slow(30)", "slow")
    await world.alice.edit_issue(slow, assignees=[world.timmy.login])
    await until(lambda: any("slow(30)" in str(request) for request in world.model.requests))
    await world.alice.edit_issue(slow, assignees=[])
    sprint = await world.settled(slow)
    assert sprint.outcome == "cancelled"
    status = await world.status_comment(slow)
    assert f"Cancelled by `{world.alice.login}`, because I was unassigned" in status

    other = await issue_with(world, "slow(2)", "asked by comment")
    await world.alice.comment(other, "/dispatch")
    await state_is(world, other, "preparing", "working")
    await world.alice.edit_issue(other, assignees=[world.timmy.login])
    await world.alice.edit_issue(other, assignees=[])
    assert (await world.settled(other)).outcome != "cancelled"
    assert await sprint_count(world, other) == 1


async def test_a_mention_in_an_opened_issue_runs_for_those_who_may(world: World):
    me = world.timmy.login
    issue = await world.bob.open_issue("slug keeps capitals", f"script: fix\n\n@{me.upper()}, please mend `lib/slug.sh`.")
    quiet = await world.alice.open_issue("about the bot", f"script: fix\n\n> @{me} said\n\nand `@{me}` did.")
    refused = await world.mallory.open_issue("a stranger's wish", f"script: fix\n\n@{me} please")
    sprint = await one_of_each(world, issue)
    assert (sprint.source, sprint.requester) == ("mention", world.bob.login)

    [reply] = await until(lambda: world.by_bot(refused))
    assert f"`{world.mallory.login}` mentions me in this issue, but has no write access" in reply
    assert await world.sprint(refused) is None
    # An edit that keeps the mention, and another comment, are no new wish.
    await world.mallory.edit_issue(refused, body=f"script: fix\n\n@{me} pretty please")
    first = await world.mallory.comment(quiet, f"@{me} what is this about?")
    await until(lambda: world.by_bot(quiet))
    await world.mallory.comment(quiet, f"and you, @{me}?")
    await answered(world, quiet)
    hint, status = await until(lambda: _two(world, quiet))
    assert "I act on commands only" in hint
    assert "Nothing has run" in status
    assert await world.reactions(first) == set()
    assert len(await world.by_bot(refused)) == 1
    assert await world.sprint(quiet) is None


@pytest.mark.parametrize("name", ["pr-review-comment", "pr-review-approved"])
@pytest.mark.parametrize("version", ["1.26", "1.22"])
async def test_a_command_in_a_review_is_answered_and_not_obeyed(version: str, name: str) -> None:
    event = recorded(name, version)
    assert await findings(event) == []
    spoken = changed(event, review={**event.data["review"], "content": "Fine.\n\n/dispatch retry fresh\n"})
    (ask,) = await findings(spoken)
    assert isinstance(ask, Ask)
    assert ask.key == f"unread:{event.repo_id}:{event.data['number']}"
    assert (ask.verb, ask.source, ask.text) == ("help", Source.MENTION, "/dispatch retry fresh")
    assert await findings(changed(event, review={**event.data["review"], "content": "> /dispatch run"})) == []
    assert await findings(changed(event, review=None)) == []


async def test_a_command_where_none_is_read_is_answered_once(world: World):
    issue = await world.bob.open_issue("slug keeps capitals", "script: fix\n\n/dispatch run steps=9\n")
    quoted = await world.bob.open_issue("about the bot", "How does this work?\n\n```\n/dispatch run\n```\n")
    [hint] = await until(lambda: world.by_bot(issue))
    assert "I read commands in comments only" in hint
    await world.bob.edit_issue(issue, body="script: fix\n\n/dispatch run\n")
    await world.bob.comment(issue, "/dispatch run")
    await until(lambda: world.sprint(issue))
    assert (await world.settled(issue)).outcome == "pull_request"
    [pull] = await pulls_of(world, issue)
    for event, body in (("COMMENT", "Nice.\n\n/dispatch retry fresh"), ("APPROVED", "/dispatch retry fresh")):
        await world.alice.client.post(f"/repos/{world.stage.repo}/pulls/{pull['number']}/reviews", {"event": event, "body": body})
    await until(lambda: world.by_bot(pull["number"]))
    await answered(world, pull["number"])
    said = await world.by_bot(pull["number"])
    assert [text for text in said if "or in a review" in text] == said[:1]
    assert await sprint_count(world, issue) == 1
    assert len([text for text in await world.by_bot(issue) if "comments only" in text]) == 1
    assert await world.by_bot(quoted) == []


async def _two(world: World, issue: int):
    said = await world.by_bot(issue)
    return said if len(said) == 2 else None


async def test_closing_stops_and_says_so(world: World):
    issue = await issue_with(world, "slow(30)")
    await world.alice.label(issue, "dispatch")
    await until(lambda: world.model.requests)
    await world.alice.edit_issue(issue, state="closed")
    assert (await world.settled(issue)).outcome == "cancelled"
    assert f"Cancelled by `{world.alice.login}`, because the issue was closed" in await world.status_comment(issue)

    waiting = await issue_with(world, title="waits")
    await world.alice.comment(waiting, "/dispatch pause repo")
    await world.alice.label(waiting, "dispatch")
    await state_is(world, waiting, "queued")
    await world.alice.unlabel(waiting, "dispatch")
    assert (await world.settled(waiting)).outcome == "cancelled"
    assert "because the label that had started it was taken off" in await world.status_comment(waiting)


@pytest.mark.parametrize("live", FORGES)
async def test_what_happened_while_the_bot_was_down_is_found_once(base: Path, live: str):
    late = {"reconcile": {"every_seconds": 3600, "leave_to_webhook_seconds": 0}}
    async with make_world(base, live=live == "live", **late) as world:
        me = world.timmy.login
        gone = await issue_with(world, title="taken back")
        await reacted(world, await world.alice.comment(gone, "/dispatch pause repo"), "rocket")
        await world.alice.edit_issue(gone, assignees=[me])
        await state_is(world, gone, "queued")
        await world.stop()
        await world.alice.edit_issue(gone, assignees=[])
        mine = await issue_with(world)
        await world.bob.edit_issue(mine, assignees=[me])
        named = await world.alice.open_issue("another", f"script: fix\n\n@{me} please")
        stranger = await world.mallory.open_issue("a wish", f"@{me} please")
        await asyncio.sleep(1.1)  # the cursors count in whole seconds
        await world.start()

        async def found():
            await world.service.reconciler.round()
            return await sprint_count(world, mine) and await sprint_count(world, named) and await world.by_bot(stranger)

        await until(found)
        assert (await world.settled(gone)).outcome == "cancelled"
        assert "because I was unassigned" in await world.status_comment(gone)
        await world.alice.comment(gone, "/dispatch resume repo")
        for issue in (mine, named):
            sprint = await world.settled(issue, 90)
            assert (sprint.outcome, sprint.source) == ("pull_request", "reconcile")
        await world.service.reconciler.round()
        assert [await sprint_count(world, issue) for issue in (gone, mine, named, stranger)] == [1, 1, 1, 0]
        assert len(await world.by_bot(stranger)) == 1


async def test_triggers_that_are_switched_off(base: Path):
    async with make_world(base, start=False) as world:
        await world.start(repositories=[{"name": world.stage.repo, "triggers": ["label"]}])
        issue = await issue_with(world)
        await world.alice.edit_issue(issue, assignees=[world.timmy.login])
        comment = await world.alice.comment(issue, "/dispatch run")
        await reacted(world, comment, "confused")
        [reply] = await until(lambda: world.by_bot(issue))
        assert "a comment starts nothing in this repository" in reply
        assert "put the trigger label on" in reply
        await answered(world, issue)
        assert await world.sprint(issue) is None
        assert ("run", "invalid", "the assignment is no trigger here") in [
            (row.kind, row.result, row.reason) for row in await world.trail(issue)
        ]
        await world.alice.label(issue, "dispatch")
        assert (await world.settled(issue)).outcome == "pull_request"
