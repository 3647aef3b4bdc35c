"""Loads the configuration for a command and says on the error channel what it warns of."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from bot.config import Loaded


def load(path: Path, *, quiet: bool = False) -> Loaded:
    """The configuration at `path`; raises ConfigError with every fault."""
    from bot import config

    loaded = config.load(path, environ=os.environ)
    if not quiet:
        for warning in loaded.warnings:
            click.echo(f"warning: {warning}", err=True)
    return loaded
