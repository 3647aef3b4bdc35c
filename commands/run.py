"""`/dispatch run`: work on this issue, once, and open a pull request."""

from __future__ import annotations

from bot.chatops import Command, Context, Fact
from bot.models import Permission, Verdict
from commands._start import start, words


def run(context: Context) -> Verdict:
    """Works on this issue and opens a pull request.

    Also what a bare `/dispatch` and the trigger label mean. `force` starts although somebody else seems to do this work, or wants it left alone.
    """
    return start(context, source=context.ask.source, instructions=words(context))


plugin = Command(
    run,
    usage="/dispatch run [force] [model=NAME] [budget=$N] [steps=N] [base=BRANCH] [priority=1-9] [instructions]",
    needs=Permission.WRITE,
    examples=(
        "/dispatch",
        "/dispatch run",
        "/dispatch run budget=$2 steps=30",
        "/dispatch run please keep the public API as it is",
        "/dispatch run force",
    ),
    wants=frozenset({Fact.ISSUE, Fact.AUTHOR, Fact.WORK}),
)
