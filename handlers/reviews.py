"""A review that requests changes makes its pull request worth a look: the delivery names no review, and the forge knows whether it still stands."""

from __future__ import annotations

from bot.chatops import Desk, Finding, PullNews
from bot.gitea.routing import Router
from bot.gitea.sansio import Event
from handlers._people import place, sender

plugin = Router()


@plugin.on("pull_request_review_rejected", action="reviewed")
async def requested(event: Event, desk: Desk) -> list[Finding]:
    """An approval or a plain comment starts nothing; neither does a review of our own."""
    where, actor, pull = place(event), sender(event), event.data.get("pull_request")
    if where is None or actor is None or actor.id == desk.me_id or not isinstance(pull, dict):
        return []
    number, head = pull.get("number"), pull.get("head")
    if not isinstance(number, int) or not isinstance(head, dict) or head.get("repo_id") != where[0]:
        return []
    return [PullNews(where[0], "reviews", number=number)]
