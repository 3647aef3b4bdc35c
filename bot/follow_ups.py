"""Looks at our open pull requests where something moved: a review that requests changes or a red check becomes an Ask, once, whoever announced it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import datetime

import structlog
from sqlalchemy.engine import Connection

from bot import chatops, feedback
from bot.chatops import Finding, NotNow, PullFate
from bot.config import RepositorySettings, Settings
from bot.decide import AskAgain, Decider
from bot.gitea.errors import ForgeError, NotFound, may_recover
from bot.gitea.forge import Forge
from bot.models import BY_FAILURE, BY_REVIEW, NOT_LOOKED_YET, Actor, Ask, IssueRef, PullFacts, Reply, RepoId, Source, Verdict
from bot.repositories import Repositories
from bot.store import Store, follow_ups, intents, pulls, sprints
from bot.store.pulls import Look
from bot.verdict import write

log = structlog.get_logger()

REVIEWS = "reviews"
BUSY_MS = 3_000
LAST_BACKOFF_MS = 300_000
# A check that never ends holds no other up for longer.
PENDING_MS = 3_600_000
DAY_MS = 86_400_000


class FollowUps:
    """`run` takes the looks that are due, one after the other. What it asks for passes the same gate and the same transaction as a comment."""

    def __init__(
        self,
        store: Store,
        forge: Forge,
        repositories: Repositories,
        decider: Decider,
        *,
        settings: Settings,
        take_in: Callable[[Finding], Awaitable[None]],
        scrub: Callable[[str], str],
        kick_projector: Callable[[], None],
        held: Callable[[], bool],
        now_ms: Callable[[], int],
    ) -> None:
        self._store = store
        self._forge = forge
        self._repositories = repositories
        self._decider = decider
        self._settings = settings
        self._take_in = take_in
        self._scrub = scrub
        self._kick_projector = kick_projector
        self._held = held
        self._now_ms = now_ms

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                if self._held():
                    for look in await self._store.read(lambda conn: pulls.due(conn, self._now_ms())):
                        await self._take(look)
            except Exception:
                log.exception("follow_ups.round")
            await asyncio.sleep(self._settings.timing.tick_seconds)

    async def _take(self, look: Look) -> None:
        now = self._now_ms()
        try:
            wait_ms = await self._look(look, now)
        except NotNow:
            wait_ms = BUSY_MS
        except Exception as error:
            again = isinstance(error, AskAgain) or (isinstance(error, ForgeError) and may_recover(error))
            if now - look.since_ms > DAY_MS and not again:
                wait_ms = 0
            else:
                wait_ms = min(LAST_BACKOFF_MS, 1_000 * 2 ** min(look.tries, 12))
            log.warning("follow_ups.later", repo_id=look.repo_id, pull=look.number, what=look.what, error=str(error), exc_info=not again)
        if wait_ms:
            await self._store.write(lambda conn: pulls.later(conn, look, due_ms=now + wait_ms))
        else:
            await self._store.write(lambda conn: pulls.looked(conn, look))

    async def _look(self, look: Look, now: int) -> int:
        """Looks at one pull request; returns in how many milliseconds to look again, 0 for not at all."""
        name = self._repositories.name_of(look.repo_id, "")
        repository = self._repositories.serves(look.repo_id, name)
        if repository is None or not await self._store.read(lambda conn: sprints.is_open_pull(conn, look.repo_id, look.number)):
            return 0
        if await self._store.read(lambda conn: _busy(conn, look)):
            return BUSY_MS
        try:
            record = await self._forge.pull(name, look.number)
        except NotFound:
            return 0
        pull = feedback.pull_facts(record, repo_id=look.repo_id, me_id=int((await self._forge.me())["id"]))
        if pull is None:
            return 0
        if pull.state != "open":
            await self._take_in(PullFate(RepoId(look.repo_id), pull.number, pull.head_branch, pull.state, now))
            return 0
        if look.what == REVIEWS:
            await self._reviews(RepoId(look.repo_id), name, pull, now)
            return 0
        # A draft is one whose sprint failed already: a person decides about it.
        if record.get("draft") or not self._settings.fixes_checks(repository):
            return 0
        return await self._checks(look, name, repository, pull, now)

    async def _reviews(self, repo_id: RepoId, name: str, pull: PullFacts, now: int) -> None:
        if not self._settings.follow_ups.reviews:
            return
        me_id = int((await self._forge.me())["id"])
        for review in feedback.requests(await self._forge.reviews(name, pull.number), me_id=me_id):
            user, asked_ms = review.get("user") or {}, _ms(review.get("submitted_at")) or now
            late = now - asked_ms > self._settings.reconcile.ask_after_seconds * 1000
            await self._decider.decide(
                Ask(
                    key=chatops.review_key(int(review["id"])),
                    repo_id=repo_id,
                    issue=IssueRef.of(name, pull.number),
                    actor=Actor(int(user["id"]), str(user.get("login") or "")),
                    source=Source.RECONCILE if late else Source.REVIEW,
                    verb="run",
                    asked_ms=asked_ms,
                    options={BY_REVIEW: str(review["id"])},
                )
            )

    async def _checks(self, look: Look, name: str, repository: RepositorySettings, pull: PullFacts, now: int) -> int:
        ours = await self._store.read(lambda conn: sprints.open_pulls_at(conn, look.repo_id, pull.head_sha))
        if pull.number not in ours:
            # A person has pushed since: theirs to mend.
            return 0
        status = await self._forge.combined_status(name, pull.head_sha)
        failures = feedback.red(status)
        if not failures:
            return 0
        if feedback.pending(status) and now - look.since_ms < PENDING_MS:
            return max(1_000, int(self._settings.follow_ups.settle_seconds * 1000))
        key = chatops.check_key(pull.head_sha, [(failure.context, failure.state) for failure in failures])
        if await self._store.read(lambda conn: intents.get(conn, key)) is not None:
            return 0
        failures = await feedback.with_logs(self._forge, name, pull.head_sha, failures, scrub=self._scrub)
        kind = feedback.signature(failures)
        last = await self._store.read(lambda conn: _last_of(conn, look.repo_id, pull.number))
        ask = Ask(
            key=key,
            repo_id=RepoId(look.repo_id),
            issue=IssueRef.of(name, pull.number),
            actor=last,
            source=Source.CHECKS,
            verb="run",
            asked_ms=now,
            options={BY_FAILURE: kind},
            text=", ".join(failure.context for failure in failures[:5]),
        )
        left = await self._left_to_people(ask, pull, kind)
        if left is None:
            await self._decider.decide(ask)
            return 0
        about = _about(ask, pull)
        await self._store.write(lambda conn: write(conn, about, repository, left, self._settings, now))
        log.info("follow_ups.left", issue=str(about.issue), pull=pull.number, reason=left.reason)
        self._kick_projector()
        return 0

    async def _left_to_people(self, ask: Ask, pull: PullFacts, kind: str) -> Verdict | None:
        """Why these red checks are not mended by us, if they are not: the label, the same failure again, too many tries."""
        issue = await self._forge.issue(ask.issue.full_name, pull.issue)
        label = self._settings.follow_ups.no_fix_label
        if label and label in {*pull.labels, *(str(item.get("name") or "") for item in issue.get("labels") or ())}:
            return Verdict("denied", f"red checks are left to people by the label {label}", Reply())
        tries = await self._store.read(lambda conn: follow_ups.tries(conn, ask.repo_id, pull.issue))
        told = {"why": ask.text, "tries": len(tries)}
        # Also where another failure lay between: one that comes back after it was mended is a circle.
        if any(known == kind for _, known in tries):
            return Verdict("denied", "the same checks fail in the same way after a follow-up", Reply("checks_same", told))
        if len(tries) >= self._settings.follow_ups.check_tries:
            return Verdict("denied", f"{len(tries)} follow-ups did not make the checks green", Reply("checks_tried", told))
        return None


def _about(ask: Ask, pull: PullFacts) -> Ask:
    return replace(ask, issue=IssueRef.of(ask.issue.full_name, pull.issue), pull=pull.number)


def _busy(conn: Connection, look: Look) -> bool:
    """Whether a sprint is at work on the issue that cannot take anything along any more: nothing is asked of the forge until it has ended."""
    newest = sprints.newest_of_pull(conn, look.repo_id, look.number)
    view = sprints.get(conn, newest) if newest else None
    active = sprints.active(conn, look.repo_id, view.issue.number) if view is not None else None
    return active is not None and (active.follows_pull != look.number or active.state not in NOT_LOOKED_YET)


def _last_of(conn: Connection, repo_id: int, number: int) -> Actor:
    """Who asked for the last sprint on a pull request: in that person's name its checks are mended."""
    newest = sprints.newest_of_pull(conn, repo_id, number)
    view = sprints.get(conn, newest) if newest else None
    return Actor(view.requester_id, view.requester) if view is not None else Actor.terminal()


def _ms(text: object) -> int:
    try:
        return int(datetime.fromisoformat(str(text)).timestamp() * 1000)
    except ValueError:
        return 0
