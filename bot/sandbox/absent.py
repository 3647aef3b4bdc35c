"""Where no sandbox can be made, nothing runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bot.sandbox.contract import Bind, CommandResult, SandboxUnavailable


class NoSandbox:
    """Stands where no sandbox can be made: every sprint is refused with the remedy."""

    level = "unavailable"
    owner = None

    def __init__(self, error: SandboxUnavailable) -> None:
        self.error = error

    async def run(
        self,
        command: str,  # noqa: ARG002 - the signature of every sandbox
        *,
        workspace: Path,  # noqa: ARG002
        timeout: float | None = None,  # noqa: ARG002
        binds: Sequence[Bind] = (),  # noqa: ARG002
        stdin: bytes | None = None,  # noqa: ARG002
        watch: bool = True,  # noqa: ARG002
    ) -> CommandResult:
        """Refuses."""
        raise self.error

    def expect(self, workspace: Path, *, binds: Sequence[Bind] = ()) -> None:
        """Refuses when it comes."""

    def dismiss(self, workspace: Path) -> None:
        """Nothing was started."""

    async def close(self) -> None:
        """Nothing runs."""
