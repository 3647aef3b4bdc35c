"""`/dispatch resume`: ends a pause before its time."""

from __future__ import annotations

from bot.chatops import Command, Context, invalid
from bot.models import Permission, Reaction, Reply, UserError, Verdict
from commands._told import fleet_pause, pause_data
from commands.pause import in_words, not_for_all, scope_of


def resume(context: Context) -> Verdict:
    """Ends the pause of this repository, or of the whole fleet or a provider (for operators), and closes its breaker."""
    scope, provider, rest = scope_of(context)
    if rest:
        shown = rest[0][:40].replace("`", "'")
        raise UserError(f"`resume` takes no `{shown}`: it ends a pause now.")
    refusal = not_for_all(context, scope, f"resume {scope.value}")
    if refusal:
        return refusal
    ended = context.queue.resume(scope, provider=provider)
    still = fleet_pause(context)
    if ended is None:
        return invalid("nothing is paused", "nothing_to_resume", scope=scope.value, fleet=still, provider=provider)
    data = {"pause": pause_data(context, ended), "now_ms": context.now_ms, "fleet": still}
    return Verdict("ok", f"{in_words(scope, provider)} goes on; it was paused by {ended.by}", Reply("resumed", data, Reaction.ROCKET))


plugin = Command(
    resume,
    usage="/dispatch resume [fleet] [provider NAME]",
    needs=Permission.ADMIN,
    examples=("/dispatch resume", "/dispatch resume fleet"),
    of_issue=False,
)
