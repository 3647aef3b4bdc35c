"""A red check on what we pushed is mended on the same branch, within bounds; a storm of statuses is one follow-up, and a person's push is a person's."""

from __future__ import annotations

from pathlib import Path

import pytest
from follow_support import looked, opened, prompts, pull_now, red, review, rounds, said, sprints_of, writes
from talk import answered, sprint_count
from world import FORGES, World, make_world, until

from bot import chatops, feedback
from bot.feedback import Failure
from bot.store import intents


@pytest.mark.parametrize("where", FORGES)
async def test_red_checks_are_mended_within_bounds(base: Path, where: str):
    async with make_world(base, live=where == "live", follow_ups={"settle_seconds": 0.5, "check_tries": 2}) as world:
        issue, pull = await opened(world)
        number, head = pull["number"], pull["head"]["sha"]

        # a storm: pending, two red contexts, each many times, and a green one
        await red(world.bob, head, "ci/lint", "running", "pending")
        for n in range(5):
            await red(world.bob, head, "ci/test", f"{n} failed")
        await red(world.bob, head, "ci/docs", "fine", "success")
        await red(world.bob, head, "ci/lint", writes("LINT.md", "clean\n", "Linted."), "error")
        [_, second] = await rounds(world, issue, 2)
        assert (second.outcome, second.source, second.requester) == ("updated", "checks", world.alice.login), second
        task = prompts(world)[-1]
        assert "ci/test: failure\n4 failed\nhttps://ci.example.org/1" in task and "ci/lint: error" in task and "ci/docs" not in task
        assert len(await said(world, number, "🔧 **Red: ci/lint, ci/test.**")) == 1
        await looked(world)

        # an old head is nobody's any more
        await red(world.bob, head, "ci/other")
        await looked(world)
        assert await sprint_count(world, issue) == 2

        # red again, otherwise: the second try; then in the same way as at first, a circle: it stops and says so, once
        first_fix = (await pull_now(world, number))["head"]["sha"]
        await red(world.bob, first_fix, "ci/test", writes("SECOND.md", "2\n", "Once more."))
        [*_, third] = await rounds(world, issue, 3)
        assert third.outcome == "updated"
        head = (await pull_now(world, number))["head"]["sha"]
        await red(world.bob, head, "ci/lint", "running", "pending")
        await red(world.bob, head, "ci/test", "7 failed")
        await red(world.bob, head, "ci/lint", writes("LINT.md", "clean\n", "Linted."), "error")
        await until(lambda: stopped(world, number, "in the same way"))
        await red(world.bob, head, "ci/test", "7 failed")
        await looked(world)
        assert await sprint_count(world, issue) == 3
        assert len(await said(world, number, "🛑 **Still red")) == 1

        # after a person asked the count begins anew, and the label leaves it to people
        await world.bob.comment(number, f"/dispatch run by hand\n{writes('HAND.md', 'h', 'By hand.')}")
        await rounds(world, issue, 4)
        await world.alice.forge.ensure_label(world.stage.repo, "dispatch/no-fix", color="#000000")
        await world.alice.label(number, "dispatch/no-fix")
        head = (await pull_now(world, number))["head"]["sha"]
        await red(world.bob, head, "ci/new", "other")
        await until(lambda: decided(world, issue, "red checks are left to people by the label dispatch/no-fix"))
        assert await sprint_count(world, issue) == 4


async def stopped(world: World, number: int, words: str) -> bool:
    return any(words in body for body in await said(world, number, "🛑 **Still red"))


async def decided(world: World, issue: int, reason: str) -> bool:
    return any(row.reason == reason for row in await world.trail(issue))


