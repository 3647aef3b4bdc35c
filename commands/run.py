"""`/dispatch run`: work on this issue, once, and open a pull request."""

from __future__ import annotations

from bot.chatops import Command, Context, Fact
from bot.models import Permission, Verdict
from commands._follow import follow_up, on_our_pull
from commands._start import start, words


def run(context: Context) -> Verdict:
    """Works on this issue and opens a pull request.

    Also what a bare `/dispatch` and the trigger label mean. With `plan` in front it begins with a plan and waits for `approve`.
    `force` starts although somebody else seems to do this work, or wants it left alone.
    """
    if on_our_pull(context):
        return follow_up(context, words(context))
    return start(context, source=context.ask.source, instructions=words(context))


plugin = Command(
    run,
    usage="/dispatch run [plan] [force] [model=NAME] [budget=$N] [steps=N] [base=BRANCH] [priority=1-9] [instructions]",
    needs=Permission.WRITE,
    examples=(
        "/dispatch",
        "/dispatch run",
        "/dispatch run budget=$2 steps=30",
        "/dispatch run please keep the public API as it is",
        "/dispatch run plan",
        "/dispatch run force",
    ),
    wants=frozenset({Fact.ISSUE, Fact.AUTHOR, Fact.WORK}),
)
