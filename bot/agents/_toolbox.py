"""What the composition root gives an engine to work with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from bot.providers.chain import ProviderChain


class ResultLike(Protocol):
    """How a command ended (`bot/sandbox/contract.py`, CommandResult)."""

    @property
    def exit_code(self) -> int | None: ...
    @property
    def output(self) -> str: ...
    @property
    def timed_out(self) -> bool: ...
    @property
    def omitted_bytes(self) -> int: ...
    @property
    def killed(self) -> str: ...


class SandboxLike(Protocol):
    """Runs a command in a workspace behind the wall; `expect` says that one is likely to come, `dismiss` that none will."""

    async def run(self, command: str, *, workspace: Path, timeout: float | None = None) -> ResultLike: ...

    def expect(self, workspace: Path) -> None: ...

    def dismiss(self, workspace: Path) -> None: ...


class ListedLike(Protocol):
    """One line of a listing; `kind` is file, directory, symlink or other."""

    @property
    def path(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def size(self) -> int: ...


class FilesLike(Protocol):
    """The one door to the files of a workspace; raises UserError with a text for the model."""

    def read(self, path: str, max_bytes: int) -> bytes: ...

    def write(self, path: str, data: bytes) -> None: ...

    def list(self, path: str, depth: int, limit: int) -> Sequence[ListedLike]: ...


class ForgeReader(Protocol):
    """Reads one repository for the `gitea` tool, with text that passed the trust filter.

    `operation` is a key of `bot.agents._tools.OPERATIONS`, and `arguments` holds only what that operation lists, already checked. Raises UserError.
    """

    async def read(self, operation: str, arguments: Mapping[str, str | int]) -> str: ...


@dataclass(frozen=True, slots=True)
class Toolbox:
    """`files` opens a workspace; `forge_reader(repo, issue)` is None where the model gets no `gitea` tool; `scrub` takes secrets out of a text.

    `now_ms` is Unix time, `loop_time` the event loop's (seconds), `command_seconds` the longest a command may run.
    """

    chain: ProviderChain
    sandbox: SandboxLike
    files: Callable[[Path], FilesLike]
    forge_reader: Callable[[str, int], ForgeReader] | None
    scrub: Callable[[str], str]
    now_ms: Callable[[], int]
    loop_time: Callable[[], float]
    command_seconds: float
