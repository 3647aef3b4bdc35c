"""The steps of one attempt as rows: every write is guarded by the ownership of the sprint, and moves what its comment shows."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy.engine import Connection

from bot.failpoints import Failpoints
from bot.lease import Fenced
from bot.models import SprintId, StoredStep, StoredToolCall, Usage
from bot.store import Store, sprints, steps

DOING_CAP = 80


@dataclass(frozen=True, slots=True)
class StoredTrajectory:
    """`bot.agents.Trajectory` over the store; raises Fenced as soon as the row belongs to somebody else."""

    store: Store
    sprint_id: SprintId
    k: int
    attempt: int
    me: str
    progress_ms: int
    failpoint: Failpoints
    now_ms: Callable[[], int]

    async def steps(self) -> list[StoredStep]:
        """The steps of this attempt."""
        return await self.store.read(lambda conn: steps.of_attempt(conn, self.sprint_id, self.attempt))

    async def tool_calls(self) -> list[StoredToolCall]:
        """The tool calls of this attempt."""
        return await self.store.read(lambda conn: steps.calls_of_attempt(conn, self.sprint_id, self.attempt))

    async def reserve(self, n: int, *, usd: float, tokens: int) -> None:
        """Books step `n` before the model is called."""

        def write(conn: Connection) -> None:
            self._own(conn, moved=False, doing="asking the model")
            steps.reserve(conn, self.sprint_id, self.attempt, n, usd=usd, tokens=tokens, now_ms=self.now_ms())

        await self.store.write(write)
        self.failpoint("work.step_reserved")

    async def reply(self, n: int, *, message: dict[str, Any], usage: Usage, provider: str, model: str) -> None:
        """Stores what the model said and what it cost; the status comment follows at the projector's tick, throttled."""

        def write(conn: Connection) -> None:
            steps.replied(
                conn, self.sprint_id, self.attempt, n, message=message, usage=usage, provider=provider, model=model, now_ms=self.now_ms()
            )
            spent = steps.spent(conn, self.sprint_id)
            self._own(
                conn,
                show=True,
                steps=steps.count(conn, self.sprint_id),
                tokens=spent.tokens,
                usd=spent.usd,
                provider=provider,
                model=model,
            )

        await self.store.write(write)
        self.failpoint("work.step_stored")

    async def failed(self, n: int, *, error: str) -> None:
        """Step `n` got no reply. What was refused before it ran (4xx) costs nothing; anything else keeps its reserve."""
        billed = not error.startswith("not billed")

        def write(conn: Connection) -> None:
            self._own(conn, moved=False)
            steps.failed(conn, self.sprint_id, self.attempt, n, error=error, billed=billed, now_ms=self.now_ms())

        await self.store.write(write)

    async def tool_started(self, n: int, i: int, *, call_id: str, tool: str, arguments: str) -> None:
        """A row before the tool runs."""

        def write(conn: Connection) -> None:
            self._own(conn, show=True, doing=doing(tool, arguments))
            steps.tool_started(
                conn, self.sprint_id, self.attempt, n, i, call_id=call_id, tool=tool, arguments=arguments, now_ms=self.now_ms()
            )

        await self.store.write(write)
        self.failpoint("work.tool_row")

    async def tool_ended(self, n: int, i: int, *, result: str) -> None:
        """What the tool answered."""
        self.failpoint("work.tool_running")

        def write(conn: Connection) -> None:
            self._own(conn)
            steps.tool_ended(conn, self.sprint_id, self.attempt, n, i, result=result, now_ms=self.now_ms())

        await self.store.write(write)

    async def spent(self) -> Usage:
        """All attempts together."""
        return await self.store.read(lambda conn: steps.spent(conn, self.sprint_id))

    async def step_count(self) -> int:
        """Steps of all attempts."""
        return await self.store.read(lambda conn: steps.count(conn, self.sprint_id))

    def _own(self, conn: Connection, *, show: bool = False, moved: bool = True, **values: Any) -> None:
        shown = self.progress_ms if show else None
        if not sprints.update(
            conn, self.sprint_id, self.k, me=self.me, now_ms=self.now_ms(), show_in_ms=shown, moved=moved, attempt=self.attempt, **values
        ):
            raise Fenced(f"sprint {self.sprint_id} belongs to another process")


def doing(tool: str, arguments: str) -> str:
    """What a tool call does, in a few words for the status comment: the tool and the one argument that tells most."""
    try:
        values = json.loads(arguments)
    except ValueError:
        return tool
    detail = next((str(values[key]) for key in ("command", "path", "pattern", "query") if isinstance(values, dict) and key in values), "")
    text = f"{tool} {' '.join(detail.split())}".strip()
    return text if len(text) <= DOING_CAP else text[: DOING_CAP - 1] + "…"
