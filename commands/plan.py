"""`/dispatch plan`: look into this issue and propose how to solve it; nothing is changed before a person approves."""

from __future__ import annotations

from bot.chatops import Command, Context, Fact
from bot.models import Permission, Verdict
from commands._start import PLAN_ONLY, start, words


def plan(context: Context) -> Verdict:
    """Makes a plan for this issue, posts it and waits for `approve`.

    `revise` and your words make another one, `deny` lets it go; after some days without a word it is let go by itself. `force` plans although
    somebody else seems to do this work.
    """
    return start(context, source=context.ask.source, instructions=words(context), carried=PLAN_ONLY)


plugin = Command(
    plan,
    usage="/dispatch plan [force] [model=NAME] [budget=$N] [steps=N] [base=BRANCH] [priority=1-9] [instructions]",
    needs=Permission.WRITE,
    examples=("/dispatch plan", "/dispatch plan budget=$1 without a new dependency"),
    pulls=False,
    wants=frozenset({Fact.ISSUE, Fact.AUTHOR, Fact.WORK}),
)
