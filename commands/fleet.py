"""`/dispatch fleet`: who works, and where the work is; other repositories appear as a number only, because they may be private."""

from __future__ import annotations

from bot.chatops import Command, Context
from bot.models import Permission, Reaction, Reply, Verdict
from bot.replies import LISTED
from commands._told import pauses_here


def fleet(context: Context) -> Verdict:
    """Lists the workers with their slots, and what each repository has running and waiting."""
    ask, snapshot, loads = context.ask, context.queue.snapshot(), context.queue.load()
    shown = [load for load in loads if ask.actor.is_terminal or load.repo_id == ask.repo_id][:LISTED]
    hidden = sum(load.in_flight + load.queued for load in loads if load not in shown)
    workers = [
        {
            "name": worker.name,
            "state": worker.state.value,
            "slots": worker.slots,
            "running": worker.running,
            "age_ms": max(0, snapshot.now_ms - worker.beat_ms),
        }
        for worker in snapshot.workers
    ]
    rows = [{"repo": load.repo, "in_flight": load.in_flight, "queued": load.queued} for load in shown]
    data = {"workers": workers, "rows": rows, "hidden": hidden, "pauses": pauses_here(context)}
    return Verdict("ok", "the fleet was told", Reply("fleet", data, Reaction.ROCKET))


plugin = Command(fleet, usage="/dispatch fleet", needs=Permission.READ, examples=("/dispatch fleet",), of_issue=False)
