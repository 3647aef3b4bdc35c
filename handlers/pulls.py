"""What became of a pull request is noted as its fate: merged, closed unmerged, open again, reverted, its branch deleted."""

from __future__ import annotations

import re

from bot.chatops import Desk, Finding, PullFate, PullNews, Reverted
from bot.gitea.routing import Router
from bot.gitea.sansio import Event
from handlers._people import moment_ms, place

plugin = Router()

COMMITS = 100
SHAS = 10
_REVERT = re.compile(r"(?i)^\W*revert|\bthis reverts commit\b")
_SHA = re.compile(r"\b[0-9a-f]{7,64}\b")


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


@plugin.on("push")
async def reverted(event: Event, desk: Desk) -> list[Finding]:  # noqa: ARG001 - a handler takes both
    """A commit that says it reverts others, on any branch but ours; git and Gitea name them by their hash in its message."""
    where, commits, ref = place(event), event.data.get("commits"), event.data.get("ref")
    if where is None or not isinstance(commits, list) or not isinstance(ref, str) or ref.startswith("refs/heads/dispatch/"):
        return []
    named: list[str] = []
    for commit in commits[:COMMITS]:
        message = commit.get("message") if isinstance(commit, dict) else None
        if isinstance(message, str) and _REVERT.search(message[:4000]):
            named += _SHA.findall(message[:4000].casefold())
    head = event.data.get("head_commit")
    at_ms = moment_ms(head.get("timestamp")) if isinstance(head, dict) else 0
    return [Reverted(where[0], tuple(dict.fromkeys(named))[:SHAS], at_ms)] if named else []


@plugin.on("delete")
async def deleted(event: Event, desk: Desk) -> list[Finding]:  # noqa: ARG001 - a handler takes both
    """A branch of ours is gone; deleting that of an open pull request closes it, which comes as a delivery of its own."""
    where, ref = place(event), event.data.get("ref")
    if where is None or event.data.get("ref_type") != "branch" or not isinstance(ref, str):
        return []
    branch = ref.removeprefix("refs/heads/")
    return [PullNews(where[0], "branch", branch=branch)] if branch.startswith("dispatch/") else []
