"""The sandbox with what a clone borrows from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bot.sandbox import Bind, CommandResult, Sandbox
from bot.workspace.manager import Workspaces


class BoundSandbox:
    """The sandbox as an engine's tools see it: each command also sees the bare repository its clone borrows objects from."""

    def __init__(self, sandbox: Sandbox, workspaces: Workspaces) -> None:
        self._sandbox = sandbox
        self._workspaces = workspaces

    async def run(self, command: str, *, workspace: Path, timeout: float | None = None) -> CommandResult:
        """See Sandbox."""
        return await self._sandbox.run(command, workspace=workspace, timeout=timeout, binds=self._binds(workspace))

    def expect(self, workspace: Path) -> None:
        """See Sandbox."""
        self._sandbox.expect(workspace, binds=self._binds(workspace))

    def dismiss(self, workspace: Path) -> None:
        """See Sandbox."""
        self._sandbox.dismiss(workspace)

    def _binds(self, workspace: Path) -> Sequence[Bind]:
        return self._workspaces.binds(workspace.parent.name)
