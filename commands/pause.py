"""`/dispatch pause`: nothing new starts in this repository or in the whole fleet, or a provider is passed over; what waits is kept."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from bot.chatops import Command, Context, denied
from bot.models import IN_FLIGHT, PauseScope, Permission, Reaction, Reply, SprintState, UserError, Verdict
from bot.replies import moment
from commands._start import reason
from commands._told import pause_data

DURATION = re.compile(r"(?i)(?=[0-9])(?:([0-9]{1,3})d)?(?:([0-9]{1,4})h)?(?:([0-9]{1,5})(?:m|min))?")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,79}")
LONGEST_MS = 90 * 86_400_000
DAY_MS, HOUR_MS, MINUTE_MS = 86_400_000, 3_600_000, 60_000


def pause(context: Context) -> Verdict:
    """Starts nothing new in this repository, or in the whole fleet (for operators), until `resume` or for a time.

    What runs is finished, what waits keeps its place. `pause provider NAME` (for operators) passes over one model provider: its sprints go on with
    the next of the chain, or wait where there is none.
    """
    scope, provider, rest = scope_of(context)
    refusal = not_for_all(context, scope, f"pause {scope.value}")
    if refusal:
        return refusal
    lasting, why = _time_and_reason(rest)
    until_ms = context.now_ms + lasting if lasting else None
    made = context.queue.pause(scope, until_ms=until_ms, reason=why, provider=provider)
    running, waiting = _held(context, scope)
    data = {"pause": pause_data(context, made), "now_ms": context.now_ms, "running": running, "waiting": waiting}
    until = f" until {moment(until_ms)}" if until_ms else ""
    return Verdict(
        "ok", f"{in_words(scope, provider)} is paused{until}" + (f": {why}" if why else ""), Reply("paused", data, Reaction.ROCKET)
    )


def scope_of(context: Context) -> tuple[PauseScope, str, list[str]]:
    """What a pause or a resume is about, the provider where it is about one, and the words after that; without a word it is the repository."""
    said = reason(context).split()
    first = said[0].casefold() if said else ""
    if first in ("fleet", "all"):
        return PauseScope.FLEET, "", said[1:]
    if first == "provider":
        return PauseScope.PROVIDER, _provider(context, said[1] if said[1:] else ""), said[2:]
    if not context.ask.repo_id:
        raise UserError("Say what it is about: `fleet`, `provider NAME`, or OWNER/REPO in front of the rest.")
    return PauseScope.REPO, "", said[1:] if first in ("repo", "repository") else said


def _provider(context: Context, said: str) -> str:
    """The name as the chain has it; a login of Hermes unfolds into names that only the chain knows, so that any may be meant."""
    providers = context.settings.providers
    known = dict.fromkeys(one.name or urlsplit(one.base_url).hostname or "provider" for one in providers if not one.from_hermes)
    known |= dict.fromkeys([*context.queue.snapshot().providers, *(held.provider for held in context.queue.pauses() if held.provider)])
    found = next((name for name in known if name.casefold() == said.casefold()), "")
    if found or (NAME.fullmatch(said) and any(one.from_hermes for one in providers)):
        return found or said
    names = ", ".join(f"`{name}`" for name in known) or "none is configured"
    shown = said[:40].replace("`", "'")
    raise UserError((f"`{shown}` is no provider here. " if said else "Say which provider. ") + f"Known: {names}.")


def in_words(scope: PauseScope, provider: str) -> str:
    """What is paused, for the decision's row."""
    return {PauseScope.FLEET: "the fleet", PauseScope.REPO: "the repository"}.get(scope, f"the provider {provider}")


def not_for_all(context: Context, scope: PauseScope, verb: str) -> Verdict | None:
    """The fleet and its providers are for operators."""
    if scope is PauseScope.REPO or context.permission >= Permission.OPERATOR:
        return None
    needs, has = Permission.OPERATOR.name, context.permission.name
    what = "the fleet is" if scope is PauseScope.FLEET else "providers are"
    return denied(f"{what} for operators", "not_permitted", login=context.ask.actor.login, verb=verb, needs=needs, has=has)


def _held(context: Context, scope: PauseScope) -> tuple[int, int]:
    """(running, waiting) where the pause holds."""
    if scope is not PauseScope.REPO:
        counts = context.queue.counts()
        return sum(counts.get(state, 0) for state in IN_FLIGHT), counts.get(SprintState.QUEUED, 0)
    here = next((load for load in context.queue.load() if load.repo_id == context.ask.repo_id), None)
    return (here.in_flight, here.queued) if here else (0, 0)


def _time_and_reason(said: list[str]) -> tuple[int, str]:
    """(ms or 0, reason): a time is `30m`, `2h`, `1d` or `1h30m`, and stands first."""
    if not said or not said[0][0].isdigit():
        return 0, " ".join(said)
    match = DURATION.fullmatch(said[0])
    days, hours, minutes = (int(part or 0) for part in match.groups()) if match else (0, 0, 0)
    lasting = days * DAY_MS + hours * HOUR_MS + minutes * MINUTE_MS
    shown = said[0][:40].replace("`", "'")
    if not lasting:
        raise UserError(f"`{shown}` is no time: write for example `30m`, `2h`, `1d` or `1h30m`.")
    if lasting > LONGEST_MS:
        raise UserError(f"`{shown}` is too long: 90 days are the most; without a time it holds until `resume`.")
    return lasting, " ".join(said[1:])


plugin = Command(
    pause,
    usage="/dispatch pause [fleet] [provider NAME] [DURATION] [reason]",
    needs=Permission.ADMIN,
    examples=("/dispatch pause 2h the release is being cut", "/dispatch pause", "/dispatch pause fleet 30m"),
    of_issue=False,
)
