"""`demo`: forge, scripted model and bot in one process; an issue becomes a pull request while you watch."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import click

from bot.models import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bot.demo.house import House, Plan
    from bot.demo.screen import Screen
    from bot.demo.story import Ending

FAILED, INTERRUPTED = 1, 130
SCRIPT_SECONDS, MODEL_SECONDS = 180.0, 1500.0
PACE_SECONDS = 0.6
LOG_LINES = 15


@click.command(short_help="Watch an issue become a pull request, with nothing set up.")
@click.option("--once", is_flag=True, help="End when the pull request is there: exit code 0 if it is ready to merge, else 1.")
@click.option("--keep", type=click.Path(path_type=Path, file_okay=False), help="Keep database, repositories and log in this empty folder.")
@click.option("--verbose", is_flag=True, help="Show the service's log here instead of writing it to a file.")
@click.option("--gitea", metavar="URL", help="Play on this running Gitea instead of the embedded forge.")
@click.option(
    "--admin-token-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File (mode 0600) with an administrator's token for --gitea.",
)
@click.option("--keep-cast", is_flag=True, help="Leave the demo's people and repository on that Gitea.")
@click.option("--model-url", help="Let a real model do the work: its OpenAI-compatible endpoint.")
@click.option("--model", help="Model to ask for there.")
@click.option("--model-key-file", type=click.Path(path_type=Path, dir_okay=False), help="File (mode 0600) with that endpoint's API key.")
def command(
    *,
    once: bool,
    keep: Path | None,
    verbose: bool,
    gitea: str | None,
    admin_token_file: Path | None,
    keep_cast: bool,
    model_url: str | None,
    model: str | None,
    model_key_file: Path | None,
) -> int:
    """Start an embedded forge, a scripted model and the bot; file an issue, label it, and show what follows until Ctrl-C.

    Nothing is installed and nothing stays. On a running Gitea (--gitea) the demo makes its own people and repository and removes them again.
    """
    if bool(gitea) != bool(admin_token_file):
        raise click.UsageError("--gitea and --admin-token-file belong together")
    if keep_cast and not gitea:
        raise click.UsageError("--keep-cast is for --gitea")
    if bool(model_url) != bool(model) or (model_key_file and not model_url):
        raise click.UsageError("--model-url and --model belong together, --model-key-file goes with them")
    # Said before what takes a second to import.
    click.echo(f"starting the bot{f' beside {gitea}' if gitea else ', an embedded forge'}{'' if model_url else ' and a scripted model'}")
    from rich.console import Console

    from bot.cli._process import harden
    from bot.config import read_secret
    from bot.demo.house import Plan, state_folder
    from bot.demo.screen import Screen
    from bot.settings import UnfitError

    try:
        plan = Plan(
            gitea=_address("--gitea", gitea),
            admin_token=read_secret(admin_token_file) if admin_token_file else None,
            model_url=_address("--model-url", model_url),
            model=model or "",
            model_key_file=model_key_file,
            keep_cast=keep_cast,
            pace=PACE_SECONDS if sys.stdout.isatty() and not once else 0.0,
        )
    except UnfitError as error:
        raise UserError(f"{error}; {error.remedy}") from error
    harden()
    console = Console(highlight=False)
    screen = Screen(console, live=console.is_terminal and not verbose)
    with state_folder(keep) as folder, _log(folder, verbose=verbose) as log:
        code = asyncio.run(_play(plan, folder, screen, log, once=once))
        if keep:
            screen.say(f"kept: {folder}")
        return code


def _address(option: str, text: str | None) -> str:
    """The address without its final slash, "" for none; raises UserError."""
    from pydantic import TypeAdapter, ValidationError

    from bot.settings import UnfitError, Url

    if not text:
        return ""
    try:
        return str(TypeAdapter(Url).validate_python(text))
    except ValidationError as error:
        cause = (error.errors()[0].get("ctx") or {}).get("error")
        raise UserError(f"{option}: {cause}; {cause.remedy}" if isinstance(cause, UnfitError) else f"{option}: {error}") from error


@contextlib.contextmanager
def _log(folder: Path, *, verbose: bool) -> Iterator[TextIO]:
    """Where the service's log goes: a file in the folder, or here."""
    if verbose:
        yield sys.stderr
        return
    with (folder / "demo.log").open("w", encoding="utf-8") as file:
        yield file


