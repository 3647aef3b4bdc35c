"""`/dispatch revise`: say what should be different; a plan that waits is made anew, a pull request of ours is gone on with."""

from __future__ import annotations

from bot.chatops import Command, Context, Fact
from bot.models import MODE, MODE_PLAN, REVISES_PLAN, Permission, PlanState, UserError, Verdict
from commands._follow import follow_up, on_our_pull
from commands._plans import in_work, none_waits
from commands._start import start, words


def revise(context: Context) -> Verdict:
    """Makes the waiting plan anew with what you say, or goes on with the open pull request.

    The old plan can still be approved until the new one is here. On a pull request of mine, or where no plan waits and one is open, it goes on
    with that.
    """
    queue, facts = context.queue, context.facts
    said = words(context, whole=True)
    if on_our_pull(context):
        return follow_up(context, said)
    plan, active = queue.plan(), queue.active()
    if active is not None:
        return in_work(context, active)
    if plan is None or plan.state is not PlanState.WAITING:
        return follow_up(context, said) if facts and any(pull.own for pull in facts.pulls) else none_waits(plan, "revise")
    if not said:
        raise UserError("Say what should be different, for example `/dispatch revise only touch the parser`.")
    carried = {**plan.options, MODE: MODE_PLAN, REVISES_PLAN: plan.id}
    return start(context, source=context.ask.source, instructions=said, carried=carried)


plugin = Command(
    revise,
    usage="/dispatch revise [model=NAME] [budget=$N] [steps=N] <what should change>",
    needs=Permission.WRITE,
    examples=("/dispatch revise only touch the parser, and add a test first",),
    wants=frozenset({Fact.ISSUE, Fact.AUTHOR, Fact.WORK}),
)
