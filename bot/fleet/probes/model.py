"""Each Hermes profile runs the model it should; a change is made by Hermes itself, after a canary of the model that should run."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bot.fleet.probes import MendError, Probe, Reach, failing, fine
from bot.providers import hermes_config
from bot.providers.entries import entry_of
from bot.providers.hermes_config import Chosen
from bot.providers.hermes_program import HermesError, run_hermes
from bot.settings import ExpectedModel, Settings
from bot.snapshot import Finding

ROOT = "default"
SET_SECONDS = 30.0


async def look(reach: Reach) -> Sequence[Finding]:
    """Every profile of the expectation map."""
    return await asyncio.to_thread(_look, reach)


def _look(reach: Reach) -> list[Finding]:
    expected = reach.settings.watchdog.expect
    return [
        judge(profile, wanted, hermes_config.chosen(home_of(reach.hermes, profile), reach.environ)) for profile, wanted in expected.items()
    ]


def home_of(root: Path, profile: str) -> Path:
    """The home of a profile; the root is the profile `default`."""
    return root if profile == ROOT else root / "profiles" / profile


def judge(profile: str, wanted: ExpectedModel, found: Chosen) -> Finding:
    """What a profile has against what it should have. A file that is not there, or cannot be read, is drift as well."""
    evidence = {"provider": found.provider, "model": found.model, "wanted": f"{wanted.provider or '*'}/{wanted.model}"}
    if found.fault:
        return replace(failing(profile, found.fault, **evidence), mendable=not found.broken)
    if found.model == wanted.model and wanted.provider in ("", found.provider):
        return fine(profile, f"runs {found.provider}/{found.model}", **evidence)
    has, should = f"{found.provider or 'no provider'}/{found.model or 'no model'}", f"{wanted.provider or found.provider}/{wanted.model}"
    return replace(failing(profile, f"runs {has} and should run {should}", **evidence), mendable=True)


async def mend(reach: Reach, finding: Finding) -> str:
    """`hermes -p NAME config set`, for the keys that differ, and reads again whether it holds."""
    profile, wanted = finding.target, reach.settings.watchdog.expect[finding.target]
    home = home_of(reach.hermes, profile)
    before = await asyncio.to_thread(hermes_config.chosen, home, reach.environ)
    provider = wanted.provider or before.provider
    await _canary(reach, home, provider, wanted.model)
    changes = {"model.provider": (before.provider, provider), "model.default": (before.model, wanted.model)}
    for key, (has, should) in changes.items():
        if should and has != should:
            await _set(reach, profile, key, should)
    after = judge(profile, wanted, await asyncio.to_thread(hermes_config.chosen, home, reach.environ))
    if after.mendable or after.verdict.value != "ok":
        raise MendError(f"it did not hold: {after.reason}")
    return f"{after.reason}; a gateway that is running may keep the old model until it is started again"


async def _canary(reach: Reach, home: Path, provider: str, model: str) -> None:
    """The model that should run answers, as this profile would call it."""
    entry = next((entry for entry in reach.entries() if (entry.provider, entry.model) == (provider, model)), None)
    if entry is None:
        endpoint = await asyncio.to_thread(hermes_config.endpoint_of, home, reach.environ, provider=provider, model=model)
        if endpoint is None:
            raise MendError(f"this profile could not call {provider}/{model}: it knows no address or no key for it")
        entry = entry_of(endpoint)
    canary = await reach.chain.ping(entry)
    if not canary.ok:
        raise MendError(f"{provider}/{model} does not answer: {canary.text}")


async def _set(reach: Reach, profile: str, key: str, value: str) -> None:
    try:
        code, output = await run_hermes(reach.hermes, reach.environ, "-p", profile, "config", "set", key, value, seconds=SET_SECONDS)
    except HermesError as error:
        raise MendError(str(error)) from None
    if code != 0:
        raise MendError(f"`hermes -p {profile} config set {key}` ended with {code}: {output[:200]}")


def _wanted(settings: Settings) -> bool:
    return bool(settings.watchdog.expect)


plugin = Probe(
    "models of the Hermes profiles",
    look,
    period_seconds=60.0,
    mend=mend,
    does="`hermes -p NAME config set`",
    wanted=_wanted,
    distance_seconds=3600.0,
)
