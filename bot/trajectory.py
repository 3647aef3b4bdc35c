"""The steps of one attempt as rows: every write is guarded by the ownership of the sprint, and moves what its comment shows."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy.engine import Connection

from bot.failpoints import Failpoints
from bot.lease import Fenced
from bot.models import SprintId, StoredStep, StoredToolCall, Usage
from bot.redaction import encodable
from bot.store import Store, sprints, steps

DOING_CAP = 80


@dataclass(frozen=True, slots=True)
class _Note:
    """One thing that happened: `write` stores it and returns what the sprint's row gets; `show` and `moved` as in `sprints.update`; `point` is passed then."""

    write: Callable[[Connection], dict[str, Any]]
    show: bool = False
    moved: bool = True
    point: str = ""


@dataclass(slots=True)
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
    _taken: list[_Note] = field(default_factory=list, init=False)
    _totals: tuple[Usage, int] | None = field(default=None, init=False)

    async def steps(self) -> list[StoredStep]:
        """The steps of this attempt."""
        return await self.store.read(lambda conn: steps.of_attempt(conn, self.sprint_id, self.attempt))

    async def tool_calls(self) -> list[StoredToolCall]:
        """The tool calls of this attempt."""
        return await self.store.read(lambda conn: steps.calls_of_attempt(conn, self.sprint_id, self.attempt))

    async def reserve(self, n: int, *, usd: float, tokens: int) -> None:
        """Books step `n` before the model is called."""

        def write(conn: Connection) -> dict[str, Any]:
            steps.reserve(conn, self.sprint_id, self.attempt, n, usd=usd, tokens=tokens, now_ms=self.now_ms())
            return {"doing": "asking the model"}

        await self._store(_Note(write, moved=False, point="work.step_reserved"))
        self._totals = None

    def reply(self, n: int, *, message: dict[str, Any], usage: Usage, provider: str, model: str) -> None:
        """What the model said and what it cost; the status comment follows at the projector's tick, throttled."""
        now_ms = self.now_ms()

        def write(conn: Connection) -> dict[str, Any]:
            steps.replied(
                conn, self.sprint_id, self.attempt, n, message=message, usage=usage, provider=provider, model=model, now_ms=now_ms
            )
            spent, count = steps.totals(conn, self.sprint_id)
            self._totals = spent, count
            return {"steps": count, "tokens": spent.tokens, "usd": spent.usd, "provider": provider, "model": model}

        self._taken.append(_Note(write, show=True, point="work.step_stored"))
        self._totals = None

    async def failed(self, n: int, *, error: str) -> None:
        """Step `n` got no reply. What was refused before it ran (4xx) costs nothing; anything else keeps its reserve."""
        billed = not error.startswith("not billed")

        def write(conn: Connection) -> dict[str, Any]:
            steps.failed(conn, self.sprint_id, self.attempt, n, error=error, billed=billed, now_ms=self.now_ms())
            return {}

        await self._store(_Note(write, moved=False))
        self._totals = None

    async def tool_started(self, n: int, i: int, *, call_id: str, tool: str, arguments: str) -> None:
        """A row before the tool runs."""

        def write(conn: Connection) -> dict[str, Any]:
            steps.tool_started(
                conn, self.sprint_id, self.attempt, n, i, call_id=call_id, tool=tool, arguments=arguments, now_ms=self.now_ms()
            )
            return {"doing": doing(tool, arguments)}

        await self._store(_Note(write, show=True, point="work.tool_row"))

    def tool_ended(self, n: int, i: int, *, result: str) -> None:
        """What the tool answered."""
        self.failpoint("work.tool_running")
        now_ms = self.now_ms()

        def write(conn: Connection) -> dict[str, Any]:
            steps.tool_ended(conn, self.sprint_id, self.attempt, n, i, result=result, now_ms=now_ms)
            return {}

        self._taken.append(_Note(write))

    async def flush(self) -> None:
        """Stores what was taken down."""
        if self._taken:
            await self._store()

    async def totals(self) -> tuple[Usage, int]:
        """All attempts together."""
        if self._totals is None:
            await self.flush()
        if self._totals is None:
            self._totals = await self.store.read(lambda conn: steps.totals(conn, self.sprint_id))
        return self._totals

    async def _store(self, *more: _Note) -> None:
        """One transaction for all that was taken down and what begins now."""
        notes = (*self._taken, *more)
        self._taken.clear()

        def write(conn: Connection) -> None:
            values: dict[str, Any] = {}
            for note in notes:
                values |= note.write(conn)
            shown = self.progress_ms if any(note.show for note in notes) else None
            moved = any(note.moved for note in notes)
            values["attempt"] = self.attempt
            if not sprints.update(conn, self.sprint_id, self.k, me=self.me, now_ms=self.now_ms(), show_in_ms=shown, moved=moved, **values):
                raise Fenced(f"sprint {self.sprint_id} belongs to another process")

        await self.store.write(write)
        for note in notes:
            if note.point:
                self.failpoint(note.point)


def doing(tool: str, arguments: str) -> str:
    """What a tool call does, in a few words for the status comment: the tool and the one argument that tells most."""
    try:
        values = json.loads(arguments)
    except ValueError:
        return tool
    detail = next((str(values[key]) for key in ("command", "path", "pattern", "query") if isinstance(values, dict) and key in values), "")
    text = encodable(f"{tool} {' '.join(detail.split())}".strip())
    return text if len(text) <= DOING_CAP else text[: DOING_CAP - 1] + "…"
