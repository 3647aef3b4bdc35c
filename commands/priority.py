"""`/dispatch priority`: who waits may be moved up or down."""

from __future__ import annotations

import re

from bot.chatops import Command, Context, invalid
from bot.models import Permission, Reaction, Reply, SprintState, UserError, Verdict
from bot.replies import sprint_data
from commands._start import LEAST_URGENT


def priority(context: Context) -> Verdict:
    """Changes the priority of this issue's waiting sprint: 1 is most urgent, 5 is usual, 9 comes last."""
    args, queue = context.ask.args, context.queue
    if len(args) != 1 or not re.fullmatch(f"[1-{LEAST_URGENT}]", args[0]):
        raise UserError(f"Write one number from 1 (most urgent) to {LEAST_URGENT}, for example `/dispatch priority 2`.")
    active = queue.active()
    if active is None or active.state is not SprintState.QUEUED or not queue.prioritise(active.id, int(args[0])):
        return invalid("no sprint waits", "not_waiting", sprint=sprint_data(active) if active else None)
    data = {"sprint": sprint_data(active, queue.position(active.id)), "before": active.priority, "after": int(args[0])}
    return Verdict("ok", f"priority {args[0]} instead of {active.priority}", Reply("priority_set", data, Reaction.ROCKET), active.id)


plugin = Command(priority, usage="/dispatch priority N", needs=Permission.ADMIN, examples=("/dispatch priority 2",), pulls=False)
