"""The demo's story: an issue is filed and labelled, everything that follows is told as it happens, and the pull request is judged at the end."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import aiohttp

from bot.demo.house import House
from bot.demo.narrator import Narrator, Watcher
from bot.demo.sample import ISSUE_BODY, ISSUE_TITLE
from bot.demo.screen import TOTAL, Screen
from bot.demo.stage import TRIGGER
from bot.gitea.errors import ForgeError
from bot.models import StateLabel
from bot.store import sprints

LOOK_SECONDS = 0.4
SHOWN_SECONDS = 30.0
ANSWER_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Ending:
    """What became of the issue: `fault` is empty where a pull request is ready to merge."""

    issue: int
    pull: int = 0
    fault: str = ""
    comment: str = ""
    diff: str = ""


async def tell(house: House, screen: Screen, narrator: Narrator, *, seconds: float) -> Ending:
    """The whole story, from the issue to the judgement; `seconds` is the most the sprint may take."""
    stage = house.stage
    alice = stage.people["alice"]
    screen.clock()
    issue = await alice.open_issue(ISSUE_TITLE, ISSUE_BODY)
    screen.fact("alice", f"opened {stage.repo}#{issue}: {ISSUE_TITLE}")
    await alice.label(issue, TRIGGER)
    watcher = Watcher(house, screen, issue)
    screen.begin("waiting for the bot")
    asking = asyncio.create_task(_ask(house, screen, narrator, watcher, issue))
    try:
        fault = await _until(narrator.settled.is_set, house, watcher, seconds)
        if fault:
            return Ending(issue, fault=f"the sprint did not end: {fault}", comment="\n".join(watcher.comments[-1:]))
        await _until(lambda: _is_shown(watcher), house, watcher, SHOWN_SECONDS)
        if watcher.asked:
            await _until(lambda: "rocket" in watcher.reactions, house, watcher, ANSWER_SECONDS)
        screen.at(TOTAL, "done")
    finally:
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        screen.end()
    return await _judge(house, watcher, issue)


async def _ask(house: House, screen: Screen, narrator: Narrator, watcher: Watcher, issue: int) -> None:
    """While the bot works, somebody asks how far it is."""
    await narrator.began.wait()
    with contextlib.suppress(ForgeError):
        watcher.asked = await house.stage.people["bob"].comment(issue, "/dispatch status")
        screen.fact("bob", "commented: /dispatch status")


def _is_shown(watcher: Watcher) -> bool:
    """Neither label nor comment say any more that something is under way."""
    under_way = {StateLabel.QUEUED, StateLabel.RUNNING} & watcher.labels
    return not under_way and bool(watcher.comments) and not watcher.comments[-1].startswith(("⏳", "🔧"))


async def _until(what: Callable[[], bool], house: House, watcher: Watcher, seconds: float) -> str:
    """Waits for `what`, looking at the forge meanwhile; returns why it did not come, or ""."""
    deadline = time.monotonic() + seconds
    last = ""
    while not what():
        if house.service.fatal.done():
            return "the service had to stop"
        if time.monotonic() > deadline:
            return last or f"nothing more within {seconds:.0f} s"
        try:
            await watcher.look()
            last = ""
        except ForgeError as error:
            last = str(error)
        if not what():
            await asyncio.sleep(LOOK_SECONDS)
    return ""


async def _judge(house: House, watcher: Watcher, issue: int) -> Ending:
    """Ready to merge means: open, no draft, mergeable, checks green, and the issue says so."""
    stage, store = house.stage, house.service.store
    alice = stage.people["alice"]
    view = await store.read(lambda conn: sprints.last(conn, stage.repo_id, issue))
    comment = "\n".join(watcher.comments[-1:])
    if view is None or not view.pr:
        why = f"{view.outcome}, {view.reason} {view.detail}".strip() if view else "no sprint"
        return Ending(issue, fault=f"there is no pull request: {why}", comment=comment)
    pull = await _settle(lambda: alice.forge.pull(stage.repo, view.pr), lambda found: bool(found.get("mergeable")))
    status = await alice.forge.combined_status(stage.repo, str((pull.get("head") or {}).get("sha") or ""))
    faults = [
        text
        for wrong, text in (
            (pull.get("state") != "open", f"it is {pull.get('state')}"),
            (pull.get("draft"), "it is a draft"),
            (not pull.get("mergeable"), "it cannot be merged"),
            (not view.checks, "no check was run"),
            (any(check.get("exit_code") != 0 for check in view.checks), "a check failed"),
            (status.get("total_count") and status.get("state") != "success", f"the commit's status is {status.get('state')}"),
            (StateLabel.REVIEW not in watcher.labels, f"the issue does not carry the label {StateLabel.REVIEW}"),
            (f"#{view.pr}" not in comment, "the bot's comment does not name it"),
        )
        if wrong
    ]
    return Ending(issue, view.pr, "; ".join(faults), comment, await _diff(house, view.pr))


async def _settle(ask: Callable[[], Awaitable[Any]], fits: Callable[[Any], bool]) -> Any:
    """Gitea finds out in the background whether a pull request can be merged."""
    deadline = time.monotonic() + SHOWN_SECONDS
    while True:
        found = await ask()
        if fits(found) or time.monotonic() > deadline:
            return found
        await asyncio.sleep(LOOK_SECONDS)


async def _diff(house: House, number: int) -> str:
    """The change as the forge shows it, or why it does not."""
    stage = house.stage
    headers = {"Authorization": f"token {stage.people['alice'].token.reveal()}"}
    url = f"{stage.url}/api/v1/repos/{stage.repo}/pulls/{number}.diff"
    try:
        async with aiohttp.ClientSession() as session, session.get(url, headers=headers, allow_redirects=False) as reply:
            return await reply.text(errors="replace") if reply.ok else f"(the forge answered {reply.status})"
    except aiohttp.ClientError as error:
        return f"(the forge did not answer: {type(error).__name__})"
