"""`status`: without an issue the whole fleet at a glance, live with `--watch`; with one the same as `/dispatch status`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from bot.fleet.board import Board

LEAST_SECONDS = 0.2


@click.command(short_help="The fleet at a glance, or where an issue stands.", context_settings={"ignore_unknown_options": True})
@click.argument("words", nargs=-1, metavar="[OWNER/REPO#N]")
@click.option("--watch", is_flag=True, help="Draw it again and again until Ctrl-C; without a terminal one line a change.")
@click.option("--interval", type=click.FloatRange(min=LEAST_SECONDS), default=1.0, show_default=True, help="Seconds between two looks.")
@click.pass_context
def command(ctx: click.Context, words: tuple[str, ...], watch: bool, interval: float) -> int:  # noqa: FBT001 - click passes options by name
    """Show what runs, what waits, the workers and the money; straight from the database, so that it needs neither forge nor service.

    With OWNER/REPO#N it is the same as `/dispatch status` in a comment there.
    """
    if words:
        from bot.cli._verb import verb_command

        verb = verb_command("status")
        with verb.make_context("status", list(words), parent=ctx.parent) as inner:
            return int(verb.invoke(inner) or 0)
    from bot.cli._load import load
    from bot.fleet.board import look, opened

    settings = load(ctx.obj, quiet=True).settings
    lease_ms = int(settings.timing.lease_seconds * 1000)
    with opened(settings.database_url(), settings.state_dir) as rows:

        def now() -> Board:
            return look(rows, now_ms=time.time_ns() // 1_000_000, lease_ms=lease_ms)

        if watch:
            _watch(now, interval)
        else:
            _once(now())
    return 0


def _once(board: Board) -> None:
    from rich.console import Console

    from bot.fleet.board import shown

    Console(highlight=False).print(shown(board))


def _watch(now: Callable[[], Board], interval: float) -> None:
    from rich.console import Console

    from bot.fleet.board import plain, shown

    console = Console(highlight=False)
    try:
        if not console.is_terminal:
            before = ""
            while True:
                board = now()
                line = plain(board)
                # How long ago something moved changes with every look.
                if line.rpartition(",")[0] != before:
                    click.echo(f"{time.strftime('%H:%M:%S')} {line}")
                    before = line.rpartition(",")[0]
                time.sleep(interval)
        from rich.live import Live

        live = Live(shown(now()), console=console, screen=True, auto_refresh=False)
        try:
            live.start(refresh=True)
            while True:
                time.sleep(interval)
                live.update(shown(now()), refresh=True)
        finally:
            # Also where Ctrl-C comes while it starts: the terminal is given back as it was.
            live.stop()
    except KeyboardInterrupt:
        return
