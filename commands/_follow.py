"""A follow-up goes on with an open pull request of ours, on its branch, for the issue that it belongs to; the pull request is only where we answer."""

from __future__ import annotations

from dataclasses import replace

from bot.chatops import Context, NotNow, invalid
from bot.models import BY_FAILURE, BY_REVIEW, NOT_LOOKED_YET, IssueFacts, Reaction, Reply, Source, Verdict
from commands._start import already, start

# What asks by itself comes again while a sprint runs; one that has not looked at the pull request yet takes it along.
BY_ITSELF = (Source.REVIEW, Source.CHECKS)


def on_our_pull(context: Context) -> bool:
    """Whether somebody asks on a pull request of ours: then `run` and `retry` go on with it."""
    return context.facts is not None and context.facts.pull is not None


def follow_up(context: Context, instructions: str) -> Verdict:
    """Queues a sprint that goes on with the pull request on which it was asked, or, asked on the issue, with the issue's open pull request.

    For a verb that wants Fact.ISSUE, Fact.AUTHOR and Fact.WORK. It takes along every unresolved review comment. Raises NotNow where a review or
    a red check asks while a sprint is at work that does not know of it.
    """
    facts, ask = context.facts, context.ask
    if facts is None:
        return Verdict("error", "the forge could not be asked about the issue", Reply("not_yet", reaction=Reaction.CONFUSED))
    if facts.pull is not None and facts.pull.state != "open":
        return invalid(f"the pull request is {facts.pull.state}", "pull_over", pull=facts.pull.number, state=facts.pull.state)
    number = _pull_of(facts)
    if not number:
        return invalid("no pull request to go on with", "nothing_to_follow")
    if ask.source not in BY_ITSELF:
        return start(context, source=ask.source, instructions=instructions, pull=number)
    active = context.queue.active()
    if active is not None:
        if active.follows_pull != number or active.state not in NOT_LOOKED_YET:
            raise NotNow(f"a sprint of {ask.issue} is {active.state}")
        return Verdict("ok", "taken along by the follow-up that waits", already(context, active).reply, active.id)
    own = {key: value for key, value in ask.options.items() if key in (BY_REVIEW, BY_FAILURE)}
    verdict = start(context, source=ask.source, instructions=instructions, pull=number, own=own)
    if verdict.result != "ok":
        return verdict
    told = {"source": ask.source.value, "login": ask.actor.login, "issue": ask.issue.number, "why": ask.text}
    return replace(verdict, reply=Reply("follow_up_begins", told))


def _pull_of(facts: IssueFacts) -> int:
    if facts.pull is not None:
        return facts.pull.number
    return next((pull.number for pull in facts.pulls if pull.own), 0)
