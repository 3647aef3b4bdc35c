"""The trigger label starts a sprint for whoever put it on, as the timeline says; taking it off, closing or deleting the issue stops the work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bot.chatops import Desk, Finding, TextEdited, closed_key, label_key, unlabel_key
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
    issue = _issue(event)
    if _has_label(issue, desk.settings.trigger_label):
        return await _added(event, desk, issue) if issue.get("state") != "closed" else []
    return await _removed(event, desk, issue) if event.event_type == "issue_label" else []


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
async def edited(event: Event, desk: Desk) -> list[Finding]:  # noqa: ARG001 - a handler takes both
    """A live sprint works on the text that was approved; what somebody with write access made of it is approved again."""
    where, actor, issue = place(event), sender(event), _issue(event)
    ref = issue_ref(event, issue)
    if where is None or actor is None or ref is None:
        return []
    return [TextEdited(where[0], ref, actor, hash_of(issue))]


async def _added(event: Event, desk: Desk, issue: Mapping[str, Any]) -> list[Finding]:
    where, ref = place(event), issue_ref(event, issue)
    if where is None or ref is None:
        return []
    added = await desk.label_adder(where[1], ref.number, desk.settings.trigger_label)
    if added is None or added.actor.id in (0, desk.me_id):
        return []
    return [
        Ask(
            key=label_key(added.event_id),
            repo_id=where[0],
            issue=ref,
            actor=added.actor,
            source=Source.LABEL,
            verb="run",
            asked_ms=added.at_ms,
            delivered_hash=hash_of(issue),
        )
    ]


async def _removed(event: Event, desk: Desk, issue: Mapping[str, Any]) -> list[Finding]:
    where, actor, ref = place(event), sender(event), issue_ref(event, issue)
    if where is None or actor is None or ref is None:
        return []
    trigger = await desk.sprint_for_label(where[0], ref.number)
    # Deliveries come late and out of order: only a label that is off now, as the timeline says, stops anything.
    if trigger is None or await desk.label_adder(where[1], ref.number, desk.settings.trigger_label):
        return []
    return [
        Ask(
            key=unlabel_key(int(trigger.removeprefix("label:"))),
            repo_id=where[0],
            issue=ref,
            actor=actor,
            source=Source.LABEL,
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
