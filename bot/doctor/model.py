"""Every model of the chain answers with a well-formed tool call; one that cannot is of no use to an agent."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from pathlib import Path

from bot.doctor import Check, Patient, Probe, fail, ok, warn


async def run(patient: Patient) -> AsyncIterator[Probe]:
    """One small request to each entry of the chain. The chain can work with one healthy entry, so only all of them ill is a failure."""
    from bot.providers.chain import Canary, ProviderChain
    from bot.providers.entries import Entry, Resolver, hermes_home
    from bot.providers.health import MemoryHealth
    from bot.providers.nous import nous_login

    home = Path(patient.environ.get("HOME") or Path.home())
    resolver = Resolver(patient.settings.providers, environ=patient.environ, home=home)
    entries = resolver()
    for finding in resolver.findings:
        yield warn("model settings", finding, "mend `providers` in dispatch.yml, or the Hermes login it names")
    if not entries:
        yield fail("model", "no provider can be used", "add one under `providers` in dispatch.yml")
        return
    health = MemoryHealth(_now_ms)
    hermes = next((setting for setting in patient.settings.providers if setting.from_hermes), None)
    logins = {}
    if hermes is not None:
        folder = hermes_home(hermes, environ=patient.environ, home=home)
        logins["nous"] = nous_login(folder, patient.environ, lease=health.try_lease, now_ms=_now_ms)
    chain = ProviderChain(resolver, health=health, now_ms=_now_ms, sleep=asyncio.sleep, random=random.random, logins=logins)
    try:
        found: list[tuple[Entry, Canary]] = [(entry, await chain.ping(entry)) for entry in entries]
    finally:
        await chain.aclose()
    any_well = any(canary.ok for _, canary in found)
    for entry, canary in found:
        name = f"model {entry.name}"
        remedy = f"check address, key and model name; is the server at {entry.base_url} up, and can the model call tools?"
        if canary.ok:
            yield ok(name, f"answers, {canary.seconds:.1f} s")
        elif any_well:
            yield warn(name, canary.text, remedy)
        else:
            yield fail(name, canary.text, remedy)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


plugin = Check("model", run, rank=50)
