"""A red check of a commit makes the pull request of ours at that head worth a look, after a while in which the other checks may end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bot.chatops import Desk, Finding, PullNews
from bot.gitea.routing import Router
from bot.gitea.sansio import Event
from handlers._people import place

plugin = Router()

RED = ("failure", "error")


@plugin.on("status")
async def status(event: Event, desk: Desk) -> list[Finding]:  # noqa: ARG001 - a handler takes both
    """Of a commit status only red is news; that of Actions is one, sent by a user that is no person."""
    return _news(event, event.data.get("sha")) if event.data.get("state") in RED else []


@plugin.on("workflow_run", action="completed")
async def workflow_run(event: Event, desk: Desk) -> list[Finding]:  # noqa: ARG001 - a handler takes both
    """A run of Actions that failed; its jobs are statuses as well, so that this only comes sooner."""
    return _ended(event, event.data.get("workflow_run"))


@plugin.on("workflow_job", action="completed")
async def workflow_job(event: Event, desk: Desk) -> list[Finding]:  # noqa: ARG001 - a handler takes both
    """The same of one job."""
    return _ended(event, event.data.get("workflow_job"))


def _ended(event: Event, run: object) -> list[Finding]:
    record: Mapping[str, Any] = run if isinstance(run, dict) else {}
    return _news(event, record.get("head_sha")) if record.get("conclusion") in RED else []


def _news(event: Event, sha: object) -> list[Finding]:
    where = place(event)
    return [PullNews(where[0], "checks", sha=sha)] if where is not None and isinstance(sha, str) and sha else []
