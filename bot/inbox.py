"""Takes stored deliveries through the router, once at a time each; handling may repeat, intents make that harmless."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import structlog
from sqlalchemy.engine import Connection

from bot.chatops import Finding, PullFate, PullNews, RepositoryFact, Reverted, TextEdited
from bot.decide import AskAgain, Decider
from bot.failpoints import Failpoints
from bot.gitea.errors import ForgeError, may_recover
from bot.gitea.routing import Router, handler_name
from bot.gitea.sansio import Event
from bot.models import Ask, EventKind, SprintEvent, SprintId
from bot.repositories import Repositories
from bot.store import Store, deliveries, intents, outbox, pulls, sprints

log = structlog.get_logger()

TASKS = 32
REOFFER_SECONDS = 5.0
FIRST_BACKOFF_MS = 1_000
LAST_BACKOFF_MS = 900_000


class Inbox:
    """Consumer tasks of one process. `offer(hash)` hands it a row just stored; at start and on a tick it takes what is due."""

    def __init__(
        self,
        store: Store,
        router: Router,
        decider: Decider,
        repositories: Repositories,
        *,
        desk: object,
        kick_projector: Callable[[], None],
        handled: Callable[[str, int], None],
        handler_ran: Callable[[str, float], None],
        failpoint: Failpoints,
        now_ms: Callable[[], int],
        observe: Callable[[SprintEvent], None] = lambda _event: None,
        settle_ms: int = 0,
    ) -> None:
        self._observe = observe
        self._settle_ms = settle_ms
        self._store = store
        self._router = router
        self._decider = decider
        self._repositories = repositories
        self._desk = desk
        self._kick_projector = kick_projector
        self._handled = handled
        self._handler_ran = handler_ran
        self._failpoint = failpoint
        self._now_ms = now_ms
        self._offered: asyncio.Queue[str] = asyncio.Queue()
        self._known: set[str] = set()

    def offer(self, digest: str) -> None:
        """This row waits; harmless if somebody has it."""
        if digest not in self._known:
            self._known.add(digest)
            self._offered.put_nowait(digest)

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._reoffer())
            for _ in range(TASKS):
                group.create_task(self._consume())

    async def _reoffer(self) -> None:
        while True:
            try:
                for digest in await self._store.read(lambda conn: deliveries.due(conn, self._now_ms())):
                    self.offer(digest)
            except Exception:
                log.exception("inbox.reoffer")
            await asyncio.sleep(min(REOFFER_SECONDS, 1.0))

    async def _consume(self) -> None:
        while True:
            digest = await self._offered.get()
            self._known.discard(digest)
            try:
                await self.handle(digest)
            except Exception:
                log.exception("inbox.handle", delivery=digest)

    async def handle(self, digest: str) -> None:
        """Takes one row, if nobody has it, and brings it to its end or to its next time."""
        row = await self._store.write(lambda conn: deliveries.take(conn, digest, self._now_ms()))
        if row is None:
            return
        self._failpoint("inbox.taken")
        renewal = asyncio.create_task(self._renew(digest))
        again: list[str] = []
        errors: list[str] = []
        try:
            if row.tries > deliveries.MAX_TRIES and row.error is None:
                errors = ["the service ended each time before it was handled"]
            else:
                again, errors = await self._handle(row)
        except Exception as error:
            log.exception("inbox.unreadable", delivery=row.delivery)
            errors = [f"{type(error).__name__}: {error}"]
        finally:
            renewal.cancel()
        now = self._now_ms()
        text = "; ".join(errors or again)
        if errors and row.tries >= deliveries.MAX_TRIES:
            await self._store.write(lambda conn: deliveries.dead(conn, digest, error=text, now_ms=now))
            self._handled("dead", row.tries)
            log.error("inbox.dead_letter", delivery=row.delivery, event_type=row.event_type, error=text)
        elif errors or again:
            due = now + min(LAST_BACKOFF_MS, FIRST_BACKOFF_MS * 2 ** min(row.tries - 1, 12))
            await self._store.write(lambda conn: deliveries.later(conn, digest, error=text, due_ms=due))
            self._handled("not_yet" if again and not errors else "retry", row.tries)
            log.warning("inbox.later", delivery=row.delivery, event_type=row.event_type, error=text)
        else:
            await self._store.write(lambda conn: deliveries.done(conn, digest, now))
            self._handled("done", row.tries)

    async def _renew(self, digest: str) -> None:
        while True:
            await asyncio.sleep(deliveries.LEASE_MS / 3000)
            try:
                await self._store.write(lambda conn: deliveries.renew(conn, digest, self._now_ms()))
            except Exception:
                log.exception("inbox.renew")

    async def _handle(self, row: deliveries.Delivery) -> tuple[list[str], list[str]]:
        """What must be asked again, and what went wrong."""
        event = Event.from_stored(row.event_type, row.body, delivery=row.delivery)
        if event.repo_id is not None and event.full_name:
            await self._repositories.renamed(event.repo_id, event.full_name)
            self._repositories.told(event.repo_id, event.data.get("repository"))
        again: list[str] = []
        errors: list[str] = []
        give_up = self._now_ms() - row.received_ms > deliveries.NOT_YET_MS
        for handler in self._router.fetch(event):
            name = handler_name(handler)
            started = time.monotonic()
            try:
                findings: list[Finding] = list(await _findings(handler(event, self._desk)))
                await self._acknowledge(findings, row.received_ms)
                for finding in findings:
                    await self.take_in(finding, give_up=give_up)
            except AskAgain as error:
                again.append(str(error))
            except ForgeError as error:
                (again if may_recover(error) and not give_up else errors).append(f"{name}: {error}")
            except Exception as error:
                log.exception("inbox.handler", handler=name, delivery=row.delivery)
                errors.append(f"{name}: {type(error).__name__}: {error}")
            finally:
                self._handler_ran(name, time.monotonic() - started)
        return again, errors

    async def _acknowledge(self, findings: list[Finding], received_ms: int) -> None:
        """👀 on every comment that holds a command, before anything is decided about it."""
        asks = [finding for finding in findings if isinstance(finding, Ask) and finding.comment_id]
        fresh = {ask.comment_id: ask for ask in reversed(asks)}
        if not fresh:
            return
        now = self._now_ms()

        def write(conn: Connection) -> None:
            for ask in asks:
                outbox.received(
                    conn,
                    key=outbox.reply_key(ask.key),
                    repo_id=ask.repo_id,
                    repo=ask.issue.full_name,
                    issue=ask.issue.number,
                    comment_id=ask.comment_id,
                    received_ms=received_ms,
                    now_ms=now,
                )

        await self._store.write(write)
        self._kick_projector()

    async def take_in(self, finding: Finding, *, give_up: bool = False) -> None:
        """One finding of a handler or of reconciliation into rows."""
        if isinstance(finding, PullFate | PullNews | Reverted):
            now = self._now_ms()
            for event in await self._store.write(lambda conn: _pull_moved(conn, finding, settle_ms=self._settle_ms, now_ms=now)):
                self._observe(event)
            self._kick_projector()
        elif isinstance(finding, RepositoryFact):
            if not finding.deleted:
                await self._repositories.renamed(finding.repo_id, finding.full_name)
        elif isinstance(finding, TextEdited):
            await self._decider.text_edited(finding)
        else:
            await self._decider.decide(finding, give_up=give_up)


def _pull_moved(conn: Connection, finding: PullFate | PullNews | Reverted, *, settle_ms: int, now_ms: int) -> list[SprintEvent]:
    """News of a pull request into rows, if it is one of ours; the events of what became of it."""
    repo_id = finding.repo_id
    if isinstance(finding, Reverted):
        numbers = pulls.reverted(conn, repo_id, finding.shas, at_ms=finding.at_ms, now_ms=now_ms)
        for number in numbers:
            _tell(conn, repo_id, number, f"pull request #{number} was reverted", now_ms)
        return [_fate_event(conn, repo_id, number, pulls.REVERTED, now_ms) for number in numbers]
    if isinstance(finding, PullFate):
        fate = finding
        if not pulls.fate(conn, repo_id, fate.number, state=fate.state, at_ms=fate.at_ms, now_ms=now_ms, merged_sha=fate.merged_sha):
            return []
        became = {pulls.MERGED: "merged", pulls.CLOSED: "closed without being merged"}.get(fate.state, "opened again")
        _tell(conn, repo_id, fate.number, f"pull request #{fate.number} was {became}", now_ms)
        event = {pulls.MERGED: "merged", pulls.CLOSED: "closed_unmerged"}.get(fate.state)
        return [_fate_event(conn, repo_id, fate.number, event, now_ms)] if event else []
    if finding.what == "branch":
        for number in pulls.branch_deleted(conn, repo_id, finding.branch, at_ms=finding.at_ms, now_ms=now_ms):
            _tell(conn, repo_id, number, f"the branch of pull request #{number} was deleted", now_ms)
        return []
    numbers = sprints.open_pulls_at(conn, repo_id, finding.sha) if finding.sha else [finding.number]
    for number in numbers:
        if finding.sha or sprints.is_open_pull(conn, repo_id, number):
            due_ms = now_ms + (settle_ms if finding.what == "checks" else 0)
            pulls.news(conn, repo_id, number, finding.what, due_ms=due_ms, now_ms=now_ms)
    return []


def _tell(conn: Connection, repo_id: int, number: int, what: str, now_ms: int) -> None:
    """What became of a pull request is told in its issue's trail."""
    newest = sprints.newest_of_pull(conn, repo_id, number)
    view = sprints.get(conn, newest) if newest else None
    if view is not None:
        issue = view.issue.number
        intents.decide(conn, repo_id=repo_id, issue=issue, kind="pull", result="ok", reason=what, sprint_id=view.id, now_ms=now_ms)


def _fate_event(conn: Connection, repo_id: int, number: int, event: str, now_ms: int) -> SprintEvent:
    newest = sprints.newest_of_pull(conn, repo_id, number) or ""
    data = {"event": event, "number": number, "model": pulls.model_of(conn, repo_id, number)}
    return SprintEvent(EventKind.PULL_REQUEST, SprintId(newest), now_ms, data)


async def _findings(result: Awaitable[object]) -> list[Finding]:
    found = await result
    return list(found) if isinstance(found, list | tuple) else []
