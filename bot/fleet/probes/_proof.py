"""Proves that a delivery arrives, by what the running service saw of a test that Gitea was asked for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from enum import StrEnum
from typing import Any

from bot.gitea.forge import Forge

LOOK_SECONDS = 0.25
SLACK_MS = 1000


class Proof(StrEnum):
    """What came of a test delivery."""

    PROVEN = "proven"
    EMPTY = "empty"
    SILENT = "silent"
    FORGED = "forged"
    BUSY = "busy"


def own_hooks(hooks: list[dict[str, Any]], url: str) -> list[dict[str, Any]]:
    """The hooks that post to our address, active ones first."""
    wanted = url.rstrip("/")
    mine = [hook for hook in hooks if str((hook.get("config") or {}).get("url", "")).rstrip("/") == wanted]
    return sorted(mine, key=lambda hook: not hook.get("active"))


async def prove_by_service(
    forge: Forge, hooks: Mapping[str, int], *, seen_ms: Callable[[], Awaitable[int]], seconds: float
) -> dict[str, Proof]:
    """Asks for a test through each hook (by repository) and waits `seconds` for it; an empty repository sends none.

    The service notes when it saw the last test push (`seen_ms`, Unix milliseconds).
    """
    found: dict[str, Proof] = {}
    for full_name, hook_id in hooks.items():
        owner, _, name = full_name.partition("/")
        if (await forge.repo(owner, name)).get("empty"):
            found[full_name] = Proof.EMPTY
            continue
        asked = int(time.time() * 1000)
        last = await seen_ms()
        await forge.test_hook(full_name, hook_id)
        found[full_name] = Proof.SILENT
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            seen = await seen_ms()
            if seen > last and seen >= asked - SLACK_MS:
                found[full_name] = Proof.PROVEN
                break
            await asyncio.sleep(LOOK_SECONDS)
    return found
