"""The only writer of what people see in the forge: rows become comments, reactions and labels, one request at a time per issue, until shown."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import structlog
from sqlalchemy.engine import Connection

from bot import replies
from bot.failpoints import Failpoints
from bot.gitea.errors import Archived, Forbidden, ForgeError, Invalid, Moved, NotFound, PreconditionFailed
from bot.gitea.forge import Forge
from bot.models import (
    RUNNING,
    STATE_LABEL_COLORS,
    OutcomeKind,
    PlanState,
    Position,
    Reaction,
    Reply,
    SprintState,
    SprintView,
    StateLabel,
)
from bot.repositories import Repositories
from bot.store import Store, outbox, plans, sprints, waits

log = structlog.get_logger()

LEASE_MS = 15_000
FAILED_SECONDS = 1.0
AT_ONCE = 8
FIRST_BACKOFF_MS = 1_000
LAST_BACKOFF_MS = 300_000
# About a day: then a repository that is out of sight is taken to be gone.
LAST_TRY = 290
SINCE = timedelta(minutes=1)


def label_of(view: SprintView) -> StateLabel | None:
    """The state label that a sprint's row calls for (DESIGN section 4); None where the issue shows none."""
    if view.state is SprintState.SETTLED:
        quiet = view.follows_pull and view.outcome in (OutcomeKind.NO_CHANGE, OutcomeKind.CANCELLED)
        if view.outcome in (OutcomeKind.PULL_REQUEST, OutcomeKind.UPDATED) or quiet:
            return None if view.pr_state in ("merged", "closed", "reverted") else StateLabel.REVIEW
        if view.outcome in (OutcomeKind.FAILED, OutcomeKind.BUDGET):
            return StateLabel.FAILED
        if view.outcome is OutcomeKind.PLANNED:
            return StateLabel.BLOCKED if view.reason == PlanState.WAITING else None
        return StateLabel.BLOCKED if view.outcome is OutcomeKind.REFUSED else None
    return StateLabel.RUNNING if view.state in RUNNING else StateLabel.QUEUED


