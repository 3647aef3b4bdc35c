"""States, reasons, sources and people as words, for every answer alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, assert_never

from bot.models import FailureReason, Json, OutcomeKind, PlanState, Position, Source, SprintState, SprintView, Stop, WaitingReason
from bot.replies._text import about, escape, money, place_in_words

# The reason of a refusal that the change itself has earned; any other is told by its detail alone.
POLICY = "policy"
# The reason of a refusal that `force` overrides: the work is done by somebody else, or not wanted.
OTHER_WORK = "other_work"
# The reason of a pull request that a person merged or closed before the sprint was done with it.
OVERTAKEN = "overtaken"


def waiting_in_words(reason: WaitingReason) -> str:
    """Why a queued sprint does not run, as half a sentence after "It waits because"."""
    match reason:
        case WaitingReason.OPEN_PRS:
            return "this repository already has as many open pull requests of the bot as it may have"
        case WaitingReason.BUDGET:
            return "the budget of the day is used up"
        case WaitingReason.PAUSED:
            return "the bot is paused"
        case WaitingReason.QUIET_HOURS:
            return "these are quiet hours"
        case WaitingReason.APPROVAL:
            return "somebody has to approve it first"
        case WaitingReason.DEPENDENCY:
            return "an issue this one depends on is still open"
        case WaitingReason.BACKOFF:
            return "an attempt failed a moment ago and the next one comes a little later"
        case WaitingReason.CAP:
            return "as many sprints as allowed are running already"
        case WaitingReason.SLOT:
            return "every slot is busy"
        case WaitingReason.NO_WORKER:
            return "no worker is alive; the operator has been told"
        case WaitingReason.BREAKER:
            return "too many sprints failed in a row; the operator has been told"
        case WaitingReason.PROVIDER:
            return "no model provider answers at the moment"
        case WaitingReason.REQUEUED:
            return "it was interrupted and goes on as soon as there is room"
        case WaitingReason.FORGE:
            return "the forge does not answer at the moment"
        case _:
            assert_never(reason)


def failure_in_words(reason: str) -> tuple[str, str]:
    """What went wrong, and what to do next; each one sentence or two. An unknown reason is told in general words."""
    again = "Ask again with `/dispatch retry`; if it happens again, the operator's log has the details."
    operator = "This is for the operator: `timmy-dispatch doctor` names the cause and its remedy. Afterwards: `/dispatch retry`."
    words = {
        FailureReason.CLONE: ("The repository could not be fetched.", operator),
        FailureReason.SANDBOX: ("The sandbox could not be set up, and nothing runs without it.", operator),
        FailureReason.LLM: ("No model gave a usable answer.", again),
        FailureReason.TOOL: ("A tool of the agent broke down.", again),
        FailureReason.CHECKS: (
            "The checks of this repository fail on the change.",
            "Look at the output of the checks, then finish the draft by hand, or say what to do differently with `/dispatch retry` and your words after it.",
        ),
        FailureReason.PUSH: ("The branch could not be pushed.", operator),
        FailureReason.PR: ("The branch was pushed, but the pull request could not be opened.", operator),
        FailureReason.AUTH: ("The forge no longer accepts the bot's token, or the right to do this is gone.", operator),
        FailureReason.SETUP: (
            "A setup command of this repository's `.dispatch.yml` fails, so no model was asked.",
            "Try it in a fresh clone without network, mend it on the default branch, then `/dispatch retry`.",
        ),
        FailureReason.LEASE_LOST: ("The worker lost its hold on this sprint too often.", again),
        FailureReason.INTERNAL: ("Something in the bot itself went wrong.", again),
        FailureReason.DIED: ("The worker died in the middle of it, more than once.", again),
        FailureReason.STALLED: ("Nothing moved for too long, so it was stopped.", again),
        FailureReason.PROTOCOL: ("The agent did not keep to its protocol.", again),
        FailureReason.MODEL_OUTPUT: (
            "The model kept answering with something that cannot be used.",
            "Try another model (`/dispatch retry model=NAME`), or describe the task more closely.",
        ),
    }
    try:
        return words[FailureReason(reason)]
    except ValueError:
        return ("It could not be finished.", again)


def source_in_words(source: Source) -> str:
    """How it was asked for."""
    return {
        Source.LABEL: "by label",
        Source.COMMAND: "by comment",
        Source.ASSIGNMENT: "by assignment",
        Source.MENTION: "by a mention in the issue's text",
        Source.SCHEDULE: "picked from the backlog",
        Source.REVIEW: "after a review",
        Source.CHECKS: "after a red check",
        Source.RECONCILE: "found afterwards, because no delivery announced it",
        Source.RETRY: "as a retry",
    }[source]


def stopped_because(why: str) -> str:
    """Which act of a person on the forge a cancel follows from, as the end of a sentence; "" where somebody asked for it."""
    acts = {
        "closed": "the issue was closed",
        "deleted": "the issue was deleted",
        "unlabelled": "the label that had started it was taken off",
        "unassigned": "I was unassigned",
    }
    return f", because {acts[why]}" if why in acts else ""


def sprint_data(view: SprintView, position: Position | None = None) -> Json:
    """What a reply may say of a sprint, as JSON values."""
    return {
        "issue": view.issue.number,
        "title": view.title,
        "state": view.state.value,
        "waiting": view.waiting.value if view.waiting else "",
        "note": view.waiting_note,
        "place": position.place if position else 0,
        "capped": position.capped if position else False,
        "wait_ms": position.wait_ms if position else 0,
        "steps": view.steps,
        "max_steps": view.limits.steps if view.limits else 0,
        "usd": view.usd,
        "model": view.model,
        "outcome": view.outcome.value if view.outcome else "",
        "reason": view.reason,
        "pr": view.pr,
        "pr_state": view.pr_state,
        "requester": view.requester,
        "since_ms": view.settled_ms or view.started_ms or view.queued_ms,
        "stopping": view.stop.value if view.stop else "",
        "planning": view.plans,
    }


def sprint_in_words(sprint: Mapping[str, Any]) -> str:
    """Half a sentence on where a sprint is: `queued, 3rd in line`, `working, step 4 of 60, $0.02 so far`, `done: pull request #12`."""
    state = SprintState(sprint["state"])
    if state is SprintState.SETTLED:
        return _outcome_in_words(sprint)
    if state is SprintState.QUEUED:
        waiting = WaitingReason(sprint["waiting"]) if sprint["waiting"] else None
        place = (
            place_in_words(sprint["place"], capped=sprint["capped"]) if sprint["place"] and (waiting is None or waiting.runnable) else ""
        )
        # A row of an earlier version has no such figure.
        if place and sprint.get("wait_ms"):
            place += f", to begin in {about(sprint['wait_ms'])}"
        because = (
            f"waiting because {waiting_in_words(waiting)}" + (f" ({escape(sprint['note'])})" if sprint["note"] else "") if waiting else ""
        )
        return ", ".join(part for part in ("queued for a plan" if sprint.get("planning") else "queued", place, because) if part)
    if sprint["stopping"] == Stop.CANCEL:
        return "being cancelled"
    if sprint["stopping"] == Stop.REVISE:
        return "beginning its plan anew"
    work = "planning" if sprint.get("planning") else "working"
    if state is SprintState.WORKING and sprint["steps"]:
        limit = f" of {sprint['max_steps']}" if sprint["max_steps"] else ""
        return f"{work}, step {sprint['steps']}{limit}, {money(sprint['usd'])} so far"
    return {
        SprintState.ADMITTED: "about to start",
        SprintState.PREPARING: "preparing",
        SprintState.WORKING: work,
        SprintState.VETTING: "checking its result",
        SprintState.PUBLISHING: "publishing its pull request",
    }[state]


def _outcome_in_words(sprint: Mapping[str, Any]) -> str:
    pull = f"pull request #{sprint['pr']}" if sprint["pr"] else ""
    fates = {"merged": ", merged", "closed": ", closed unmerged", "reverted": ", merged and reverted"}
    fate = fates.get(sprint["pr_state"], "") if pull else ""
    draft = f"; the draft is {pull}{fate}" if pull else ""
    match OutcomeKind(sprint["outcome"]) if sprint["outcome"] else None:
        case OutcomeKind.PULL_REQUEST | OutcomeKind.UPDATED:
            return f"done: {pull or 'a pull request'}{fate}"
        case OutcomeKind.NO_CHANGE:
            return "done: nothing was changed"
        case OutcomeKind.REFUSED:
            return "not published, because the change breaks a rule" if sprint["reason"] == POLICY else "refused"
        case OutcomeKind.BUDGET:
            return f"stopped at a limit{draft}"
        case OutcomeKind.CANCELLED:
            return "cancelled"
        case OutcomeKind.PLANNED:
            return {
                PlanState.WAITING: "a plan waits for approval",
                PlanState.APPROVED: "its plan was approved",
                PlanState.DENIED: "its plan was denied",
                PlanState.EXPIRED: "nobody approved its plan in time",
                PlanState.CLOSED: "the issue was closed before its plan was approved",
            }.get(sprint["reason"], "its plan gave way to something newer")
        case OutcomeKind.FAILED | None:
            what = failure_in_words(sprint["reason"])[0]
            return f"failed: {what[0].lower()}{what[1:].rstrip('.')}{draft}"
