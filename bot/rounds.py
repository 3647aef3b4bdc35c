"""A follow-up's round on a pull request of ours: what is taken along into it, and what is answered when it has ended, each once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sqlalchemy.engine import Connection

from bot import chatops, feedback
from bot.feedback import Feedback
from bot.models import Json, OutcomeKind, Reply, Source, SprintView
from bot.store import follow_ups, intents, outbox, pulls

SUMMARY = 1_500
WIP = re.compile(r"(?i)^(?:\s*(?:wip:|\[wip\]))+\s*")
REVIEWS, CHECKS = "reviews", "checks"


def title_of(pull: Mapping[str, Any], *, draft: bool) -> str:
    """The title a pull request gets by a round: its own, which a person may have written, with or without the mark of a draft."""
    bare = WIP.sub("", str(pull.get("title") or "")) or "Work in progress"
    return f"WIP: {bare}" if draft else bare


def take_along(conn: Connection, view: SprintView, found: Feedback, now_ms: int) -> None:
    """This is what the agent is told; a review among it asks for no further follow-up."""
    follow_ups.gathered(conn, view.id, found.stored())
    for review in found.reviews:
        key = chatops.review_key(review.id)
        if review.asks and intents.claim(conn, key, now_ms):
            intents.decide(
                conn,
                repo_id=view.repo_id,
                issue=view.issue.number,
                kind="review",
                result="ok",
                reason="taken along by the follow-up that works already",
                sprint_id=view.id,
                intent_key=key,
                actor=review.author,
                now_ms=now_ms,
            )


def moot(view: SprintView, found: Feedback) -> str:
    """Why there is nothing left to do for a follow-up that no person's words asked for, or ""."""
    if view.source is Source.CHECKS and not found.failures:
        return "the checks are not red any more"
    if view.source is Source.REVIEW and not found.askers and not found.new_remarks:
        return "the review was dismissed or everything in it resolved"
    return ""


def in_prompt(pull: int, branch: str, found: Feedback) -> Json:
    """What `bot.prompt.task_prompt` takes of it."""
    names = {remark.id: f"C{n}" for n, remark in enumerate(found.new_remarks, 1)}
    return {
        "pull": pull,
        "branch": branch,
        "reviews": [{"author": review.author, "text": review.body, "asks": review.asks} for review in found.reviews],
        "remarks": [
            {
                "name": names.get(remark.id, ""),
                "author": remark.author,
                "where": where(remark.path, remark.line) + (" (a removed line)" if remark.removed else ""),
                "hunk": remark.hunk,
                "text": remark.text,
            }
            for remark in found.remarks
        ],
        "failures": [
            {"context": failure.context, "state": failure.state, "text": failure.description, "url": failure.url, "log": failure.log}
            for failure in found.failures
        ],
        "omitted": found.omitted,
    }


def where(path: str, line: int) -> str:
    """`lib/slug.sh:12`."""
    return f"{path}:{line}" if line else path


def ended(conn: Connection, view: SprintView, summary: str, now_ms: int) -> None:
    """In the transaction that settles a follow-up: its answer on the pull request, and the look at what came meanwhile."""
    number = view.follows_pull or view.pr
    if number and view.pr_state == pulls.OPEN:
        for what in (REVIEWS, CHECKS):
            pulls.news(conn, view.repo_id, number, what, due_ms=now_ms, now_ms=now_ms)
    if not view.follows_pull or view.outcome in (None, OutcomeKind.CANCELLED):
        return
    found = Feedback.load(follow_ups.feedback(conn, view.id) or {})
    updated = view.outcome is OutcomeKind.UPDATED
    reply = Reply(
        "round_ended",
        {
            "issue": view.issue.number,
            "outcome": view.outcome.value if view.outcome else "",
            "reason": view.reason,
            "detail": view.detail,
            "head": view.head_sha if updated or view.files else "",
            "summary": _without_answers(summary)[:SUMMARY],
            "remarks": _answered(found, summary, follow_ups.changes(conn, view.id)) if view.files else [],
            "ask_review": list(found.askers) if updated else [],
        },
    )
    outbox.show(
        conn,
        key=f"round:{view.id}",
        repo_id=view.repo_id,
        repo=view.issue.full_name,
        issue=view.follows_pull,
        comment_id=0,
        reply=reply,
        now_ms=now_ms,
    )


def _answered(found: Feedback, summary: str, changed: list[str]) -> list[Json]:
    """Each new remark with what the agent says of it; where it says nothing, whether its file was changed, which we know."""
    said = feedback.answers(summary)
    return [
        {
            "where": where(remark.path, remark.line),
            "author": remark.author,
            "said": said.get(n, ""),
            "changed": remark.path in changed,
        }
        for n, remark in enumerate(found.new_remarks, 1)
    ]


def _without_answers(summary: str) -> str:
    return re.sub(r"\n{3,}", "\n\n", feedback.ANSWER.sub("", summary)).strip()
