"""One wish, one transaction: whatever asked, the intent, the decision, the sprint and the answer are written together, once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import replace

import structlog

from bot import chatops, feedback, guard
from bot.authorise import Allowed, Denied, Gate, NotYet
from bot.chatops import Command, Context, Fact, TextEdited
from bot.config import RepositorySettings, Settings
from bot.failpoints import Failpoints
from bot.gitea.errors import ForgeError, Moved, NotFound, may_recover
from bot.gitea.forge import Forge
from bot.models import (
    Actor,
    Ask,
    Comment,
    DispatchError,
    EventKind,
    IssueFacts,
    IssueRef,
    OpenPull,
    Permission,
    PullFacts,
    Reaction,
    Reply,
    RepoId,
    Source,
    SprintEvent,
    Verdict,
    text_hash,
)
from bot.repo_config import narrow
from bot.repositories import Repositories
from bot.store import Store, intents, sprints
from bot.store.issue_queue import IssueQueue
from bot.verdict import write

log = structlog.get_logger()

PERMISSION_SECONDS = 30.0
NOT_YET_HOURS = 24
TRUSTED_COMMENTS = 20


class AskAgain(DispatchError):
    """The forge cannot say now; nothing was started, ask again later."""


class Decider:
    """Takes every Ask, from webhook, reconciliation, schedule and terminal alike."""

    def __init__(
        self,
        store: Store,
        forge: Forge,
        *,
        settings: Settings,
        repositories: Repositories,
        commands: Mapping[str, Command],
        kick_queue: Callable[[], None],
        kick_projector: Callable[[], None],
        observe: Callable[[SprintEvent], None],
        count: Callable[[str, str], None],
        failpoint: Failpoints,
        now_ms: Callable[[], int],
    ) -> None:
        self._store = store
        self._forge = forge
        self._settings = settings
        self._repositories = repositories
        self._commands = commands
        self._kick_queue = kick_queue
        self._kick_projector = kick_projector
        self._observe = observe
        self._count = count
        self._failpoint = failpoint
        self._now_ms = now_ms
        self._levels: dict[tuple[int, int], tuple[float, Permission]] = {}
        self._gate = Gate(settings, self.permission_of)

    async def permission_of(self, repo_id: RepoId, repo: str, actor: Actor) -> Permission:
        """The live level of a person, asked at most every PERMISSION_SECONDS; raises ForgeError."""
        key = (repo_id, actor.id)
        known = self._levels.get(key)
        now = time.monotonic()
        if known is not None and now - known[0] < PERMISSION_SECONDS:
            return known[1]
        level = Permission.parse(await self._permission(repo_id, repo, actor))
        self._levels = {other: value for other, value in self._levels.items() if now - value[0] < PERMISSION_SECONDS}
        self._levels[key] = (now, level)
        return level

    async def _permission(self, repo_id: RepoId, repo: str, actor: Actor) -> str:
        """The forge answers by name only. A name that it does not know may be a former one, and says nothing where the repository is out of sight."""
        try:
            return await self._forge.permission(repo, actor.login)
        except NotFound:
            await self._repositories.must_be_seen(repo_id)
            login = await self._forge.login_of(actor.id)
            if not login or login.casefold() == actor.login.casefold():
                raise
        return await self._forge.permission(repo, login)

    async def recheck(self, repo_id: RepoId, repo: str, actor: Actor) -> Allowed | Denied | NotYet:
        """The gate again, with the level as it is at this very moment: before a sprint prepares, and before it pushes."""
        self._levels.pop((repo_id, actor.id), None)
        ask = Ask(
            key="",
            repo_id=repo_id,
            issue=IssueRef.of(repo, 0),
            actor=actor,
            source=Source.COMMAND,
            verb="run",
            asked_ms=self._now_ms(),
        )
        return await self._gate.judge(ask, Permission.WRITE)

    async def may_run(self, repo_id: RepoId, repo: str, actor: Actor) -> Allowed | Denied | NotYet:
        """Whether the gate would let this person start a sprint here; the level is at most PERMISSION_SECONDS old."""
        ref, repository = IssueRef.of(repo, 0), self._repositories.serves(repo_id, repo)
        ask = Ask(key="", repo_id=repo_id, issue=ref, actor=actor, source=Source.SCHEDULE, verb="run", asked_ms=self._now_ms())
        if repository is None:
            return NotYet("the repository is not served")
        return await self._gate.judge(ask, chatops.needed(self._commands["run"], "run", repository))

    async def text_edited(self, edit: TextEdited) -> None:
        """A text edited by somebody with write is frozen anew for the live sprint; anybody else's edit is met by `prepare`, which refuses."""
        active = await self._store.read(lambda conn: sprints.active(conn, edit.repo_id, edit.issue.number))
        if active is None or active.text_hash == edit.digest:
            return
        judgement = await self.recheck(edit.repo_id, edit.issue.full_name, edit.actor)
        if isinstance(judgement, NotYet):
            raise AskAgain(judgement.reason)
        if isinstance(judgement, Allowed):
            now = self._now_ms()
            await self._store.write(lambda conn: sprints.text_edited(conn, edit.repo_id, edit.issue.number, digest=edit.digest, now_ms=now))

    async def decide(self, ask: Ask, *, give_up: bool = False) -> Verdict | None:
        """Decides an Ask once; None where it was decided before. Raises AskAgain while the forge cannot say, unless `give_up` (24 h have passed)."""
        repository = self._repositories.serves(ask.repo_id, ask.issue.full_name)
        if repository is None:
            return None
        if await self._store.read(lambda conn: intents.get(conn, ask.key)) is not None:
            return None
        ask = replace(ask, issue=IssueRef.of(self._repositories.name_of(ask.repo_id, ask.issue.full_name), ask.issue.number))
        settings = self._settings
        try:
            settings, repository = await self._narrowed(ask, repository)
            ask, verdict_or_context = await self._prepare(ask, settings, repository)
        except AskAgain:
            if not give_up:
                raise
            verdict_or_context = Verdict(
                "error", "the forge could not be asked for a day", Reply("forge_silent", {"hours": NOT_YET_HOURS}, Reaction.CONFUSED)
            )
        verdict = await self._store.write(lambda conn: write(conn, ask, repository, verdict_or_context, settings, self._now_ms()))
        if verdict is None:
            return None
        self._failpoint("inbox.decided")
        await self._announce(ask, verdict)
        self._count(ask.verb or "unreadable", verdict.result)
        self._kick_queue()
        self._kick_projector()
        log.info("decided", issue=str(ask.issue), verb=ask.verb, result=verdict.result, reason=verdict.reason, sprint=verdict.sprint_id)
        return verdict

    async def _announce(self, ask: Ask, verdict: Verdict) -> None:
        if verdict.sprint_id is None:
            return
        sprint = await self._store.read(lambda conn: sprints.get(conn, verdict.sprint_id or ""))
        if sprint is not None and sprint.intent_key == ask.key:
            self._observe(SprintEvent(EventKind.ENQUEUED, sprint.id, sprint.queued_ms, {"source": sprint.source}))

    async def _narrowed(self, ask: Ask, repository: RepositorySettings) -> tuple[Settings, RepositorySettings]:
        """The settings as the repository's own file narrows them."""
        if chatops.is_forge_act(ask):
            return self._settings, repository
        try:
            config = await self._repositories.config(ask.repo_id)
        except ForgeError as error:
            if ask.actor.is_terminal:
                return self._settings, repository
            raise AskAgain(str(error)) from error
        return narrow(self._settings, repository, config)

    async def _prepare(self, ask: Ask, settings: Settings, repository: RepositorySettings) -> tuple[Ask, Verdict | Context]:
        """Everything the decision needs from the forge, asked before the transaction opens; on a pull request of ours the Ask is one about its issue."""
        off = chatops.unheard(ask, settings, repository)
        if off is not None:
            return ask, off
        command = None if ask.error else self._commands.get(ask.verb)
        needs = Permission.READ if command is None else chatops.needed(command, ask.verb, repository)
        wants: frozenset[Fact] = frozenset() if command is None else command.wants | command.likes
        judgement, facts = await asyncio.gather(self._gate.judge(ask, needs), self._facts(ask))
        if isinstance(judgement, NotYet):
            raise AskAgain(judgement.reason)
        if judgement.operator_error:
            log.warning("authorise.operator_error", error=judgement.operator_error, issue=str(ask.issue))
        if isinstance(facts, IssueFacts) and facts.pull is not None:
            ask, facts = await self._of_the_issue(ask, facts.pull)
        if isinstance(judgement, Denied):
            return ask, Verdict("denied", judgement.reason, judgement.reply)
        if isinstance(facts, IssueFacts):
            facts = await self._told(ask, self._wanted(ask, facts, wants))
        if isinstance(facts, Verdict):
            return ask, facts
        author = Permission.NONE
        if facts is not None and Fact.AUTHOR in wants and self._author_matters(ask, facts):
            author = await self._author_level(ask, facts)
        return ask, Context(
            ask=ask,
            facts=facts,
            permission=judgement.permission,
            queue=_NoQueue(),
            settings=settings,
            repository=repository,
            now_ms=self._now_ms(),
            commands=self._commands,
            author_permission=author,
        )

    async def _of_the_issue(self, ask: Ask, pull: PullFacts) -> tuple[Ask, IssueFacts | Verdict | None]:
        """The same wish, about the issue of our pull request, and that issue; the delivery showed the pull request's text, not the issue's."""
        issue = IssueRef.of(ask.issue.full_name, pull.issue)
        about = replace(ask, issue=issue, pull=pull.number, delivered_hash="")
        facts = await self._facts(about)
        if isinstance(facts, Verdict) and facts.result == "error" and not facts.reply.reaction:
            return about, replace(facts, reply=Reply("issue_gone", {"issue": pull.issue}, Reaction.CONFUSED))
        return about, replace(facts, pull=pull) if isinstance(facts, IssueFacts) else facts

    def _author_matters(self, ask: Ask, facts: IssueFacts) -> bool:
        if ask.actor.is_terminal or facts.author_id == ask.actor.id:
            return False
        return ask.delivered_hash != text_hash(facts.title, facts.body)

    async def _author_level(self, ask: Ask, facts: IssueFacts) -> Permission:
        try:
            return await self.permission_of(ask.repo_id, ask.issue.full_name, Actor(facts.author_id, facts.author_login))
        except ForgeError as error:
            if may_recover(error):
                raise AskAgain(str(error)) from error
            return Permission.NONE

    async def _facts(self, ask: Ask) -> IssueFacts | Verdict | None:
        """The issue as it is now."""
        return await self._told(ask, self._read_issue(ask.repo_id, ask.issue))

    async def _told(self, ask: Ask, asked: Awaitable[IssueFacts]) -> IssueFacts | Verdict | None:
        """What the forge answers; None where only the terminal asks and the forge is silent; a Verdict where the issue is gone."""
        try:
            return await asked
        except Moved:
            try:
                await self._repositories.resolve(ask.repo_id)
            except ForgeError as error:
                raise AskAgain(str(error)) from error
            raise AskAgain("the repository has another name; asking again under it") from None
        except NotFound:
            try:
                await self._repositories.must_be_seen(ask.repo_id)
            except ForgeError as error:
                if ask.actor.is_terminal or chatops.is_forge_act(ask):
                    return None
                raise AskAgain(str(error)) from error
            command = self._commands.get(ask.verb)
            return Verdict("error", "the issue is gone", Reply()) if command is not None and command.wants else None
        except ForgeError as error:
            if ask.actor.is_terminal or chatops.is_forge_act(ask):
                return None
            if may_recover(error):
                raise AskAgain(str(error)) from error
            return Verdict("error", f"the forge does not show the issue: {error}", Reply(reaction=Reaction.CONFUSED))

    async def _wanted(self, ask: Ask, facts: IssueFacts, wants: Collection[Fact]) -> IssueFacts:
        """With what the command wants to know besides; nothing of it where the issue is closed and nothing can start."""
        repo, number = ask.issue.full_name, ask.issue.number
        if Fact.WORK in wants and not facts.is_pull and facts.state == "open":
            pulls, blockers = await self.other_work(ask.repo_id, repo, number)
            facts = replace(facts, pulls=pulls, blockers=blockers)
        if Fact.COMMENTS in wants:
            facts = replace(facts, comments=tuple(await self.trusted_comments(ask.repo_id, repo, number)))
        return facts

    async def other_work(self, repo_id: RepoId, repo: str, number: int) -> tuple[tuple[OpenPull, ...], tuple[str, ...]]:
        """Open pull requests that do this work, and open issues that it depends on."""
        me, pulls, dependencies = await asyncio.gather(
            self._forge.me(), self._forge.pulls(repo, "open"), self._forge.dependencies(repo, number)
        )
        return guard.work_of(pulls, me_id=int(me["id"]), repo_id=repo_id, issue=number), guard.blockers(dependencies, repo)

    async def trusted_comments(self, repo_id: RepoId, repo: str, number: int) -> list[Comment]:
        """The newest comments by people with write, oldest first: only they, or people with write, can have written them."""
        me = (await self._forge.me())["id"]
        found: list[Comment] = []
        for comment in reversed(await self._forge.comments(repo, number)):
            user, body = comment.get("user") or {}, str(comment.get("body") or "")
            if user.get("id") == me or not body or chatops.has_marker(body):
                continue
            actor = Actor(int(user.get("id") or -1), str(user.get("login") or ""))
            try:
                level = await self.permission_of(repo_id, repo, actor)
            except ForgeError as error:
                if may_recover(error):
                    raise
                continue
            if level >= Permission.WRITE:
                found.append(Comment(actor.login, body, str(comment.get("created_at") or "")))
            if len(found) >= TRUSTED_COMMENTS:
                break
        return found[::-1]

    async def _read_issue(self, repo_id: int, ref: IssueRef) -> IssueFacts:
        issue, record = await asyncio.gather(self._forge.issue(ref.full_name, ref.number), self._repositories.record(repo_id))
        branch, ours = "", None
        if issue.get("pull_request") is not None:
            pull = await self._forge.pull(ref.full_name, ref.number)
            head = pull.get("head") or {}
            branch = str(head.get("label") or "") if head.get("repo_id") == repo_id else ""
            ours = feedback.pull_facts(pull, repo_id=repo_id, me_id=int((await self._forge.me())["id"]))
        author = issue.get("user") or {}
        return IssueFacts(
            title=str(issue.get("title") or ""),
            body=str(issue.get("body") or ""),
            author_id=int(author.get("id") or 0),
            author_login=str(author.get("login") or ""),
            state=str(issue.get("state") or ""),
            is_pull=issue.get("pull_request") is not None,
            labels=tuple(str(label["name"]) for label in issue.get("labels") or ()),
            head_branch=branch,
            archived=bool(record.get("archived")),
            pull=ours,
        )


class _NoQueue(IssueQueue):
    """Stands in the Context until the transaction is open."""

    def __init__(self) -> None:
        """Nothing is bound yet."""
