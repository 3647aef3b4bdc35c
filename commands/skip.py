"""`/dispatch skip`: leave this issue alone, whoever asks."""

from __future__ import annotations

from bot.chatops import Command, Context
from bot.models import Permission, Reaction, Reply, SprintState, Verdict
from commands._start import reason

NOT_BEGUN = (SprintState.QUEUED, SprintState.ADMITTED)


def skip(context: Context) -> Verdict:
    """Leaves this issue alone, whoever asks, until `unskip`.

    A sprint that has not begun is cancelled; one that runs goes on.
    """
    queue, why = context.queue, reason(context)
    queue.skip(why)
    active = queue.active()
    waits = active is not None and active.state in NOT_BEGUN
    if active is not None and waits:
        queue.cancel(active.id, context.ask.actor.login)
    data = {"reason": why, "cancelled": waits, "running": active is not None and not waits}
    said = Reply("skipped", data, Reaction.ROCKET)
    return Verdict("ok", "on the skip list" + (f": {why}" if why else ""), said, active.id if active else None)


plugin = Command(
    skip,
    usage="/dispatch skip [reason]",
    needs=Permission.WRITE,
    examples=("/dispatch skip", "/dispatch skip we do this ourselves"),
    pulls=False,
)
