"""The command line: one subcommand a file, imported when it is asked for; a user's fault is a sentence and an exit code, never a traceback."""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from bot import __version__
from bot.models import ConfigError, DispatchError

PROGRAM = "timmy-dispatch"
CONFIG_VARIABLE = "TIMMY_DISPATCH_CONFIG"
CONFIG_NAME = "dispatch.yml"
CONFIG_FALLBACK = Path("/etc/timmy-dispatch") / CONFIG_NAME
FAILED, MISUSED, INTERRUPTED = 1, 2, 130


class Commands(click.Group):
    """Finds `bot/cli/NAME.py` when `NAME` is asked for; each such module defines `command`, with `_` for `-` in its file name.

    Their top level imports nothing heavy: `--help` imports them all.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Every module here that does not begin with `_`."""
        found = {info.name.replace("_", "-") for info in pkgutil.iter_modules(__path__) if not info.name.startswith("_")}
        return sorted(found | _verbs() | set(super().list_commands(ctx)))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, None where there is none."""
        name = cmd_name.replace("-", "_")
        if name.startswith("_") or not any(info.name == name for info in pkgutil.iter_modules(__path__)):
            if cmd_name in _verbs():
                from bot.cli._verb import verb_command

                return verb_command(cmd_name)
            return super().get_command(ctx, cmd_name)
        command = importlib.import_module(f"{__name__}.{name}").command
        if not isinstance(command, click.Command):
            raise TypeError(f"{__name__}.{name} must define `command`, a click.Command; it has {type(command).__name__}")
        return command


def _of_the_database(error: Exception) -> str:
    """What is to be said of it, where the error is one of a database: then its library is loaded."""
    if "sqlalchemy" not in sys.modules:
        return ""
    from bot.store import explain

    return explain(error)


def _verbs() -> set[str]:
    """Every file of `commands/` is a verb here too; the files are named, not imported."""
    import commands

    return {info.name for info in pkgutil.iter_modules(commands.__path__) if not info.name.startswith("_")}


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name=PROGRAM, message="%(prog)s %(version)s")
@click.option(
    "-c",
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    envvar=CONFIG_VARIABLE,
    help=f"Configuration file. Default: ./{CONFIG_NAME}, else {CONFIG_FALLBACK}.",
)
@click.pass_context
def main(ctx: click.Context, config: Path | None) -> None:
    """A label or a /dispatch comment on a Gitea issue becomes a sandboxed coding-agent sprint and a pull request."""
    from bot.cli._owners import refuse_foreign_owner

    refuse_foreign_owner()
    ctx.obj = config or default_config()


def default_config() -> Path:
    """The file in this folder, else that of the machine where only that exists."""
    here = Path(CONFIG_NAME)
    return CONFIG_FALLBACK if not here.exists() and CONFIG_FALLBACK.exists() else here


def run(arguments: Sequence[str]) -> int:
    """Runs the command line and returns its exit code: 1 it did not succeed, 2 it was called or configured wrongly."""
    try:
        code = main.main(list(arguments), prog_name=PROGRAM, standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped", err=True)
        return INTERRUPTED
    except ConfigError as error:
        click.echo("\n".join(error.faults), err=True)
        return MISUSED
    except DispatchError as error:
        click.echo(f"{PROGRAM}: {error}", err=True)
        return FAILED
    except BrokenPipeError:
        # The reader of our output has gone; without this the interpreter complains once more while it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        click.echo(f"{PROGRAM}: {error}", err=True)
        return FAILED
    except Exception as error:
        said = _of_the_database(error)
        if not said:
            raise
        click.echo(f"{PROGRAM}: {said}", err=True)
        return FAILED
    return code if isinstance(code, int) else 0
