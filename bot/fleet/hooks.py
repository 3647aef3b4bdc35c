"""The webhook of a repository: what it must send, whose deliveries came, and how it is made or mended without ever being there twice."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from bot.fleet.probes._proof import own_hooks
from bot.gitea.forge import Forge
from bot.redaction import Secret
from bot.settings import Settings

EVENTS = ("issues", "pull_request", "push", "delete", "repository", "status", "workflow_run")
# What the server makes of them, under the names that every supported version knows.
NEEDED = frozenset(
    {
        "issues",
        "issue_label",
        "issue_assign",
        "issue_comment",
        "pull_request",
        "pull_request_comment",
        "pull_request_sync",
        "push",
        "delete",
        "repository",
    }
)
# How many of the newest deliveries tell whose arrive.
LOOKED_AT = 500


def lacking(hook: Mapping[str, Any]) -> list[str]:
    """Events the bot lives by that the hook does not send."""
    return sorted(NEEDED - set(hook.get("events") or ()))


def arrivals(rows: Iterable[tuple[int, bytes]]) -> dict[str, int]:
    """`owner/name` in small letters -> when its last delivery came (Unix ms), from deliveries with the newest first."""
    found: dict[str, int] = {}
    for received_ms, body in rows:
        try:
            repository = json.loads(body).get("repository") or {}
            found.setdefault(str(repository.get("full_name")).casefold(), received_ms)
        except (ValueError, AttributeError):
            continue
    return found


async def ensure_hook(forge: Forge, full_name: str, settings: Settings, *, secret: Secret, replace: bool) -> tuple[int, str]:
    """The id of the one hook that posts to us with `secret`, and what was done about it.

    A hook of ours is kept and mended, because its secret cannot be read or changed; with `replace` a new one is made first and then the old deleted.
    """
    url = settings.webhook.hook_url()
    mine = own_hooks(await forge.hooks(full_name), url)
    keep = next((hook for hook in mine if (hook.get("config") or {}).get("content_type") == "json"), None)
    if keep and not replace:
        done = "kept"
        if not keep.get("active") or lacking(keep):
            await forge.update_hook(full_name, int(keep["id"]), url, EVENTS)
            done = "mended"
    else:
        keep = await forge.create_hook(full_name, url, secret, EVENTS)
        done = "replaced" if mine else "made"
    for old in mine:
        if old["id"] != keep["id"]:
            await forge.delete_hook(full_name, int(old["id"]))
    return int(keep["id"]), done
