"""What people do that nobody expects: another base, another name, no access for a while, a secret of ours in an issue's text."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import aiohttp
import pytest
from follow_support import rounds
from talk import answered, issue_with, pulls_of, reacted, state_is
from world import FORGES, World, make_world, until

from bot.chatops import PARAGRAPH_CAP, mentions, parse
from bot.replies import decision_in_words, escape, not_understood


async def one_pull(world: World, issue: int) -> tuple[int, str, str]:
    """(number, state, base) of the only pull request of an issue."""
    [pull] = await pulls_of(world, issue)
    return pull["number"], pull["state"], pull["base"]["ref"]


async def copied(world: World, *branches: str) -> None:
    for name in branches:
        await world.alice.client.post(f"/repos/{world.stage.repo}/branches", {"new_branch_name": name, "old_branch_name": "main"})


async def renamed(world: World, role: str) -> None:
    """Another name for a person; the repository moves along with its owner."""
    person = world.stage.people[role]
    login = f"{person.login}-r"
    await world.stage.admin.post("/admin/users/{login}/rename", {"new_username": login}, login=person.login)
    world.stage.logins = [login if known == person.login else known for known in world.stage.logins]
    owner, _, name = world.stage.repo.partition("/")
    world.stage.people[role] = dataclasses.replace(person, login=login)
    if owner == person.login:
        world.moved(f"{login}/{name}")


@pytest.mark.parametrize("live", FORGES)
async def test_an_issue_keeps_its_one_pull_request_whatever_its_base(base: Path, live: str):
    async with make_world(base, live=live == "live") as world:
        await copied(world, "develop", "release")
        issue = await issue_with(world)
        await world.alice.comment(issue, "/dispatch run base=develop")
        await world.settled(issue)
        number, *there = await one_pull(world, issue)
        assert there == ["open", "develop"]

        await world.alice.comment(issue, "/dispatch retry")
        [*_, again] = await rounds(world, issue, 2)
        assert (again.outcome, again.base_branch) == ("updated", "develop")
        assert await one_pull(world, issue) == (number, "open", "develop")

        await world.alice.client.patch(f"/repos/{world.stage.repo}/pulls/{number}", {"base": "release"})
        await world.alice.comment(issue, "/dispatch retry")
        [*_, again] = await rounds(world, issue, 3)
        assert (again.outcome, again.base_branch) == ("updated", "release")
        assert await one_pull(world, issue) == (number, "open", "release")

        await world.alice.comment(issue, "/dispatch retry fresh base=main")
        [*_, again] = await rounds(world, issue, 4)
        assert (again.outcome, again.base_branch, again.pr) == ("updated", "main", number)
        assert await one_pull(world, issue) == (number, "open", "main")


@pytest.mark.parametrize("live", FORGES)
async def test_who_asked_is_known_under_another_name(base: Path, live: str):
    async with make_world(base, live=live == "live") as world:
        issue = await issue_with(world, "slow(0.4)")
        await world.alice.label(issue, "dispatch")
        await until(lambda: world.model.requests)
        await renamed(world, "alice")
        sprint = await world.settled(issue)
        assert sprint.outcome == "pull_request", sprint.detail
        comment = await world.alice.comment(issue, "/dispatch status")
        await reacted(world, comment, "rocket")
        [status, _] = await world.by_bot(issue)
        assert "is open" in status
        assert await world.labels(issue) == {"dispatch", "dispatch/review"}


@pytest.mark.parametrize("live", FORGES)
async def test_out_of_sight_for_a_while_is_no_refusal_and_the_words_become_true(base: Path, live: str):
    async with make_world(base, live=live == "live") as world:
        await world.edit_repo(private=True)
        issue = await issue_with(world, "slow(0.4)")
        await world.alice.label(issue, "dispatch")
        await until(lambda: world.model.requests)
        owner, _, name = world.stage.repo.partition("/")
        await world.alice.client.delete("/repos/{owner}/{repo}/collaborators/{login}", owner=owner, repo=name, login=world.timmy.login)
        waiting = await state_is(world, issue, "queued")
        assert "the repository" in waiting.waiting_note
        await world.stage._collaborator("timmy", "admin")
        sprint = await world.settled(issue, 90)
        assert sprint.outcome == "pull_request", sprint.detail
        [status] = await world.by_bot(issue)
        assert "is open" in status
        assert await world.labels(issue) == {"dispatch", "dispatch/review"}


@pytest.mark.parametrize("live", FORGES)
async def test_a_secret_of_ours_in_a_text_goes_nowhere_and_a_base_that_is_gone_is_named(base: Path, live: str):
    async with make_world(base, live=live == "live") as world:
        token = world.timmy.token.reveal()
        await world.alice.put_file("main", "AGENTS.md", f"Log in with {token}\n")
        issue = await world.alice.open_issue(f"key {token}", f"script: no_change\n\nuse {token}")
        comment = await world.alice.comment(issue, f"/dispatch run look at {token}\nand {token}")
        await world.settled(issue)
        await reacted(world, comment, "rocket")
        for text in (f"/dispatch {token}", f"/dispatch skip {token}", f"/dispatch prompt {token}", "/dispatch explain"):
            await world.alice.comment(issue, text)
        await answered(world, issue)
        assert world.model.requests
        assert [request for request in world.model.requests if token in json.dumps(request.body)] == []
        assert [body for body in await world.by_bot(issue) if token in body] == []

        await copied(world, "develop")
        gone = await issue_with(world, "slow(0.2)")
        await world.alice.comment(gone, "/dispatch run base=develop")
        await until(lambda: any("slow" in request.script for request in world.model.requests))
        await world.alice.client.delete(f"/repos/{world.stage.repo}/branches/develop")
        sprint = await world.settled(gone)
        assert (sprint.outcome, sprint.reason) == ("failed", "pr")
        assert "`develop` was deleted" in sprint.detail

        await world.stop()
        found = [path for path in world.state_dir.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]
        assert found == []


async def test_half_a_character_of_a_model_ends_nothing(base: Path):
    """JSON can spell half of an emoji; no text of ours can hold it."""
    half = "\\ud83d"
    calls = [
        f'["write_file", {{"path": "a{half}.txt", "content": "x"}}]',
        f'["write_file", {{"path": "a.txt", "content": "{half} \\ud83d\\ude00"}}]',
        '["write_file", {"path": "b.txt", "content": "\\ud83d\\ude00"}]',
        f'["run_command", {{"command": "echo {half}"}}]',
        f'["no{half}", {{"x": "{half}"}}]',
        f'["finish", {{"summary": "Done {half} \\ud83d\\ude00."}}]',
    ]
    async with make_world(base) as world:
        issue = await world.alice.open_issue("half", f"script: calls([{', '.join(calls)}])")
        await world.alice.comment(issue, "/dispatch")
        sprint = await world.settled(issue)
        assert (sprint.outcome, sprint.files) == ("pull_request", 1), sprint.detail
        assert sprint.detail == "Done \ufffd \U0001f600."
        await answered(world, issue, "/dispatch logs")
        [log] = [body for body in await world.by_bot(issue) if "The last" in body]
        assert log.count("holds half a character") == 3
        page = re.search(r"\[transcript\]\(([^)]+)\)", await world.status_comment(issue))[1]
        async with aiohttp.ClientSession() as session, session.get(page) as reply:
            assert (reply.status, "a\ufffd.txt" in await reply.text()) == (200, True)


async def test_odd_numbers_and_examples_that_can_be_copied(base: Path):
    async with make_world(base) as world:
        issue = await issue_with(world, "no_change")
        asked = [await world.alice.comment(issue, f"/dispatch {text}") for text in ("logs 0010000", "logs 41", "priority ten")]
        for comment in asked:
            await reacted(world, comment, "confused")
        nothing = await world.alice.comment(issue, "/dispatch revise more")
        await reacted(world, nothing, "confused")
        await copied(world, "feature")
        await world.bob.put_file("feature", "x.md", "x\n")
        fields = {"head": "feature", "base": "main", "title": "by hand", "body": "/dispatch run"}
        pull = await world.bob.client.post(f"/repos/{world.stage.repo}/pulls", fields)
        theirs = await world.bob.comment(pull["number"], "/dispatch revise more")
        await reacted(world, theirs, "confused")
        assert "this is a pull request of a person" in (await world.by_bot(pull["number"]))[-1]
        said = await world.by_bot(issue)
        assert sum("There is no plan to revise here, and no pull request of mine is open." in body for body in said) == 1
        assert sum("is no number of actions from 1 to 40" in body for body in said) == 2
        assert sum("for example `/dispatch priority 2`" in body for body in said) == 1


def test_of_one_paragraph_no_more_is_read_than_a_person_writes():
    """Unmatched brackets cost the square of their number: they must not hold up the loop that everybody waits for."""
    verbs = ("run", "status")
    [command] = parse("/dispatch run\n" + "word " * 5_000, verbs)
    assert len(command.instructions) == 24_999
    assert [found.text for found in parse("![" * PARAGRAPH_CAP + "\n/dispatch run\n\n/dispatch status", verbs)] == ["/dispatch status"]
    assert mentions("![" * 100 + " @timmy", "timmy")
    assert not mentions("![" * PARAGRAPH_CAP + " @timmy", "timmy")


def test_words_of_many_scripts_stay_whole():
    family = "👩\u200d👩\u200d👧"
    assert escape(family) == family
    assert escape("نامه\u200cای") == "نامه\u200cای"
    assert escape("a\u202eb") == "a b"
    assert (
        decision_in_words({"kind": "settle", "result": "no_change", "reason": "Done.", "actor": ""})
        == "the sprint ended as no change: Done."
    )
    assert "`/dispatch run`" in not_understood("x", "write `/dispatch run`", "")