class Projector:
    """Shows rows. `kick()` looks at once; the tick finds what other processes wrote."""

    def __init__(
        self,
        store: Store,
        forge: Forge,
        repositories: Repositories,
        *,
        links: replies.Links,
        scrub: Callable[[str], str],
        held: Callable[[], bool],
        ack: Callable[[float], None],
        failed: Callable[[str], None],
        failpoint: Failpoints,
        caps: Callable[[str], waits.Caps],
        tick_seconds: float,
        now_ms: Callable[[], int],
    ) -> None:
        self._store = store
        self._forge = forge
        self._repositories = repositories
        self._links = links
        self._scrub = scrub
        self._held = held
        self._ack = ack
        self._failed = failed
        self._failpoint = failpoint
        self._caps = caps
        self._tick = tick_seconds
        self._now_ms = now_ms
        self._event = asyncio.Event()
        self._busy: set[tuple[int, int]] = set()
        self._limit = asyncio.Semaphore(AT_ONCE)

    def kick(self) -> None:
        """Something is to be shown."""
        self._event.set()

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group:
            while True:
                try:
                    if self._held():
                        for place in await self._work():
                            self._busy.add(place)
                            group.create_task(self._show(place))
                except Exception:
                    log.exception("projector.work")
                try:
                    # Not wait_for, which before Python 3.12 swallows a cancellation that meets the event.
                    async with asyncio.timeout(self._tick):
                        await self._event.wait()
                except TimeoutError:
                    continue
                finally:
                    self._event.clear()

    async def _work(self) -> list[tuple[int, int]]:
        now = self._now_ms()
        places = await self._store.read(lambda conn: [*outbox.work(conn, now), *sprints.show_work(conn, now)])
        return [place for place in dict.fromkeys(places) if place not in self._busy]

    async def _show(self, place: tuple[int, int]) -> None:
        try:
            async with self._limit:
                entries, taken, newest = await self._store.write(partial(self._take, place))
                if entries:
                    await self._show_replies(entries)
                    taken, newest = await self._store.write(partial(self._take_sprints, place))
                await self._show_sprints(taken, newest)
        except Exception:
            log.exception("projector.show", repo_id=place[0], issue=place[1])
            # The database is away, say: at once again would be a loop that does nothing but fail.
            await asyncio.sleep(max(self._tick, FAILED_SECONDS))
        finally:
            self._busy.discard(place)
            self._event.set()

    def _take(self, place: tuple[int, int], conn: Connection) -> tuple[list[outbox.Entry], list[Any], str | None]:
        """Replies and reactions due at one issue; where there are none, its sprints and which of them is the newest.

        Not both: what is claimed is to be shown at once, and the sprints come after the replies.
        """
        entries = outbox.take(conn, *place, now_ms=self._now_ms(), lease_ms=LEASE_MS)
        return (entries, [], None) if entries else ([], *self._take_sprints(place, conn))

    def _take_sprints(self, place: tuple[int, int], conn: Connection) -> tuple[list[Any], str | None]:
        taken = sprints.show_take(conn, *place, now_ms=self._now_ms(), lease_ms=LEASE_MS)
        return taken, sprints.newest(conn, *place) if taken else None

    async def _show_replies(self, entries: Iterable[outbox.Entry]) -> None:
        for entry in entries:
            try:
                await self._show_reply(entry)
            except ForgeError as error:
                due = await self._after(error, entry.repo_id, entry.tries, kind="reply" if entry.reply else "reaction", key=entry.key)
                await self._store.write(partial(_put_off_reply, entry=entry, error=str(error), due_ms=due))

    async def _show_reply(self, entry: outbox.Entry) -> None:
        repo = self._repositories.name_of(entry.repo_id, entry.repo)
        if entry.comment_id:
            await self._react(repo, entry)
        if entry.reply is not None:
            reply = Reply(entry.reply["name"], entry.reply["data"])
            body = self._scrub(replies.render(reply, key=entry.key))
            self._failpoint("projector.rendered")
            made = datetime.fromtimestamp(entry.made_ms / 1000, UTC)
            try:
                comment_id = await self._put_comment(
                    repo, entry.issue, body, known=entry.forge_id, key=entry.key, first=entry.tries == 1, since=made
                )
            except Archived:
                await self._react_to_issue(repo, entry)
                raise
            self._failpoint("projector.sent")
            await self._store.write(lambda conn: outbox.commented(conn, entry.key, comment_id))
            for login in reply.data.get("ask_review") or ():
                await self._ask_review(repo, entry.issue, str(login))
            self._failpoint("projector.id_stored")
        else:
            await self._react_to_issue(repo, entry)
        await self._store.write(lambda conn: outbox.shown(conn, entry.key, entry.rev))

    async def _react(self, repo: str, entry: outbox.Entry) -> None:
        if not entry.reacted:
            try:
                await self._forge.react(repo, entry.comment_id, Reaction.EYES)
            except Forbidden as error:
                log.warning("projector.reaction_refused", error=str(error))
                return
            except NotFound:
                return
            if entry.received_ms:
                self._ack((self._now_ms() - entry.received_ms) / 1000)
            await self._store.write(lambda conn: outbox.reacted(conn, entry.key, Reaction.EYES))
        if entry.reaction not in ("", Reaction.EYES, entry.reacted):
            try:
                await self._forge.react(repo, entry.comment_id, entry.reaction)
            except (NotFound, Forbidden) as error:
                log.warning("projector.reaction_refused", error=str(error))
                return
            await self._store.write(lambda conn: outbox.reacted(conn, entry.key, entry.reaction))

    async def _ask_review(self, repo: str, pull: int, login: str) -> None:
        """Whoever wanted changes is asked to look again; somebody who left, or a pull request that is over, is no reason to say nothing at all."""
        try:
            await self._forge.request_review(repo, pull, login)
        except (NotFound, Forbidden, Invalid, PreconditionFailed) as error:
            log.warning("projector.review_not_asked", pull=pull, error=str(error))

    async def _react_to_issue(self, repo: str, entry: outbox.Entry) -> None:
        """What answers no comment is seen all the same: where there are no words, or an archived repository takes none."""
        if entry.reaction and not entry.comment_id:
            with contextlib.suppress(Archived, Forbidden, NotFound):
                await self._forge.react_issue(repo, entry.issue, entry.reaction)

    async def _show_sprints(self, taken: Iterable[Any], newest: str | None) -> None:
        for view, _, _, _, tries in taken:
            try:
                await self._show_sprint(view.id, first=tries == 1, newest=view.id == newest)
            except ForgeError as error:
                due = await self._after(error, view.repo_id, tries, kind="status", key=f"sprint:{view.id}")
                await self._store.write(partial(_put_off_sprint, sprint_id=view.id, error=str(error), due_ms=due))

    async def _show_sprint(self, sprint_id: str, *, first: bool, newest: bool) -> None:
        view, rev, comment_id, label, place = await self._store.read(lambda conn: _as_now(conn, sprint_id, self._caps))
        repo = self._repositories.name_of(view.repo_id, view.issue.full_name)
        key = f"sprint:{view.id}"
        text = replies.status_comment(view, position=place, now_ms=self._now_ms(), links=self._links)
        body = self._scrub(replies.with_marker(text, key))
        self._failpoint("projector.rendered")
        since = datetime.fromtimestamp(view.queued_ms / 1000, UTC)
        try:
            shown_id: int | None = await self._put_comment(
                repo, view.issue.number, body, known=comment_id, key=key, first=first, since=since
            )
        except Archived as error:
            # No comment can be written or edited any more, but the label can.
            log.warning("projector.given_up", key=key, error=str(error))
            shown_id = comment_id
        self._failpoint("projector.sent")
        if shown_id != comment_id:
            await self._store.write(lambda conn: sprints.commented(conn, view.id, shown_id))
        self._failpoint("projector.id_stored")
        wanted = label_of(view)
        if newest and view.state is SprintState.SETTLED and wanted in (None, StateLabel.FAILED):
            # A revision that came to nothing leaves the plan that it should have changed.
            held = await self._store.read(lambda conn: plans.one_waits(conn, view.repo_id, view.issue.number))
            wanted = StateLabel.BLOCKED if held else wanted
        if newest and ((wanted or "") != label or comment_id is None):
            await self._label(repo, view.issue.number, wanted)
        await self._store.write(lambda conn: sprints.shown(conn, view.id, rev, label=wanted or "" if newest else label))

    async def _put_comment(self, repo: str, issue: int, body: str, *, known: int | None, key: str, first: bool, since: datetime) -> int:
        """Edits the comment we know, else adopts the one that carries our marker, else makes it; returns its id."""
        if known is None and not first:
            found = await self._forge.find_comment(repo, issue, replies.marker(key), (await self._forge.me())["id"], since - SINCE)
            known = int(found["id"]) if found else None
        if known is not None:
            try:
                await self._forge.edit_comment(repo, known, body)
            except NotFound:
                await self._forge.issue(repo, issue)
                # Deleted by a person; a former life may have made it anew and not remembered it.
                found = await self._forge.find_comment(repo, issue, replies.marker(key), (await self._forge.me())["id"], since - SINCE)
                if found is not None:
                    await self._forge.edit_comment(repo, int(found["id"]), body)
                    return int(found["id"])
            else:
                return known
        return int((await self._forge.comment(repo, issue, body))["id"])

    async def _label(self, repo: str, issue: int, wanted: StateLabel | None) -> None:
        """One exclusive state label, or none; what a person set besides stays."""
        if wanted is not None:
            names = await self._forge.add_labels(repo, issue, [wanted])
            if wanted not in names:
                for label, color in STATE_LABEL_COLORS.items():
                    await self._forge.ensure_label(repo, label, color=color, exclusive=True)
                names = await self._forge.add_labels(repo, issue, [wanted])
        else:
            names = [str(label["name"]) for label in (await self._forge.issue(repo, issue)).get("labels") or ()]
        stale = {str(label) for label in StateLabel} & set(names) - {str(wanted)}
        if stale:
            for record in await self._forge.labels(repo):
                if record["name"] in stale:
                    await self._forge.remove_label(repo, issue, int(record["id"]))

    async def _after(self, error: ForgeError, repo_id: int, tries: int, *, kind: str, key: str) -> int | None:
        """When to try again, or None where it can never be shown: the issue is gone or the repository archived."""
        self._failed(kind)
        if isinstance(error, NotFound) and tries < LAST_TRY:
            try:
                await self._repositories.must_be_seen(repo_id)
            except ForgeError as unseen:
                # Whoever took us off a private repository may put us back, and then the words must be true.
                error = unseen
        if isinstance(error, NotFound | Archived):
            log.warning("projector.given_up", key=key, error=str(error))
            return None
        if isinstance(error, Moved):
            try:
                await self._repositories.resolve(repo_id)
            except ForgeError as unresolved:
                log.warning("projector.unresolved", error=str(unresolved))
        log.warning("projector.later", key=key, error=str(error), tries=tries)
        return self._now_ms() + int(min(LAST_BACKOFF_MS, FIRST_BACKOFF_MS * 2 ** min(tries - 1, 10)))


def _put_off_reply(conn: Connection, *, entry: outbox.Entry, error: str, due_ms: int | None) -> None:
    if due_ms is None:
        outbox.shown(conn, entry.key, entry.rev)
    else:
        outbox.failed(conn, entry.key, error=error, due_ms=due_ms)


def _put_off_sprint(conn: Connection, *, sprint_id: str, error: str, due_ms: int | None) -> None:
    if due_ms is None:
        sprints.shown(conn, sprint_id, sprints.show_as_now(conn, sprint_id)[1], label="")
    else:
        sprints.show_failed(conn, sprint_id, error=error, due_ms=due_ms)


def _as_now(
    conn: Connection, sprint_id: str, caps: Callable[[str], waits.Caps]
) -> tuple[SprintView, int, int | None, str, Position | None]:
    view, rev, comment_id, label = sprints.show_as_now(conn, sprint_id)
    place = waits.position(conn, sprint_id, caps(view.issue.full_name)) if view.state is SprintState.QUEUED else None
    return view, rev, comment_id, label, place
