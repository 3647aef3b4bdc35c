"""`worker`: one more process that runs sprints, beside a `serve` on the same database."""

from __future__ import annotations

from pathlib import Path

import click

from bot.models import UserError


@click.command(short_help="Run sprints beside `serve`.")
@click.option("--metrics", default="", metavar="HOST:PORT", help="Where this process shows its own figures; left out: nowhere.")
@click.option(
    "--drain-seconds",
    type=click.FloatRange(min=0),
    default=0.0,
    help="Time that sprints get to end at a stop, before others take them over; 0, the default: as long as they take.",
)
@click.option("--log-level", type=click.Choice(["DEBUG", "INFO", "WARNING", "ERROR"]), default="INFO", show_default=True)
@click.option("--log-json", is_flag=True, help="One JSON object a line, for journals and collectors.")
@click.option(
    "--log-file", type=click.Path(path_type=Path, dir_okay=False), help="Keep the log in this file too (mode 0600, rotated at 5 MB)."
)
@click.option("--lane", type=click.IntRange(min=0), help="Number of the lane this worker is shown in; set by `lanes up`.")
@click.pass_obj
def command(
    config: Path,
    *,
    metrics: str,
    drain_seconds: float,
    log_level: str,
    log_json: bool,
    log_file: Path | None,
    lane: int | None,
) -> int:
    """Take sprints from the queue and run them; the log says what they do. It hears nothing of the forge itself: one `serve` does.

    Beside it on the same machine they share the SQLite file of the state folder; on other machines they share a PostgreSQL (`database`).
    The first SIGTERM or Ctrl-C takes no new sprint and ends when those under way have ended; the second ends now, and others take them over.
    """
    import asyncio

    from bot.cli._load import load
    from bot.cli._process import run_worker
    from bot.settings import UnfitError, split_listen

    try:
        if metrics:
            split_listen(metrics)
    except UnfitError as error:
        raise UserError(f"--metrics: {error}. Remedy: {error.remedy}") from None
    loaded = load(config)
    if lane is not None:
        click.echo(f"lane {lane}: Ctrl-C lets its sprints end and stops it for good; `timmy-dispatch lanes up` starts it again", err=True)
    return asyncio.run(run_worker(loaded, level=log_level, json=log_json, file=log_file, metrics=metrics, drain_seconds=drain_seconds))
