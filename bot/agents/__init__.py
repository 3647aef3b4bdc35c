"""Agent engines, one a file: each turns a job into facts about how it ended; the verdict is the tree's, never the engine's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from bot.models import EventKind, FailureReason, Limits, SprintId, StoredStep, StoredToolCall, Usage

__all__ = [
    "AgentEnd",
    "AgentJob",
    "AgentResult",
    "Backend",
    "Emit",
    "Engine",
    "StoredStep",
    "StoredToolCall",
    "Trajectory",
]

Emit = Callable[[EventKind, dict[str, Any]], None]


class AgentEnd(StrEnum):
    """How a run ended. PROVIDER means that no provider can be called now: the sprint is requeued, no attempt is burnt."""

    FINISHED = "finished"
    LIMIT = "limit"
    REFUSED = "refused"
    FAILED = "failed"
    PROVIDER = "provider"
    STOPPED = "stopped"


class Trajectory(Protocol):
    """Where an engine records its steps before and after they happen, so that a crash resumes at the step in flight (engine.md, "Work").

    What a coroutine writes is durable when it returns. `reply` and `tool_ended` only take down what happened: the next coroutine that is awaited stores it
    in the same transaction as its own, so that nothing which follows from it can begin before. `flush` is for where nothing follows. The coroutines raise
    `Fenced` (bot/engine.py) when the sprint is no longer this process's.
    """

    async def steps(self) -> list[StoredStep]: ...

    async def tool_calls(self) -> list[StoredToolCall]: ...

    async def reserve(self, n: int, *, usd: float, tokens: int) -> None:
        """Books step `n` with the most it can cost, before the model is called."""

    def reply(self, n: int, *, message: dict[str, Any], usage: Usage, provider: str, model: str) -> None:
        """The reply and the true cost of step `n`; stored before its tools run, with the row of the first."""

    async def failed(self, n: int, *, error: str) -> None:
        """Step `n` got no reply; its reserve is released only where the provider certainly did not bill (`error` says what came)."""

    async def tool_started(self, n: int, i: int, *, call_id: str, tool: str, arguments: str) -> None: ...

    def tool_ended(self, n: int, i: int, *, result: str) -> None:
        """What the call answered; stored with whatever begins next."""

    async def flush(self) -> None:
        """Stores what was taken down and has not been stored yet."""

    async def totals(self) -> tuple[Usage, int]:
        """All steps of all attempts of this sprint: what they cost, reserves counted where no cost is known, and how many there are."""


@dataclass(frozen=True, slots=True)
class AgentJob:
    """One run. `system` and `task` are the finished prompt texts; `deadline` is loop time (seconds); `stopping()` gives the stop flag seen last.

    `planning` asks for a plan instead of work: the last words are the plan, and whatever changed in the tree is thrown away.
    """

    sprint_id: SprintId
    attempt: int
    system: str
    task: str
    workdir: Path
    repo: str
    issue: int
    limits: Limits
    deadline: float
    provider: str
    model: str
    trajectory: Trajectory
    stopping: Callable[[], str | None]
    planning: bool = False


@dataclass(frozen=True, slots=True)
class AgentResult:
    """Facts about a run: `text` are the last words (capped, untrusted), `limit` names which limit ended it, `until_ms` when a provider may be asked again.

    With PROVIDER, an `until_ms` of 0 says that people paused every provider: nothing is owed until they resume one.
    """

    end: AgentEnd
    reason: FailureReason | None = None
    text: str = ""
    limit: str = ""
    until_ms: int = 0
    models: tuple[str, ...] = ()


class Engine(Protocol):
    """One way of running an agent."""

    async def run(self, job: AgentJob, emit: Emit) -> AgentResult:
        """Runs to an end. Cancellation of the task is cancel: kill what was started, re-raise, within 2 s."""


@dataclass(frozen=True, slots=True)
class Backend:
    """What a module of this package exposes as `plugin`: `build(tools)` makes the engine from what the composition root offers (`bot/rooms.py`, `Toolbox`)."""

    build: Callable[[Any], Engine]
    summary: str
