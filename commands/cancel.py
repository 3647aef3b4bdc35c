"""`/dispatch cancel`: stop this issue's sprint; also what closing the issue or taking the trigger label off means."""

from __future__ import annotations

from typing import assert_never

from bot.chatops import Command, Context, invalid, is_forge_act
from bot.models import CancelResult, Permission, Reaction, Reply, Verdict
from bot.replies import sprint_data


def cancel(context: Context) -> Verdict:
    """Stops the sprint of this issue, waiting or running.

    From publishing on it is too late. A label taken off stops only the sprint that it had started. Where the forge tells of an act instead of a
    person asking, nothing is answered: the status comment says it.
    """
    ask, active = context.ask, context.queue.active()
    act = is_forge_act(ask)
    only = ask.options.get("only_trigger", "") if act else ""
    if active is None or (only and active.intent_key != only):
        return Verdict("ok", "nothing to cancel", Reply()) if act else invalid("nothing to cancel", "nothing_to_cancel")
    result = context.queue.cancel(active.id, ask.actor.login)
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


plugin = Command(cancel, usage="/dispatch cancel", needs=Permission.WRITE, examples=("/dispatch cancel",), pulls=False)
