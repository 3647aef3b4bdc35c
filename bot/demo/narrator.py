"""Tells the demo's story while it happens: what the bot does, from its events and its store, and what people see of it on the forge."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from typing import Any

import structlog

from bot.demo.house import House
from bot.demo.screen import Screen
from bot.models import EventKind, SprintEvent, SprintView
from bot.store import sprints, steps

log = structlog.get_logger()

WORK_BEGINS, WORK_ENDS, STEP_IS = 25.0, 70.0, 6.0
EMOJI = {"eyes": "👀", "rocket": "🚀", "confused": "😕"}
SAID_CAP = 160


class Narrator:
    """Tells what sprints do, whichever they are: `observe` takes the service's events, `tell` turns them into lines until it is cancelled."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._events: asyncio.Queue[SprintEvent] = asyncio.Queue()
        self._told: set[tuple[str, int, int, int]] = set()
        self.settled = asyncio.Event()
        self.began = asyncio.Event()

    def observe(self, event: SprintEvent) -> None:
        """An observer of the service; only takes a note."""
        self._events.put_nowait(event)

    async def tell(self, house: House) -> None:
        """Until cancelled; what cannot be read now is left out."""
        store = house.service.store
        while True:
            event = await self._events.get()
            try:
                view = await store.read(partial(sprints.get, sprint_id=event.sprint_id))
                if view is not None:
                    if event.kind in (EventKind.TOOL_ENDED, EventKind.STAGE_ENDED):
                        for row in await store.read(partial(steps.journal, sprint_id=event.sprint_id)):
                            self._call(event.sprint_id, row)
                    self._event(event, view)
            except Exception:
                log.exception("demo.narrator", kind=event.kind)
            if event.kind is EventKind.SETTLED:
                self.settled.set()

    def _event(self, event: SprintEvent, view: SprintView) -> None:
        screen, data = self._screen, event.data
        match event.kind:
            case EventKind.ENQUEUED:
                screen.fact("timmy", f"{view.issue}: queued, asked for by {view.requester}")
                screen.at(5, "queued")
            case EventKind.ADMITTED:
                screen.fact("timmy", "admitted: a slot is reserved")
                screen.at(10, "about to start")
            case EventKind.STARTED:
                screen.fact("timmy", f"preparing, sandbox: {view.sandbox}")
                screen.at(15, "preparing")
            case EventKind.STEP_STARTED:
                self.began.set()
                number = int(data.get("step") or 0)
                screen.at(min(WORK_ENDS - STEP_IS, WORK_BEGINS + STEP_IS * (number - 1)), f"step {number}: the model thinks")
            case EventKind.TEXT:
                screen.fact("model", f"“{_short(str(data.get('text')))}”", "italic")
            case EventKind.FALLBACK:
                screen.fact("timmy", f"{data.get('from_provider')} fails, next: {data.get('to_provider')}", "yellow")
            case EventKind.STAGE_ENDED:
                self._stage(str(data.get("stage")), view)
            case EventKind.PULL_REQUEST:
                screen.fact("timmy", f"pushed {view.head_sha[:10]} to {view.branch}")
                screen.fact("timmy", f"pull request #{data.get('number')} {data.get('event')}", "bold green")
                screen.at(92, "showing it")
            case EventKind.REQUEUED:
                screen.fact("timmy", f"back to the queue: {view.waiting_note or data.get('reason')}", "yellow")
                screen.at(5, "waiting")
            case EventKind.SETTLED:
                why = ": ".join(part for part in (view.reason, view.detail) if part)
                screen.fact("timmy", f"settled: {view.outcome}" + (f" ({why})" if why else "") + f", {view.steps} steps, ${view.usd:.2f}")
            case _:
                pass

    def _stage(self, stage: str, view: SprintView) -> None:
        screen = self._screen
        if stage == "prepare":
            screen.fact("timmy", f"issue read and frozen, {view.base_branch} at {view.base_sha[:10]} fetched")
            screen.at(WORK_BEGINS, "working")
        elif stage == "work":
            screen.at(WORK_ENDS, "checking the result")
        elif stage == "vet":
            for check in view.checks:
                passed = check.get("exit_code") == 0
                text = f"check `{check.get('command')}`, run by the bot: {'passed' if passed else 'failed'}"
                screen.fact("timmy", text, "green" if passed else "red")
            screen.at(80, "pushing")

    def _call(self, sprint_id: str, row: Any) -> None:
        key = (sprint_id, row.attempt, row.n, row.i)
        if key in self._told:
            return
        self._told.add(key)
        head, *rest = str(row.result).strip().splitlines() or [""]
        text = f"step {row.n}: {row.tool} {_subject(row.arguments)}".rstrip()
        if row.tool != "run_command":
            self._screen.fact("model", text)
            return
        failed = head != "exit 0"
        said = [line for line in rest if line.startswith(("FAIL", "ok"))] or rest[-2:]
        self._screen.fact("model", f"{text} → {head}", "red" if failed else "green")
        for line in said[:6]:
            self._screen.fact("", f"  {_short(line)}", "red" if failed and not line.startswith("ok") else "dim")


