"""`/dispatch watchdog`: what the probes see; an operator may have one run now and do what helps. The service's loop does it: here is only a wish."""

from __future__ import annotations

from collections.abc import Sequence

from bot.chatops import Command, Context, denied
from bot.models import Json, Permission, Reaction, Reply, UserError, Verdict
from bot.snapshot import ProbeState, ProbeTarget, ProbeVerdict
from commands._start import reason

FIX = "fix"
NAMED = 3


def watchdog(context: Context) -> Verdict:
    """Shows what the watchdog sees; `fix` has a probe, or all of them, act now (for operators).

    Other repositories appear as a number only, because they may be private.
    """
    said, states = reason(context).split(), context.queue.watchdog()
    if said and said[0].casefold() == FIX:
        return _fix(context, states, said[1:])
    if said:
        raise UserError(f"`{said[0][:40].replace('`', chr(39))}` is nothing the watchdog can do: write `fix`, `fix PROBE`, or nothing.")
    rows = [_row(context, state) for state in states]
    return Verdict("ok", "what the watchdog sees was told", Reply("watchdog", {"rows": rows, "now_ms": context.now_ms}, Reaction.ROCKET))


def _fix(context: Context, states: Sequence[ProbeState], names: Sequence[str]) -> Verdict:
    if context.permission < Permission.OPERATOR:
        needs, has = Permission.OPERATOR.name, context.permission.name
        return denied("fixing is for operators", "not_permitted", login=context.ask.actor.login, verb="watchdog fix", needs=needs, has=has)
    known = [state.name for state in states]
    wanted = [name.casefold() for name in names] or known
    if strange := [name for name in wanted if name not in known]:
        offer = ", ".join(f"`{name}`" for name in known) or "none, because the watchdog has not run yet"
        raise UserError(f"There is no probe `{strange[0][:40].replace('`', chr(39))}` at work; there are: {offer}.")
    context.queue.wish_probes(wanted)
    return Verdict("ok", f"asked to fix: {', '.join(wanted) or 'nothing'}", Reply("watchdog_wished", {"names": wanted}, Reaction.ROCKET))


def _row(context: Context, state: ProbeState) -> Json:
    ask = context.ask
    shown = [target for target in state.targets if ask.actor.is_terminal or target.repo_id in (0, ask.repo_id)]
    bad = [target for target in shown if target.verdict is not ProbeVerdict.OK]
    hidden = sum(target.verdict is not ProbeVerdict.OK for target in state.targets) - len(bad)
    acted = max((target for target in shown if target.acted_ms is not None), key=lambda target: target.acted_ms or 0, default=None)
    return {
        "name": state.name,
        "verdict": state.verdict.value,
        "ran_ms": state.ran_ms,
        "policy": state.policy,
        "wished": bool(state.wished_by),
        "reasons": [state.reason] if state.reason else _reasons(bad or shown),
        "more": max(0, len(bad) - NAMED),
        "hidden": hidden,
        "acted_ms": acted.acted_ms if acted else 0,
        "acted": acted.act_result if acted else "",
    }


def _reasons(targets: list[ProbeTarget]) -> list[str]:
    return [f"{target.name}: {target.reason}" for target in targets[:NAMED]]


plugin = Command(
    watchdog,
    usage="/dispatch watchdog [fix [PROBE]]",
    needs=Permission.READ,
    examples=("/dispatch watchdog", "/dispatch watchdog fix", "/dispatch watchdog fix model"),
    of_issue=False,
)
