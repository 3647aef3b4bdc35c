"""`check-config`: every fault of dispatch.yml at once, with line and remedy."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("check-config")
@click.option("--example", is_flag=True, help="Print an annotated example of the whole file instead.")
@click.option("--table", is_flag=True, help="Print the table of all settings (Markdown) instead.")
@click.option("--repo-file", type=click.Path(path_type=Path), help="Check this .dispatch.yml of a repository instead.")
@click.pass_obj
def command(path: Path, *, example: bool, table: bool, repo_file: Path | None) -> None:
    """Report every fault in the configuration, with its line and its remedy."""
    if repo_file is not None:
        _repo_file(repo_file)
        return
    if example or table:
        from bot import handbook

        click.echo(handbook.example() if example else handbook.table(), nl=False)
        return
    from bot.cli._load import load

    loaded = load(path)
    settings = loaded.settings
    click.echo(f"{path}: in order ({len(settings.repositories)} repositories, {len(settings.providers)} providers)")


def _repo_file(path: Path) -> None:
    """The same reading as the service does."""
    from bot.models import ConfigError
    from bot.repo_config import parse_repo_config

    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read ({error.strerror}). Remedy: name a file, for example .dispatch.yml."]) from None
    found = parse_repo_config(raw)
    if found.faults:
        raise ConfigError([f"{path}:{fault.line}:{fault.column}: {fault.text}. Remedy: {fault.remedy}." for fault in found.faults])
    said = ", ".join(found.file.model_dump(exclude_defaults=True)) or "no keys"
    click.echo(f"{path}: in order ({said})")
