"""`report`: what the fleet did in a window of time, as tables, Markdown, a page or JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.console import RenderableType

FORMS = ("terminal", "md", "html", "json")


@click.command(short_help="Report on a window of time: sprints, pull requests, cost, failures.")
@click.argument("words", nargs=-1, metavar="[OWNER/REPO] [WINDOW]")
@click.option("--format", "form", type=click.Choice(FORMS), help="Default: terminal; with -o what the file's name ends with.")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Write it to this file.")
@click.pass_obj
def command(config: Path, words: tuple[str, ...], form: str | None, output: Path | None) -> int:
    """Report on the last WINDOW (12h, 24h, 7d; without one 24h), over the fleet or over one repository.

    All numbers are read from the database in one transaction; the service need not run.
    """
    from bot.cli._house import now_ms, opened
    from bot.cli._load import load
    from bot.figures import window_ms
    from bot.fleet import report
    from bot.models import UserError
    from bot.repositories import known_repositories

    repo = words[0] if words and "/" in words[0] else ""
    length = window_ms(" ".join(words[1:] if repo else words) or "24h")
    loaded = load(config, quiet=True)
    with opened(loaded) as store:
        known = store.read_sync(known_repositories)
        ids = [key for key, names in known.items() if repo.casefold() in (name.casefold() for name in names)]
        if repo and not ids:
            raise UserError(f"{repo} is not a repository this service has seen")
        now = now_ms()
        found = store.read_sync(lambda conn: report.collect(conn, length_ms=length, now_ms=now, repo_id=ids[0] if repo else None))
    chosen = form or {".md": "md", ".html": "html", ".json": "json"}.get(output.suffix if output else "", "terminal")
    if chosen == "terminal":
        _print(report.as_tables(found), output)
        return 0
    text = {"md": report.as_markdown, "html": report.as_html, "json": report.as_json}[chosen](found)
    if output is not None:
        output.write_text(text, encoding="utf-8")
    else:
        click.echo(text, nl=False)
    return 0


def _print(tables: Sequence[RenderableType], output: Path | None) -> None:
    from rich.console import Console

    if output is None:
        Console(highlight=False).print(*tables, sep="\n")
        return
    with output.open("w", encoding="utf-8") as file:
        Console(file=file, highlight=False, width=120).print(*tables, sep="\n")
