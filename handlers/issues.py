"""The trigger label, an assignment or a mention starts a sprint for whoever the forge credits it to; taking it back, closing or deleting stops the work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bot.chatops import (
    Desk,
    Finding,
    LabelAdded,
    TextEdited,
    assignment_key,
    closed_key,
    label_key,
    mention_key,
    mentions,
    unassign_key,
    unlabel_key,
)
from bot.gitea.routing import Router
from bot.gitea.sansio import Event
from bot.models import Ask, Source
from handlers._people import hash_of, issue_ref, moment_ms, place, sender

plugin = Router()


@plugin.on("issues", action="opened")
@plugin.on("issues", action="reopened")
@plugin.on("issue_label", action="label_updated")
@plugin.on("issue_label", action="label_cleared")
async def labelled(event: Event, desk: Desk) -> list[Finding]:
    """Looks at what the labels are, never at what changed: Gitea does not say, and sends the event when nothing did."""
    issue, label = _issue(event), desk.settings.trigger_label
    if _has_label(issue, label):
        where, ref = place(event), issue_ref(event, issue)
        if where is None or ref is None or issue.get("state") == "closed":
            return []
        return _run(event, desk, Source.LABEL, await desk.label_adder(where[1], ref.number, label))
    return await _withdrawn(event, desk, Source.LABEL) if event.event_type == "issue_label" else []


@plugin.on("issues", action="opened")
@plugin.on("issues", action="reopened")
@plugin.on("issue_assign", action="assigned")
@plugin.on("issue_assign", action="unassigned")
async def assigned(event: Event, desk: Desk) -> list[Finding]:
    """The same for the assignees. Whoever assigned the bot asks, as the timeline says; the event's sender may have assigned somebody else."""
    issue = _issue(event)
    if _is_assigned(issue, desk.me_id):
        where, ref = place(event), issue_ref(event, issue)
        if where is None or ref is None or issue.get("state") == "closed":
            return []
        return _run(event, desk, Source.ASSIGNMENT, await desk.assigner(where[1], ref.number))
    return await _withdrawn(event, desk, Source.ASSIGNMENT) if event.event_type == "issue_assign" else []


@plugin.on("issues", action="opened")
async def mentioned(event: Event, desk: Desk) -> list[Finding]:
    """An issue that is opened with a word to the bot is asked for by its author."""
    return _mention(event, desk)


@plugin.on("issues", action="closed")
@plugin.on("issues", action="deleted")
async def ended(event: Event, desk: Desk) -> list[Finding]:  # noqa: ARG001 - a handler takes both
    """A closed or deleted issue needs no work; that a sprint of ours closed it by its merge meets nothing active."""
    where, actor, issue = place(event), sender(event), _issue(event)
    ref = issue_ref(event, issue)
    if where is None or actor is None or ref is None:
        return []
    at_ms = 0 if event.action == "deleted" else moment_ms(issue.get("closed_at"), issue.get("updated_at"))
    key = closed_key(where[0], ref.number, at_ms)
    asked_ms = at_ms or moment_ms(issue.get("updated_at"))
    return [Ask(key=key, repo_id=where[0], issue=ref, actor=actor, source=Source.COMMAND, verb="cancel", asked_ms=asked_ms)]


@plugin.on("issues", action="edited")
async def edited(event: Event, desk: Desk) -> list[Finding]:
    """A live sprint works on the text that was approved; what somebody with write access made of it is approved again.

    A mention that the edit brought in is asked for by the editor.
    """
    where, actor, issue = place(event), sender(event), _issue(event)
    ref = issue_ref(event, issue)
    if where is None or actor is None or ref is None:
        return []
    found: list[Finding] = [TextEdited(where[0], ref, actor, hash_of(issue))]
    changes = event.data.get("changes")
    before = changes.get("body") if isinstance(changes, dict) else None
    old = before.get("from") if isinstance(before, dict) else None
    if isinstance(old, str) and issue.get("state") != "closed" and not mentions(old, desk.me_login):
        found += _mention(event, desk)
    return found


def _mention(event: Event, desk: Desk) -> list[Finding]:
    where, actor, issue = place(event), sender(event), _issue(event)
    ref, body = issue_ref(event, issue), issue.get("body")
    if where is None or actor is None or ref is None or actor.id == desk.me_id or not isinstance(body, str):
        return []
    if not mentions(body, desk.me_login):
        return []
    return [
        Ask(
            key=mention_key(where[0], ref.number),
            repo_id=where[0],
            issue=ref,
            actor=actor,
            source=Source.MENTION,
            verb="run",
            asked_ms=moment_ms(issue.get("updated_at"), issue.get("created_at")),
            delivered_hash=hash_of(issue),
        )
    ]


def _run(event: Event, desk: Desk, source: Source, credited: LabelAdded | None) -> list[Finding]:
    where, issue = place(event), _issue(event)
    ref = issue_ref(event, issue)
    if where is None or ref is None or credited is None or credited.actor.id in (0, desk.me_id):
        return []
    return [
        Ask(
            key=label_key(credited.event_id) if source is Source.LABEL else assignment_key(credited.event_id),
            repo_id=where[0],
            issue=ref,
            actor=credited.actor,
            source=source,
            verb="run",
            asked_ms=credited.at_ms,
            delivered_hash=hash_of(issue),
        )
    ]


async def _withdrawn(event: Event, desk: Desk, source: Source) -> list[Finding]:
    """Stops only the sprint that this very label or assignment had started."""
    where, actor, issue = place(event), sender(event), _issue(event)
    ref = issue_ref(event, issue)
    if where is None or actor is None or ref is None:
        return []
    trigger = await desk.active_trigger(where[0], ref.number)
    kind, _, item = trigger.partition(":")
    if kind != source or not item.isdigit():
        return []
    # Deliveries come late and out of order: only what is withdrawn now, as the timeline says, stops anything.
    if source is Source.LABEL:
        standing = await desk.label_adder(where[1], ref.number, desk.settings.trigger_label)
    else:
        standing = await desk.assigner(where[1], ref.number)
    if standing:
        return []
    return [
        Ask(
            key=unlabel_key(int(item)) if source is Source.LABEL else unassign_key(int(item)),
            repo_id=where[0],
            issue=ref,
            actor=actor,
            source=source,
            verb="cancel",
            asked_ms=moment_ms(issue.get("updated_at")),
            options={"only_trigger": trigger},
        )
    ]


def _issue(event: Event) -> Mapping[str, Any]:
    issue = event.data.get("issue")
    return issue if isinstance(issue, dict) else {}


def _has_label(issue: Mapping[str, Any], name: str) -> bool:
    labels = issue.get("labels")
    return isinstance(labels, list) and any(isinstance(label, dict) and label.get("name") == name for label in labels)


def _is_assigned(issue: Mapping[str, Any], user_id: int) -> bool:
    people = issue.get("assignees")
    return isinstance(people, list) and any(isinstance(person, dict) and person.get("id") == user_id for person in people)
