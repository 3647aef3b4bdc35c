"""`lanes`: workers to look at, in the panes of a tmux session; up, down, status, snapshot, attach."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from bot.models import ConfigError, UserError

if TYPE_CHECKING:
    from bot.config import Loaded
    from bot.fleet.lanes import Lanes, Shown
    from bot.store import Store

T = TypeVar("T")

MOST = 32
BEGIN_SECONDS = 30.0
LOOK_SECONDS = 0.2


@click.group("lanes", short_help="Workers in the panes of a tmux session.")
def command() -> None:
    """Show workers at work: each lane is an ordinary `worker` in a pane of a tmux session of its own.

    A running `serve` starts a lane again whose worker died (`lanes.restart`), and never one that a person stopped.
    """


@command.command("up", short_help="Make the panes and start the workers.")
@click.argument("count", type=click.IntRange(1, MOST), required=False)
@click.option("--no-wait", is_flag=True, help="Do not wait until the workers run.")
@click.pass_obj
def up(config: Path, count: int | None, *, no_wait: bool) -> int:
    """Have the first COUNT lanes run (`lanes.workers` where it is left out); those that run already are left alone.

    Twice does no harm. Secrets must come from files or systemd's credentials: a tmux server shows its environment, so none goes into it.
    """
    loaded = _loaded_as_a_lane(config)
    number, path = count or loaded.settings.lanes.workers, config.absolute()

    async def work(lanes: Lanes, store: Store) -> list[Shown]:
        await lanes.up(number, config=path, by=_me())
        if not no_wait:
            await _begun(lanes, store, number)
        return await lanes.shown()

    shown = _with_lanes(loaded, work)
    _table(shown)
    click.echo("`timmy-dispatch lanes attach` shows them; Ctrl-B D leaves them again")
    return 0 if all(one.well for one in shown if one.row.lane < number) else 1


@command.command("down", short_help="Let the workers end.")
@click.argument("numbers", type=click.IntRange(0, MOST - 1), nargs=-1, metavar="[LANE]...")
@click.option("--now", is_flag=True, help="Do not let sprints end; other workers take them over.")
@click.option(
    "--wait", type=click.FloatRange(min=0), metavar="SECONDS", help="How long to wait for their sprints; left out: as long as they take."
)
@click.pass_obj
def down(config: Path, numbers: tuple[int, ...], *, now: bool, wait: float | None) -> int:
    """Stop all lanes, or those that are named: they take no new sprint and end when those under way have ended. They stay down until `lanes up`."""
    from bot.cli._load import load

    async def work(lanes: Lanes, _store: Store) -> tuple[int, ...]:
        return await lanes.down(numbers or None, by=_me(), now=now, wait=wait)

    if not now and wait is None:
        click.echo("waiting for the sprints under way; Ctrl-C leaves, and they end by themselves", err=True)
    left = _with_lanes(load(config, quiet=True), work)
    if left:
        click.echo(f"still at work: lane {', '.join(map(str, left))}; they end with their sprints (`--now`: at once)")
        return 1
    click.echo("down")
    return 0


@command.command("status", short_help="How the lanes are, and how they should be.")
@click.option("--fix", is_flag=True, help="Start again what died and may be started, without waiting for the next look of `serve`.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object for programs.")
@click.pass_obj
def status(config: Path, *, fix: bool, as_json: bool) -> int:
    """List the lanes of this state folder. Exit code 1: one of them is not as it is wanted."""
    import json
    from dataclasses import asdict

    from bot.cli._load import load

    loaded = load(config, quiet=True)

    async def work(lanes: Lanes, _store: Store) -> list[Shown]:
        if fix:
            for lane in await lanes.mend(patient=False):
                click.echo(f"lane {lane} was started again", err=True)
        return await lanes.shown()

    shown = _with_lanes(loaded, work)
    if as_json:
        click.echo(
            json.dumps({"session": loaded.settings.lanes.session, "lanes": [{**asdict(one), "well": one.well} for one in shown]}, indent=1)
        )
    else:
        _table(shown)
    return 0 if all(one.well for one in shown) else 1


@command.command("snapshot", short_help="Write down what tmux shows.")
@click.pass_obj
def take(config: Path) -> int:
    """Write the panes as JSON to the folder `lanes` of the state folder, and print them."""
    import asyncio
    import json

    from bot.cli._load import load
    from bot.fleet.lanes import as_json, snapshot, topology

    settings = load(config, quiet=True).settings
    if not settings.state_dir.exists():
        raise UserError(f"there is no state in {settings.state_dir}: start the service once (`timmy-dispatch serve`)")
    os.umask(0o077)
    found = asyncio.run(topology(settings, os.environ))
    path = snapshot(settings, found)
    click.echo(json.dumps(as_json(found), indent=1, ensure_ascii=False))
    click.echo(str(path), err=True)
    return 0


@command.command("attach", short_help="Look at the panes.")
@click.option("--read-only", is_flag=True, help="Keys do nothing but move and leave.")
@click.pass_obj
def attach(config: Path, *, read_only: bool) -> int:
    """Attach this terminal to the session. Ctrl-B D leaves it again; Ctrl-C in a pane drains its worker and stops that lane."""
    import asyncio

    from bot.cli._load import load
    from bot.fleet.lanes import tmux_of, topology

    settings = load(config, quiet=True).settings
    found = asyncio.run(topology(settings, os.environ))
    if found is None or not found.ours:
        raise UserError("no lane is up. Remedy: `timmy-dispatch lanes up`")
    if not sys.stdout.isatty():
        raise UserError("this is not a terminal. Remedy: call it from one, or read `timmy-dispatch lanes status`")
    tmux = tmux_of(settings, os.environ)
    words = ["attach-session", *(["-r"] if read_only else []), "-t", f"={found.session}:"]
    os.execve(tmux.program(), tmux.argv(*words), {**tmux.environ, "TERM": os.environ.get("TERM", "xterm")})  # noqa: S606 - tmux takes the terminal over


def _loaded_as_a_lane(config: Path) -> Loaded:
    """The configuration as a worker in a pane will find it: without anything secret in its environment."""
    from bot import config as configuration
    from bot.cli._load import load
    from bot.fleet.lanes import passed_on

    loaded = load(config, quiet=True)
    try:
        configuration.load(config, environ=passed_on(os.environ), serves=False)
    except ConfigError as error:
        raise ConfigError(
            [
                *error.faults,
                "A lane's environment carries no secret, because tmux shows it to whoever asks; that is why these are missing there.",
            ]
        ) from None
    return loaded


def _with_lanes(loaded: Loaded, work: Callable[[Lanes, Store], Coroutine[Any, Any, T]]) -> T:
    import asyncio

    from bot.cli._house import now_ms
    from bot.fleet.lanes import Lanes
    from bot.lease import node_name

    settings = loaded.settings
    os.umask(0o077)
    with _store(loaded) as store:
        lanes = Lanes(store, settings, node_id=node_name(settings.state_dir), environ=os.environ, now_ms=now_ms)
        return asyncio.run(work(lanes, store))


@contextlib.contextmanager
def _store(loaded: Loaded) -> Iterator[Store]:
    from bot.cli._house import opened

    try:
        with opened(loaded) as store:
            # Where the database is elsewhere, this may be the first that happens in this folder.
            loaded.settings.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            yield store
    except PermissionError as error:
        raise UserError(f"{error.filename} cannot be used ({error.strerror}). Remedy: run this as the user of the service") from None


async def _begun(lanes: Lanes, store: Store, count: int) -> None:
    """Waits until the workers hold their slots, or ended."""
    import asyncio
    import time

    from rich.console import Console

    from bot.fleet.lanes import LaneState
    from bot.store import workers

    deadline = time.monotonic() + BEGIN_SECONDS
    with Console(stderr=True).status("") as spinner:
        while time.monotonic() < deadline:
            held = {row.pid for row in await store.read(workers.every) if row.reaped_ms is None}
            mine = [one for one in await lanes.shown() if one.row.lane < count]
            ready = sum(one.pane is not None and one.pane.pid in held for one in mine)
            if ready + sum(one.state is not LaneState.RUNNING for one in mine) >= count:
                return
            spinner.update(f"{ready} of {count} workers run")
            await asyncio.sleep(LOOK_SECONDS)


def _table(shown: list[Shown]) -> None:
    import time

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from bot.redaction import terminal

    console = Console(highlight=False)
    if not shown:
        console.print("there is no lane")
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("lane", "wanted", "is", "pid", "since", "restarts", "why"):
        table.add_column(title)
    for one in shown:
        pane, row = one.pane, one.row
        ended = (
            "" if pane is None or not pane.dead else f" ({pane.dead_status if pane.dead_signal is None else f'signal {pane.dead_signal}'})"
        )
        since = time.strftime("%H:%M:%S", time.localtime(pane.started)) if pane is not None and pane.started else ""
        why = f"{row.why} by {row.by}" if row.why else ""
        table.add_row(
            str(row.lane),
            row.wanted,
            Text(f"{one.state}{ended}", "green" if one.well else "bold red"),
            str(pane.pid) if pane is not None and not pane.dead else "",
            since,
            str(row.restarts),
            Text(terminal(why)),
        )
    console.print(table)


def _me() -> str:
    import pwd

    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())
