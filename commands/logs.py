"""`/dispatch logs`: what the agent did last; secrets were taken out before it was stored, and again before it is sent."""

from __future__ import annotations

import re

from bot.chatops import Command, Context, invalid
from bot.models import Permission, Reaction, Reply, UserError, Verdict
from bot.replies import sprint_data

USUAL, MOST = 10, 40


def logs(context: Context) -> Verdict:
    """Shows the last actions of the agent in this issue's sprint, folded."""
    queue = context.queue
    number = context.ask.args[0] if context.ask.args else str(USUAL)
    if not re.fullmatch("[1-9][0-9]?", number) or int(number) > MOST:
        shown = number[:40].replace("`", "'")
        raise UserError(f"`{shown}` is no number of actions from 1 to {MOST}: write for example `{USUAL}`.")
    sprint = queue.active() or queue.last()
    if sprint is None:
        return invalid("nothing has run", "nothing_logged")
    lines = [
        {"n": line.n, "tool": line.tool, "arguments": line.arguments[:2000], "result": line.result and line.result[:4000]}
        for line in queue.log(sprint.id, int(number))
    ]
    data = {"sprint": sprint_data(sprint, queue.position(sprint.id)), "lines": lines}
    return Verdict("ok", "the log was shown", Reply("log", data, Reaction.ROCKET), sprint.id)


plugin = Command(logs, usage="/dispatch logs [N]", needs=Permission.WRITE, examples=("/dispatch logs", "/dispatch logs 30"), pulls=False)
