"""What handlers and reconciliation may look at: settings, who the bot is, the timeline, what started an active sprint."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy.engine import Connection

from bot.chatops import LabelAdded
from bot.config import Settings
from bot.gitea.forge import Forge
from bot.models import Actor, PlanState, RepoId
from bot.store import Store, plans, sprints


@dataclass(frozen=True, slots=True)
class ForgeDesk:
    """`bot.chatops.Desk` over the forge and the store."""

    settings: Settings
    verbs: Collection[str]
    me_id: int
    me_login: str
    forge: Forge
    store: Store

    async def label_adder(self, repo: str, number: int, label: str) -> LabelAdded | None:
        """The newest item that added the label and is not followed by its removal; raises ForgeError."""
        return _credited(await self.forge.label_adder(repo, number, label))

    async def assigner(self, repo: str, number: int) -> LabelAdded | None:
        """The newest item that assigned the bot and is not followed by its unassignment; raises ForgeError."""
        return _credited(await self.forge.assigner(repo, number, self.me_id))

    async def active_trigger(self, repo_id: RepoId, number: int) -> str:
        """The intent key of what started the issue's active sprint, or else the one that made the plan that waits, or ""."""

        def read(conn: Connection) -> str:
            active = sprints.active(conn, repo_id, number)
            plan = plans.newest(conn, repo_id, number) if active is None else None
            if plan is not None and plan.state is PlanState.WAITING:
                active = sprints.get(conn, plan.id)
            return active.intent_key if active is not None else ""

        return await self.store.read(read)


def _credited(found: tuple[int, dict[str, Any], str] | None) -> LabelAdded | None:
    if found is None:
        return None
    event_id, user, created_at = found
    at_ms = int(datetime.fromisoformat(created_at).timestamp() * 1000) if created_at else 0
    return LabelAdded(event_id, Actor(int(user.get("id") or 0), str(user.get("login") or "")), at_ms)