async def test_missed_news_are_found_and_what_comes_meanwhile_waits(base: Path):
    changes = {"follow_ups": {"settle_seconds": 0.2, "check_tries": 1}, "reconcile": {"every_seconds": 0.5, "poll_seconds": 0.5}}
    async with make_world(base, hook=False, **changes) as world:
        issue, pull = await opened(world)
        number, head = pull["number"], pull["head"]["sha"]
        order = writes("A.md", "a\n", "First.\n\nC1: done")
        slow = order.replace("calls([", 'calls([["run_command", {"command": "sleep 2"}], ')
        await review(world.bob, number, "REQUEST_CHANGES", f"First.\n\n{slow}", ("lib/slug.sh", 2, "one"))
        await until(lambda: "First." in prompts(world)[-1])
        # another reviewer, while the first review is worked off, and one whose review is dismissed before anybody looks
        await review(world.alice, number, "REQUEST_CHANGES", "Second.\n\n" + writes("B.md", "b\n", "Second.\n\nC1: done as well"))
        [_, second, third] = await rounds(world, issue, 3)
        assert [(view.outcome, view.source) for view in (second, third)] == [("updated", "review")] * 2, (second, third)
        assert third.requester == world.alice.login and "Second." in prompts(world)[-1] and "First." not in prompts(world)[-1]
        assert len(await said(world, number, "✅ **Updated** with")) == 2

        # red on the head of the first sprint is old; on a person's head it is theirs
        await red(world.bob, head)
        await world.alice.put_file(pull["head"]["label"], "PERSON.md", "by hand\n")
        await red(world.bob, (await pull_now(world, number))["head"]["sha"], "ci/person")
        # a dismissed review asks for nothing
        await review(world.bob, number, "REQUEST_CHANGES", "Never mind.")
        await world.service.stop()
        world.service = None
        [mine] = [item for item in await world.alice.forge.reviews(world.stage.repo, number) if item["body"] == "Never mind."]
        path = f"/repos/{world.stage.repo}/pulls/{number}/reviews/{mine['id']}/dismissals"
        await world.alice.client.post(path, {"message": "no need"})
        known = await _decided_before(world, int(mine["id"]))
        await world.start()
        await answered(world, number, "/dispatch status")
        await looked(world)
        expected = 4 if known else 3
        assert await sprint_count(world, issue) == expected
        assert all(view.outcome in ("pull_request", "updated", "cancelled") for view in await sprints_of(world, issue))


async def _decided_before(world: World, review_id: int) -> bool:
    from bot.store import Store

    store = Store(world.settings().database_url())
    store.open()
    try:
        return store.read_sync(lambda conn: intents.get(conn, chatops.review_key(review_id))) is not None
    finally:
        store.close()


def test_the_same_failure_looks_the_same_and_another_does_not():
    def kind(*failures: Failure) -> str:
        return feedback.signature(failures)

    one = Failure("ci/test", "failure", "3 of 120 failed in 4.2s at 0a1b2c3d4e", "https://ci/1", "FAIL test_a (0.31s)\n12:03:44 end")
    two = Failure("ci/test", "failure", "5 of 121 failed in 11.7s at 99aa88bb77", "https://ci/2", "FAIL test_a (0.29s)\n14:59:01 end")
    other = Failure("ci/test", "failure", "3 of 120 failed in 4.2s at 0a1b2c3d4e", "https://ci/1", "FAIL test_b (0.31s)\n12:03:44 end")
    assert kind(one) == kind(two) != kind(other)
    assert kind(one, other) == kind(other, one) != kind(one)
    assert chatops.check_key("abc", [("a", "failure"), ("b", "error")]) == chatops.check_key("abc", [("b", "error"), ("a", "failure")])
    assert chatops.check_key("abc", [("a", "failure")]) != chatops.check_key("abd", [("a", "failure")])


def test_only_the_newest_status_of_a_context_counts():
    def status(n: int, context: str, state: str) -> dict[str, object]:
        return {"id": n, "context": context, "status": state, "description": "", "target_url": None}

    combined = {"statuses": [status(3, "a", "success"), status(1, "a", "failure"), status(2, "b", "error"), status(4, "c", "pending")]}
    assert [(failure.context, failure.state) for failure in feedback.red(combined)] == [("b", "error")]
    assert feedback.pending(combined)
    assert not feedback.pending({"statuses": [status(1, "c", "pending"), status(2, "c", "success")]})
    assert feedback.red({"statuses": None}) == []


def test_what_the_agent_says_of_each_remark():
    summary = "All done.\n\nC1: quotes it\n- **C2**: left as it is: see above\n> C3 - no\nC10. ten\nThe CI: is green\nC4:\n"
    assert feedback.answers(summary) == {1: "quotes it", 2: "left as it is: see above", 3: "no", 10: "ten"}


def test_which_reviews_ask_for_changes():
    def item(n: int, user: int, state: str, *, dismissed: bool = False) -> dict[str, object]:
        return {"id": n, "user": {"id": user}, "state": state, "dismissed": dismissed}

    reviews = [
        item(1, 3, "REQUEST_CHANGES"),
        item(2, 3, "APPROVED"),
        item(3, 4, "REQUEST_CHANGES", dismissed=True),
        item(4, 5, "REQUEST_CHANGES"),
        item(5, 5, "COMMENT"),
        item(6, 9, "REQUEST_CHANGES"),
        item(7, 6, "REQUEST_REVIEW"),
        {"id": 8, "user": None, "state": "REQUEST_CHANGES", "dismissed": False},
    ]
    assert [review["id"] for review in feedback.requests(reviews, me_id=9)] == [4]
