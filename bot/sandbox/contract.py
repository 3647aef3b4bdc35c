"""What a sandbox is to the rest of the service: run one command in a workspace, with bounds, and leave nothing behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from bot.models import DispatchError


class SandboxUnavailable(DispatchError):
    """No sandbox can be made here. `detail` is what was seen, `remedy` what the operator can do; the message holds both."""

    def __init__(self, detail: str, remedy: str = "") -> None:
        self.detail = detail
        self.remedy = remedy
        super().__init__(f"{detail}\n{remedy}" if remedy else detail)


@dataclass(frozen=True, slots=True)
class Bind:
    """A host path shown inside at `target` (absolute); read-only unless `writable`."""

    source: Path
    target: str
    writable: bool = False


@dataclass(frozen=True, slots=True)
class CommandResult:
    """How one command ended.

    `exit_code` is None when we killed it; `killed` says why: "timeout", "output" (too much of it), "disk" (the workspace outgrew its bounds), else "".
    `output` is stdout and stderr as they came, UTF-8 with replacement characters, head and tail only when long (`omitted_bytes` between them).
    """

    exit_code: int | None
    output: str
    timed_out: bool
    omitted_bytes: int
    killed: str

    @property
    def ok(self) -> bool:
        """True when the command ended by itself with 0."""
        return self.exit_code == 0


class Sandbox(Protocol):
    """One way of running what a model asks for. `level` is "bubblewrap" or "none"; `owner` the uid that must own what it writes (None: our own)."""

    @property
    def level(self) -> str: ...

    @property
    def owner(self) -> int | None: ...

    async def run(
        self,
        command: str,
        *,
        workspace: Path,
        timeout: float | None = None,
        binds: Sequence[Bind] = (),
        stdin: bytes | None = None,
        watch: bool = True,
    ) -> CommandResult:
        """Runs `command` with `/bin/bash -c` in `/workspace` (level none: in the workspace itself, where `binds` have no effect).

        `timeout` in seconds, by default the configured one. `watch=False` switches off the bound on the size of the workspace, for our own
        clean-up. Cancellation kills the whole tree before it is re-raised. Raises SandboxUnavailable when the command could not be started.
        """

    def expect(self, workspace: Path, *, binds: Sequence[Bind] = ()) -> None:
        """A command is likely to come soon: starts the sandbox for it now, where that saves time. It runs that one command, or nothing and ends after 10 s."""

    def dismiss(self, workspace: Path) -> None:
        """No command will come: ends what `expect` started. Harmless when there is nothing."""

    async def close(self) -> None:
        """Kills everything that still runs."""
