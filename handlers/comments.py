"""Every command of a new comment is asked by its author; of an edited one only what is new, asked by whoever edited; a deleted one asks nothing.

A comment that only mentions the bot starts nothing: people talk about a bot as well as to it. Once in an issue it is told how to ask.
"""

from __future__ import annotations

from bot.chatops import Desk, Finding, Found, addressed_key, capped, mentions, new_commands, parse, to_ask
from bot.gitea.routing import Router
from bot.gitea.sansio import Event
from bot.models import Ask, Source
from handlers._people import hash_of, issue_ref, moment_ms, place, sender

plugin = Router()


@plugin.on("issue_comment", "pull_request_comment", action="created")
async def created(event: Event, desk: Desk) -> list[Finding]:
    """All commands of the comment, up to the cap; where there is none, a word to the bot is answered with how to ask."""
    found = capped(parse(_body(event), desk.verbs), desk.settings.commands_per_comment)
    return _asks(event, desk, found) if found else _addressed(event, desk)


@plugin.on("issue_comment", "pull_request_comment", action="edited")
async def edited(event: Event, desk: Desk) -> list[Finding]:
    """Only what the old text did not hold. Without the old text nothing runs."""
    changes = event.data.get("changes")
    before = changes.get("body") if isinstance(changes, dict) else None
    old = before.get("from") if isinstance(before, dict) else None
    if not isinstance(old, str):
        return []
    return _asks(event, desk, new_commands(old, _body(event), desk.verbs, desk.settings.commands_per_comment), edit=True)


def _asks(event: Event, desk: Desk, commands: list[Found], *, edit: bool = False) -> list[Finding]:
    where, actor, issue, comment = place(event), sender(event), event.data.get("issue"), event.data.get("comment")
    if (
        not commands
        or where is None
        or actor is None
        or actor.id == desk.me_id
        or not isinstance(issue, dict)
        or not isinstance(comment, dict)
    ):
        return []
    ref, comment_id = issue_ref(event, issue), comment.get("id")
    if ref is None or not isinstance(comment_id, int):
        return []
    asked_ms = moment_ms(*((comment.get("updated_at"),) if edit else ()), comment.get("created_at"), comment.get("updated_at"))
    return [
        to_ask(command, comment_id=comment_id, repo_id=where[0], issue=ref, actor=actor, asked_ms=asked_ms, delivered_hash=hash_of(issue))
        for command in commands
    ]


def _addressed(event: Event, desk: Desk) -> list[Finding]:
    where, actor, issue = place(event), sender(event), event.data.get("issue")
    if where is None or actor is None or actor.id == desk.me_id or not isinstance(issue, dict):
        return []
    ref = issue_ref(event, issue)
    if ref is None or not mentions(_body(event), desk.me_login):
        return []
    key, asked_ms = addressed_key(where[0], ref.number), moment_ms(issue.get("updated_at"))
    return [Ask(key=key, repo_id=where[0], issue=ref, actor=actor, source=Source.MENTION, verb="help", asked_ms=asked_ms)]


def _body(event: Event) -> str:
    comment = event.data.get("comment")
    body = comment.get("body") if isinstance(comment, dict) else None
    return body if isinstance(body, str) else ""
