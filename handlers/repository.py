"""A repository is known by its id: its address is learnt from what the forge sends, and a deleted one ends what waits for it."""

from __future__ import annotations

from bot.chatops import Desk, Finding, RepositoryFact
from bot.gitea.routing import Router
from bot.gitea.sansio import Event
from handlers._people import place

plugin = Router()


@plugin.on("repository")
async def fact(event: Event, desk: Desk) -> list[Finding]:  # noqa: ARG001 - a handler takes both
    """Gitea tells of creation and deletion; a rename is seen only by the new address in the next event of any kind."""
    where = place(event)
    return [RepositoryFact(where[0], where[1], deleted=event.action == "deleted")] if where else []
