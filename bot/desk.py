"""What handlers and reconciliation may look at: settings, who the bot is, the timeline, what started an active sprint."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from bot.chatops import LabelAdded
from bot.config import Settings
from bot.gitea.forge import Forge
from bot.models import Actor, RepoId
from bot.store import Store, sprints


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
        """The intent key of what started the issue's active sprint, or ""."""
        active = await self.store.read(lambda conn: sprints.active(conn, repo_id, number))
        return active.intent_key if active is not None else ""


def _credited(found: tuple[int, dict[str, Any], str] | None) -> LabelAdded | None:
    if found is None:
        return None
    event_id, user, created_at = found
    at_ms = int(datetime.fromisoformat(created_at).timestamp() * 1000) if created_at else 0
    return LabelAdded(event_id, Actor(int(user.get("id") or 0), str(user.get("login") or "")), at_ms)
