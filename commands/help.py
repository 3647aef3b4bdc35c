"""`/dispatch help`: the verbs, from their own declarations."""

from __future__ import annotations

import difflib

from bot.chatops import NAMESPACE, Command, Context, invalid, needed
from bot.models import Permission, Reaction, Reply, Source, Verdict


def help_(context: Context) -> Verdict:
    """Lists the commands, or explains one."""
    if context.ask.source is Source.MENTION and context.ask.text:
        return Verdict("ok", "a command where none is read was answered", Reply("command_unread"))
    if context.ask.source is Source.MENTION:
        return Verdict("ok", "a mention without a command was answered", Reply("addressed"))
    shown = {verb: command for verb, command in sorted(context.commands.items()) if not command.hidden}
    wanted = context.ask.args[0].casefold() if context.ask.args else ""
    if wanted and wanted not in shown:
        near = difflib.get_close_matches(wanted, list(shown), n=1)
        suggestion = f"{NAMESPACE} help {near[0]}" if near else ""
        return invalid("unknown verb", "not_understood", text=context.ask.text, problem="There is no such verb.", suggestion=suggestion)
    verbs = [
        {
            "usage": command.usage,
            "summary": command.summary,
            "needs": needed(command, verb, context.repository).name,
            "examples": list(command.examples),
        }
        for verb, command in shown.items()
        if not wanted or verb == wanted
    ]
    return Verdict("ok", "help told", Reply("help_text", {"verbs": verbs, "has": context.permission.name}, Reaction.ROCKET))


plugin = Command(
    help_, usage="/dispatch help [VERB]", needs=Permission.READ, examples=("/dispatch help", "/dispatch help run"), of_issue=False
)
