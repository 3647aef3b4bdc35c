"""What is decided on the words about a plan, without forge and rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_commands import ENDED, FACTS, HASH, ISSUE, NOW, SETTINGS, WORKING, Line, asked, say, view, words

from bot.models import (
    FOLLOWS_PLAN,
    FOLLOWS_PULL,
    MODE,
    MODE_PLAN,
    REVISES_PLAN,
    OpenPull,
    OutcomeKind,
    Plan,
    PlanState,
    RepoId,
    Source,
    SprintId,
    Stop,
    text_hash,
)

OWN = replace(FACTS, pulls=(OpenPull(12, "timmy", "is open on its branch", own=True),))
OTHER = replace(FACTS, body="Another text.")
MAKING = view(state=WORKING.state, options={MODE: MODE_PLAN}, instructions="keep it")


def plan(**changes: object) -> Plan:
    first = {
        "id": SprintId("p1"),
        "sprint_id": SprintId("p1"),
        "repo_id": RepoId(5),
        "issue": ISSUE,
        "state": PlanState.WAITING,
        "text": "1. a",
        "text_hash": HASH,
        "instructions": "keep it",
        "options": {"model": "hermes-4", "steps": "20"},
        "expires_ms": NOW,
    }
    return Plan(**(first | changes))


@pytest.mark.parametrize("text", ["/dispatch plan be brief", "/dispatch run plan be brief", "/dispatch run PLAN force be brief"])
def test_a_plan_is_asked_for_in_two_ways(text: str) -> None:
    line = Line()
    verdict = say(text, line)
    assert (verdict.result, verdict.reason) == ("ok", "queued for a plan")
    assert line.options[MODE] == MODE_PLAN
    assert line.views[-1].instructions == "be brief"


def test_an_approval_keeps_the_options_and_its_own_words_win() -> None:
    line = Line(plan=plan())
    verdict = say("/dispatch approve steps=5 but mind the tests", line)
    assert verdict.result == "ok"
    assert line.options == {"model": "hermes-4", "steps": "5", FOLLOWS_PLAN: "p1"}
    assert line.views[-1].instructions == "keep it\nbut mind the tests"


def test_a_changed_text_is_told_of_before_it_may_be_approved() -> None:
    line = Line(plan=plan())
    # The sprint of this double does not carry its options, so only what is decided is looked at.
    first = say("/dispatch approve", line, facts=OTHER)
    assert (first.reply.name, line.kept_plan.told_hash) == ("plan_edited", text_hash(OTHER.title, OTHER.body))
    again = say("/dispatch approve", line, facts=OTHER, ask=asked("/dispatch approve", delivered_hash=""))
    assert again.result == "ok", "its author asks"
    stranger = replace(OTHER, author_id=99, author_login="mallory")
    line = Line(plan=plan(told_hash=text_hash(OTHER.title, OTHER.body)))
    late = say("/dispatch approve", line, facts=stranger)
    assert (late.result, late.reply.name) == ("denied", "text_changed"), "the comment was written before the text that is there now"
    seen = say("/dispatch approve", line, facts=stranger, ask=asked("/dispatch approve", delivered_hash=line.kept_plan.told_hash))
    assert seen.result == "ok"


@pytest.mark.parametrize("verb", ["approve", "deny", "revise more"])
@pytest.mark.parametrize(
    ("line", "name"),
    [
        (Line(), "no_plan"),
        (Line(plan=plan(state=PlanState.DENIED, decided_by="alice")), "no_plan"),
    ],
    ids=["none", "denied"],
)
def test_where_nothing_waits_it_is_said_what_became_of_it(line: Line, name: str, verb: str) -> None:
    verdict = say(f"/dispatch {verb}", line)
    assert (verdict.result, verdict.reply.name) == ("invalid", name)


@pytest.mark.parametrize("verb", ["deny", "revise more"])
def test_a_plan_that_is_carried_out_is_not_changed_any_more(verb: str) -> None:
    verdict = say(f"/dispatch {verb}", Line(WORKING, plan=plan(state=PlanState.APPROVED)))
    assert "there is no plan to change any more" in words(verdict)


@pytest.mark.parametrize("verb", ["approve", "deny"])
def test_a_plan_in_the_making_cannot_be_decided_on(verb: str) -> None:
    first = Line(MAKING)
    assert "`/dispatch revise` with your words after it changes it now" in words(say(f"/dispatch {verb}", first))
    another = Line(replace(MAKING, options={**MAKING.options, REVISES_PLAN: "p1"}), plan=plan())
    assert "then the plan before it can be decided on" in words(say(f"/dispatch {verb}", another))


def test_a_plan_in_the_making_takes_words_along() -> None:
    line = Line(MAKING)
    verdict = say("/dispatch revise steps=20 only the parser", line)
    assert (verdict.result, verdict.sprint_id) == ("ok", MAKING.id)
    [kept] = line.views
    assert (kept.instructions, kept.options) == ("keep it\nonly the parser", {MODE: MODE_PLAN, "steps": "20"})
    assert say("/dispatch revise", line).reply.name == "not_understood"
    assert "`base=` cannot be changed while the plan is being made" in words(say("/dispatch revise base=main more", line))
    assert say("/dispatch revise steps=100000 more", line).reply.name == "over_limit"
    assert line.views == [kept]
    ending = Line(replace(MAKING, stop=Stop.CANCEL))
    assert say("/dispatch revise more", ending).reply.name == "plan_in_work"


def test_revise_makes_a_waiting_plan_anew_else_goes_on_with_the_pull_request() -> None:
    line = Line(plan=plan())
    assert say("/dispatch revise", line).reply.name == "not_understood"
    assert say("/dispatch revise force the tests", line).result == "ok"
    assert {MODE: MODE_PLAN, REVISES_PLAN: "p1"}.items() <= line.options.items()
    assert line.views[-1].instructions == "force the tests"
    line = Line(ENDED)
    assert say("/dispatch revise rename it", line, facts=OWN).result == "ok"
    assert line.options == {FOLLOWS_PULL: "12"}


def test_only_what_nobody_wrote_a_comment_for_is_planned_first() -> None:
    repository = SETTINGS.repositories[0].model_copy(update={"plan_first": True})
    label = asked("/dispatch run", key="label:1", source=Source.LABEL, comment_id=0)
    line = Line()
    assert say("", line, ask=label, repository=repository).reason == "queued for a plan"
    line = Line(plan=plan())
    assert say("", line, ask=label, repository=repository).reason == "its plan waits for approval"
    assert line.views == []
    line = Line()
    assert say("/dispatch run", line, repository=repository).reason == "queued"
    assert MODE not in line.options


def test_a_retry_repeats_what_it_was() -> None:
    for options in ({MODE: MODE_PLAN, REVISES_PLAN: "p0"}, {FOLLOWS_PLAN: "p1"}, {}):
        line = Line(replace(ENDED, options={**options, "model": "old"}, pr=0), plan=plan(state=PlanState.APPROVED))
        assert say("/dispatch retry", line).result == "ok"
        assert line.options == options


def test_a_retry_by_a_plan_that_is_not_kept_any_more_does_not_begin_without_it() -> None:
    line = Line(replace(ENDED, options={FOLLOWS_PLAN: "p1"}, pr=0))
    assert "`/dispatch plan` makes a new one" in words(say("/dispatch retry", line))
    assert len(line.views) == 1


def test_the_label_taken_off_lets_go_only_the_plan_that_came_of_it() -> None:
    off = asked("/dispatch cancel", key="unlabel:131", comment_id=0, options={"only_trigger": "label:131"})
    made = replace(ENDED, id=SprintId("p1"), outcome=OutcomeKind.PLANNED, reason="waiting", intent_key="label:131", pr=0)
    line = Line(made, plan=plan())
    verdict = say("", line, ask=off)
    assert (verdict.reason, words(verdict)) == ("the plan that waited is let go", "")
    assert (line.kept_plan.state, line.kept_plan.decided_by) == (PlanState.DENIED, "bob")
    assert line.kept_plan.reason == "the label that had started it was taken off"
    for other in (
        Line(replace(made, intent_key="command:1:x:0"), plan=plan()),
        Line(replace(made, id=SprintId("p0")), plan=plan()),
        Line(made, replace(MAKING, intent_key="command:1:x:0"), plan=plan()),
    ):
        assert say("", other, ask=off).reason == "nothing to cancel"
        assert other.kept_plan.state is PlanState.WAITING


def test_cancel_lets_a_waiting_plan_go_and_closing_says_nothing() -> None:
    line = Line(plan=plan())
    assert "The plan is let go" in words(say("/dispatch cancel", line))
    assert line.kept_plan.state is PlanState.DENIED
    line = Line(plan=plan())
    closed = asked("/dispatch cancel", key="closed:5:7:1", comment_id=0)
    assert words(say("", line, ask=closed)) == ""
    assert line.kept_plan.state is PlanState.CLOSED
