"""`/dispatch deny`: let the plan that waits go; nothing is changed, and no forge is needed."""

from __future__ import annotations

from bot.chatops import Command, Context
from bot.models import Permission, PlanState, Reaction, Reply, Verdict
from commands._plans import in_work, none_waits
from commands._start import reason


def deny(context: Context) -> Verdict:
    """Lets the plan that waits go; nothing is changed."""
    queue, ask = context.queue, context.ask
    plan, active, why = queue.plan(), queue.active(), reason(context)
    if active is not None:
        return in_work(context, active)
    if plan is None or plan.state is not PlanState.WAITING:
        return none_waits(plan, "deny")
    queue.end_plan(plan, PlanState.DENIED, by=ask.actor.login, reason=why)
    # The plan's own comment says it; a second comment would only repeat it.
    reply = Reply("plan_denied", {"reason": why}) if ask.actor.is_terminal else Reply(reaction=Reaction.ROCKET)
    return Verdict("ok", f"the plan is denied: {why}" if why else "the plan is denied", reply, plan.sprint_id)


plugin = Command(
    deny,
    usage="/dispatch deny [reason]",
    needs=Permission.WRITE,
    examples=("/dispatch deny", "/dispatch deny the cause is in the parser"),
    pulls=False,
)
