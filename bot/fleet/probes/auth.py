"""The tokens we live by are good: Gitea knows ours, and the keys that a login renews are renewed before somebody needs them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from bot.fleet.probes import MendError, Probe, Reach, ago, failing, fine, notable, untold
from bot.gitea.errors import Forbidden, ForgeError, Unauthorized
from bot.providers.entries import Entry
from bot.providers.health import EntryState
from bot.providers.nous import MARGIN_MS, LoggedOutError, RefreshPendingError
from bot.snapshot import Finding


async def look(reach: Reach) -> Sequence[Finding]:
    """Gitea's token, then one key a provider with a login."""
    states = {(provider, model): (state, reason) for provider, model, state, _, reason in await reach.chain.availability()}
    entries = {entry.provider: entry for entry in reversed(reach.entries()) if entry.login}
    return [await _gitea(reach), *logins(entries, states, reach.now_ms())]


async def _gitea(reach: Reach) -> Finding:
    try:
        me = await reach.forge.api.getitem("/user")
    except Unauthorized as error:
        return failing("gitea", f"the server does not know our token: {error.message or 'refused'}")
    except Forbidden as error:
        return failing("gitea", f"the server refuses our token: {error.message or 'no reason given'}")
    except ForgeError as error:
        return untold("gitea", f"the server does not answer: {error}")
    login = str(me.get("login", "")) if isinstance(me, dict) else ""
    return fine("gitea", f"accepted as '{login}'; Gitea's tokens have no end")


def logins(entries: Mapping[str, Entry], states: Mapping[tuple[str, str], tuple[EntryState, str]], now_ms: int) -> Iterator[Finding]:
    """A key lives for minutes and is renewed when a call needs it, so that one that ended is no fault as long as it can be renewed."""
    for name, entry in sorted(entries.items()):
        state, reason = states.get((entry.provider, entry.model), (EntryState.HEALTHY, ""))
        left = (entry.key_expires_ms - now_ms) / 1000
        evidence = {"expires_ms": entry.key_expires_ms}
        if state is EntryState.DOWN and reason.startswith("auth"):
            found = failing(name, f"the login is gone ({reason})", **evidence)
        elif not entry.key_expires_ms:
            found = untold(name, "the login does not say when its key ends")
        elif left * 1000 > MARGIN_MS:
            found = fine(name, f"the key is good for another {ago(left)}", **evidence)
        else:
            ended = f"ended {ago(-left)} ago" if left <= 0 else f"ends in {ago(left)}"
            found = notable(name, f"the key {ended}; it is renewed when a call needs it", **evidence)
        yield replace(found, provider=name, mendable=found.verdict.value in ("warn", "failing"))


async def mend(reach: Reach, finding: Finding) -> str:
    """Lets the login renew its key (Hermes does it, under its own locks)."""
    entry = next((entry for entry in reach.entries() if entry.provider == finding.target and entry.login), None)
    login = reach.logins.get(entry.login) if entry else None
    if entry is None or login is None:
        raise MendError("only the owner of the token can mend it")
    try:
        await login.fresh()
    except (LoggedOutError, RefreshPendingError) as error:
        raise MendError(str(error)) from None
    return "the key was renewed"


plugin = Probe("tokens and logins", look, period_seconds=300.0, mend=mend, does="renews a login", mend_seconds=60.0, distance_seconds=300.0)
