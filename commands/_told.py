"""What several verbs tell of pauses and of the skip list, as data for their replies."""

from __future__ import annotations

from bot.chatops import Context
from bot.models import Json, Pause, PauseScope, PlanState, Skip


def pause_data(context: Context, pause: Pause) -> Json:
    """One pause."""
    return {
        "scope": pause.scope.value,
        "repo": pause.repo,
        "here": pause.scope is PauseScope.REPO and pause.repo_id == context.ask.repo_id,
        "by": pause.by,
        "since_ms": pause.since_ms,
        "until_ms": pause.until_ms or 0,
        "reason": pause.reason,
        "provider": pause.provider,
        "kind": pause.kind.value,
    }


def pauses_here(context: Context) -> list[Json]:
    """The pauses and open breakers that a person here may know of: the fleet's, its providers' and this repository's; the terminal sees all."""
    return [
        pause_data(context, pause)
        for pause in context.queue.pauses()
        if pause.scope is not PauseScope.REPO or context.ask.actor.is_terminal or pause.repo_id == context.ask.repo_id
    ]


def pauses_of_issue(context: Context) -> list[Json]:
    """The pauses that hold this issue."""
    return [pause for pause in pauses_here(context) if pause["scope"] != PauseScope.REPO or pause["here"]]


def fleet_pause(context: Context) -> Json | None:
    """The pause of the whole fleet, or its open breaker."""
    return next((pause for pause in pauses_here(context) if pause["scope"] == PauseScope.FLEET), None)


def plan_data(context: Context) -> Json | None:
    """The plan of this issue that waits for a person."""
    plan = context.queue.plan()
    return {"until_ms": plan.expires_ms} if plan is not None and plan.state is PlanState.WAITING else None


def skip_data(skip: Skip | None) -> Json | None:
    """An entry of the skip list."""
    return None if skip is None else {"by": skip.by, "since_ms": skip.since_ms, "reason": skip.reason}
