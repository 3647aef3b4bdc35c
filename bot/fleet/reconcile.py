"""Asks the forge for what no delivery announced, through the same intents; takes over by polling where deliveries cannot reach us."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime
from typing import Any

import structlog

from bot import chatops
from bot.chatops import Desk, LabelAdded, PullFate, PullNews
from bot.config import Settings
from bot.decide import AskAgain, Decider
from bot.gitea.errors import ForgeError, NotFound, is_transient
from bot.gitea.forge import Forge
from bot.models import Actor, Ask, IssueRef, RepoId, Source
from bot.repositories import Repositories
from bot.store import Store, cursors, plans, sprints

log = structlog.get_logger()

OVERLAP_MS = 5_000
PROOF_SECONDS = 10.0
PROVE_AGAIN_SECONDS = 300.0
MAX_PULLS = 50
# While it polls, a look at each open pull request every round would be too many questions.
LOOK_AGAIN_MS = 15_000

TakeIn = Callable[[chatops.Finding], Any]


class Reconciler:
    """One round asks every repository what moved since the cursors. `polling` is true while deliveries are known not to arrive.

    `tested_ms` is when the forge last agreed to send a test delivery (Unix ms; 0: never), told to `tested` each time.
    """

    def __init__(
        self,
        store: Store,
        forge: Forge,
        repositories: Repositories,
        decider: Decider,
        *,
        desk: Desk,
        settings: Settings,
        verbs: Collection[str],
        take_in: TakeIn,
        missed: Callable[[int], None],
        tested: Callable[[int], None],
        last_delivery_ms: Callable[[], int],
        hook_url: str,
        is_leader: Callable[[], bool],
        now_ms: Callable[[], int],
    ) -> None:
        self._store = store
        self._forge = forge
        self._repositories = repositories
        self._decider = decider
        self._desk = desk
        self._settings = settings
        self._verbs = verbs
        self._take_in = take_in
        self._missed = missed
        self._tested = tested
        self._last_delivery_ms = last_delivery_ms
        self._hook_url = hook_url
        self._is_leader = is_leader
        self._now_ms = now_ms
        self.polling = False
        self.why_polling = ""
        self.tested_ms = 0
        self._changed = asyncio.Event()
        self._looked: dict[tuple[int, int], int] = {}

    async def run(self) -> None:
        """A round at once, then on the timer of the mode; until cancelled."""
        proof = asyncio.create_task(self._prove())
        try:
            while True:
                if self._is_leader():
                    await self.round()
                timing = self._settings.reconcile
                # Polling begins at once, not after the long wait of the other mode.
                self._changed.clear()
                with contextlib.suppress(TimeoutError):
                    # Not wait_for, which before Python 3.12 swallows a cancellation that meets the event.
                    async with asyncio.timeout(timing.poll_seconds if self.polling else timing.every_seconds):
                        await self._changed.wait()
        finally:
            proof.cancel()

    async def _prove(self) -> None:
        """Asks for a test delivery until one has come; a delivery of any kind is proof enough."""
        while True:
            started = self._now_ms()
            why = await self._ask_for_test()
            if not why:
                self.tested_ms = started
                self._tested(started)
                await asyncio.sleep(PROOF_SECONDS)
                why = "" if self._last_delivery_ms() >= started else "no test delivery came within 10 s"
            elif self._last_delivery_ms() >= started - PROVE_AGAIN_SECONDS * 1000:
                # A hook that we may not see, or one of the owner or the whole server, delivers as well.
                why = ""
            if why != self.why_polling:
                self.polling, self.why_polling = bool(why), why
                self._changed.set()
                if why:
                    log.warning("reconcile.polling", why=why, every_seconds=self._settings.reconcile.poll_seconds)
                else:
                    log.info("reconcile.deliveries_arrive")
            waited = 0.0
            while waited < PROVE_AGAIN_SECONDS and (not self.polling or self._last_delivery_ms() < started):
                await asyncio.sleep(1.0)
                waited += 1.0

    async def _ask_for_test(self) -> str:
        """Asks Gitea for a test delivery through our hook of the first repository that can send one; returns why none can, or ""."""
        reasons = []
        for repo_id, name in self._repositories.names().items():
            try:
                record = await self._repositories.record(repo_id)
                hooks = [hook for hook in await self._forge.hooks(name) if (hook.get("config") or {}).get("url") == self._hook_url]
                if not hooks:
                    reasons.append(f"{name} has no webhook to {self._hook_url}")
                elif not record.get("empty"):
                    await self._forge.test_hook(name, int(hooks[0]["id"]))
                    return ""
            except ForgeError as error:
                reasons.append(f"the webhook of {name} cannot be tried: {error}")
                if is_transient(error):
                    break
        return reasons[0] if reasons else "no repository can send a test delivery"

    async def round(self) -> None:
        """Every repository once; one that fails does not stop the others. One whose id was never learnt is asked for again."""
        if len(self._repositories.names()) < len(self._settings.repositories):
            await self._repositories.refresh()
        for repo_id, name in self._repositories.names().items():
            try:
                await self._repository(RepoId(repo_id), name)
            except (ForgeError, AskAgain) as error:
                log.warning("reconcile.later", repository=name, error=str(error))
            except Exception:
                log.exception("reconcile.failed", repository=name)

    async def _repository(self, repo_id: RepoId, name: str) -> None:
        now = self._now_ms()
        horizon = now - (0 if self.polling else int(self._settings.reconcile.leave_to_webhook_seconds * 1000))
        begin = await self._store.write(lambda conn: cursors.setdefault(conn, cursors.STARTED, now))
        await self._issues(repo_id, name, begin=begin, horizon=horizon)
        await self._comments(repo_id, name, begin=begin, horizon=horizon)
        await self._active(repo_id, name)
        await self._pulls(repo_id, name)

    async def _cursor(self, key: str, begin: int) -> int:
        return int(await self._store.read(lambda conn: cursors.get(conn, key)) or begin)

    async def _issues(self, repo_id: RepoId, name: str, *, begin: int, horizon: int) -> None:
        """Open issues that moved and carry the trigger label, are assigned to us or were opened with a word to us: the timeline says by whom."""
        key = f"reconcile:{repo_id}:issues"
        since = await self._cursor(key, begin)
        for issue in await self._forge.issues_since(name, _moment(since - OVERLAP_MS)):
            if issue.get("state") != "open":
                continue
            for intent, asked in await self._triggers(repo_id, name, issue):
                if asked.actor.id in (0, self._desk.me_id) or not begin <= asked.at_ms + 1000 <= horizon + 1000:
                    continue
                await self._decide(
                    Ask(
                        key=intent,
                        repo_id=repo_id,
                        issue=IssueRef.of(name, int(issue["number"])),
                        actor=asked.actor,
                        source=Source.RECONCILE,
                        verb="run",
                        asked_ms=asked.at_ms,
                    )
                )
        await self._store.write(lambda conn: cursors.put(conn, key, max(since, horizon)))

    async def _triggers(self, repo_id: RepoId, name: str, issue: Mapping[str, Any]) -> list[tuple[str, LabelAdded]]:
        """(intent key, who asked and when) of everything about an open issue that asks for work, under the keys of the handlers."""
        number, found = int(issue["number"]), []
        if self._settings.trigger_label in {label.get("name") for label in issue.get("labels") or ()}:
            added = await self._desk.label_adder(name, number, self._settings.trigger_label)
            found += [(chatops.label_key(added.event_id), added)] if added else []
        if self._is_mine(issue):
            added = await self._desk.assigner(name, number)
            found += [(chatops.assignment_key(added.event_id), added)] if added else []
        if chatops.mentions(str(issue.get("body") or ""), self._desk.me_login):
            author = issue.get("user") or {}
            actor = Actor(int(author.get("id") or 0), str(author.get("login") or ""))
            found.append((chatops.mention_key(repo_id, number), LabelAdded(0, actor, _ms(issue.get("created_at")))))
        return found

    def _is_mine(self, issue: Mapping[str, Any]) -> bool:
        return any(person.get("id") == self._desk.me_id for person in issue.get("assignees") or ())

    async def _comments(self, repo_id: RepoId, name: str, *, begin: int, horizon: int) -> None:
        """Comments written since; one that was edited runs nothing, because its old text is not known."""
        key = f"reconcile:{repo_id}:comments"
        since = await self._cursor(key, begin)
        for comment in await self._forge.comments_since(name, _moment(since - OVERLAP_MS)):
            user = comment.get("user") or {}
            created = _ms(comment.get("created_at"))
            if user.get("id") in (None, self._desk.me_id) or comment.get("updated_at") != comment.get("created_at"):
                continue
            if not begin <= created + 1000 or created > horizon:
                continue
            number = _number(comment)
            if number is None:
                continue
            found = chatops.capped(chatops.parse(str(comment.get("body") or ""), self._verbs), self._settings.commands_per_comment)
            for item in found:
                await self._decide(
                    chatops.to_ask(
                        item,
                        comment_id=int(comment["id"]),
                        repo_id=repo_id,
                        issue=IssueRef.of(name, number),
                        actor=Actor(int(user["id"]), str(user.get("login") or "")),
                        asked_ms=created,
                        source=Source.RECONCILE,
                    )
                )
        await self._store.write(lambda conn: cursors.put(conn, key, max(since, horizon)))

    async def _decide(self, ask: Ask) -> None:
        if await self._decider.decide(ask) is not None and not self.polling:
            self._missed(1)
            log.warning("reconcile.missed", issue=str(ask.issue), verb=ask.verb, key=ask.key)

    async def _active(self, repo_id: RepoId, name: str) -> None:
        """A live sprint whose issue was closed or deleted, or whose label or assignment was taken back, while nobody told us."""
        live = await self._store.read(lambda conn: sprints.listing(conn, limit=200, repo_id=repo_id))
        for sprint in live:
            number = sprint.issue.number
            try:
                issue = await self._forge.issue(name, number)
            except NotFound:
                issue = {"state": "deleted"}
            actor = Actor(-1, "the forge")
            if issue.get("state") != "open":
                closed_ms = _ms(issue.get("closed_at") or issue.get("updated_at")) if issue.get("state") == "closed" else 0
                await self._cancel(repo_id, sprint.issue, actor, chatops.closed_key(repo_id, number, closed_ms), closed_ms, {})
            elif sprint.intent_key.startswith("label:") and self._settings.trigger_label not in {
                label.get("name") for label in issue.get("labels") or ()
            }:
                event = int(sprint.intent_key.removeprefix("label:"))
                options = {"only_trigger": sprint.intent_key}
                await self._cancel(repo_id, sprint.issue, actor, chatops.unlabel_key(event), self._now_ms(), options)
            elif sprint.intent_key.startswith("assignment:") and not self._is_mine(issue):
                event = int(sprint.intent_key.removeprefix("assignment:"))
                options = {"only_trigger": sprint.intent_key}
                await self._cancel(repo_id, sprint.issue, actor, chatops.unassign_key(event), self._now_ms(), options)

        await self._plans(repo_id, name, besides={sprint.issue.number for sprint in live})

    async def _plans(self, repo_id: RepoId, name: str, *, besides: Collection[int]) -> None:
        """A plan that waits for a person on an issue that was closed or deleted, while nobody told us."""
        waiting = await self._store.read(lambda conn: plans.waiting(conn, limit=200, repo_id=repo_id))
        for plan, _ in waiting:
            number = plan.issue.number
            if number in besides:
                continue
            try:
                issue = await self._forge.issue(name, number)
            except NotFound:
                issue = {"state": "deleted"}
            if issue.get("state") != "open":
                closed_ms = _ms(issue.get("closed_at") or issue.get("updated_at")) if issue.get("state") == "closed" else 0
                key = chatops.closed_key(repo_id, number, closed_ms)
                await self._cancel(repo_id, plan.issue, Actor(-1, "the forge"), key, closed_ms, {})

    async def _cancel(self, repo_id: RepoId, issue: IssueRef, actor: Actor, key: str, at_ms: int, options: Mapping[str, str]) -> None:
        ask = Ask(
            key=key,
            repo_id=repo_id,
            issue=issue,
            actor=actor,
            source=Source.COMMAND,
            verb="cancel",
            asked_ms=at_ms,
            options=options,
        )
        await self._decide(ask)

    async def _pulls(self, repo_id: RepoId, name: str) -> None:
        """What became of our open pull requests; those still open are looked at for reviews and red checks that no delivery announced."""
        numbers = await self._store.read(lambda conn: sprints.open_pulls_of(conn, repo_id))
        for number in numbers[:MAX_PULLS]:
            try:
                pull = await self._forge.pull(name, number)
            except NotFound:
                continue
            state = "merged" if pull.get("merged") else str(pull.get("state") or "open")
            now = self._now_ms()
            if state != "open":
                at_ms = _ms(pull.get("merged_at") if state == "merged" else pull.get("closed_at")) or now
                sha = str(pull.get("merge_commit_sha") or "") if state == "merged" else ""
                await self._take_in(PullFate(repo_id, number, str((pull.get("head") or {}).get("label") or ""), state, at_ms, sha))
            elif now - self._looked.get((repo_id, number), 0) >= LOOK_AGAIN_MS:
                self._looked[repo_id, number] = now
                for what in ("reviews", "checks"):
                    await self._take_in(PullNews(repo_id, what, number=number))


def _number(comment: Mapping[str, Any]) -> int | None:
    url = str(comment.get("issue_url") or comment.get("pull_request_url") or "")
    tail = url.rstrip("/").rpartition("/")[2]
    return int(tail) if tail.isdigit() else None


def _moment(ms: int) -> datetime:
    return datetime.fromtimestamp(max(0, ms) / 1000, UTC)


def _ms(text: object) -> int:
    try:
        return int(datetime.fromisoformat(str(text)).timestamp() * 1000)
    except ValueError:
        return 0
