"""What the verbs of a plan share: the answers where there is nothing to decide."""

from __future__ import annotations

from bot.chatops import Context, invalid
from bot.models import Plan, PlanState, SprintView, Verdict
from bot.replies import sprint_data


def in_work(context: Context, active: SprintView) -> Verdict:
    """A plan is being made or carried out."""
    data = sprint_data(active, context.queue.position(active.id))
    plan = context.queue.plan()
    waits = active.plans and plan is not None and plan.state is PlanState.WAITING
    return invalid("a sprint is active", "plan_in_work", sprint=data, another_waits=waits)


def none_waits(plan: Plan | None, verb: str) -> Verdict:
    """No plan waits; what became of the last one is said."""
    state, by = (plan.state.value, plan.decided_by) if plan else ("", "")
    return invalid(f"no plan waits: the last is {state}" if state else "there is no plan", "no_plan", verb=verb, state=state, by=by)
