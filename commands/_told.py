"""What several verbs tell of pauses and of the skip list, as data for their replies."""

from __future__ import annotations

from bot.chatops import Context
from bot.models import Json, Pause, PauseScope, Skip


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
    }


def pauses_here(context: Context) -> list[Json]:
    """The pauses that a person here may know of: the fleet's and this repository's; the terminal sees all."""
    return [
        pause_data(context, pause)
        for pause in context.queue.pauses()
        if pause.scope is PauseScope.FLEET or context.ask.actor.is_terminal or pause.repo_id == context.ask.repo_id
    ]


def pauses_of_issue(context: Context) -> list[Json]:
    """The pauses that hold this issue."""
    return [pause for pause in pauses_here(context) if pause["scope"] == PauseScope.FLEET or pause["here"]]


def fleet_pause(context: Context) -> Json | None:
    """The pause of the whole fleet."""
    return next((pause for pause in pauses_here(context) if pause["scope"] == PauseScope.FLEET), None)


def skip_data(skip: Skip | None) -> Json | None:
    """An entry of the skip list."""
    return None if skip is None else {"by": skip.by, "since_ms": skip.since_ms, "reason": skip.reason}
