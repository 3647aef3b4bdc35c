"""Refuses to run beside a distribution that brings its own `bot`, `handlers` or `commands`: one would silently overwrite the other."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib.metadata import Distribution, distributions

from bot.models import UserError

OURS = "timmy-dispatch"
PACKAGES = ("bot", "handlers", "commands")
# A RECORD names every installed file, one a line.
RECORDED = re.compile(rf"^({'|'.join(PACKAGES)})/", re.MULTILINE)


def refuse_foreign_owner(installed: Iterable[Distribution] | None = None) -> None:
    """Raises UserError naming the other owner. In an editable install the names belong to nobody, which is fine."""
    found = [
        f"`{package}` belongs to {name}"
        for distribution in (distributions() if installed is None else installed)
        if (name := distribution.name or "an unnamed distribution").lower().replace("_", "-") != OURS
        for package in sorted(set(RECORDED.findall(distribution.read_text("RECORD") or "")))
    ]
    if found:
        raise UserError(
            f"another package was installed over this one: {', '.join(found)}. "
            f"Remedy: install {OURS} alone, with `uv tool install`, pipx, a container or a virtual environment of its own"
        )
