"""What every handler reads out of a delivery: who, which issue, when."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from bot.gitea.sansio import Event
from bot.models import Actor, IssueRef, RepoId, text_hash


def place(event: Event) -> tuple[RepoId, str] | None:
    """Repository id and current `owner/repo`, or None where the event has no repository."""
    return (RepoId(event.repo_id), event.full_name) if event.repo_id and event.full_name else None


def sender(event: Event) -> Actor | None:
    """Who caused the event, or None for an event without a person; an id of 0 would be the terminal and is nobody."""
    return Actor(event.sender_id, event.sender_login) if event.sender_id and event.sender_login else None


def issue_ref(event: Event, issue: Mapping[str, Any]) -> IssueRef | None:
    """The address of an issue or pull request of the payload."""
    number = issue.get("number")
    return IssueRef.of(event.full_name, number) if event.full_name and isinstance(number, int) and number > 0 else None


def hash_of(issue: Mapping[str, Any]) -> str:
    """The hash of title and body as this delivery carries them."""
    return text_hash(str(issue.get("title") or ""), str(issue.get("body") or ""))


def moment_ms(*texts: object) -> int:
    """Unix milliseconds of the first text that is a moment with an offset (Gitea's zero time is none); 0 where there is none."""
    for text in texts:
        if not isinstance(text, str) or text.startswith("0001-"):
            continue
        try:
            moment = datetime.fromisoformat(text)
        except ValueError:
            continue
        if moment.tzinfo is not None:
            return int(moment.timestamp() * 1000)
    return 0
