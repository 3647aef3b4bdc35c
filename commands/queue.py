"""`/dispatch queue`: what runs and what waits; other repositories appear as a number only, because they may be private."""

from __future__ import annotations

from bot.chatops import Command, Context
from bot.models import IN_FLIGHT, Permission, Reaction, Reply, SprintState, Verdict
from bot.replies import LISTED, sprint_data
from commands._told import pauses_here

READ_AHEAD = 200


def queue(context: Context) -> Verdict:
    """Lists what runs and what waits, in order, and the plans that wait for a person."""
    ask, counts = context.ask, context.queue.counts()
    terminal = ask.actor.is_terminal
    views = [view for view in context.queue.listing(READ_AHEAD) if terminal or view.repo_id == ask.repo_id][:LISTED]
    rows = [
        {
            **sprint_data(view, context.queue.position(view.id) if view.state is SprintState.QUEUED else None),
            "ref": str(view.issue) if terminal else f"#{view.issue.number}",
            "here": view.repo_id == ask.repo_id and view.issue.number == ask.issue.number,
        }
        for view in views
    ]
    running, waiting = sum(counts.get(state, 0) for state in IN_FLIGHT), counts.get(SprintState.QUEUED, 0)
    data = {
        "rows": rows,
        "running": running,
        "waiting": waiting,
        "hidden": max(0, running + waiting - len(rows)),
        "pauses": pauses_here(context),
        "plans": [
            {"ref": str(plan.issue) if terminal else f"#{plan.issue.number}", "title": title, "until_ms": plan.expires_ms}
            for plan, title in context.queue.plans(READ_AHEAD)
            if terminal or plan.repo_id == ask.repo_id
        ][:LISTED],
    }
    return Verdict("ok", "queue told", Reply("queue", data, Reaction.ROCKET))


plugin = Command(queue, usage="/dispatch queue", needs=Permission.READ, examples=("/dispatch queue",), of_issue=False)
