"""`doctor`: proves that forge, model, sandbox and machine are as the fleet needs them, and says how to mend what is not."""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bot.models import ConfigError

if TYPE_CHECKING:
    from bot.doctor import Check, Probe

# Of the client's random wait between attempts: a person sits before this, and nobody else is asking the same.
IMPATIENT = 0.1


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the findings as one JSON document.")
@click.option("--only", multiple=True, metavar="CHECK", help="Run only this check (may be repeated); `--only list` names them.")
@click.option(
    "--worker", is_flag=True, help="Look at what a machine needs that only runs `worker`: nothing of the webhook, but the shared database."
)
@click.option("--wait", type=click.FloatRange(min=0.1, max=300), default=10.0, show_default=True, help="Seconds a test delivery may take.")
@click.pass_obj
def command(path: Path, *, as_json: bool, only: tuple[str, ...], worker: bool, wait: float) -> None:
    """Prove that everything a sprint needs works; exit with 1 if something does not."""
    from bot.doctor import Mark, checks

    known = [check for check in checks() if check.only in ("", "worker" if worker else "serve")]
    if "list" in only:
        click.echo("\n".join(check.title for check in known))
        return
    titles = [check.title for check in known]
    if strange := sorted(set(only) - set(titles)):
        raise click.UsageError(f"there is no check '{strange[0]}'; there are: {', '.join(titles)}")
    wanted = [check for check in known if not only or check.title in only]
    found = asyncio.run(_examine(path, wanted, wait=wait, quiet=as_json, serves=not worker))
    if as_json:
        click.echo(
            json.dumps({"ok": all(probe.mark is not Mark.FAIL for probe in found), "probes": [asdict(probe) for probe in found]}, indent=1)
        )
    else:
        _show(found)
    if any(probe.mark is Mark.FAIL for probe in found):
        raise click.exceptions.Exit(1)


async def _examine(path: Path, wanted: list[Check], *, wait: float, quiet: bool, serves: bool) -> list[Probe]:
    from rich.console import Console

    from bot import config
    from bot.doctor import Patient, examine, fail, ok, warn
    from bot.gitea.aiohttp import GiteaClient
    from bot.gitea.forge import Forge

    try:
        loaded = config.load(path, environ=os.environ, serves=serves)
    except ConfigError as error:
        return [fail("configuration", *_parted(fault)) for fault in error.faults]
    found = [warn("configuration", *_parted(warning)) for warning in loaded.warnings] or [ok("configuration", str(path))]
    settings, secrets = loaded.settings, loaded.secrets
    async with GiteaClient(settings.forge.url, secrets.forge_token, ca_file=settings.forge.ca_file, jitter=lambda: IMPATIENT) as client:
        patient = Patient(settings, secrets, Forge(client), os.environ, wait)
        with Console(stderr=True, quiet=quiet).status("") as status:
            for index, check in enumerate(wanted, 1):
                status.update(f"checking {check.title} ({index} of {len(wanted)})")
                found += [probe async for probe in examine(patient, [check])]
    return found


def _parted(line: str) -> tuple[str, str]:
    """Fault and remedy of a line of the configuration's report."""
    fault, _, remedy = line.partition(" Remedy: ")
    return fault, remedy.rstrip(".")


def _show(found: list[Probe]) -> None:
    """A table for people; the remedies stand below it, where they can be copied whole."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from bot.doctor import Mark

    styles = {Mark.OK: "green", Mark.WARN: "yellow", Mark.FAIL: "bold red"}
    table = Table(box=None, pad_edge=False)
    for title in ("", "check", "finding"):
        table.add_column(title, overflow="fold")
    for probe in found:
        table.add_row(Text(probe.mark, styles[probe.mark]), Text(plain(probe.name)), Text(plain(probe.detail)))
    console = Console(highlight=False)
    console.print(table)
    for probe in found:
        if probe.remedy:
            console.print(Text(f"\n{plain(probe.name)}: {plain(probe.detail)}", styles[probe.mark]))
            console.print(Text(f"  remedy: {plain(probe.remedy)}"), soft_wrap=True)
    counts = {mark: sum(probe.mark is mark for probe in found) for mark in Mark}
    console.print(Text(f"\n{counts[Mark.OK]} in order, {counts[Mark.WARN]} to look at, {counts[Mark.FAIL]} failed"))


def plain(text: str) -> str:
    """Without control characters: what a server or a repository says must not drive the terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
