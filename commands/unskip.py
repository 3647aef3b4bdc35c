"""`/dispatch unskip`: this issue may be worked on again."""

from __future__ import annotations

from bot.chatops import Command, Context, invalid
from bot.models import Permission, Reaction, Reply, Verdict
from commands._told import skip_data


def unskip(context: Context) -> Verdict:
    """Takes this issue off the skip list."""
    entry = context.queue.unskip()
    if entry is None:
        return invalid("not on the skip list", "not_skipped")
    return Verdict(
        "ok",
        f"off the skip list, where {entry.by} had put it",
        Reply("unskipped", {"skip": skip_data(entry), "now_ms": context.now_ms}, Reaction.ROCKET),
    )


plugin = Command(unskip, usage="/dispatch unskip", needs=Permission.WRITE, examples=("/dispatch unskip",), pulls=False)
