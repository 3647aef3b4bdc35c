"""`check-config`: every fault of dispatch.yml at once, with line and remedy."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("check-config")
@click.option("--example", is_flag=True, help="Print an annotated example of the whole file instead.")
@click.option("--table", is_flag=True, help="Print the table of all settings (Markdown) instead.")
@click.pass_obj
def command(path: Path, *, example: bool, table: bool) -> None:
    """Report every fault in the configuration, with its line and its remedy."""
    if example or table:
        from bot import handbook

        click.echo(handbook.example() if example else handbook.table(), nl=False)
        return
    from bot.cli._load import load

    loaded = load(path)
    settings = loaded.settings
    click.echo(f"{path}: in order ({len(settings.repositories)} repositories, {len(settings.providers)} providers)")
