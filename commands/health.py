"""`/dispatch health`: whether work is being done, judged by what moved; on the command line also as an exit code."""

from __future__ import annotations

from bot.chatops import Command, Context
from bot.fleet.health import Thresholds, judge
from bot.models import Permission, Reaction, Reply, Verdict
from bot.snapshot import Fault, HealthVerdict, Reason
from commands._told import pauses_here

# 1 and 2 mean that nothing could be asked (bot/cli/__init__.py).
EXIT_CODES = {HealthVerdict.DEGRADED: 3, HealthVerdict.STALLED: 4}


def health(context: Context) -> Verdict:
    """Judges the fleet: working, idle, paused, degraded or stalled, with the reasons."""
    snapshot = context.queue.snapshot()
    also = () if snapshot.workers else (Reason(Fault.WORKERS_LOST, "no worker is there: the service does not run"),)
    found = judge(snapshot, Thresholds.of(context.settings), also)
    data = {
        "verdict": found.verdict.value,
        "reasons": [reason.detail for reason in found.reasons],
        "pauses": pauses_here(context),
    }
    said = Reply("health", data, Reaction.ROCKET)
    return Verdict("ok", f"the fleet is {found.verdict}", said, exit_code=EXIT_CODES.get(found.verdict, 0))


plugin = Command(health, usage="/dispatch health", needs=Permission.READ, examples=("/dispatch health",), of_issue=False)
