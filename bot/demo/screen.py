"""The demo's terminal: one line a fact with the time it happened, and a bar while the first sprint runs; plain text where nobody watches."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

TOTAL: Final = 100
_WHO: Final = 8
_STYLES: Final = {"timmy": "cyan", "model": "magenta", "forge": "blue", "demo": "bold"}
_DIFF: Final = {"+": "green", "-": "red", "@": "cyan"}
_MARKER: Final = re.compile(r"<!--.*?-->", re.DOTALL)


class Screen:
    """Where the story is told. Every text passes `plain`: what a server or a model says must not drive the terminal."""

    def __init__(self, console: Console, *, live: bool) -> None:
        self.console = console
        self._live = live
        self._began = time.monotonic()
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def clock(self) -> None:
        """Times are counted from here."""
        self._began = time.monotonic()

    def say(self, text: str, style: str = "") -> None:
        """A line without time or speaker."""
        self.console.print(Text(plain(text), style), soft_wrap=True)

    def loud(self, text: str) -> None:
        """A warning that cannot be overlooked, one paragraph a line."""
        for line in text.splitlines():
            self.say(f"!! {line}", "bold yellow")

    def fact(self, who: str, text: str, style: str = "") -> None:
        """What somebody did just now."""
        moment = f"{time.monotonic() - self._began:6.1f} s  "
        line = Text.assemble((moment, "dim"), (f"{who:<{_WHO}}", _STYLES.get(who, "yellow")), (plain(text), style))
        self.console.print(line, soft_wrap=True)

    def begin(self, text: str) -> None:
        """Shows the bar, where somebody watches."""
        if self._live:
            self._bar = Progress(
                SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn(), console=self.console
            )
            self._task = self._bar.add_task(plain(text), total=TOTAL)
            self._bar.start()

    def at(self, done: float, text: str) -> None:
        """How far the sprint is (of `TOTAL`) and what it does."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=plain(text))

    def end(self) -> None:
        """Takes the bar away; may be called twice."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def heading(self, text: str) -> None:
        """Begins a part."""
        self.console.print()
        self.say(text, "bold underline")

    def diff(self, text: str) -> None:
        """A unified diff in colours."""
        for line in text.rstrip().splitlines():
            self.say(line, "bold" if line.startswith(("diff ", "+++", "---")) else _DIFF.get(line[:1], ""))

    def quote(self, markdown: str) -> None:
        """A comment as it was written, without the marker that people do not see."""
        for line in _MARKER.sub("", markdown).strip().splitlines():
            self.say(f"  {line}")

    def table(self, rows: Iterable[tuple[str, str]]) -> None:
        """Names and values, one pair a line, so that an address can be clicked and copied whole."""
        pairs = list(rows)
        width = max(len(name) for name, _ in pairs)
        for name, value in pairs:
            self.say(f"  {name:<{width}}  {value}")


def plain(text: str) -> str:
    """Without control characters."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