def _subject(arguments: str) -> str:
    """What a call is about, in a few words: the command, the path, the pattern or the summary."""
    try:
        value = json.loads(arguments)
    except ValueError:
        return ""
    if not isinstance(value, dict):
        return ""
    return _short(str(next((value[key] for key in ("command", "path", "pattern", "operation", "summary") if value.get(key)), "")))


def _short(text: str) -> str:
    line = " ".join(text.split(" ")).replace("\n", " ")
    return line if len(line) <= SAID_CAP else line[: SAID_CAP - 1] + "…"


class Watcher:
    """Looks at the issue as its people see it, and tells what is new there: labels, the bot's comments, its reactions."""

    def __init__(self, house: House, screen: Screen, issue: int) -> None:
        self._stage = house.stage
        self._service = house.service
        self._screen = screen
        self._issue = issue
        self._seen: set[int] = set()
        self._headlines: dict[int, str] = {}
        self._polling = False
        self.asked = 0
        self.reactions: set[str] = set()
        self.labels: set[str] = set()
        self.comments: list[str] = []

    async def look(self) -> None:
        """One look; raises ForgeError."""
        stage, screen = self._stage, self._screen
        alice, bot = stage.people["alice"], stage.people["timmy"]
        self._tell_polling()
        for item in await alice.forge.timeline(stage.repo, self._issue):
            if item.get("type") == "label" and int(item["id"]) not in self._seen:
                self._seen.add(int(item["id"]))
                added = str(item.get("body") or "") == "1"
                name = (item.get("label") or {}).get("name")
                screen.fact("forge", f"{(item.get('user') or {}).get('login')} {'added' if added else 'took off'} the label {name}")
        self.labels = {str(label["name"]) for label in (await alice.forge.issue(stage.repo, self._issue)).get("labels") or ()}
        found = await alice.forge.comments(stage.repo, self._issue)
        mine = [comment for comment in found if (comment.get("user") or {}).get("id") == bot.id]
        for comment in mine:
            headline = (str(comment.get("body") or "").strip().splitlines() or [""])[0]
            if self._headlines.get(int(comment["id"])) != headline:
                verb = "comment edited" if int(comment["id"]) in self._headlines else "new comment"
                self._headlines[int(comment["id"])] = headline
                screen.fact("forge", f"{verb}: {_short(headline)}")
        self.comments = [str(comment.get("body") or "") for comment in mine if "key=sprint:" in str(comment.get("body"))]
        await self._look_at_reactions()

    async def _look_at_reactions(self) -> None:
        if not self.asked:
            return
        owner, _, name = self._stage.repo.partition("/")
        route = "/repos/{owner}/{repo}/issues/comments/{id}/reactions"
        found = await self._stage.people["alice"].client.getitem(route, owner=owner, repo=name, id=self.asked)
        for content in [str(item["content"]) for item in found or () if item["content"] not in self.reactions]:
            self.reactions.add(content)
            self._screen.fact("forge", f"timmy reacted to bob's comment: {EMOJI.get(content, content)}")

    def _tell_polling(self) -> None:
        polling = self._service.reconciler.polling
        if polling != self._polling:
            self._polling = polling
            why = self._service.reconciler.why_polling
            text = (
                f"deliveries do not reach the bot ({why}): it asks the forge every second instead" if polling else "deliveries arrive again"
            )
            self._screen.fact("timmy", text, "yellow")
