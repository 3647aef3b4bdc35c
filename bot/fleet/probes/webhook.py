"""Deliveries arrive: after a long silence Gitea is asked for a test, and where the bot may not ask, what moved there is the evidence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

from sqlalchemy.engine import Connection

from bot.fleet.probes import Probe, Reach, ago, failing, fine, untold
from bot.fleet.probes._proof import Proof, own_hooks, prove_by_service
from bot.gitea.errors import Forbidden, ForgeError, NotFound
from bot.snapshot import Finding
from bot.store import cursors

TARGET = "deliveries"
TEST_SECONDS = 10.0
MOST = 5
# What moved in the last moments may still be on its way.
LATE_MS = 120_000


async def look(reach: Reach) -> Sequence[Finding]:
    """The last delivery of any kind; where that is long ago, each repository by a test or by its activity."""
    now = reach.now_ms()
    last = await reach.store.read(_last_ms) or now
    silent = (now - last) / 1000
    if silent <= reach.settings.watchdog.webhook_silent_minutes * 60:
        return [fine(TARGET, f"the last one came {ago(silent)} ago", last_ms=last)]
    found: list[Finding] = []
    for repo_id, name in list(reach.names().items())[:MOST]:
        found.append(replace(await _look(reach, name, last), repo_id=repo_id))
    return found or [untold(TARGET, f"the last one came {ago(silent)} ago, and no repository is known yet", last_ms=last)]


def _last_ms(conn: Connection) -> int:
    """The last delivery, or when the bot was set up; 0 for neither."""
    return int(cursors.get(conn, cursors.LAST_DELIVERY) or cursors.get(conn, cursors.STARTED) or 0)


async def _look(reach: Reach, name: str, last_ms: int) -> Finding:
    url = reach.settings.webhook.hook_url()
    try:
        hooks = own_hooks(await reach.forge.hooks(name), url)
    except (Forbidden, NotFound):
        return await _by_activity(reach, name, last_ms)
    except ForgeError as error:
        return untold(name, f"the server does not answer: {error}")
    if not hooks or not hooks[0].get("active"):
        said = "is switched off" if hooks else f"to {url} is not there"
        return failing(name, f"the webhook {said}: run `timmy-dispatch init` again", last_ms=last_ms)
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


async def _by_activity(reach: Reach, name: str, last_ms: int) -> Finding:
    """The bot is no administrator: it may not ask for a test. Whatever moves in an issue sends a delivery, our own comments too."""
    since = datetime.fromtimestamp((last_ms + LATE_MS) / 1000, UTC)
    try:
        moved = await reach.forge.issues_since(name, since)
    except ForgeError as error:
        return untold(name, f"the server does not answer: {error}")
    before = datetime.fromtimestamp((reach.now_ms() - LATE_MS) / 1000, UTC)
    missed = [issue for issue in moved if since < _moment(issue.get("updated_at")) < before]
    if missed:
        return failing(name, f"issue #{missed[0].get('number')} moved and no delivery told of it; the bot polls meanwhile", last_ms=last_ms)
    return untold(name, "the bot is no administrator here and may not ask for a test; no issue moved either", last_ms=last_ms)


def _moment(text: object) -> datetime:
    try:
        moment = datetime.fromisoformat(str(text))
    except ValueError:
        return datetime.fromtimestamp(0, UTC)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


plugin = Probe("whether deliveries arrive", look, period_seconds=600.0, limit_seconds=30.0 + MOST * TEST_SECONDS)
