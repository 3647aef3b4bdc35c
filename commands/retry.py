"""`/dispatch retry`: a new sprint after one that ended."""

from __future__ import annotations

from bot.chatops import Command, Context, Fact, invalid
from bot.models import Permission, Source, Verdict
from commands._start import already, start, words


def retry(context: Context) -> Verdict:
    """Starts again after a sprint that ended.

    Without words of its own it repeats the instructions of the sprint before.
    """
    active, last = context.queue.active(), context.queue.last()
    if active:
        return already(context, active)
    if last is None:
        return invalid("no sprint has ended", "nothing_to_retry")
    return start(context, source=Source.RETRY, instructions=words(context) or last.instructions)


plugin = Command(
    retry,
    usage="/dispatch retry [model=NAME] [budget=$N] [steps=N] [base=BRANCH] [priority=1-9] [instructions]",
    needs=Permission.WRITE,
    examples=("/dispatch retry", "/dispatch retry budget=$3 the test must stay as it is"),
    pulls=False,
    wants=frozenset({Fact.ISSUE, Fact.AUTHOR, Fact.WORK}),
)
