"""The wall round everything a model runs; the only package that starts processes on a model's behalf."""

from __future__ import annotations

from pathlib import Path

from bot.config import SandboxSettings
from bot.sandbox.contract import Bind, CommandResult, Sandbox, SandboxUnavailable
from bot.sandbox.files import Entry, PathRefused, WorkspaceFiles
from bot.sandbox.kill import sweep
from bot.sandbox.launch import Bubblewrap
from bot.sandbox.plain import Plain

__all__ = ["Bind", "CommandResult", "Entry", "PathRefused", "Sandbox", "SandboxUnavailable", "WorkspaceFiles", "build", "sweep"]


def build(settings: SandboxSettings, *, state_dir: Path) -> Sandbox:
    """The sandbox the configuration asks for, tried once (some 30 ms), after what a dead service process left behind was killed.

    Raises SandboxUnavailable with what was seen and the remedy when bubblewrap cannot work here; there is never a silent fall back to `none`.
    """
    sweep()
    if settings.kind == "none":
        return Plain(settings, state_dir=state_dir)
    sandbox = Bubblewrap(settings)
    sandbox.check()
    return sandbox
