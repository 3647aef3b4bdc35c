"""`/dispatch retry`: a new sprint after one that ended; it goes on with unfinished work unless it is asked to begin afresh."""

from __future__ import annotations

from dataclasses import replace

from bot.chatops import Command, Context, Fact, invalid
from bot.models import OutcomeKind, Permission, Source, SprintView, Verdict
from commands._follow import follow_up, on_our_pull
from commands._start import already, as_before, start, words

FRESH = "fresh"
UNFINISHED = (OutcomeKind.BUDGET, OutcomeKind.FAILED)


def retry(context: Context) -> Verdict:
    """Starts again after a sprint that ended; unfinished work in a draft is gone on with.

    `fresh` begins from the base branch instead, and replaces what is in the draft. What ended well, or left no draft, begins afresh anyway. Without
    words of its own it repeats the instructions of the sprint before.
    """
    context, fresh = _fresh(context)
    active, last = context.queue.active(), context.queue.last()
    if active:
        return already(context, active)
    instructions = words(context) or (last.instructions if last else "")
    if on_our_pull(context) and not fresh:
        return follow_up(context, instructions)
    if last is None:
        return invalid("no sprint has ended", "nothing_to_retry")
    if not fresh and _unfinished(context, last):
        return follow_up(context, instructions)
    if last.follows_plan and context.queue.plan() is None:
        # Without it this would be other work than was approved.
        return invalid("the plan it worked by is not kept any more", "plan_not_kept")
    return start(context, source=Source.RETRY, instructions=instructions, carried=as_before(last))


def _fresh(context: Context) -> tuple[Context, bool]:
    """The command without a leading `fresh`, and whether it was there; `force` may stand on either side of it."""
    args = context.ask.args
    at = next((n for n, word in enumerate(args[:2]) if word.casefold() == FRESH), None)
    if at is None or (at == 1 and args[0].casefold() != "force"):
        return context, False
    return replace(context, ask=replace(context.ask, args=(*args[:at], *args[at + 1 :]))), True


def _unfinished(context: Context, last: SprintView) -> bool:
    """Whether the last sprint left a draft that is still open: then its branch is where to go on."""
    pulls = context.facts.pulls if context.facts is not None else ()
    return last.outcome in UNFINISHED and last.pr > 0 and any(pull.own and pull.number == last.pr for pull in pulls)


plugin = Command(
    retry,
    usage="/dispatch retry [fresh] [model=NAME] [budget=$N] [steps=N] [base=BRANCH] [priority=1-9] [instructions]",
    needs=Permission.WRITE,
    examples=("/dispatch retry", "/dispatch retry fresh", "/dispatch retry budget=$3 the test must stay as it is"),
    pulls=False,
    wants=frozenset({Fact.ISSUE, Fact.AUTHOR, Fact.WORK}),
)
