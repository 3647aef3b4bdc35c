"""`/dispatch revise`: say what should be different; a plan that waits is made anew, a pull request of ours is gone on with."""

from __future__ import annotations

from bot.chatops import Command, Context, Fact
from bot.models import MODE, MODE_PLAN, REVISES_PLAN, Permission, PlanState, Reaction, Reply, SprintView, UserError, Verdict
from bot.replies import sprint_data
from commands._follow import follow_up, on_our_pull
from commands._plans import in_work, none_waits
from commands._start import options_of, start, words

UNSAID = "Say what should be different, for example `/dispatch revise only touch the parser`."


def revise(context: Context) -> Verdict:
    """Makes the plan anew with what you say, or goes on with the open pull request.

    A plan that is just being made takes your words along, and only that one is posted. The old plan stays until the new one is here; `cancel`
    goes back to it. On a pull request of mine, or where no plan waits and one is open, it goes on with that.
    """
    queue, facts = context.queue, context.facts
    said = words(context, whole=True)
    if on_our_pull(context):
        return follow_up(context, said)
    if facts is not None and facts.is_pull:
        return start(context, source=context.ask.source, instructions=said)
    plan, active = queue.plan(), queue.active()
    if active is not None:
        return _while_it_is_made(context, active, said) if active.plans else in_work(context, active)
    if plan is None or plan.state is not PlanState.WAITING:
        return follow_up(context, said) if facts and any(pull.own for pull in facts.pulls) else none_waits(plan, "revise")
    if not said:
        raise UserError(UNSAID)
    carried = {**plan.options, MODE: MODE_PLAN, REVISES_PLAN: plan.id}
    return start(context, source=context.ask.source, instructions=said, carried=carried)


def _while_it_is_made(context: Context, active: SprintView, said: str) -> Verdict:
    """The sprint that makes the plan goes on being the only one: it is told, and begins anew where it has begun."""
    options = options_of(context)
    if isinstance(options, Verdict):
        return options
    if fixed := sorted(set(options) & {"base", "priority"}):
        raise UserError(f"`{fixed[0]}=` cannot be changed while the plan is being made. `/dispatch cancel` it and ask anew.")
    if not said:
        raise UserError(UNSAID)
    instructions = "\n".join(part for part in (active.instructions, said) if part)
    if not context.queue.revise(active.id, context.ask.actor.login, instructions=instructions, options={**active.options, **options}):
        return in_work(context, active)
    reply = Reply("plan_taken_along", {"sprint": sprint_data(active, context.queue.position(active.id))}, Reaction.ROCKET)
    return Verdict("ok", "taken along by the plan in the making", reply, active.id)


plugin = Command(
    revise,
    usage="/dispatch revise [model=NAME] [budget=$N] [steps=N] <what should change>",
    needs=Permission.WRITE,
    examples=("/dispatch revise only touch the parser, and add a test first",),
    wants=frozenset({Fact.ISSUE, Fact.AUTHOR, Fact.WORK}),
)
