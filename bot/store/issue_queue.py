"""The queue as one deciding transaction sees it: bound to a connection, an issue and the person who asks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy.engine import Connection

from bot.models import Ask, CancelResult, Limits, Position, Source, SprintId, SprintState, SprintView
from bot.store import sprints

COUNTED = 200


@dataclass(frozen=True, slots=True)
class IssueQueue:
    """What a command may do to the queue; see `bot.chatops.Queue`. `fresh_id` becomes the new sprint's id."""

    conn: Connection
    ask: Ask
    limits: Limits
    base_branch: str
    fresh_id: SprintId
    now_ms: int

    def active(self) -> SprintView | None:
        """The sprint of this issue that has not settled."""
        return sprints.active(self.conn, self.ask.repo_id, self.ask.issue.number)

    def last(self) -> SprintView | None:
        """The newest settled sprint of this issue."""
        return sprints.last(self.conn, self.ask.repo_id, self.ask.issue.number)

    def enqueue(
        self, *, source: Source, priority: int, instructions: str, options: Mapping[str, str], text_hash: str, title: str
    ) -> SprintView | None:
        """A new sprint; None where one is active already."""
        made = sprints.new(
            self.conn,
            sprint_id=self.fresh_id,
            repo_id=self.ask.repo_id,
            issue=self.ask.issue,
            title=title,
            source=source,
            priority=priority,
            trigger=self.ask.key,
            requester_id=self.ask.actor.id,
            requester=self.ask.actor.login,
            instructions=instructions,
            options=options,
            limits=_lowered(self.limits, options),
            text_hash=text_hash,
            base_branch=options.get("base", self.base_branch),
            now_ms=self.now_ms,
        )
        return sprints.get(self.conn, self.fresh_id) if made else None

    def cancel(self, sprint_id: SprintId, by: str) -> CancelResult:
        """Stops a sprint, or tells why not."""
        return sprints.cancel(self.conn, sprint_id, by=by, now_ms=self.now_ms)

    def position(self, sprint_id: SprintId) -> Position | None:
        """Its place in line; None where it does not wait."""
        place = sprints.position(self.conn, sprint_id)
        return None if place is None else Position(min(place, COUNTED), min(place - 1, COUNTED), place > COUNTED)

    def listing(self, limit: int) -> list[SprintView]:
        """Those in flight, then those queued, in order."""
        return sprints.listing(self.conn, limit=limit)

    def counts(self) -> Mapping[SprintState, int]:
        """How many live sprints of the fleet are in each state."""
        return sprints.counts(self.conn)


def _lowered(limits: Limits, options: Mapping[str, str]) -> Limits:
    """The limits as a command's options lower them; the command has checked that they are numbers."""
    steps = min(limits.steps, int(options["steps"])) if "steps" in options else limits.steps
    usd = limits.usd
    if "budget" in options:
        wanted = float(options["budget"].lstrip("$"))
        usd = min(usd, wanted) if usd else wanted
    return Limits(steps=steps, seconds=limits.seconds, tokens=limits.tokens, usd=usd)
