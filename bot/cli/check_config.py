"""`check-config`: every fault of dispatch.yml at once, with line and remedy."""

from __future__ import annotations

from pathlib import Path

import click

WORKER_NEEDS = (
    "a worker needs the forge's token, the keys of the providers and the database; it listens to nothing, so that it needs no secret of the webhook, "
    "the pages or the alerts"
)


@click.command("check-config")
@click.option("--example", is_flag=True, help="Print an annotated example of the whole file instead.")
@click.option("--table", is_flag=True, help="Print the table of all settings (Markdown) instead.")
@click.option(
    "--worker", is_flag=True, help="Check what a machine needs that only runs `worker`: no secret of the webhook, pages or alerts."
)
@click.option("--repo-file", type=click.Path(path_type=Path), help="Check this .dispatch.yml of a repository instead.")
@click.pass_obj
def command(path: Path, *, example: bool, table: bool, worker: bool, repo_file: Path | None) -> None:
    """Report every fault in the configuration, with its line and its remedy; without --worker as `serve` needs it."""
    if repo_file is not None:
        _repo_file(repo_file)
        return
    if example or table:
        from bot import handbook

        click.echo(handbook.example() if example else handbook.table(), nl=False)
        return
    from bot.cli._load import load

    loaded = load(path, serves=not worker)
    settings = loaded.settings
    click.echo(f"{path}: in order ({len(settings.repositories)} repositories, {len(settings.providers)} providers)")
    if worker:
        click.echo(WORKER_NEEDS)
        if settings.database_url().startswith("sqlite"):
            click.echo(
                "the database is a file of this machine: a `serve` must run here too; elsewhere both need `database: postgresql://...`"
            )


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
