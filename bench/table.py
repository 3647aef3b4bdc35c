"""What a benchmark hands back, and how it is shown: ours, floor, ratio, goal, samples, machine."""

from __future__ import annotations

import math
import os
import platform
import sqlite3
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HEADINGS = ("id", "what", "ours", "floor", "ratio", "goal", "met", "samples", "floor is")


@dataclass(frozen=True, slots=True)
class Row:
    """One line. `most_ratio` and `most_ours` are the goal, in the row's own unit; None where there is none. `floor` None: measured against a bound only."""

    id: str
    what: str
    unit: str
    ours: float
    floor: float | None
    samples: str
    floor_is: str
    most_ratio: float | None = None
    most_ours: float | None = None

    @property
    def ratio(self) -> float | None:
        """Ours by floor."""
        return self.ours / self.floor if self.floor else None

    @property
    def met(self) -> bool | None:
        """Whether every part of the goal is met; None where there is no goal."""
        parts: list[bool] = []
        if self.most_ratio is not None and self.ratio is not None:
            parts.append(self.ratio <= self.most_ratio)
        if self.most_ours is not None:
            parts.append(self.ours <= self.most_ours)
        return all(parts) if parts else None

    def cells(self) -> tuple[str, ...]:
        """As text."""
        goal = [f"<= {self.most_ratio:g} x"] if self.most_ratio is not None else []
        if self.most_ours is not None:
            goal.append(f"<= {self.most_ours:g} {self.unit}")
        return (
            self.id,
            self.what,
            f"{number(self.ours)} {self.unit}",
            "-" if self.floor is None else f"{number(self.floor)} {self.unit}",
            "-" if self.ratio is None else f"{self.ratio:.2f}",
            ", ".join(goal) or "-",
            {True: "yes", False: "NO", None: "-"}[self.met],
            self.samples,
            self.floor_is,
        )


def number(value: float) -> str:
    """Three figures."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def middle(values: Sequence[float]) -> float:
    """The median."""
    return statistics.median(values)


def table(rows: Sequence[Row]) -> str:
    """All rows as aligned text."""
    lines = [HEADINGS, *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS))]
    shown = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([shown[0], "  ".join("-" * width for width in widths), *shown[1:]])


def machine(folder: Path) -> str:
    """What the figures were taken on."""
    model = next((line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), platform.machine())
    memory = next((int(line.split()[1]) // 1024**2 for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    kind = subprocess.run(["stat", "-f", "-c", "%T", str(folder)], capture_output=True, text=True, check=False).stdout.strip()
    git = subprocess.run(["git", "--version"], capture_output=True, text=True, check=False).stdout.strip().removeprefix("git version ")
    return (
        f"{len(os.sched_getaffinity(0))} cores ({model}), {memory} GiB, Linux {platform.release()}, Python {platform.python_version()}, "
        f"SQLite {sqlite3.sqlite_version}, git {git}, state on {kind}, load before {os.getloadavg()[0]:.2f}"
    )


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
