"""The command line: quick to answer, one file a command, and no traceback for what a person did."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import Distribution
from pathlib import Path

import click
import pytest

from bot import __version__, cli
from bot.cli import default_config, run
from bot.cli._owners import refuse_foreign_owner
from bot.models import ConfigError, UserError

ROOT = Path(__file__).parent.parent
HEAVY = ("openai", "dbos", "aiohttp", "sqlalchemy", "yaml", "rich", "prometheus_client", "jinja2")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["doctor", "--help"], ["init", "--help"], ["check-config", "--help"]])
def test_help_imports_nothing_heavy(arguments):
    code = (
        f"import sys; from bot.cli import run; code = run({arguments!r}); print(sorted(set({HEAVY!r}) & set(sys.modules))); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd="/", capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "[]"


def test_every_file_is_a_command_with_help(capsys):
    context = click.Context(cli.main)
    names = cli.main.list_commands(context)
    assert {"check-config", "doctor", "init"} <= set(names)
    for name in names:
        command = cli.main.get_command(context, name)
        assert command is not None
        assert command.get_short_help_str()
    assert run(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name}" in shown for name in names)


@pytest.mark.parametrize("name", ["nothing", "_load", "__init__", "../x"])
def test_what_is_no_command(capsys, name):
    assert run([name]) == 2
    assert "No such command" in capsys.readouterr().err


def test_version(capsys):
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"timmy-dispatch {__version__}\n"


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("do this instead"), 1, "timmy-dispatch: do this instead\n"),
        (ConfigError(["a:1: x. Remedy: y.", "a:2: z. Remedy: w."]), 2, "a:1: x. Remedy: y.\na:2: z. Remedy: w.\n"),
        (click.UsageError("no"), 2, "Error: no\n"),
        (KeyboardInterrupt(), 130, "stopped\n"),
        (click.exceptions.Exit(7), 7, ""),
    ],
)
def test_a_fault_becomes_a_sentence_and_an_exit_code(capsys, error, code, said):
    @cli.main.command("break-it")
    def break_it() -> None:
        raise error

    try:
        assert run(["break-it"]) == code
    finally:
        del cli.main.commands["break-it"]
    assert capsys.readouterr().err.endswith(said)


def test_a_reader_that_goes_away(tmp_path):
    done = subprocess.run(
        ["/bin/sh", "-c", f"'{sys.executable}' -P -m bot check-config --example | head -n 1"],
        cwd="/",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.startswith("# timmy-dispatch")
    assert done.stderr == ""


def test_check_config(capsys, tmp_path):
    path = tmp_path / "dispatch.yml"
    assert run(["--config", str(path), "check-config"]) == 2
    assert "timmy-dispatch init" in capsys.readouterr().err
    assert run(["check-config", "--example"]) == 0
    path.write_text(capsys.readouterr().out)
    path.chmod(0o600)
    for name in ("gitea.token", "webhook.secret"):
        (tmp_path / name).write_text("long-enough-secret")
        (tmp_path / name).chmod(0o600)
    assert run(["--config", str(path), "check-config"]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{path}: in order (1 repositories, 1 providers)\n"
    assert "warning:" in shown.err
    assert run(["check-config", "--table"]) == 0
    assert "| `forge` |" in capsys.readouterr().out


def test_a_level_for_a_verb_that_does_not_exist_is_a_fault(capsys, tmp_path):
    path = tmp_path / "dispatch.yml"
    for name in ("gitea.token", "webhook.secret"):
        (tmp_path / name).write_text("long-enough-secret")
        (tmp_path / name).chmod(0o600)
    roles = "roles: {ROLE: admin}"
    path.write_text(
        "forge: {url: https://git.example.org, token_file: gitea.token}\n"
        f"repositories:\n  - name: acme/rocket\n    {roles}\n"
        "webhook: {secret_files: [webhook.secret]}\n"
        "providers: [{base_url: http://127.0.0.1:1/v1, model: x}]\n"
    )
    path.chmod(0o600)
    assert run(["--config", str(path), "check-config"]) == 2
    assert "there is no verb `ROLE`. Remedy: the verbs are approve, cancel, deny, explain" in capsys.readouterr().err
    path.write_text(path.read_text().replace("ROLE", "run"))
    assert run(["--config", str(path), "check-config"]) == 0


def test_the_file_comes_from_the_environment_too(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("TIMMY_DISPATCH_CONFIG", str(tmp_path / "none.yml"))
    assert run(["check-config"]) == 2
    assert "none.yml" in capsys.readouterr().err


def test_the_file_of_this_folder_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dispatch.yml").touch()
    assert default_config() == Path("dispatch.yml")


class Installed(Distribution):
    """A distribution as its two files tell it."""

    def __init__(self, name: str, *files: str) -> None:
        self._texts = {"METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n", "RECORD": "".join(f"{file},,\n" for file in files)}

    def read_text(self, filename):
        return self._texts.get(filename)

    def locate_file(self, path):
        raise NotImplementedError


def test_another_owner_of_our_packages_is_refused():
    ours = Installed("timmy-dispatch", "bot/__init__.py", "handlers/__init__.py", "commands/run.py")
    other = Installed("robots", "robots/bot/x.py", "bot_tools/x.py", "not_commands/y.py")
    refuse_foreign_owner([ours, other])
    with pytest.raises(UserError, match=r"`bot` belongs to other-bot, `commands` belongs to other-bot.*uv tool install"):
        refuse_foreign_owner([ours, Installed("other-bot", "bot/__init__.py", "commands/__init__.py")])


def test_run_as_a_module():
    done = subprocess.run([sys.executable, "-P", "-m", "bot", "--version"], cwd="/", capture_output=True, text=True, timeout=60)
    assert done.stdout == f"timmy-dispatch {__version__}\n"