class _Signals:
    """The first one ends what runs politely, the second one everything at once."""

    def __init__(self, screen: Screen, left: str) -> None:
        self._screen = screen
        self._left = left
        self._task = asyncio.current_task()
        self.asked = False
        self.leaving = False
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        for number in numbers:
            asyncio.get_running_loop().add_signal_handler(number, self._come)

    def _come(self) -> None:
        self._screen.end()
        if self.asked:
            self._screen.loud(f"ended at once; left behind: {self._left}")
            sys.stdout.flush()
            os._exit(INTERRUPTED)
        self.asked = True
        self._screen.say("stopping (Ctrl-C again: at once)")
        if not self.leaving and self._task is not None:
            self._task.cancel()


async def _play(plan: Plan, folder: Path, screen: Screen, log: TextIO, *, once: bool) -> int:
    """Opens the house, tells the story and stays; returns the exit code."""
    from bot.demo.house import open_house
    from bot.demo.narrator import Narrator
    from bot.demo.story import tell

    signals = _Signals(screen, f"{folder}" + (f" and the demo's people on {plan.gitea}" if plan.gitea else ""))
    narrator = Narrator(screen)
    code = INTERRUPTED
    if log is not sys.stderr:
        screen.say(f"log: {log.name}", "dim")
    try:
        async with open_house(plan, folder, screen, log=log, observe=narrator.observe) as house:
            telling = asyncio.create_task(narrator.tell(house))
            try:
                _introduce(house, plan, screen)
                ending = await tell(house, screen, narrator, seconds=MODEL_SECONDS if plan.model_url else SCRIPT_SECONDS)
                code = FAILED if ending.fault else 0
                _show(house, screen, ending)
                if ending.fault:
                    _show_log(screen, log)
                if not once:
                    _invite(house, screen)
                    await house.service.fatal
                    code = FAILED
                    screen.loud("the service had to stop")
                    _show_log(screen, log)
            finally:
                telling.cancel()
                await asyncio.gather(telling, return_exceptions=True)
            signals.leaving = True
    except asyncio.CancelledError:
        if not signals.asked:
            raise
    return code


def _introduce(house: House, plan: Plan, screen: Screen) -> None:
    forge = "embedded forge" if house.embedded else "Gitea"
    model = (
        f"{plan.model} at {plan.model_url}" if plan.model_url else "a script (it drives the real loop: every call and every tool is real)"
    )
    screen.table(
        [
            (forge, house.stage.url),
            ("repository", f"{house.stage.url}/{house.stage.repo}"),
            ("bot", f"{house.stage.people['timmy'].login}, sandbox: {house.service.sandbox.level}"),
            ("model", model),
        ]
    )
    screen.heading("What happens")


def _show(house: House, screen: Screen, ending: Ending) -> None:
    """The change, the comment, the verdict and where to look."""
    stage = house.stage
    if ending.diff:
        screen.heading(f"The change (pull request #{ending.pull})")
        screen.diff(ending.diff)
    if ending.comment:
        screen.heading(f"The comment on issue #{ending.issue}")
        screen.quote(ending.comment)
    screen.heading("Look")
    rows = [("issue", f"{stage.url}/{stage.repo}/issues/{ending.issue}")]
    if ending.pull:
        rows.append(("pull request", f"{stage.url}/{stage.repo}/pulls/{ending.pull}"))
    screen.table([*rows, ("metrics", f"http://127.0.0.1:{house.service.metrics_port}/metrics")])
    screen.say("")
    if ending.fault:
        screen.say(f"Not ready to merge: {ending.fault}", "bold red")
    else:
        screen.say(f"Pull request #{ending.pull} is open and ready to merge.", "bold green")


def _invite(house: House, screen: Screen) -> None:
    """What to try by hand, and as whom."""
    stage = house.stage
    screen.heading("Try it")
    if house.embedded:
        what = {"alice": "owns the repository", "bob": "may write", "mallory": "is a stranger: the bot refuses her"}
        screen.say(f"Sign in at {stage.url}/user/login (made for this demo, gone with it):")
        screen.table((role, f"password {stage.people[role].password}  {text}") for role, text in what.items())
    screen.say(
        "Comment on the issue: /dispatch help, /dispatch status, /dispatch retry. Or open another one and give it the label dispatch."
    )
    screen.say("It all stays up, and what the bot does is told here, until Ctrl-C.")


def _show_log(screen: Screen, log: TextIO) -> None:
    """The end of the log, because its file may go with the folder."""
    if log is sys.stderr:
        return
    log.flush()
    lines = Path(log.name).read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
    screen.heading("The end of the log")
    for line in lines:
        screen.say(line)
