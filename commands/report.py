"""`/dispatch report`: what happened here lately; of other repositories nothing is told, because they may be private."""

from __future__ import annotations

from bot.chatops import Command, Context
from bot.figures import HOUR_MS, window_ms
from bot.models import Permission, Reaction, Reply, Verdict

USUAL_MS = 24 * HOUR_MS


def report(context: Context) -> Verdict:
    """Reports on a window of time: sprints, pull requests, cost, failures, waits.

    The window ends now; without one it is 24 hours.
    """
    said = context.ask.args[0] if context.ask.args else ""
    length = window_ms(said) if said else USUAL_MS
    found = context.queue.figures(since_ms=context.now_ms - length, until_ms=context.now_ms)
    return Verdict("ok", f"reported on {said or '24h'}", Reply("report", {"figures": found.to_json()}, Reaction.ROCKET))


plugin = Command(
    report,
    usage="/dispatch report [WINDOW]",
    needs=Permission.READ,
    examples=("/dispatch report", "/dispatch report 12h", "/dispatch report 7d"),
    of_issue=False,
)
