"""`/dispatch status`: where this issue stands."""

from __future__ import annotations

from bot.chatops import Command, Context
from bot.models import Permission, Reaction, Reply, Verdict
from bot.replies import sprint_data
from commands._told import pauses_of_issue, plan_data, skip_data


def status(context: Context) -> Verdict:
    """Tells where this issue stands: place in line, step, cost, result."""
    queue = context.queue
    active, last = queue.active(), queue.last()
    data = {
        "active": sprint_data(active, queue.position(active.id)) if active else None,
        "last": sprint_data(last) if last else None,
        "now_ms": context.now_ms,
        "pauses": pauses_of_issue(context),
        "skip": skip_data(queue.skipped()),
        "plan": plan_data(context),
    }
    return Verdict("ok", "status told", Reply("status", data, Reaction.ROCKET), active.id if active else None)


plugin = Command(status, usage="/dispatch status", needs=Permission.READ, examples=("/dispatch status",), pulls=False)
