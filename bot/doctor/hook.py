"""The webhook is there, active, complete, and its deliveries arrive."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from bot.config import Settings
from bot.doctor import Check, Patient, Probe, fail, ok, refused, warn
from bot.doctor._delivery import PortBusyError, Receiver, last_arrivals_ms, last_test_push_ms, prove
from bot.fleet.hooks import lacking
from bot.fleet.probes._proof import Proof, own_hooks, prove_by_service
from bot.gitea.errors import Forbidden, ForgeError

AGAIN = "run `timmy-dispatch init` again"


async def run(patient: Patient) -> AsyncIterator[Probe]:
    """Every repository's hook by its record, then by a real delivery; where the record cannot be seen, by what has arrived."""
    hooks: dict[str, int] = {}
    arrived = await last_arrivals_ms(patient.settings)
    now = int(time.time() * 1000)
    for repository in patient.settings.repositories:
        last = arrived.get(repository.name.casefold(), 0)
        try:
            mine = own_hooks(await patient.forge.hooks(repository.name), patient.settings.webhook.hook_url())
        except Forbidden as error:
            # A token without the scope is another matter than an account that may not look.
            yield refused(f"{repository.name} hook", error) if "scope" in error.message else unseen(repository.name, last, now)
            continue
        except ForgeError as error:
            yield refused(f"{repository.name} hook", error)
            continue
        if not mine and last:
            yield elsewhere(repository.name, last, now)
            continue
        yield look(mine, repository.name, patient.settings)
        if mine and mine[0].get("active"):
            hooks[repository.name] = int(mine[0]["id"])
    for name, proof in (await proofs(patient, hooks)).items():
        yield told(name, proof, patient.settings, patient.wait_seconds)


def unseen(full_name: str, last_ms: int, now_ms: int) -> Probe:
    """An account that is no administrator of the repository sees no webhook, and cannot ask for a test delivery."""
    name = f"{full_name} hook"
    if last_ms:
        return ok(
            name, f"cannot be seen by an account that is no administrator; but deliveries arrive, the last one {_ago(last_ms, now_ms)}"
        )
    return warn(
        name,
        "cannot be seen by an account that is no administrator, and no delivery of this repository has come so far",
        "write a comment there while the bot runs and look again; else an administrator makes the hook, of the repository or its organisation",
    )


def elsewhere(full_name: str, last_ms: int, now_ms: int) -> Probe:
    """The repository has no webhook to us, and still its deliveries come: its organisation, its owner or the server has one."""
    return ok(
        f"{full_name} hook",
        f"none of its own, but deliveries arrive by one of its owner or the server, the last one {_ago(last_ms, now_ms)}",
    )


def _ago(ms: int, now_ms: int) -> str:
    minutes = max(0, now_ms - ms) // 60_000
    for size, unit in ((1440, "days"), (60, "hours")):
        if minutes >= 2 * size:
            return f"{minutes // size} {unit} ago"
    return f"{minutes} min ago"


def look(mine: list[dict[str, Any]], full_name: str, settings: Settings) -> Probe:
    """Judges the record of the hook."""
    name = f"{full_name} hook"
    if not mine:
        return fail(name, f"no webhook posts to {settings.webhook.hook_url()}", AGAIN)
    hook = mine[0]
    if not hook.get("active"):
        return fail(name, "the webhook is switched off", AGAIN)
    if (kind := (hook.get("config") or {}).get("content_type")) != "json":
        return fail(name, f"the webhook sends '{kind}' instead of JSON", f"delete it in the repository's settings, then {AGAIN}")
    if missing := lacking(hook):
        return fail(name, f"the webhook does not send: {', '.join(missing)}", AGAIN)
    if len(mine) > 1:
        return warn(name, f"{len(mine)} webhooks post to the same address, so everything comes twice", "delete all but one of them")
    return ok(name, "active and complete")


async def proofs(patient: Patient, hooks: Mapping[str, int]) -> dict[str, Proof]:
    """A test delivery for each hook, by whichever way can tell."""
    settings, seconds = patient.settings, patient.wait_seconds
    if not hooks:
        return {}
    try:
        async with Receiver(settings.webhook.listen, patient.secrets.webhook_secrets) as receiver:
            found: dict[str, Proof] = {}
            silent = False
            for name, hook_id in hooks.items():
                # One that stays silent says enough of the way; the others need not be waited for as long.
                found[name] = await prove(receiver, patient.forge, name, hook_id=hook_id, seconds=2.0 if silent else seconds)
                silent |= found[name] is Proof.SILENT
            return found
    except PortBusyError as busy:
        if not busy.held:
            return dict.fromkeys(hooks, Proof.BUSY)
    return await prove_by_service(patient.forge, hooks, seen_ms=lambda: last_test_push_ms(settings), seconds=seconds)


def told(full_name: str, proof: Proof, settings: Settings, seconds: float) -> Probe:
    """The outcome in words."""
    name = f"{full_name} delivery"
    url, listen = settings.webhook.hook_url(), settings.webhook.listen
    match proof:
        case Proof.PROVEN:
            return ok(name, "a test delivery arrived, signed with our secret")
        case Proof.EMPTY:
            return warn(
                name, "cannot be proven yet: Gitea sends no test from an empty repository", "push a first commit and run this again"
            )
        case Proof.FORGED:
            return fail(name, "a delivery arrived, but signed with another secret", AGAIN)
        case Proof.BUSY:
            return warn(
                name,
                f"cannot be proven here: this machine has no address {listen}",
                "run this on the machine of the service, or mend `webhook.listen`",
            )
        case Proof.SILENT:
            return fail(
                name,
                f"no delivery came to {url} within {seconds:.0f} s (or {listen} is not where it leads); the bot polls meanwhile",
                "let Gitea reach that address: in its app.ini, [webhook] ALLOWED_HOST_LIST must name it (loopback, private, external, "
                "a CIDR or a host; restart Gitea), and DISABLE_WEBHOOKS must be off; then firewall and proxy",
            )


plugin = Check("webhook", run, forge=True, rank=40, only="serve")
