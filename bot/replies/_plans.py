"""A plan and what became of it."""

from __future__ import annotations

from collections.abc import Sequence

from bot.models import Json, PlanState, SprintState
from bot.replies._text import _list, _person, _verb, escape, moment, plural, quoted, says
from bot.replies._words import sprint_in_words

# A plan longer than this is folded, so that the comment can be read at a glance.
PLAN_SHOWN, PLAN_LINES = 3_000, 40


def _plans_that_wait(plans: Sequence[Json]) -> str:
    if not plans:
        return ""
    items = [f"`{plan['ref']}` {escape(plan['title'], 80)}, until {moment(plan['until_ms'])}" for plan in plans]
    return f"📝 {plural(len(plans), 'plan')} waiting for a person's `/dispatch approve`:\n\n{_list(items)}"


@says
def plan(
    *, text: str, requester: str, state: str, until_ms: int, by: str = "", reason: str = "", follow_up: bool = False, edited: bool = False
) -> str:
    """A plan, and what becomes of it: this comment is edited when somebody decides. `follow_up` where it revises an earlier one.

    `edited` where the issue's text was changed after an approval, so that it waits again.
    """
    what = "A revised plan" if follow_up else "A plan"
    head = f"📝 **{what} for this issue**" + (f", asked for by {_person(requester)}" if requester else "") + ". The agent says:"
    said = quoted(text, len(text))
    if len(text) > PLAN_SHOWN or text.count("\n") > PLAN_LINES:
        said = f"<details><summary>The plan ({plural(len(text.splitlines()), 'line')})</summary>\n\n{said}\n\n</details>"
    return "\n\n".join([head, said, _plan_end(state, until_ms=until_ms, by=by, reason=reason, edited=edited)])


def _plan_end(state: str, *, until_ms: int, by: str, reason: str, edited: bool) -> str:
    person, why = _person(by), f": {escape(reason, 400)}" if reason else ""
    match state:
        case PlanState.WAITING:
            again = (
                "The issue was edited after this plan was approved, so it **waits again**"
                if edited
                else "Nothing was changed so far. It waits"
            )
            return (
                f"{again} for somebody with the right to decide, until {moment(until_ms)}:\n\n"
                "- `/dispatch approve` goes on with exactly this plan\n"
                "- `/dispatch revise` with your words after it makes another one\n"
                "- `/dispatch deny` lets it go"
            )
        case PlanState.APPROVED:
            return f"✅ **Approved** by {person}."
        case PlanState.DENIED:
            return f"⛔ **Denied** by {person}{why}. `/dispatch plan` makes a new one."
        case PlanState.EXPIRED:
            return "⌛ **Nobody decided in time**, so this plan is let go; nothing was changed. `/dispatch plan` makes a new one."
        case PlanState.CLOSED:
            return "🗄️ **The issue was closed**, so this plan is let go; nothing was changed."
    return f"🔁 **Not valid any more**{why or ': something newer has taken its place'}."


@says
def plan_edited(author: str) -> str:
    """The text is another one than the plan was made of; it may be approved for that text, once somebody has read it."""
    return (
        f"Not started: the text of this issue, written by {_person(author)}, was changed after the plan was made. Read both again. "
        "If the plan still fits: `/dispatch approve` once more. If not: `/dispatch revise` with your words after it, or `/dispatch plan`."
    )


@says
def plan_waits_again() -> str:
    """After an approval the issue was edited before the work began."""
    return (
        "The issue was edited after its plan was approved, so nothing was started. Read both again. "
        "If the plan still fits: `/dispatch approve`. If not: `/dispatch revise` with your words after it, or `/dispatch plan`."
    )


@says
def plan_denied(reason: str) -> str:
    """A person let the plan go; seen on the terminal, where no comment is edited before somebody's eyes."""
    why = f" ({escape(reason, 400)})" if reason else ""
    return f"The plan is let go{why}; nothing was changed. `/dispatch plan` makes a new one."


@says
def no_plan(*, verb: str, state: str = "", by: str = "") -> str:
    """Nothing waits for a decision; `state` is what became of the last plan, "" where there never was one."""
    became = {
        PlanState.APPROVED: f"The last one was approved by {_person(by)} already.",
        PlanState.DENIED: f"The last one was denied by {_person(by)}.",
        PlanState.EXPIRED: "Nobody decided on the last one in time.",
        PlanState.SUPERSEDED: "Something newer took the place of the last one.",
        PlanState.CLOSED: "The last one ended when the issue was closed.",
    }
    said = became[PlanState(state)] if state in became else ""
    head = f"There is no plan to {_verb(verb)} here" + (", and no pull request of mine is open." if verb == "revise" else ".")
    return " ".join(part for part in (head, said, "`/dispatch plan` makes one.") if part)


@says
def plan_in_work(sprint: Json, *, another_waits: bool = False) -> str:
    """A plan is still being made, or carried out. `another_waits` where the one that is being revised still stands."""
    if sprint.get("planning"):
        what = "The plan is being made anew" if another_waits else "The plan is still being made"
        follows = (
            "Decide when it is here, or say `/dispatch cancel` first: then the plan before it can be decided on"
            if another_waits
            else "Decide when it is here; `/dispatch revise` with your words after it changes it now, `/dispatch cancel` stops it"
        )
        return f"{what}: this issue is {sprint_in_words(sprint)}. {follows}."
    return f"This issue is already {sprint_in_words(sprint)}: there is no plan to change any more. `/dispatch cancel` stops it."


@says
def plan_taken_along(sprint: Json) -> str:
    """Words about a plan that is not there yet; `sprint` makes it, as it was before they came."""
    if SprintState(sprint["state"]) in (SprintState.QUEUED, SprintState.ADMITTED):
        return f"Taken along: this issue is {sprint_in_words(sprint)}, and the plan will be made with your words."
    return "The plan is begun anew with your words, and only that one will be posted. What was used so far counts towards the limits."


@says
def plan_not_kept() -> str:
    """Nothing can be done again by a plan of long ago, which retention has taken."""
    return (
        "The plan that the last sprint worked by is not kept any more. `/dispatch plan` makes a new one, `/dispatch run` works without one."
    )
