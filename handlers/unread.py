"""A command where none is read, in the text of an opened issue or in a review, is answered once with where to write it: nobody waits for nothing."""

from __future__ import annotations

from bot.chatops import Desk, Finding, mentions, parse, unread_key
from bot.gitea.routing import Router
from bot.gitea.sansio import Event
from bot.models import Ask, Source
from handlers._people import issue_ref, moment_ms, place, sender

plugin = Router()


@plugin.on("issues", action="opened")
async def in_an_issue(event: Event, desk: Desk) -> list[Finding]:
    """The text of an issue; a mention of the bot in it starts a sprint, which is answer enough."""
    return _hint(event, desk, event.data.get("issue"), "body")


@plugin.on("pull_request_review_approved", "pull_request_review_comment", action="reviewed")
async def in_a_review(event: Event, desk: Desk) -> list[Finding]:
    """The words of a review; one that requests changes is worked off as it stands."""
    return _hint(event, desk, event.data.get("pull_request"), "content")


def _hint(event: Event, desk: Desk, about: object, field: str) -> list[Finding]:
    where, actor, said = place(event), sender(event), event.data.get("review") if field == "content" else about
    if where is None or actor is None or actor.id == desk.me_id or not isinstance(about, dict) or not isinstance(said, dict):
        return []
    ref, text = issue_ref(event, about), said.get(field)
    if ref is None or not isinstance(text, str) or (field == "body" and mentions(text, desk.me_login)):
        return []
    commands = parse(text, desk.verbs)
    if not commands:
        return []
    asked_ms = moment_ms(about.get("updated_at"))
    key, first = unread_key(where[0], ref.number), commands[0].text
    return [Ask(key=key, repo_id=where[0], issue=ref, actor=actor, source=Source.MENTION, verb="help", asked_ms=asked_ms, text=first)]
