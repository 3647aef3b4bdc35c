"""`watchdog`: what the probes see, from the database; `--once` runs them in this process, and `--fix` acts on what they find."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from bot.cli._house import House
    from bot.config import Loaded
    from bot.fleet.probes import Reach
    from bot.snapshot import ProbeState
    from bot.store import Store

# 1 and 2 mean that nothing could be asked (bot/cli/__init__.py).
FAILING, BROKEN = 3, 4
STYLES = {"ok": "green", "warn": "yellow", "failing": "bold red", "unknown": "dim"}


@click.command(short_help="Show what the watchdog sees, or look once more.")
@click.argument("names", nargs=-1, metavar="[fix] [PROBE]...")
@click.option("--once", is_flag=True, help="Run the probes now, in this process.")
@click.option("--fix", is_flag=True, help="Also do what helps, as an operator; a pause still holds it. Needs --once.")
@click.option("--json", "as_json", is_flag=True, help="Print what was seen as one JSON document.")
@click.pass_obj
def command(config: Path, names: tuple[str, ...], once: bool, fix: bool, as_json: bool) -> int:  # noqa: FBT001 - click passes options by name
    """Show how the probes of the watchdog stand; exit with 3 if one fails, with 4 if one of them broke.

    Without --once the running service's last looks are shown, and `fix [PROBE]` asks that service to act, like `/dispatch watchdog fix`.
    """
    import asyncio

    from bot.cli._house import opened
    from bot.cli._load import load
    from bot.models import UserError

    if fix and not once:
        raise click.UsageError("--fix needs --once; without it write `watchdog fix`, which the running service does")
    if names and names[0] == "fix":
        if once:
            raise click.UsageError("with --once write --fix")
        return _as_verb(config, names)
    loaded = load(config, quiet=True)
    with opened(loaded) as store:
        if once:
            states = asyncio.run(_once(loaded, store, names, fix=fix))
        else:
            from bot.store import probes

            found = store.read_sync(probes.states)
            if strange := sorted(set(names) - {state.name for state in found}):
                raise UserError(
                    f"there is no probe '{strange[0]}' at work; there are: {', '.join(state.name for state in found) or 'none'}"
                )
            states = tuple(state for state in found if not names or state.name in names)
    _print(states, as_json=as_json)
    return _code(states)


def _as_verb(config: Path, names: tuple[str, ...]) -> int:
    from bot.cli._verb import verb_command

    return int(verb_command("watchdog").main(list(names), obj=config, standalone_mode=False) or 0)


def _code(states: Sequence[ProbeState]) -> int:
    if any(state.verdict == "failing" for state in states):
        return FAILING
    return BROKEN if any(state.broken for state in states) else 0


async def _once(loaded: Loaded, store: Store, names: tuple[str, ...], *, fix: bool) -> tuple[ProbeState, ...]:
    from bot.cli._house import house
    from bot.fleet.watchdog import Watchdog
    from bot.models import UserError
    from bot.redaction import Redactor

    async with house(loaded, store) as rooms, _reach(loaded, rooms) as reach:
        keys = [loaded.secrets.forge_token, *loaded.secrets.webhook_secrets]
        redactor = Redactor([*keys, *(secret for entry in reach.entries() for secret in entry.secrets())])
        watchdog = Watchdog(reach, is_leader=lambda: True, acted=_told_by_rows, scrub=redactor.scrub)
        if strange := sorted(set(names) - watchdog.probes.keys()):
            raise UserError(f"there is no probe '{strange[0]}' at work; there are: {', '.join(sorted(watchdog.probes))}")
        return await watchdog.once(names or tuple(watchdog.probes), fix=fix, by="operator")


@contextlib.asynccontextmanager
async def _reach(loaded: Loaded, rooms: House) -> AsyncIterator[Reach]:
    """The same rows, forge and providers as the service's; files of sprints are the service's alone."""
    import asyncio
    import os
    import random

    from bot.cli._house import now_ms
    from bot.fleet.lanes import Lanes
    from bot.fleet.probes import Reach, hermes_root
    from bot.lease import node_name
    from bot.providers.chain import ProviderChain
    from bot.providers.entries import Resolver
    from bot.providers.nous import nous_login
    from bot.stored_health import StoredHealth

    settings, environ, home = loaded.settings, os.environ, Path(os.environ.get("HOME") or Path.home())
    resolver = Resolver(settings.providers, environ=environ, home=home, keys=loaded.secrets.provider_keys)
    health, hermes = StoredHealth(rooms.store, now_ms), hermes_root(settings, environ=environ, home=home)
    login = nous_login(hermes, environ, lease=health.try_lease, now_ms=now_ms)
    logins = {"nous": login} if any(provider.from_hermes for provider in settings.providers) else {}
    chain = ProviderChain(resolver, health=health, now_ms=now_ms, sleep=asyncio.sleep, random=random.random, logins=logins)
    lanes = Lanes(rooms.store, settings, node_id=node_name(settings.state_dir), environ=environ, now_ms=now_ms)
    try:
        yield Reach(
            settings=settings,
            store=rooms.store,
            forge=rooms.forge,
            names=rooms.repositories.names,
            chain=chain,
            entries=resolver,
            hermes=hermes,
            environ=environ,
            now_ms=now_ms,
            logins=logins,
            lanes=lanes,
            webhook_secret=next(iter(loaded.secrets.webhook_secrets), None),
        )
    finally:
        await chain.aclose()


def _told_by_rows(_probe: str, _target: str, *, ok: bool) -> None:
    """The service's metrics count what the service did; the decision's row tells of this."""
    del ok


def _print(states: Sequence[ProbeState], *, as_json: bool) -> None:
    import json
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from bot.cli._house import now_ms
    from bot.fleet.probes import ago
    from bot.redaction import terminal

    if as_json:
        click.echo(json.dumps([asdict(state) for state in states], indent=1, ensure_ascii=False))
        return
    console = Console(highlight=False)
    if not states:
        console.print("the watchdog has not looked yet: it is switched off, or the service has not run")
        return
    table = Table(box=None, pad_edge=False)
    for title in ("probe", "policy", "verdict", "looked", "what it sees"):
        table.add_column(title, overflow="fold")
    for state in states:
        seen = [state.reason] if state.reason else [f"{target.name}: {target.reason}" for target in state.targets]
        seen += [
            f"{target.name}: last action {ago((now_ms() - target.acted_ms) / 1000)} ago, {target.act_result}"
            for target in state.targets
            if target.acted_ms is not None
        ]
        table.add_row(
            Text(state.name, "bold"),
            state.policy,
            Text(state.verdict if state.ran_ms else "", STYLES.get(state.verdict, "")),
            f"{ago((now_ms() - state.ran_ms) / 1000)} ago" if state.ran_ms else "not yet",
            Text(terminal("\n".join(seen))),
        )
    console.print(table)
