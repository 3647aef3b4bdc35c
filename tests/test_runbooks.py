"""What the pages for people name is there: commands with their options, verbs, settings, metrics, panels. A page that sends somebody nowhere at night is a fault."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from pydantic import BaseModel

from bot.cli import main
from bot.doctor import checks
from bot.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
RUNBOOKS = sorted((ROOT / "docs" / "runbooks").glob("*.md"))
METRICS = (ROOT / "docs" / "metrics.md").read_text()
VERBS = {path.stem for path in (ROOT / "commands").glob("[!_]*.py")}


def spans(page: Path) -> list[str]:
    """Code in a line, and every line of fenced code, without comments."""
    text = page.read_text()
    fenced = re.findall(r"```[a-z]*\n(.*?)```", text, re.DOTALL)
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    lines = [line.partition(" # ")[0].strip() for block in fenced for line in block.replace("\\\n", " ").splitlines()]
    return [*re.findall(r"`([^`\n]+)`", text), *lines]


def titles() -> set[str]:
    def walk(panels: list[dict]) -> Iterator[str]:
        for panel in panels:
            yield panel.get("title", "")
            yield from walk(panel.get("panels") or [])

    boards = (json.loads(path.read_text()) for path in (ROOT / "grafana" / "dashboards").glob("*.json"))
    return {title for board in boards for title in walk(board["panels"])}


def has_setting(path: str) -> bool:
    model: type[BaseModel] | None = Settings
    for name in path.split("."):
        if model is None or name not in model.model_fields:
            return False
        kind = model.model_fields[name].annotation
        model = kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None
    return True


def options_of(command: click.Command, name: str) -> list[click.Option]:
    return [each for each in command.params if isinstance(each, click.Option) and name in each.opts]


def wrong(words: list[str]) -> str:
    """What is not there of a command line of the program, or ""."""
    command: click.Command | None = main
    ctx = click.Context(main)
    for at, word in enumerate(words):
        if isinstance(command, click.Group) and not word.startswith("-"):
            name, command = word.partition("|")[0], command.get_command(ctx, word.partition("|")[0])
            if command is None:
                return f"no command {name}"
        elif not word.startswith("-") and at and words[at - 1] == "--only":
            if word not in {check.title for check in checks()}:
                return f"no check {word}"
        elif not word.startswith("-") and command and not any(isinstance(each, click.Argument) for each in command.params):
            if not words[at - 1].startswith("-") or any(each.is_flag for each in options_of(command, words[at - 1])):
                return f"no word {word}"
        elif word.startswith("--"):
            options = {option for parameter in (command.params if command else ()) for option in parameter.opts} | {"--help", "--config"}
            if word.partition("=")[0] not in options:
                return f"no option {word}"
    return ""


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_a_page_names_only_what_is_there(page: Path) -> None:
    faults = []
    for span in spans(page):
        command = re.match(r"(?:sudo )?timmy-dispatch ((?:-c|--config) \S+ )?([a-z].*)", span)
        if command:
            found = wrong([word for word in command[2].split() if word not in ("...", "…")])
            faults += [f"{span}: {found}"] if found else []
        verb = re.match(r"/dispatch ([a-z]+)", span)
        if verb and verb[1] not in VERBS:
            faults.append(f"{span}: no verb {verb[1]}")
        setting = re.fullmatch(r"([a-z_]+\.[a-z_]+):?(?: .*)?", span)
        if (
            setting
            and not span.endswith(".jsonl")
            and setting[1].partition(".")[0] in Settings.model_fields
            and not has_setting(setting[1])
        ):
            faults.append(f"{span}: no such setting")
        faults += [f"{span}: no metric {name}" for name in re.findall(r"\bdispatch_[a-z0-9_]+", span) if name not in METRICS]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("page", RUNBOOKS, ids=lambda path: path.stem)
def test_a_runbook_confirms_and_tells_what_to_do(page: Path) -> None:
    text = page.read_text()
    assert "\n## Confirm\n" in text
    assert "\n## Do\n" in text
    named = {span for span in spans(page) if re.fullmatch(r"[A-Z][a-z]+(?: [A-Za-z]+)+", span)}
    assert named <= titles(), named - titles()


def test_what_is_not_there_is_seen() -> None:
    assert wrong(["nonsense"]) == "no command nonsense"
    assert wrong(["lanes", "sideways"]) == "no command sideways"
    assert wrong(["serve", "--nonsense"]) == "no option --nonsense"
    assert wrong(["doctor", "clock"]) == "no word clock"
    assert wrong(["doctor", "--json", "clock"]) == "no word clock"
    assert wrong(["doctor", "--only", "nonsense"]) == "no check nonsense"
    assert wrong(["doctor", "--only", "clock", "--wait", "2"]) == ""
    assert not has_setting("breaker.nonsense")
    assert has_setting("breaker.failures")
    assert "Probe age" in titles()
