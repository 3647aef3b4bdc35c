"""`/dispatch approve`: carry out the plan that waits, by the right of whoever approves, for the very text it was made of."""

from __future__ import annotations

from bot.chatops import Command, Context, Fact
from bot.models import FOLLOWS_PLAN, Permission, PlanState, Source, Verdict
from commands._plans import in_work, none_waits
from commands._start import already, start, words


def approve(context: Context) -> Verdict:
    """Goes on with the plan that waits; the pull request follows.

    Words after it go to the agent as instructions beside the plan. Where the issue was edited since the plan was made, it asks once more.
    `force` goes on although somebody else seems to do this work.
    """
    queue, ask = context.queue, context.ask
    plan, active = queue.plan(), queue.active()
    if active is not None:
        return in_work(context, active) if active.plans else already(context, active)
    if plan is None or plan.state is not PlanState.WAITING:
        return none_waits(plan, "approve")
    verdict = start(
        context,
        source=Source.COMMAND,
        instructions="\n".join(part for part in (plan.instructions, words(context)) if part),
        carried={**plan.options, FOLLOWS_PLAN: plan.id},
        plan=plan,
    )
    sprint = queue.active()
    if sprint is not None and sprint.follows_plan == plan.id:
        queue.end_plan(plan, PlanState.APPROVED, by=ask.actor.login)
    return verdict


plugin = Command(
    approve,
    usage="/dispatch approve [force] [model=NAME] [budget=$N] [steps=N] [base=BRANCH] [priority=1-9] [instructions]",
    needs=Permission.WRITE,
    examples=("/dispatch approve", "/dispatch approve budget=$3 and please mind the old tests"),
    pulls=False,
    wants=frozenset({Fact.ISSUE, Fact.AUTHOR, Fact.WORK}),
)
