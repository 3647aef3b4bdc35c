"""`/dispatch cancel`: stop this issue's sprint; also what closing the issue, taking the trigger label off or unassigning the bot means."""

from __future__ import annotations

from typing import assert_never

from bot.chatops import Command, Context, invalid, is_forge_act
from bot.models import Ask, CancelResult, Permission, Plan, PlanState, Reaction, Reply, SprintView, Verdict
from bot.replies import sprint_data, stopped_because


def cancel(context: Context) -> Verdict:
    """Stops the sprint of this issue, waiting or running.

    Where only a plan waits, that is let go. From publishing on it is too late. A label taken off, or an assignment, stops only the sprint that it
    had started, or lets go the plan that came of it. Where the forge tells of an act instead of a person asking, nothing is answered: the status
    comment says it, and why.
    """
    ask, active = context.ask, context.queue.active()
    act = is_forge_act(ask)
    only = ask.options.get("only_trigger", "") if act else ""
    plan = _let_go(context, active, act=act, only=only)
    if active is None and plan is not None:
        reply = Reply() if act else Reply("plan_denied", {"reason": ""}, Reaction.ROCKET)
        return Verdict("ok", "the plan that waited is let go", reply, plan.sprint_id)
    if active is None or (only and active.intent_key != only):
        return Verdict("ok", "nothing to cancel", Reply()) if act else invalid("nothing to cancel", "nothing_to_cancel")
    result = context.queue.cancel(active.id, ask.actor.login, _because(ask) if act else "")
    if act:
        return Verdict("ok", result.value, Reply(), active.id)
    match result:
        case CancelResult.CANCELLED:
            reply = Reply("cancelled", {"issue": active.issue.number}, Reaction.ROCKET)
        case CancelResult.STOPPING:
            reply = Reply("stopping", {}, Reaction.ROCKET)
        case CancelResult.TOO_LATE:
            return invalid("too late", "too_late", sprint=sprint_data(context.queue.active() or active))
        case CancelResult.NOTHING:
            return invalid("nothing to cancel", "nothing_to_cancel")
        case _:
            assert_never(result)
    return Verdict("ok", result.value, reply, active.id)


def _let_go(context: Context, active: SprintView | None, *, act: bool, only: str) -> Plan | None:
    """A plan that waits, waits no longer when the issue is closed, or when a person cancels and nothing else is there to stop.

    With `only`, what had asked for it is taken back: that lets go what was made by it alone.
    """
    queue, plan = context.queue, context.queue.plan()
    if plan is None or plan.state is not PlanState.WAITING or (active is not None and (only or not act)):
        return None
    made = queue.last()
    if only and (made is None or made.id != plan.id or made.intent_key != only):
        return None
    why = stopped_because(_because(context.ask)).removeprefix(", because ") if only else ""
    queue.end_plan(plan, PlanState.CLOSED if act and not only else PlanState.DENIED, by=context.ask.actor.login, reason=why)
    return plan


def _because(ask: Ask) -> str:
    """Which act of the forge it follows from; a deletion is a closing at no time."""
    kind, _, rest = ask.key.partition(":")
    return {"unlabel": "unlabelled", "unassign": "unassigned"}.get(kind) or ("deleted" if rest.endswith(":0") else "closed")


plugin = Command(cancel, usage="/dispatch cancel", needs=Permission.WRITE, examples=("/dispatch cancel",), pulls=False)
