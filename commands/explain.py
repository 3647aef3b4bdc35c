"""`/dispatch explain`: why things are as they are, from the rows of the decisions themselves."""

from __future__ import annotations

from bot.chatops import Command, Context, Fact
from bot.models import Permission, Reaction, Reply, Verdict
from bot.replies import LISTED, sprint_data
from commands._start import in_the_way_now
from commands._told import pauses_of_issue, plan_data, skip_data

KEPT = 200


def explain(context: Context) -> Verdict:
    """Tells why this issue waits, runs or does not, what stands in the way of a start now, and every decision about it."""
    queue = context.queue
    trail, active, last = queue.trail(KEPT), queue.active(), queue.last()
    rows = [
        {"made_ms": row.made_ms, "kind": row.kind, "result": row.result, "reason": row.reason, "actor": row.actor}
        for row in trail[-LISTED:]
    ]
    data = {
        "rows": rows,
        "hidden": len(trail) - len(rows),
        "active": sprint_data(active, queue.position(active.id)) if active else None,
        "last": sprint_data(last) if last else None,
        "pauses": pauses_of_issue(context),
        "skip": skip_data(queue.skipped()),
        "plan": plan_data(context),
        "now_ms": context.now_ms,
        "dead": queue.snapshot().inbox_dead,
        "obstacles": [] if active else in_the_way_now(context),
        "looked": context.facts is not None,
    }
    return Verdict("ok", "the trail was told", Reply("explanation", data, Reaction.ROCKET), active.id if active else None)


plugin = Command(
    explain,
    usage="/dispatch explain",
    needs=Permission.READ,
    examples=("/dispatch explain",),
    pulls=False,
    likes=frozenset({Fact.ISSUE, Fact.WORK}),
)
