"""`launch`: one round of the launcher, so that a line in a crontab is enough; with `--dry-run` the ranking and why each issue is left out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from bot.config import Loaded
    from bot.fleet.launcher import Ranking, Round


@click.command(short_help="Take the next suitable open issue, once.")
@click.argument("repositories", nargs=-1, metavar="[OWNER/REPO]...")
@click.option("--dry-run", is_flag=True, help="Start nothing; show the ranking, and why each issue is left out.")
@click.option("--json", "as_json", is_flag=True, help="Print what was seen and done as one JSON document.")
@click.pass_obj
def command(config: Path, repositories: tuple[str, ...], dry_run: bool, as_json: bool) -> int:  # noqa: FBT001 - click passes options by name
    """Hold one round of the launcher over all repositories, or over those named.

    Works whether or not `launcher.enabled` is set; pauses, quiet hours, open-PR capacity, the skip list and everybody's rights hold here as well.
    """
    import asyncio
    import json

    from bot.cli._house import opened
    from bot.cli._load import load

    loaded = load(config, quiet=True)
    with opened(loaded) as store:
        done = asyncio.run(_round(loaded, store, repositories, dry_run=dry_run))
    if as_json:
        click.echo(json.dumps(_data(done), indent=1, ensure_ascii=False))
    else:
        _show(done, dry_run=dry_run)
    return 0


async def _round(loaded: Loaded, store: Any, repositories: tuple[str, ...], *, dry_run: bool) -> Round:
    from bot.cli._house import house, now_ms
    from bot.fleet.launcher import Launcher

    async with house(loaded, store) as rooms:
        launcher = Launcher(
            store,
            rooms.forge,
            rooms.repositories,
            rooms.decider,
            settings=loaded.settings,
            kick_projector=lambda: None,
            now_ms=now_ms,
        )
        return await launcher.round(repositories, dry_run=dry_run)


def _data(done: Round) -> dict[str, Any]:
    return {
        "repositories": [
            {
                "repository": ranking.repo,
                "held": ranking.held,
                "why": ranking.why,
                "issues": [
                    {
                        "issue": place.issue.number,
                        "title": place.issue.title,
                        "author": place.issue.author.login,
                        "created_ms": place.issue.created_ms,
                        "rank": place.rank,
                        "attempt": place.attempt,
                        "left_out": place.left_out,
                        "why": place.why,
                    }
                    for place in ranking.places
                ],
            }
            for ranking in done.rankings
        ],
        "launches": [
            {"repository": one.repo, "issue": one.issue, "attempt": one.attempt, "result": one.result, "reason": one.reason}
            for one in done.launches
        ],
    }


def _show(done: Round, *, dry_run: bool) -> None:
    from rich.console import Console
    from rich.text import Text

    from bot.redaction import terminal

    console = Console(highlight=False)
    for ranking in done.rankings:
        console.print(
            Text(terminal(ranking.repo), "bold"), Text(f"nothing is taken: {terminal(ranking.why)}" if ranking.held else "", "yellow")
        )
        if dry_run and ranking.places:
            console.print(_table(ranking))
    for launch in done.launches:
        said = f"{launch.repo}#{launch.issue} (attempt {launch.attempt}): {launch.result}, {launch.reason}"
        console.print(Text(terminal(said), "green" if launch.result == "ok" else "yellow"))
    free = sum(len(ranking.free) for ranking in done.rankings if ranking.held is None)
    if dry_run:
        console.print(Text(f"{free} may be taken now, nothing was started"))
    elif not done.launches:
        console.print(Text("nothing was taken"))


def _table(ranking: Ranking) -> Any:
    from rich.table import Table
    from rich.text import Text

    from bot.redaction import terminal

    table = Table(box=None, pad_edge=False)
    for title in ("", "issue", "rank", "attempt", "title", "why not"):
        table.add_column(title, overflow="fold")
    for line, place in enumerate(ranking.places, 1):
        left_out = place.left_out is not None
        table.add_row(
            "" if left_out else str(line),
            f"#{place.issue.number}",
            "" if left_out else str(place.rank),
            "" if left_out else str(place.attempt),
            Text(terminal(place.issue.title)[:70]),
            Text(f"{place.left_out}: {terminal(place.why)}", "dim") if left_out else "",
        )
    return table
