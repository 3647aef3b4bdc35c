"""Deliveries arrive: hooks are there, and after a long silence Gitea is asked for a test; where the bot may not ask, what moved there is the evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from sqlalchemy.engine import Connection

from bot.fleet.hooks import LOOKED_AT, arrivals, ensure_hook, lacking
from bot.fleet.probes import MendError, Probe, Reach, ago, failing, fine, notable, untold
from bot.fleet.probes._proof import Proof, own_hooks, prove_by_service
from bot.gitea.errors import Forbidden, ForgeError, NotFound
from bot.snapshot import Finding, ProbeVerdict
from bot.store import cursors, deliveries

TARGET = "deliveries"
TEST_SECONDS = 10.0
MOST = 5
MOST_HOOKS = 50
# What moved in the last moments may still be on its way.
LATE_MS = 120_000


async def look(reach: Reach) -> Sequence[Finding]:
    """The last delivery of any kind, and hooks of ours that are gone or cut down; after a long silence each repository by a test or by its activity."""
    now = reach.now_ms()
    last = await reach.store.read(_last_ms) or now
    silent = (now - last) / 1000
    if silent <= reach.settings.watchdog.webhook_silent_minutes * 60:
        return [fine(TARGET, f"the last one came {ago(silent)} ago", last_ms=last), *await _hooks(reach)]
    found: list[Finding] = []
    for repo_id, name in list(reach.names().items())[:MOST]:
        found.append(replace(await _look(reach, repo_id, name, last), repo_id=repo_id))
    return found or [untold(TARGET, f"the last one came {ago(silent)} ago, and no repository is known yet", last_ms=last)]


def _last_ms(conn: Connection) -> int:
    """The last delivery, or when the bot was set up; 0 for neither."""
    return int(cursors.get(conn, cursors.LAST_DELIVERY) or cursors.get(conn, cursors.STARTED) or 0)


async def _hooks(reach: Reach) -> list[Finding]:
    """While deliveries come from somewhere: what is amiss with the hook of a single repository. What cannot be asked now is no finding."""
    found: list[Finding] = []
    for repo_id, name in list(reach.names().items())[:MOST_HOOKS]:
        try:
            hooks = own_hooks(await reach.forge.hooks(name), reach.settings.webhook.hook_url())
        except (Forbidden, NotFound):
            continue
        except ForgeError:
            break
        if (amiss := await _amiss(reach, repo_id, name, hooks)) is not None:
            found.append(replace(amiss, repo_id=repo_id))
    return found


async def _amiss(reach: Reach, repo_id: int, name: str, hooks: list[dict[str, Any]]) -> Finding | None:
    """A hook that was seen and is gone, or does not send all we live by, can be mended; one that was switched off is left to whoever did that."""
    key, now = str(repo_id), reach.now_ms()
    known = await reach.store.read(lambda conn: (cursors.get(conn, cursors.OWN_HOOKS) or {}).get(key))
    if hooks:
        if known != {"missed_ms": 0}:
            await _remember(reach, key, {"missed_ms": 0})
        if not hooks[0].get("active"):
            return failing(
                name, "the webhook is switched off: switch it on in the repository's settings, or run `timmy-dispatch init` again"
            )
        if missing := lacking(hooks[0]):
            return replace(notable(name, f"the webhook does not send: {', '.join(missing)}"), mendable=True)
        return None
    if known is None:
        return None
    if not known["missed_ms"]:
        await _remember(reach, key, {"missed_ms": now})
    elif await reach.store.read(lambda conn: _arrived_ms(conn, name)) > known["missed_ms"] + LATE_MS:
        # They come by the hook of its owner or of the server now.
        await _remember(reach, key, None)
        return None
    gone = failing(name, f"the webhook to {reach.settings.webhook.hook_url()} has vanished; the bot polls meanwhile")
    return replace(gone, mendable=True)


async def _remember(reach: Reach, key: str, value: Mapping[str, int] | None) -> None:
    def write(conn: Connection) -> None:
        known = {**(cursors.get(conn, cursors.OWN_HOOKS) or {}), key: value}
        cursors.put(conn, cursors.OWN_HOOKS, {name: facts for name, facts in known.items() if facts is not None})

    await reach.store.write(write)


def _arrived_ms(conn: Connection, name: str) -> int:
    return arrivals(deliveries.newest(conn, limit=LOOKED_AT)).get(name.casefold(), 0)


async def _look(reach: Reach, repo_id: int, name: str, last_ms: int) -> Finding:
    url = reach.settings.webhook.hook_url()
    try:
        hooks = own_hooks(await reach.forge.hooks(name), url)
    except (Forbidden, NotFound):
        return await _by_activity(reach, name, last_ms, why="the bot is no administrator here and may not ask for a test")
    except ForgeError as error:
        return untold(name, f"the server does not answer: {error}")
    amiss = await _amiss(reach, repo_id, name, hooks)
    if amiss is not None:
        return amiss
    if not hooks:
        moved = await _by_activity(reach, name, last_ms, why="the hook is one of its owner or the server, which cannot be tried from here")
        if await reach.store.read(lambda conn: _arrived_ms(conn, name)):
            return moved
        said = f"{moved.reason}, and " if moved.verdict is ProbeVerdict.FAILING else ""
        none = failing(name, f"{said}the webhook to {url} is not there: run `timmy-dispatch init` again", last_ms=last_ms)
        return replace(none, mendable=moved.verdict is ProbeVerdict.FAILING)
    tested = {name: int(hooks[0]["id"])}
    try:
        proof = (await prove_by_service(reach.forge, tested, seen_ms=lambda: _test_ms(reach), seconds=TEST_SECONDS))[name]
    except ForgeError as error:
        return untold(name, f"no test could be asked for: {error}")
    if proof is Proof.PROVEN:
        return fine(name, "it was quiet, and a test delivery arrived", last_ms=last_ms)
    if proof is Proof.EMPTY:
        return untold(name, "Gitea sends no test from an empty repository", last_ms=last_ms)
    return failing(name, f"a test delivery did not arrive within {TEST_SECONDS:.0f} s; the bot polls meanwhile", last_ms=last_ms)


async def _test_ms(reach: Reach) -> int:
    return int(await reach.store.read(lambda conn: cursors.get(conn, cursors.LAST_TEST_PUSH)) or 0)


async def _by_activity(reach: Reach, name: str, last_ms: int, *, why: str) -> Finding:
    """Where no test can be asked for, and `why`: whatever moves in an issue sends a delivery, our own comments too."""
    since = datetime.fromtimestamp((last_ms + LATE_MS) / 1000, UTC)
    try:
        moved = await reach.forge.issues_since(name, since)
    except ForgeError as error:
        return untold(name, f"the server does not answer: {error}")
    before = datetime.fromtimestamp((reach.now_ms() - LATE_MS) / 1000, UTC)
    missed = [issue for issue in moved if since < _moment(issue.get("updated_at")) < before]
    if missed:
        return failing(name, f"issue #{missed[0].get('number')} moved and no delivery told of it; the bot polls meanwhile", last_ms=last_ms)
    return untold(name, f"{why}; no issue moved either", last_ms=last_ms)


def _moment(text: object) -> datetime:
    try:
        moment = datetime.fromisoformat(str(text))
    except ValueError:
        return datetime.fromtimestamp(0, UTC)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


async def mend(reach: Reach, finding: Finding) -> str:
    """Makes the hook again, or has it send all we live by; whether deliveries arrive is what the next look says."""
    if reach.webhook_secret is None:
        raise MendError("this process does not know the webhook's secret; the service does")
    name = reach.names().get(finding.repo_id, finding.target)
    try:
        _, done = await ensure_hook(reach.forge, name, reach.settings, secret=reach.webhook_secret, replace=False)
    except ForgeError as error:
        raise MendError(str(error)) from None
    await _remember(reach, str(finding.repo_id), {"missed_ms": 0})
    return {"made": "the webhook was made again", "mended": "the webhook sends everything again"}.get(done, f"the webhook was {done}")


plugin = Probe(
    "whether deliveries arrive",
    look,
    period_seconds=600.0,
    mend=mend,
    does="makes a webhook again that vanished",
    limit_seconds=30.0 + MOST * TEST_SECONDS,
)
