"""What became of a pull request is noted as its fate: merged, closed unmerged, open again."""

from __future__ import annotations

from bot.chatops import Desk, Finding, PullFate
from bot.gitea.routing import Router
from bot.gitea.sansio import Event
from handlers._people import moment_ms, place

plugin = Router()


@plugin.on("pull_request", action="closed")
@plugin.on("pull_request", action="reopened")
async def fate(event: Event, desk: Desk) -> list[Finding]:  # noqa: ARG001 - a handler takes both
    """Only of a branch in the repository itself: a fork may call its branch what it likes."""
    where, pull = place(event), event.data.get("pull_request")
    if where is None or not isinstance(pull, dict) or not isinstance(pull.get("number"), int):
        return []
    head = pull.get("head")
    if not isinstance(head, dict) or head.get("repo_id") != where[0] or not isinstance(head.get("label"), str):
        return []
    merged = pull.get("merged") is True
    state = "merged" if merged else "closed" if event.action == "closed" else "open"
    at_ms = moment_ms(pull.get("merged_at") if merged else None, pull.get("closed_at") if state != "open" else None, pull.get("updated_at"))
    sha = pull.get("merge_commit_sha") if merged else ""
    return [PullFate(where[0], pull["number"], head["label"], state, at_ms, sha if isinstance(sha, str) else "")]
