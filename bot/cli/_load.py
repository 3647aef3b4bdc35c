"""Loads the configuration for a command and says on the error channel what it warns of."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from bot.config import Loaded


def load(path: Path, *, quiet: bool = False, serves: bool = False) -> Loaded:
    """The configuration at `path`; raises ConfigError with every fault. Only who `serves` needs the secrets of what listens."""
    from bot import config

    loaded = config.load(path, environ=os.environ, serves=serves)
    _know_the_verbs(path, loaded)
    if not quiet:
        for warning in loaded.warnings:
            click.echo(f"warning: {warning}", err=True)
    return loaded


def _know_the_verbs(path: Path, loaded: Loaded) -> None:
    """A level for a verb that does not exist would guard nothing."""
    named = [(repository.name, verb) for repository in loaded.settings.repositories for verb in repository.roles]
    if not named:
        return
    import commands
    from bot.chatops import Command
    from bot.discovery import discover
    from bot.models import ConfigError

    verbs = sorted(verb for verb, _ in discover(commands, Command))
    faults = [
        f"{path}: repositories: {name}: roles: there is no verb `{verb}`. Remedy: the verbs are {', '.join(verbs)}"
        for name, verb in named
        if verb not in verbs
    ]
    if faults:
        raise ConfigError(faults)
