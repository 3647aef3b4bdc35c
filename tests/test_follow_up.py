"""Follow-ups on our own pull requests: commands on the pull request, people who push meanwhile, what became of it, and kill -9 before the answer."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any

import pytest
from follow_support import SETTLE, opened, prompts, pull_now, review, rounds, said, script, sprints_of, writes
from served import ServedWorld
from talk import answered, issue_with, pulls_of, reacted, sprint_count, state_is
from world import FORGES, World, make_world, until

from bot import feedback
from bot.admission import Admit, Head, Policy, Wait, decide
from bot.chatops import PullNews
from bot.gitea.sansio import Event
from bot.models import PullFacts, RepoId
from handlers import checks, pulls, reviews

RECONCILE = {"every_seconds": 2, "leave_to_webhook_seconds": 1}


@pytest.mark.parametrize("where", FORGES)
async def test_commands_on_our_pull_request_are_about_its_issue(base: Path, where: str):
    async with make_world(base, live=where == "live", **SETTLE) as world:
        issue, pull = await opened(world)
        number, head, body = pull["number"], pull["head"]["sha"], pull["body"]

        for verb in ("status", "queue", "explain", "logs"):
            await answered(world, number, f"/dispatch {verb}")
        await world.shown(number)
        told = await world.by_bot(number)
        assert len(told) == 4 and any(f"done: pull request #{number}" in body for body in told), told
        cancel = await world.bob.comment(number, "/dispatch cancel")
        await reacted(world, cancel, "confused")

        order = writes("NOTES.md", "kept\n", "Notes are kept.")
        asked = await world.bob.comment(number, f"/dispatch run please keep notes\n{order}")
        [_, second] = await rounds(world, issue, 2)
        await reacted(world, asked, "rocket")
        assert (second.outcome, second.pr, second.base_sha, second.requester) == ("updated", number, head, world.bob.login)
        assert "please keep notes" in prompts(world)[-1]
        assert len(await said(world, number, "✅ **Updated** with")) == 1

        # a person pushes on top; the next follow-up builds on that, fast-forward
        await world.alice.put_file(pull["head"]["label"], "PERSON.md", "by hand\n")
        theirs = (await pull_now(world, number))["head"]["sha"]
        again = writes("MORE.md", "more\n", "More is there.")
        await world.alice.comment(number, f"/dispatch revise more of it\n{again}")
        [*_, third] = await rounds(world, issue, 3)
        assert (third.outcome, third.base_sha) == ("updated", theirs)
        now = await pull_now(world, number)
        assert (now["body"], now["head"]["sha"], now["changed_files"]) == (body, third.head_sha, 4)
        assert [pull["number"] for pull in await pulls_of(world, issue)] == [number]

        # nothing to do is said where it was asked
        await world.alice.comment(number, "/dispatch run once more\nscript: no_change")
        [*_, fourth] = await rounds(world, issue, 4)
        assert fourth.outcome == "no_change"
        assert await world.labels(issue) == {"dispatch/review"}
        assert len(await said(world, number, "🟰 **Nothing was changed.**")) == 1

        await world.alice.merge(number)
        merged = await until(lambda: fate(world, issue, "merged"))
        assert merged
        refused = await world.alice.comment(number, "/dispatch run again")
        await reacted(world, refused, "confused")
        assert await sprint_count(world, issue) == 4


async def fate(world: World, issue: int, state: str) -> bool:
    return all(view.pr_state == state for view in await sprints_of(world, issue) if view.pr)


async def test_a_person_pushes_while_a_follow_up_works_and_one_without_a_pull_request_is_refused(base: Path):
    async with make_world(base, **SETTLE) as world:
        issue, pull = await opened(world)
        number = pull["number"]
        order = script(("run_command", {"command": "sleep 2"}), ("write_file", {"path": "NOTE.md", "content": "n\n"}))
        await world.bob.comment(number, f"/dispatch run note it\n{order}")
        await state_is(world, issue, "working")
        await world.alice.put_file(pull["head"]["label"], "PERSON.md", "by hand\n")
        theirs = (await pull_now(world, number))["head"]["sha"]
        [_, second] = await rounds(world, issue, 2)
        assert (second.outcome, second.base_sha, second.attempt) == ("updated", theirs, 2), second
        now = await pull_now(world, number)
        assert (now["head"]["sha"], now["changed_files"]) == (second.head_sha, 3)
        assert [pull["number"] for pull in await pulls_of(world, issue)] == [number]

        # the pull request is closed under a follow-up: nothing is pushed, and the issue says why
        other = script(("run_command", {"command": "sleep 2"}), ("write_file", {"path": "OTHER.md", "content": "o\n"}))
        await world.bob.comment(number, f"/dispatch run again\n{other}")
        await state_is(world, issue, "working")
        head = (await pull_now(world, number))["head"]["sha"]
        await world.alice.client.patch(f"/repos/{world.stage.repo}/pulls/{number}", {"state": "closed"})
        [*_, third] = await rounds(world, issue, 3)
        assert (third.outcome, third.detail) == ("cancelled", f"pull request #{number} is closed: nothing was pushed")
        assert (await pull_now(world, number))["head"]["sha"] == head
        assert "closed: nothing was pushed" in await world.status_comment(issue)

        without = await issue_with(world)
        comment = await world.alice.comment(without, "/dispatch revise this")
        await reacted(world, comment, "confused")
        assert await sprint_count(world, without) == 0


async def test_what_became_of_a_pull_request_is_counted_once_and_told(base: Path):
    async with make_world(base, **SETTLE) as world:
        first, one = await opened(world)
        second, two = await opened(world)
        await world.alice.merge(one["number"])
        await until(lambda: fate(world, first, "merged"))
        await world.alice.client.delete(f"/repos/{world.stage.repo}/branches/dispatch%2Fissue-{second}")
        await until(lambda: fate(world, second, "closed"))
        for event, raw in [item for item in await world.stored() if item[0] in ("pull_request", "delete")]:
            assert (await world.send(event, raw + b" "))[0] == 202
        sha = (await pull_now(world, one["number"]))["merge_commit_sha"]
        await world.alice.put_file("main", "lib/slug.sh", "old\n", f'Revert "fix"\n\nThis reverts commit {sha}.\n')
        await until(lambda: fate(world, first, "reverted"))
        await world.shown(first)
        await world.shown(second)
        assert "It was merged, and reverted afterwards." in await world.status_comment(first)
        assert "closed without being merged" in await world.status_comment(second)
        assert await world.labels(first) == await world.labels(second) == set()

        async def all_told():
            reasons = [row.reason for row in await world.trail(second) if row.kind == "pull"]
            return sorted(reasons) == [
                f"pull request #{two['number']} was closed without being merged",
                f"the branch of pull request #{two['number']} was deleted",
            ]

        await until(all_told)
        assert [event.data["event"] for event in world.events if event.kind == "pull_request"].count("merged") == 1
        by_event = [event.data["event"] for event in world.events if event.kind == "pull_request"]
        assert sorted(by_event) == ["closed_unmerged", "merged", "opened", "opened", "reverted"]


@pytest.mark.parametrize("point", ["push.after", "projector.sent"])
async def test_killed_between_the_push_and_the_answers(base: Path, point: str):
    async with make_world(base, kind=ServedWorld, start=False, reconcile=RECONCILE, **SETTLE) as world:
        await world.serve()
        await world.listening()
        issue, pull = await opened(world)
        number = pull["number"]
        await world.stop_process()

        process = await world.serve(failpoint=point)
        await world.listening()
        order = writes("EMPTY.md", "empty\n", "Described.\n\nC1: written down")
        await review(world.bob, number, "REQUEST_CHANGES", f"Again.\n\n{order}", ("lib/slug.sh", 3, "say it here"))
        assert await until(lambda: _ended(process), 60) == -signal.SIGKILL, world.log()[-3000:]
        await world.serve(failpoint=point)
        await world.listening()
        [_, second] = await rounds(world, issue, 2)
        assert second.outcome == "updated", second
        await until(lambda: _answered(world, number))
        assert len(await said(world, number, "🔧 **I take up the review")) == 1
        now = await pull_now(world, number)
        assert (now["head"]["sha"], now["changed_files"]) == (second.head_sha, 2)
        timeline = await world.alice.forge.timeline(world.stage.repo, number)
        assert len([item for item in timeline if item["type"] == "review_request"]) == 1
        assert await sprint_count(world, issue) == 2


async def _ended(process: asyncio.subprocess.Process) -> Any:
    return process.returncode


async def _answered(world: World, number: int) -> bool:
    return len(await said(world, number, "✅ **Updated** with")) == 1 and any(
        item["state"] == "REQUEST_REVIEW" for item in await world.alice.forge.reviews(world.stage.repo, number)
    )


def test_a_follow_up_is_not_held_by_the_pull_request_it_goes_on_with():
    new, follow = Head("new", 1, "acme/rocket", 7, 5, 10), Head("follow", 1, "acme/rocket", 8, 7, 20, pull=12)
    policy = Policy(capacity=2, pr_caps={1: 1}, open_prs={1: 1})
    answers = decide([new, follow], {}, policy)
    assert [(type(answer), answer.head.id) for answer in answers] == [(Wait, "new"), (Admit, "follow")]
    assert [type(answer) for answer in decide([follow], {1: 1}, policy)] == [Wait], "the cap of running ones holds it"


def test_only_a_pull_request_of_ours_is_ours():
    record = {
        "number": 9,
        "user": {"id": 5},
        "head": {"label": "dispatch/issue-7-2", "repo_id": 1, "sha": "abc"},
        "base": {"ref": "main"},
        "state": "closed",
        "merged": True,
        "labels": [{"name": "dispatch/no-fix"}],
    }
    ours = feedback.pull_facts(record, repo_id=1, me_id=5)
    assert ours == PullFacts(9, 7, "merged", "dispatch/issue-7-2", "abc", "main", ("dispatch/no-fix",))
    for other in (
        {"user": {"id": 6}},
        {"head": {**record["head"], "repo_id": 2}},
        {"head": {**record["head"], "label": "mine"}},
        {"user": None},
    ):
        assert feedback.pull_facts({**record, **other}, repo_id=1, me_id=5) is None
    gone = {**record, "head": {"label": "dispatch/issue-7", "ref": "refs/pull/9/head", "repo_id": -1, "sha": "abc"}}
    assert feedback.pull_facts(gone, repo_id=1, me_id=5) is None, "a fork may call its branch what it likes"


DATA = Path(__file__).parent / "data" / "gitea" / "recorded-1.26" / "deliveries"


def delivered(name: str, **changes: Any) -> Event:
    """A recorded delivery, with other values in its payload."""
    [body] = DATA.glob(f"{name}.*.body")
    event = Event.from_stored(body.name.split(".")[-2], body.read_bytes(), delivery="x")
    fields = {field: getattr(event, field) for field in Event.__dataclass_fields__}
    return Event(**fields | {"data": {**event.data, **changes}})


class Who:
    me_id = 5


async def test_what_handlers_find_worth_a_look():
    assert await reviews.requested(delivered("pr-review-rejected"), Who()) == [PullNews(RepoId(5), "reviews", number=5)]
    mine = delivered("pr-review-rejected")
    pull = {**mine.data["pull_request"], "head": {**mine.data["pull_request"]["head"], "repo_id": 77}}
    assert await reviews.requested(delivered("pr-review-rejected", pull_request=pull), Who()) == [], "a fork's"

    sha = delivered("status-failure").data["sha"]
    assert await checks.status(delivered("status-failure"), Who()) == [PullNews(RepoId(5), "checks", sha=sha)]
    assert await checks.status(delivered("status-failure", state="error"), Who()) == [PullNews(RepoId(5), "checks", sha=sha)]
    for quiet in ("pending", "success", "warning", "skipped", None):
        assert await checks.status(delivered("status-failure", state=quiet), Who()) == []
    run = delivered("push-with-workflow.3")
    ended = {**run.data["workflow_run"], "status": "completed", "conclusion": "failure"}
    assert await checks.workflow_run(delivered("push-with-workflow.3", workflow_run=ended), Who()) == [
        PullNews(RepoId(5), "checks", sha=ended["head_sha"])
    ]
    assert await checks.workflow_run(run, Who()) == []

    merge = delivered("pr-merged-closes-issue.3")
    named = "effe509ce7f6bf39914a30ea04604d167476faf3"
    for message, found in (
        (f'Revert "Keep the last row (#5)"\n\nThis reverts commit {named}.\n', (named,)),
        (f"revert {named[:10]}\n", (named[:10],)),
        (f"Keep the last row\n\nsee {named}\n", ()),
        ("Revert the colours\n", ()),
    ):
        commits = [{**merge.data["commits"][0], "message": message}]
        findings = await pulls.reverted(delivered("pr-merged-closes-issue.3", commits=commits), Who())
        assert [finding.shas for finding in findings] == ([found] if found else [])
    assert await pulls.reverted(delivered("hook-test", ref="refs/heads/dispatch/issue-1"), Who()) == []

    gone = delivered("hook-test", ref="dispatch/issue-7", ref_type="branch")
    assert await pulls.deleted(gone, Who()) == [PullNews(gone.repo_id, "branch", branch="dispatch/issue-7")]
    assert await pulls.deleted(delivered("hook-test", ref="dispatch/issue-7", ref_type="tag"), Who()) == []
    assert await pulls.deleted(delivered("hook-test", ref="feature", ref_type="branch"), Who()) == []
