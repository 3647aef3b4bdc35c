"""The choreography of one sprint: prepare, work, vet, publish, settle; each step claims first, looks before it creates, and passes when repeated."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import structlog
from sqlalchemy.engine import Connection

from bot import feedback, guard, prompt, replies, rounds
from bot.agents import AgentEnd, AgentJob, AgentResult, Engine
from bot.authorise import Denied, NotYet
from bot.config import RepositorySettings, Settings
from bot.decide import Decider
from bot.failpoints import Failpoints
from bot.feedback import Feedback
from bot.gitea.errors import Forbidden, ForgeError, Moved, NotFound, may_recover
from bot.gitea.forge import Forge
from bot.lease import Fenced, Lease
from bot.models import (
    REVISES_PLAN,
    Actor,
    EventKind,
    FailureReason,
    IssueRef,
    Json,
    ObstacleKind,
    Outcome,
    OutcomeKind,
    Permission,
    Plan,
    PlanState,
    PullFacts,
    SprintEvent,
    SprintId,
    SprintState,
    SprintView,
    Stop,
    WaitingReason,
    text_hash,
)
from bot.repo_config import narrow
from bot.repositories import Repositories
from bot.sandbox import Sandbox, SandboxUnavailable
from bot.store import Store, follow_ups, intents, is_away, plans, skips, sprints, steps
from bot.trajectory import StoredTrajectory
from bot.workspace import GitFailed, GitRefused, GitUnavailable, Policy, Refusal, TreeRefused, Workspaces

log = structlog.get_logger()

DAY_MS = 86_400_000
FIRST_BACKOFF_MS = 2_000
LAST_BACKOFF_MS = 300_000
FLAG_SECONDS = 0.5
RENEW_SECONDS = 30.0
# What a step returned is recorded by the engine a moment after it ended.
RECORD_SECONDS = 0.2
FREE_ADMISSIONS = 3
AWAY_SECONDS = 1.0
LAST_BRANCH = 9
ROUND_SUMMARY = 600
SETUP_SECONDS = 900.0
SETUP_OUTPUT = 1_000
AGENTS_BYTES = 20_000
CHECK_OUTPUT = 4_000
SUMMARY = 8_000
# Less than what a prompt takes, so that the plan that was shown is the plan that is carried out.
PLAN = 16_000
HOUR_MS = 3_600_000
LEAST_FREE_BYTES = 512 * 1024 * 1024
DISK_RETRY_MS = 60_000
NEXT: Json = {"go": "next"}
GONE: Json = {"go": "gone"}


class Stopped(Exception):
    """The sprint ends here, in settle or requeue; carries what the workflow returns."""

    def __init__(self, end: Json) -> None:
        self.end = end
        super().__init__(str(end))


def end_with(kind: OutcomeKind, detail: str, reason: FailureReason | str = "") -> Stopped:
    """Ends in settle(outcome)."""
    return Stopped({"go": "settle", "kind": kind, "reason": reason, "detail": detail})


def requeue(reason: WaitingReason, note: str, *, not_before_ms: int = 0, new_attempt: bool = False) -> Stopped:
    """The end that goes back to the queue."""
    return Stopped({"go": "requeue", "reason": reason, "note": note, "not_before_ms": not_before_ms, "new_attempt": new_attempt})


@dataclass(frozen=True, slots=True)
class Kit:
    """What a sprint works with, made by the composition root."""

    store: Store
    forge: Forge
    repositories: Repositories
    decider: Decider
    workspaces: Workspaces
    sandbox: Sandbox
    engines: Mapping[str, Engine]
    settings: Settings
    lease: Lease
    links: replies.Links
    scrub: Callable[[str], str]
    observe: Callable[[SprintEvent], None]
    kick_queue: Callable[[], None]
    kick_projector: Callable[[], None]
    failpoint: Failpoints
    now_ms: Callable[[], int]
    login: str
    salt: str
    sandbox_refusal: Callable[[], str]


class SprintStages:
    """The five steps, as `bot.engine.Stages`."""

    def __init__(self, kit: Kit) -> None:
        self.kit = kit
        self._tasks: dict[str, asyncio.Task[AgentResult]] = {}
        self._stops: dict[str, str] = {}
        self._halting = False
        self._stages_in_flight = 0
        self._parked: set[asyncio.Task[Any]] = set()
        self._fetched: set[tuple[str, int]] = set()

    async def watch_stops(self) -> None:
        """Tells running agents of their stop flags, also those that other processes set; until cancelled."""
        kit = self.kit
        while True:
            await asyncio.sleep(FLAG_SECONDS)
            if not self._tasks:
                continue
            try:
                flags = await kit.store.read(lambda conn: sprints.flags(conn, kit.lease.executor_id))
            except Exception:
                log.exception("sprint.flags")
                continue
            for sprint_id, stop in flags.items():
                self.tell(sprint_id, stop)

    def tell(self, sprint_id: str, stop: str) -> None:
        """A stop flag for a sprint of this process: cancel and requeue end its agent now, drain after the step in flight."""
        self._stops[sprint_id] = stop
        task = self._tasks.get(sprint_id)
        if task is not None and stop != Stop.DRAIN:
            task.cancel()

    async def halt(self, seconds: float) -> None:
        """Shutdown: no step begins, agents end, effects in flight get `seconds` to be recorded; what is parked stays for whoever takes over."""
        self._halting = True
        for task in self._tasks.values():
            task.cancel()
        deadline = time.monotonic() + seconds
        while self._stages_in_flight and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        await asyncio.sleep(RECORD_SECONDS)

    async def release(self) -> None:
        """Lets go of parked steps, after the engine was closed and can record nothing of them any more."""
        for task in self._parked:
            task.cancel()
        await asyncio.gather(*self._parked, return_exceptions=True)

    async def _park(self) -> NoReturn:
        """Holds a step for ever, so that the engine records nothing of it: the row stays pending and is taken over."""
        task = asyncio.current_task()
        if task is not None:
            self._parked.add(task)
        self._stages_in_flight -= 1
        while True:
            await asyncio.sleep(3600)

    async def prepare(self, sprint_id: str, k: int) -> Json:
        """Facts only: who may, what the issue says, where to begin; no path, so that any host can go on."""
        return await self._stage("prepare", sprint_id, k, self._prepare)

    async def work(self, sprint_id: str, k: int) -> Json:
        """The agent, from its first step or from the step in flight."""
        return await self._stage("work", sprint_id, k, self._work)

    async def vet(self, sprint_id: str, k: int) -> Json:
        """The tree is judged: what changed, whether the policy lets it through, what the checks say."""
        return await self._stage("vet", sprint_id, k, self._vet)

    async def publish(self, sprint_id: str, k: int) -> Json:
        """Commit, push, pull request; each looked up before it is made."""
        return await self._stage("publish", sprint_id, k, self._publish)

    async def _stage(self, name: str, sprint_id: str, k: int, body: Callable[[SprintView, int], Any]) -> Json:
        kit = self.kit
        started = time.monotonic()
        self._stages_in_flight += 1
        if self._halting:
            await self._park()
        try:
            end = await self._while_away(partial(self._end_of_stage, name, sprint_id, k, body))
        finally:
            if asyncio.current_task() not in self._parked:
                self._stages_in_flight -= 1
        if end["go"] != "gone":
            seconds = time.monotonic() - started
            kit.observe(SprintEvent(EventKind.STAGE_ENDED, SprintId(sprint_id), kit.now_ms(), {"stage": name, "seconds": seconds}))
        if end["go"] == "next" and name in ("prepare", "vet"):
            kit.failpoint(f"{name}.done")
        return end

    async def _while_away(self, step: Callable[[], Awaitable[Json]]) -> Json:
        """A step that meets a database that is away begins again when it is back; it fails for nothing of its own."""
        while True:
            try:
                return await step()
            except Exception as error:
                if not is_away(error):
                    raise
                log.warning("sprint.database_away", error=str(error))
            if self._halting:
                await self._park()
            await asyncio.sleep(AWAY_SECONDS)

    async def _end_of_stage(self, name: str, sprint_id: str, k: int, body: Callable[[SprintView, int], Any]) -> Json:
        try:
            await self._held()
            view, crashes = await self._claim(sprint_id, k)
            if view is None:
                return GONE
            if crashes >= self.kit.settings.queue.max_attempts:
                raise end_with(OutcomeKind.FAILED, f"the process that ran it died {crashes} times", FailureReason.DIED)
            await body(view, k)
        except Stopped as stopped:
            return stopped.end
        except Exception as error:
            if is_away(error):
                raise
            return await self._end_by_error(name, sprint_id, error)
        return NEXT

    async def _end_by_error(self, name: str, sprint_id: str, error: Exception) -> Json:
        """What an error of a step means for its sprint: later, refused, or failed with its reason."""
        kit = self.kit
        match error:
            case Fenced():
                log.warning("sprint.fenced", sprint=sprint_id, stage=name, error=str(error))
                return GONE
            case GitUnavailable():
                return await self._later(sprint_id, f"git: {error}")
            case GitRefused():
                return await self._git_refused(sprint_id, name, error)
            case Moved():
                await self._resolve(sprint_id)
                return await self._later(sprint_id, str(error))
            case ForgeError() | TimeoutError() | ConnectionError():
                if may_recover(error):
                    return await self._later(sprint_id, str(error))
                reason = FailureReason.PR if name == "publish" else FailureReason.CLONE
                return end_with(OutcomeKind.FAILED, kit.scrub(str(error)), reason).end
            case TreeRefused():
                return end_with(OutcomeKind.REFUSED, kit.scrub(str(error)), "policy").end
            case SandboxUnavailable():
                return end_with(OutcomeKind.FAILED, kit.scrub(str(error)), FailureReason.SANDBOX).end
        log.error("sprint.failed", sprint=sprint_id, stage=name, exc_info=error)
        return end_with(OutcomeKind.FAILED, kit.scrub(f"{type(error).__name__}: {error}"), FailureReason.INTERNAL).end

    async def _git_refused(self, sprint_id: str, stage: str, error: GitRefused) -> Json:
        """A revoked token or a new address may be mended, a head that moved is looked at again; the rest is final."""
        if error.kind in (Refusal.AUTH, Refusal.MOVED):
            if error.kind is Refusal.MOVED:
                await self._resolve(sprint_id)
            return await self._later(sprint_id, str(error))
        if error.kind is Refusal.LEASE:
            return await self._later(sprint_id, str(error), why="the branch moved while it was pushed")
        if error.kind is Refusal.ARCHIVED:
            return end_with(OutcomeKind.REFUSED, "the repository is archived").end
        reason = FailureReason.PUSH if stage == "publish" else FailureReason.CLONE
        return end_with(OutcomeKind.FAILED, self.kit.scrub(str(error)), reason).end

    async def _held(self) -> None:
        """No effect starts while the lease is not held; an outage of the database is waited out, a reaped process exits elsewhere."""
        await self.kit.lease.wait_held()

    async def _claim(self, sprint_id: str, k: int) -> tuple[SprintView | None, int]:
        """The sprint, if this process may run it, and how often a process died that did."""
        kit = self.kit

        def write(conn: Connection) -> tuple[SprintView | None, int]:
            mine = sprints.claim(conn, sprint_id, k, me=kit.lease.executor_id, node_id=kit.lease.node_id, timeout_ms=kit.lease.timeout_ms)
            return (sprints.get(conn, sprint_id), sprints.field(conn, sprint_id, "crashes").crashes) if mine else (None, 0)

        return await kit.store.write(write)

    async def _later(self, sprint_id: str, note: str, *, why: str = "the forge does not answer") -> Json:
        """The forge cannot be reached: back to the queue with what was done kept, for a day; then it has failed."""
        kit = self.kit
        view = await kit.store.read(lambda conn: sprints.get(conn, sprint_id))
        now = kit.now_ms()
        if view is None:
            return GONE
        if now - max(view.queued_ms, view.started_ms) > DAY_MS:
            return end_with(OutcomeKind.FAILED, kit.scrub(f"the forge could not be used for a day: {note}"), FailureReason.AUTH).end
        delay = min(LAST_BACKOFF_MS, FIRST_BACKOFF_MS * 2 ** min(view.admitted_n, 12))
        return requeue(WaitingReason.REQUEUED, kit.scrub(f"{why}: {note}"), not_before_ms=now + delay).end

    async def _resolve(self, sprint_id: str) -> None:
        view = await self.kit.store.read(lambda conn: sprints.get(conn, sprint_id))
        if view is not None:
            with contextlib.suppress(ForgeError):
                await self.kit.repositories.resolve(view.repo_id)

    def _repo(self, view: SprintView) -> tuple[str, RepositorySettings]:
        """The address of today and the settings."""
        repository = self.kit.repositories.serves(view.repo_id, view.issue.full_name)
        if repository is None:
            raise end_with(OutcomeKind.REFUSED, "this repository is not in the configuration any more")
        return self.kit.repositories.name_of(view.repo_id, view.issue.full_name), repository

    async def _advance(self, view: SprintView, k: int, to: SprintState, before: Iterable[SprintState], **values: Any) -> None:
        kit = self.kit
        moved = await kit.store.write(
            lambda conn: sprints.advance(
                conn, view.id, k, me=kit.lease.executor_id, to=to, before=list(before), now_ms=kit.now_ms(), **values
            )
        )
        if not moved:
            await self._why_not(view)
        kit.kick_projector()

    async def _why_not(self, view: SprintView) -> None:
        """A change of state that met no row: stopped, or not ours any more."""
        now = await self.kit.store.read(lambda conn: sprints.get(conn, view.id))
        if now is not None and now.stop is not None:
            raise self._stop_end(now.stop, now.stop_by)
        raise Fenced(f"sprint {view.id} is not where this step expects it")

    def _stop_end(self, stop: str, by: str) -> Stopped:
        if stop == Stop.CANCEL:
            return end_with(OutcomeKind.CANCELLED, f"cancelled by {by}" if by else "cancelled")
        if stop == Stop.STALLED:
            return end_with(OutcomeKind.FAILED, "it took no step for a long time, again after it was begun anew", FailureReason.STALLED)
        return requeue(WaitingReason.REQUEUED, f"requeued by {by}" if by else "requeued")

    def _check_stop(self, view: SprintView) -> None:
        if view.stop is not None:
            raise self._stop_end(view.stop, view.stop_by)

    async def _update(self, view: SprintView, k: int, *, show_in_ms: int | None = None, **values: Any) -> None:
        kit = self.kit
        mine = await kit.store.write(
            lambda conn: sprints.update(conn, view.id, k, me=kit.lease.executor_id, now_ms=kit.now_ms(), show_in_ms=show_in_ms, **values)
        )
        if not mine:
            raise Fenced(f"sprint {view.id} belongs to another process")

    async def _allowed(self, view: SprintView, repo: str) -> None:
        """The person who asked still has the right; a definite no refuses, a silent forge is asked again later."""
        if view.requester_id == 0:
            return
        judgement = await self.kit.decider.recheck(view.repo_id, repo, Actor(view.requester_id, view.requester))
        if isinstance(judgement, NotYet):
            raise Stopped(await self._later(view.id, judgement.reason))
        if isinstance(judgement, Denied):
            raise end_with(OutcomeKind.REFUSED, f"{view.requester} may not ask for this any more: {judgement.reason}")

    async def _prepare(self, view: SprintView, k: int) -> None:
        kit = self.kit
        self._check_stop(view)
        repo, repository = self._repo(view)
        first = not view.started_ms
        values: dict[str, Any] = {"sandbox": kit.sandbox.level}
        if first:
            values["started_ms"] = kit.now_ms()
        await self._advance(view, k, SprintState.PREPARING, [SprintState.ADMITTED], **values)
        if first:
            waited = (kit.now_ms() - view.queued_ms) / 1000
            kit.observe(
                SprintEvent(
                    EventKind.STARTED,
                    view.id,
                    kit.now_ms(),
                    {"source": view.source, "waited_seconds": waited, "agent": kit.settings.engine},
                )
            )
        if kit.workspaces.disk_free() < LEAST_FREE_BYTES:
            raise requeue(WaitingReason.REQUEUED, "the disk is nearly full", not_before_ms=kit.now_ms() + DISK_RETRY_MS)
        refusal = kit.sandbox_refusal()
        if refusal:
            raise end_with(OutcomeKind.FAILED, refusal, FailureReason.SANDBOX)
        _, record, issue, config = await asyncio.gather(
            self._allowed(view, repo),
            kit.repositories.record(view.repo_id),
            self._issue(repo, view.issue.number),
            kit.repositories.config(view.repo_id, fresh=True),
        )
        if list(view.config_faults) != config.told():
            await self._update(view, k, show_in_ms=0, config_faults=config.told())
        _, repository = narrow(kit.settings, repository, config)
        if record.get("archived"):
            raise end_with(OutcomeKind.REFUSED, "the repository is archived")
        if record.get("empty"):
            raise end_with(OutcomeKind.FAILED, "the repository is empty: push a first commit, then retry", FailureReason.CLONE)
        if record.get("has_pull_requests") is False:
            raise end_with(OutcomeKind.FAILED, "pull requests are switched off in this repository's settings", FailureReason.PR)
        if issue.get("state") != "open":
            raise end_with(OutcomeKind.CANCELLED, "the issue was closed")
        digest = await self._frozen(view, repo, issue)
        base = view.base_branch or repository.base_branch or str(record.get("default_branch") or "main")
        await self._no_other_work(view, repo, issue, first=first)
        again: dict[str, Any] = {}
        if view.follows_pull:
            base, branch, base_sha, lease_sha, again = await self._begin_at_pull(view, repo)
        else:
            branch, base_sha, lease_sha = await self._begin_at(view, repo, base)
        await self._update(
            view,
            k,
            text_hash=digest,
            title=str(issue.get("title") or "")[:255],
            base_branch=base,
            base_sha=base_sha,
            branch=branch,
            lease_sha=lease_sha,
            engine=kit.settings.engine,
            **again,
        )
        self._fetched.add((view.id, k))

    async def _issue(self, repo: str, number: int) -> Mapping[str, Any]:
        try:
            return await self.kit.forge.issue(repo, number)
        except NotFound:
            raise end_with(OutcomeKind.CANCELLED, "the issue was deleted") from None

    async def _frozen(self, view: SprintView, repo: str, issue: Mapping[str, Any]) -> str:
        """The hash of the text that runs. Text changed since approval runs only if none but people with write could have changed it.

        A plan was approved for one text: until the work begins, another one asks again, whoever wrote it.
        """
        digest = text_hash(str(issue.get("title") or ""), str(issue.get("body") or ""))
        plan = await self._approved_plan(view)
        if plan is not None and not view.steps and digest not in (plan.text_hash, plan.told_hash):
            detail = "The issue was edited after its plan was approved, so nothing was started."
            raise Stopped({"go": "settle", "kind": OutcomeKind.PLANNED, "reason": PlanState.WAITING, "detail": detail, "text_hash": digest})
        if digest == view.text_hash:
            return digest
        author = issue.get("user") or {}
        actor = Actor(int(author.get("id") or -1), str(author.get("login") or ""))
        if actor.id == view.requester_id:
            return digest
        level = Permission.NONE
        with contextlib.suppress(NotFound, Forbidden):
            level = await self.kit.decider.permission_of(view.repo_id, repo, actor)
        if level >= Permission.WRITE:
            return digest
        raise end_with(
            OutcomeKind.REFUSED,
            f"the issue's text was changed after it was approved, and its author {actor.login} has no write access. "
            "Read it again and ask again",
        )

    async def _approved_plan(self, view: SprintView) -> Plan | None:
        """The plan that this sprint carries out, where it does."""
        return await self.kit.store.read(lambda conn: plans.get(conn, view.follows_plan)) if view.follows_plan else None

    async def _no_other_work(self, view: SprintView, repo: str, issue: Mapping[str, Any], *, first: bool) -> None:
        """What speaks against beginning, unless somebody asked with `force`; once begun, only the work of a person counts."""
        kit = self.kit
        options = (await kit.store.read(lambda conn: sprints.field(conn, view.id, "options"))).options
        if guard.FORCE in options:
            return
        pulls, blockers = await kit.decider.other_work(view.repo_id, repo, view.issue.number)
        skip = await kit.store.read(lambda conn: skips.get(conn, view.repo_id, view.issue.number))
        found = guard.obstacles(
            labels=[str(label.get("name") or "") for label in issue.get("labels") or ()],
            # One of ours is what the sprint goes on with: it was weighed when somebody asked.
            pulls=[pull for pull in pulls if not pull.own],
            blockers=blockers,
            skip=skip,
            skip_labels=kit.settings.skip_labels,
            source=view.source,
        )
        found = found if first else tuple(one for one in found if one.kind is ObstacleKind.PULL)
        if found:
            raise end_with(OutcomeKind.REFUSED, kit.scrub("; ".join(map(guard.in_words, found))), replies.OTHER_WORK)

    async def _begin_at(self, view: SprintView, repo: str, base: str) -> tuple[str, str, str]:
        """(branch, base sha, lease sha): our branch if every head on it was recorded by us, else the next name that is free of persons."""
        kit = self.kit
        stem = f"dispatch/issue-{view.issue.number}"
        names = [stem, *(f"{stem}-{n}" for n in range(2, LAST_BRANCH + 1))]
        heads = await kit.workspaces.fetch(view.id, repo, [base, *names])
        if base not in heads:
            raise end_with(OutcomeKind.FAILED, f"there is no branch `{base}` to begin at", FailureReason.CLONE)
        ours = await kit.store.read(lambda conn: sprints.heads_recorded(conn, view.repo_id, view.issue.number))
        if view.branch and view.head_sha and heads.get(view.branch, view.head_sha) == view.head_sha:
            return view.branch, view.base_sha or heads[base], heads.get(view.branch, "")
        for name in names:
            if name not in heads or heads[name] in ours:
                return name, heads[base], heads.get(name, "")
        raise end_with(OutcomeKind.FAILED, f"every branch from {stem} to {names[-1]} has commits of other people", FailureReason.PUSH)

    async def _own_pull(self, view: SprintView, repo: str) -> tuple[PullFacts, Mapping[str, Any]]:
        """The open pull request that this sprint goes on with; a follow-up ends quietly where that is over."""
        number = view.follows_pull
        try:
            record = await self.kit.forge.pull(repo, number)
        except NotFound:
            raise end_with(OutcomeKind.CANCELLED, f"pull request #{number} is gone") from None
        pull = feedback.pull_facts(record, repo_id=view.repo_id, me_id=int((await self.kit.forge.me())["id"]))
        if pull is None or pull.issue != view.issue.number:
            raise end_with(OutcomeKind.REFUSED, f"pull request #{number} is not mine any more")
        if pull.state != "open":
            raise end_with(OutcomeKind.CANCELLED, f"pull request #{number} is {pull.state}: nothing was pushed")
        return pull, record

    async def _begin_at_pull(self, view: SprintView, repo: str) -> tuple[str, str, str, str, dict[str, Any]]:
        """(base, branch, begin, lease, more): the head of the pull request, a person's commits included; once begun it stays while that stands.

        Where somebody pushed meanwhile, what was done is thrown away and begun again on top of it.
        """
        kit = self.kit
        pull, _ = await self._own_pull(view, repo)
        heads = await kit.workspaces.fetch(view.id, repo, [pull.base_branch, pull.head_branch])
        tip = heads.get(pull.head_branch)
        if tip is None or pull.base_branch not in heads:
            raise end_with(OutcomeKind.CANCELLED, f"the branch of pull request #{pull.number} is gone: nothing was pushed")
        begun = bool(view.base_sha)
        kept = begun and tip in (view.base_sha, view.head_sha)
        attempt = view.attempt + (1 if begun and not kept else 0)
        if attempt > kit.settings.queue.max_attempts:
            raise end_with(OutcomeKind.FAILED, "the branch was moved by somebody else each time", FailureReason.PUSH)
        await kit.store.write(lambda conn: follow_ups.begin(conn, view.id, repo_id=view.repo_id, pull=pull.number, afresh=not kept))
        again: dict[str, Any] = {} if attempt == view.attempt else {"attempt": attempt, "head_sha": ""}
        return pull.base_branch, pull.head_branch, view.base_sha if kept else tip, tip, again

    async def _feedback(self, view: SprintView, repo: str) -> Feedback:
        """What the follow-up takes along, gathered once an attempt, so that the agent is told the same after a restart."""
        kit = self.kit
        stored = await kit.store.read(lambda conn: follow_ups.feedback(conn, view.id))
        if stored is not None:
            return Feedback.load(stored)
        number = view.follows_pull

        async def may(actor: Actor) -> bool:
            with contextlib.suppress(NotFound, Forbidden):
                return await kit.decider.permission_of(view.repo_id, repo, actor) >= Permission.WRITE
            return actor.id == view.requester_id

        earlier = await kit.store.read(lambda conn: follow_ups.earlier(conn, view.repo_id, number))
        found = await feedback.gather(kit.forge, repo, number, may=may, earlier=earlier)
        failures = feedback.red(await kit.forge.combined_status(repo, view.base_sha))
        failures = await feedback.with_logs(kit.forge, repo, view.base_sha, failures, scrub=kit.scrub)
        found = replace(found, failures=tuple(failures[: feedback.FAILURES]))
        over = rounds.moot(view, found)
        if over:
            raise end_with(OutcomeKind.CANCELLED, f"{over}: nothing was changed")
        await kit.store.write(lambda conn: rounds.take_along(conn, view, found, kit.now_ms()))
        return found

    async def _work(self, view: SprintView, k: int) -> None:
        kit = self.kit
        self._check_stop(view)
        await self._advance(view, k, SprintState.WORKING, [SprintState.PREPARING])
        repo, _ = self._repo(view)
        attempt, workdir = await self._ensure_workspace(view, k, repo)
        deadline_ms = await self._deadline(view)
        _, repository = await self._narrowed(view)
        job = await self._job(view, k, repo, attempt, workdir, deadline_ms, repository)
        result = await self._run_agent(view, job)
        if self._halting and result.end is AgentEnd.STOPPED:
            await self._park()
        stop = self._stops.pop(view.id, None)
        if stop is not None and (stop != Stop.CANCEL or result.end is AgentEnd.STOPPED):
            raise self._stop_end(stop, "")
        if result.end is AgentEnd.PROVIDER:
            why = WaitingReason.PROVIDER if result.until_ms else WaitingReason.PAUSED
            raise requeue(why, kit.scrub(result.text) or "no provider can be called", not_before_ms=result.until_ms)
        if result.end is AgentEnd.STOPPED:
            raise requeue(WaitingReason.REQUEUED, "stopped by the service")
        await self._update(
            view,
            k,
            agent_end=result.end,
            agent_reason=result.limit or (result.reason or ""),
            summary=prompt.clean(kit.scrub(result.text), cap=PLAN) if view.plans else kit.scrub(result.text)[:SUMMARY],
            doing="",
        )
        if view.plans:
            raise await self._planned(view)

    async def _planned(self, view: SprintView) -> Stopped:
        """A planning sprint ends here: there is nothing to judge but that there is a plan, and its tree is thrown away."""
        ended = await self.kit.store.read(lambda conn: sprints.field(conn, view.id, "agent_end", "agent_reason", "summary"))
        if ended.agent_end == AgentEnd.LIMIT:
            return end_with(OutcomeKind.BUDGET, _why(ended.agent_end, ended.agent_reason), ended.agent_reason)
        if ended.agent_end == AgentEnd.FINISHED and ended.summary.strip():
            return end_with(OutcomeKind.PLANNED, "", PlanState.WAITING)
        without = "the agent ended without a plan"
        reason = ended.agent_reason or FailureReason.MODEL_OUTPUT
        return end_with(OutcomeKind.FAILED, without if ended.agent_end == AgentEnd.FINISHED else ended.summary[:1000] or without, reason)

    async def _ensure_workspace(self, view: SprintView, k: int, repo: str) -> tuple[int, Path]:
        """The tree of this attempt if it is here; else a fresh clone, and a new attempt where steps were made elsewhere."""
        kit = self.kit
        mark = kit.workspaces.tree_path(view.id).parent / "attempt"
        if kit.workspaces.has_tree(view.id) and _read(mark) == str(view.attempt):
            return view.attempt, kit.workspaces.tree_path(view.id)
        made = await kit.store.read(lambda conn: steps.of_attempt(conn, view.id, view.attempt))
        attempt = view.attempt + 1 if made else view.attempt
        base_sha = view.base_sha
        begin_at = view.branch if view.follows_pull else view.base_branch
        if not base_sha or (view.id, k) not in self._fetched:
            heads = await kit.workspaces.fetch(view.id, repo, list(dict.fromkeys((view.base_branch, begin_at))))
            base_sha = base_sha or heads[begin_at]
        self._fetched.discard((view.id, k))
        workdir = await kit.workspaces.clone(view.id, base_sha, begin_at)
        await self._set_up(view, k)
        await self._update(view, k, attempt=attempt)
        await asyncio.to_thread(mark.write_text, str(attempt))
        return attempt, workdir

    async def _deadline(self, view: SprintView) -> int:
        """Wall-clock end in Unix ms; what its steps and tool calls took is used up, time in which we were down or it was queued is not."""
        kit = self.kit
        used = await kit.store.read(lambda conn: steps.used_ms(conn, view.id))
        seconds = view.limits.seconds if view.limits else kit.settings.limits.limits().seconds
        return kit.now_ms() + max(0, seconds * 1000 - used)

    async def _narrowed(self, view: SprintView) -> tuple[Settings, RepositorySettings]:
        """The settings as the repository's default branch narrows them at this moment, whatever branch the sprint works on."""
        config = await self.kit.repositories.config(view.repo_id)
        return narrow(self.kit.settings, self._repo(view)[1], config)

    async def _set_up(self, view: SprintView, k: int) -> None:
        """The setup commands of `.dispatch.yml` in a fresh work tree. One that fails ends the sprint before a model is asked."""
        kit = self.kit
        deadline = time.monotonic() + SETUP_SECONDS
        for command in (await kit.repositories.config(view.repo_id)).setup:
            await self._update(view, k, show_in_ms=0, doing=f"setting up: {command}"[:200])
            ended = await self._check(view, command, max(1.0, deadline - time.monotonic()))
            if ended["exit_code"] != 0:
                how = "took too long" if ended["timed_out"] else f"ended with exit code {ended['exit_code']}"
                output = f": {ended['output'].strip()[-SETUP_OUTPUT:]}" if ended["output"].strip() else ""
                raise end_with(OutcomeKind.FAILED, f"{command} {how}{output}", FailureReason.SETUP)

    async def _job(
        self, view: SprintView, k: int, repo: str, attempt: int, workdir: Path, deadline_ms: int, repository: RepositorySettings
    ) -> AgentJob:
        kit = self.kit
        issue, comments, agents = await asyncio.gather(
            self._issue(repo, view.issue.number),
            kit.decider.trusted_comments(view.repo_id, repo, view.issue.number),
            kit.workspaces.read_base_file(view.id, view.base_sha, "AGENTS.md", AGENTS_BYTES),
        )
        digest = text_hash(str(issue.get("title") or ""), str(issue.get("body") or ""))
        fresh = await kit.store.read(lambda conn: sprints.get(conn, view.id))
        if fresh is not None and digest != fresh.text_hash:
            await self._frozen(fresh, repo, issue)
            await self._update(view, k, text_hash=digest)
        plan = await self._plan_of(view)
        taken: Json | None = None
        if view.follows_pull:
            found = await self._feedback(view, repo)
            comments = [*comments, *await kit.decider.trusted_comments(view.repo_id, repo, view.follows_pull)]
            taken = rounds.in_prompt(view.follows_pull, view.branch, found)
        delimiter = hashlib.sha256(f"{kit.salt}:{view.id}".encode()).hexdigest()[:16]
        task = prompt.task_prompt(
            ref=IssueRef.of(repo, view.issue.number),
            title=str(issue.get("title") or ""),
            body=str(issue.get("body") or ""),
            author=str((issue.get("user") or {}).get("login") or ""),
            delimiter=delimiter,
            comments=comments,
            instructions=view.instructions,
            asker=view.requester,
            agents_md=(agents or b"").decode("utf-8", "replace"),
            planning=view.plans,
            plan=plan.text if plan else "",
            follow_up=taken,
        )
        limits = view.limits or kit.settings.limits.limits()
        options = (await kit.store.read(lambda conn: sprints.field(conn, view.id, "options"))).options
        loop = asyncio.get_running_loop()
        return AgentJob(
            sprint_id=view.id,
            attempt=attempt,
            system=prompt.system_prompt(
                repo=repo,
                base_branch=view.branch if view.follows_pull else view.base_branch,
                limits=limits,
                delimiter=delimiter,
                checks=repository.checks,
                bot=kit.login,
                planning=view.plans,
            ),
            task=task,
            workdir=workdir,
            repo=repo,
            issue=view.issue.number,
            limits=limits,
            deadline=loop.time() + max(0.0, (deadline_ms - kit.now_ms()) / 1000),
            provider=self._repo(view)[1].provider,
            model=str(options.get("model", "")),
            trajectory=StoredTrajectory(
                store=kit.store,
                sprint_id=view.id,
                k=k,
                attempt=attempt,
                me=kit.lease.executor_id,
                progress_ms=int(kit.settings.timing.progress_seconds * 1000),
                failpoint=kit.failpoint,
                now_ms=kit.now_ms,
            ),
            stopping=lambda: self._stops.get(view.id),
            planning=view.plans,
        )

    async def _plan_of(self, view: SprintView) -> Plan | None:
        """The plan that this sprint carries out, or makes anew."""
        plan_id = view.follows_plan or view.options.get(REVISES_PLAN, "")
        return await self.kit.store.read(lambda conn: plans.get(conn, plan_id)) if plan_id else None

    async def _run_agent(self, view: SprintView, job: AgentJob) -> AgentResult:
        kit = self.kit
        engine = kit.engines[kit.settings.engine]

        def emit(kind: EventKind, data: Json) -> None:
            kit.observe(SprintEvent(kind, view.id, kit.now_ms(), data))

        flags = await kit.store.read(lambda conn: sprints.field(conn, view.id, "stop", "stop_by"))
        if flags.stop is not None:
            raise self._stop_end(flags.stop, flags.stop_by)
        task = asyncio.create_task(engine.run(job, emit), name=f"agent-{view.id}")
        self._tasks[view.id] = task
        renewal = asyncio.create_task(self._renew(view.id, job.deadline))
        try:
            return await task
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current is not None and current.cancelling():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task
                raise
            return AgentResult(AgentEnd.STOPPED)
        finally:
            renewal.cancel()
            self._tasks.pop(view.id, None)

    async def _renew(self, sprint_id: str, deadline: float) -> None:
        """While the agent is inside its deadline, a long call is no stall (observability.md, "Progress")."""
        kit = self.kit
        loop = asyncio.get_running_loop()
        while loop.time() < deadline:
            await asyncio.sleep(RENEW_SECONDS)
            with contextlib.suppress(Exception):
                await kit.store.write(lambda conn: sprints.renew_progress(conn, sprint_id, kit.lease.executor_id, kit.now_ms()))

    async def _vet(self, view: SprintView, k: int) -> None:
        kit = self.kit
        self._check_stop(view)
        kit.workspaces.expect_export(view.id)
        await self._advance(view, k, SprintState.VETTING, [SprintState.WORKING])
        settings, repository = await self._narrowed(view)
        ended = await kit.store.read(lambda conn: sprints.field(conn, view.id, "agent_end", "agent_reason", "summary", "options"))
        if not kit.workspaces.has_tree(view.id):
            raise requeue(WaitingReason.REQUEUED, "the work was on a machine that is gone", new_attempt=True)
        tree = await kit.workspaces.export(view.id, view.base_sha)
        changes = await kit.workspaces.changes(view.id, view.base_sha, tree)
        if view.follows_pull:
            await kit.store.write(lambda conn: follow_ups.changed(conn, view.id, [change.path for change in changes]))
        if not changes:
            raise _without_changes(ended.agent_end, ended.agent_reason, ended.summary)
        policy: Policy = await kit.workspaces.vet(
            view.id,
            view.base_sha,
            tree,
            extra_protected=[*settings.protected_paths, *repository.protected_paths],
            allow_protected=False,
            scrub=kit.scrub,
            changes=changes,
        )
        if policy.violations:
            await kit.workspaces.keep_patch(view.id, view.base_sha, tree, scrub=kit.scrub)
            shown = "; ".join(f"{item.path}: {item.detail}" for item in policy.violations[:10])
            raise end_with(OutcomeKind.REFUSED, kit.scrub(shown), "policy")
        checks = [await self._check(view, command, repository.checks_timeout_seconds) for command in repository.checks]
        await self._update(view, k, tree=tree, files=len(changes), flagged=list(policy.flagged), checks=checks)

    async def _check(self, view: SprintView, command: str, seconds: float) -> Json:
        """One declared check in the sandbox; its exit code is what the pull request says, not the agent's words."""
        kit = self.kit
        started = time.monotonic()
        tree = kit.workspaces.tree_path(view.id)
        result = await self._stoppable(view, kit.sandbox.run(command, workspace=tree, timeout=seconds, binds=kit.workspaces.binds(view.id)))
        seconds_used = time.monotonic() - started
        await kit.store.write(lambda conn: sprints.renew_progress(conn, view.id, kit.lease.executor_id, kit.now_ms()))
        return {
            "command": command,
            "exit_code": result.exit_code,
            "timed_out": result.timed_out,
            "seconds": round(seconds_used, 2),
            "output": "" if result.exit_code == 0 else kit.scrub(result.output)[-CHECK_OUTPUT:],
        }

    async def _stoppable(self, view: SprintView, work: Any) -> Any:
        """Runs a command of the sprint so that a stop flag ends it at once."""
        task = asyncio.ensure_future(work)
        self._tasks[view.id] = task
        try:
            return await task
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current is not None and current.cancelling():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task
                raise
            if self._halting:
                await self._park()
            raise self._stop_end(self._stops.pop(view.id, Stop.CANCEL), "") from None
        finally:
            self._tasks.pop(view.id, None)

    async def _publish(self, view: SprintView, k: int) -> None:
        kit = self.kit
        repo, _ = self._repo(view)
        row = await kit.store.read(lambda conn: sprints.field(conn, view.id, "tree", "agent_end", "agent_reason", "summary", "queued_ms"))
        _, pulls, remote = await asyncio.gather(
            self._allowed(view, repo), kit.forge.pulls(repo, "all"), kit.workspaces.remote_head(repo, view.branch)
        )
        await self._advance(view, k, SprintState.PUBLISHING, [SprintState.VETTING], unless_stopped=True)
        kind, reason = verdict_of(row.agent_end, row.agent_reason, view.checks)
        draft = kind is not OutcomeKind.PULL_REQUEST
        if view.follows_pull:
            raise await self._publish_round(view, k, repo, tree=row.tree, summary=row.summary, remote=remote, end=(kind, reason), limit=row)
        found = await self._known_pull(view, pulls)
        if found is not None and (found.get("merged") or found.get("state") == "closed"):
            await self._record_pull(view, k, found)
            raise end_with(OutcomeKind.PULL_REQUEST, "a person was faster: the pull request is " + _pull_state(found), replies.OVERTAKEN)
        head, branch = await self._push(view, k, repo, row.tree, row.summary, remote)
        title = kit.scrub(replies.pr_title(view, draft=draft))
        body = await self._pr_body(view, row.summary)
        created = found is None
        if found is None:
            found = await self._open_pull(view, pulls, branch)
        if found is None:
            await self._held()
            found = await kit.forge.create_pull(repo, branch, view.base_branch, title, body)
            kit.failpoint("pr.created")
        else:
            created = False
            await self._held()
            await kit.forge.edit_pull(repo, int(found["number"]), title=title, body=body)
        await self._record_pull(view, k, found)
        models = await kit.store.read(lambda conn: steps.models_of(conn, view.id))
        kit.observe(
            SprintEvent(
                EventKind.PULL_REQUEST,
                view.id,
                kit.now_ms(),
                {
                    "event": "opened" if created else "updated",
                    "number": int(found["number"]),
                    "model": models[-1].partition("/")[2] if models else "",
                },
            )
        )
        if (
            kind is OutcomeKind.PULL_REQUEST
            and not created
            and await kit.store.read(lambda conn: sprints.pull_of_another(conn, view.repo_id, int(found["number"]), view.id))
        ):
            kind = OutcomeKind.UPDATED
        log.info("sprint.published", sprint=view.id, pr=found["number"], head=head)
        good = kind in (OutcomeKind.PULL_REQUEST, OutcomeKind.UPDATED)
        raise end_with(kind, _in_brief(row.summary) if good else _why(row.agent_end, row.agent_reason), reason)

    async def _publish_round(
        self, view: SprintView, k: int, repo: str, *, tree: str, summary: str, remote: str | None, end: tuple[OutcomeKind, str], limit: Any
    ) -> Stopped:
        """A follow-up's commit goes on top of the pull request's branch; its text stays as people know it, its title tells whether it is a draft."""
        kit = self.kit
        kind, reason = end
        draft = kind is not OutcomeKind.PULL_REQUEST
        pull, record = await self._own_pull(view, repo)
        head, _ = await self._push(view, k, repo, tree, summary, remote)
        title = kit.scrub(rounds.title_of(record, draft=draft))
        if title != record.get("title"):
            await self._held()
            await kit.forge.edit_pull(repo, pull.number, title=title)
        await self._record_pull(view, k, record)
        models = await kit.store.read(lambda conn: steps.models_of(conn, view.id))
        data = {"event": "updated", "number": pull.number, "model": models[-1].partition("/")[2] if models else ""}
        kit.observe(SprintEvent(EventKind.PULL_REQUEST, view.id, kit.now_ms(), data))
        log.info("sprint.followed_up", sprint=view.id, pr=pull.number, head=head)
        if draft:
            return end_with(kind, _why(limit.agent_end, limit.agent_reason), reason)
        return end_with(OutcomeKind.UPDATED, _in_brief(summary))

    async def _known_pull(self, view: SprintView, pulls: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
        """This sprint's own pull request in any state, by its marker."""
        mark = replies.marker(f"sprint:{view.id}")
        me = (await self.kit.forge.me())["id"]
        for pull in pulls:
            if mark in str(pull.get("body") or "") and (pull.get("user") or {}).get("id") == me:
                return pull
        return None

    async def _open_pull(self, view: SprintView, pulls: Iterable[Mapping[str, Any]], branch: str) -> Mapping[str, Any] | None:
        """Our open pull request on this branch, from an earlier sprint of the issue: it is updated."""
        me = (await self.kit.forge.me())["id"]
        for pull in pulls:
            head, base = pull.get("head") or {}, pull.get("base") or {}
            if (
                pull.get("state") == "open"
                and head.get("label") == branch
                and head.get("repo_id") == view.repo_id
                and base.get("ref") == view.base_branch
                and (pull.get("user") or {}).get("id") == me
            ):
                return pull
        return None

    async def _push(self, view: SprintView, k: int, repo: str, tree: str, summary: str, remote: str | None) -> tuple[str, str]:
        """Commit and push; the head is in the row before it is at the forge, and no head of another person is overwritten.

        `remote` is where the branch stood a moment ago; the push itself carries the lease.
        """
        kit = self.kit
        message = kit.scrub(replies.commit_message(view, summary=summary, trailer=kit.settings.commit_trailer))
        try:
            if not tree or not kit.workspaces.has_tree(view.id):
                raise GitFailed("no tree of this sprint is on this host")
            commit = await kit.workspaces.commit(view.id, tree, view.base_sha, message, at_ms=view.started_ms)
        except GitFailed as error:
            if view.head_sha and remote == view.head_sha:
                return view.head_sha, view.branch
            raise requeue(WaitingReason.REQUEUED, "the work was on a machine that is gone", new_attempt=True) from error
        kit.failpoint("commit.made")
        branch, lease = view.branch, view.lease_sha
        if view.follows_pull and remote not in (commit, lease):
            if remote is None:
                raise end_with(OutcomeKind.CANCELLED, f"the branch of pull request #{view.follows_pull} is gone: nothing was pushed")
            raise requeue(WaitingReason.REQUEUED, "somebody pushed to the branch meanwhile: it begins again on top of that")
        if remote not in (commit, lease or None):
            ours = await kit.store.read(lambda conn: sprints.heads_recorded(conn, view.repo_id, view.issue.number))
            if remote is None or remote in ours:
                lease = remote or ""
            else:
                branch, lease, remote = await self._free_branch(view, repo, commit)
        await self._update(view, k, head_sha=commit, branch=branch, lease_sha=lease)
        kit.failpoint("publish.head_recorded")
        if remote != commit:
            await self._held()
            await kit.workspaces.push(view.id, repo, commit, branch, lease=lease or None)
        kit.failpoint("push.after")
        return commit, branch

    async def _free_branch(self, view: SprintView, repo: str, commit: str) -> tuple[str, str, str | None]:
        stem = f"dispatch/issue-{view.issue.number}"
        for n in range(2, LAST_BRANCH + 1):
            name = f"{stem}-{n}"
            head = await self.kit.workspaces.remote_head(repo, name)
            if head is None or head == commit:
                return name, "", head
        raise end_with(OutcomeKind.FAILED, f"every branch of {stem} has commits of other people", FailureReason.PUSH)

    async def _pr_body(self, view: SprintView, summary: str) -> str:
        kit = self.kit
        models = await kit.store.read(lambda conn: steps.models_of(conn, view.id))
        body = replies.pr_body(
            view,
            summary=summary,
            issue=view.issue.number,
            checks=view.checks,
            flagged=view.flagged,
            models=models,
            sandbox=view.sandbox,
            requester=view.requester,
            links=kit.links,
            key=f"sprint:{view.id}",
        )
        return kit.scrub(body)

    async def _record_pull(self, view: SprintView, k: int, pull: Mapping[str, Any]) -> None:
        await self._update(view, k, pr=int(pull["number"]), pr_state=_pull_state(pull))

    async def settle(self, sprint_id: str, k: int, end: Json) -> Json:
        """One transaction on rows; the forge is not needed, the projector shows the rest."""
        self._stages_in_flight += 1
        if self._halting:
            await self._park()
        try:
            return await self._while_away(partial(self._settled, sprint_id, k, end))
        finally:
            if asyncio.current_task() not in self._parked:
                self._stages_in_flight -= 1

    async def _settled(self, sprint_id: str, k: int, end: Json) -> Json:
        kit = self.kit
        await self._held()
        result, view = await kit.store.write(partial(self._settle, sprint_id, k, end))
        kit.failpoint("settle.row")
        self._stops.pop(sprint_id, None)
        self._fetched.discard((sprint_id, k))
        kit.kick_projector()
        kit.kick_queue()
        if view is not None and result == "settled":
            self._observe_end(view)
            if view.outcome is not OutcomeKind.REFUSED:
                await self._tidy(sprint_id)
        log.info("sprint.ended", sprint=sprint_id, result=result, **{key: end.get(key) for key in ("kind", "reason", "detail", "note")})
        return {"result": result}

    def _settle(self, sprint_id: str, k: int, end: Json, conn: Connection) -> tuple[str, SprintView | None]:
        kit = self.kit
        now = kit.now_ms()
        me = kit.lease.executor_id
        sprints.lock(conn, sprint_id)
        before = sprints.get(conn, sprint_id)
        if not sprints.claim(conn, sprint_id, k, me=me, node_id=kit.lease.node_id, timeout_ms=kit.lease.timeout_ms) or before is None:
            return "gone", before
        again = end["go"] == "requeue" and not (end["new_attempt"] and before.attempt >= kit.settings.queue.max_attempts)
        if again and sprints.requeue(
            conn,
            sprint_id,
            k,
            me=me,
            reason=WaitingReason(end["reason"]),
            note=end["note"],
            not_before_ms=max(end["not_before_ms"], now + _pause_ms(before.admitted_n)),
            now_ms=now,
            new_attempt=end["new_attempt"],
        ):
            view = sprints.get(conn, sprint_id)
            if view is not None:
                _decision(conn, view, "requeue", end["reason"], end["note"], now)
                kit.observe(SprintEvent(EventKind.REQUEUED, view.id, now, {"reason": end["reason"]}))
            return "requeued", view
        outcome = _final(end, before)
        if outcome.kind is OutcomeKind.PLANNED and before.follows_plan and not self._reopen(conn, before, str(end["text_hash"]), now):
            outcome = Outcome(OutcomeKind.REFUSED, "", "the issue was edited after its plan was approved, and that plan waits no longer")
        if not sprints.settle(
            conn, sprint_id, k, me=me, outcome=outcome, spent=steps.spent(conn, sprint_id), steps=steps.count(conn, sprint_id), now_ms=now
        ):
            return "gone", before
        view = sprints.get(conn, sprint_id)
        if view is not None:
            if outcome.kind is OutcomeKind.PLANNED and not view.follows_plan:
                text = str(sprints.field(conn, sprint_id, "summary").summary)
                plans.propose(conn, view, text=text, expires_ms=self._plan_ends(now), now_ms=now)
            _decision(conn, view, "settle", outcome.kind, outcome.detail or outcome.kind, now)
            rounds.ended(conn, view, str(sprints.field(conn, sprint_id, "summary").summary), now)
        return "settled", view

    def _plan_ends(self, now_ms: int) -> int:
        return now_ms + int(self.kit.settings.plan_hours * HOUR_MS)

    def _reopen(self, conn: Connection, view: SprintView, digest: str, now_ms: int) -> bool:
        """The plan that was approved waits again, for this text; shown by this sprint."""
        plan = plans.get(conn, view.follows_plan)
        return plan is not None and plans.reopen(
            conn, plan, sprint_id=view.id, digest=digest, expires_ms=self._plan_ends(now_ms), now_ms=now_ms
        )

    def _observe_end(self, view: SprintView) -> None:
        data = {
            "outcome": view.outcome,
            "reason": view.reason,
            "seconds": max(0, view.settled_ms - (view.started_ms or view.settled_ms)) / 1000,
            "steps": view.steps,
            "agent": view.engine,
            "model": view.model,
            "usd": view.usd,
        }
        self.kit.observe(SprintEvent(EventKind.SETTLED, view.id, view.settled_ms, data))

    async def _tidy(self, sprint_id: str) -> None:
        try:
            await self.kit.workspaces.remove(sprint_id)
        except Exception:
            log.exception("sprint.tidy", sprint=sprint_id)


def verdict_of(agent_end: str, agent_reason: str, checks: Iterable[Mapping[str, Any]]) -> tuple[OutcomeKind, str]:
    """The outcome of a tree that has changes and may be published (DESIGN section 4)."""
    if agent_end == AgentEnd.LIMIT:
        return OutcomeKind.BUDGET, agent_reason
    if agent_end != AgentEnd.FINISHED:
        return OutcomeKind.FAILED, agent_reason or FailureReason.INTERNAL
    if any(check["exit_code"] != 0 for check in checks):
        return OutcomeKind.FAILED, FailureReason.CHECKS
    return OutcomeKind.PULL_REQUEST, ""


def _without_changes(agent_end: str, agent_reason: str, summary: str) -> Stopped:
    if agent_end == AgentEnd.LIMIT:
        return end_with(OutcomeKind.BUDGET, _why(agent_end, agent_reason), agent_reason)
    if agent_end in (AgentEnd.FINISHED, AgentEnd.REFUSED):
        return end_with(OutcomeKind.NO_CHANGE, summary[:1000])
    return end_with(OutcomeKind.FAILED, summary[:1000], agent_reason or FailureReason.INTERNAL)


def _in_brief(summary: str) -> str:
    """The first paragraph of what the agent says it did."""
    return summary.strip().partition("\n\n")[0][:ROUND_SUMMARY]


def _why(agent_end: str, agent_reason: str) -> str:
    if agent_end == AgentEnd.LIMIT:
        return f"the limit of {agent_reason or 'the sprint'} was reached"
    return ""


def _pause_ms(admitted_n: int) -> int:
    """What comes back again and again is not admitted at once for ever: 2 s after the fourth time, doubling to five minutes."""
    if admitted_n <= FREE_ADMISSIONS:
        return 0
    return min(LAST_BACKOFF_MS, FIRST_BACKOFF_MS * int(2 ** min(admitted_n - FREE_ADMISSIONS - 1, 12)))


def _final(end: Json, view: SprintView) -> Outcome:
    """A cancel wins over every other end but a publication."""
    if view.stop is Stop.CANCEL and view.state is not SprintState.PUBLISHING:
        return Outcome(OutcomeKind.CANCELLED, view.reason, f"cancelled by {view.stop_by}" if view.stop_by else "cancelled")
    if end["go"] == "requeue":
        return Outcome(OutcomeKind.FAILED, FailureReason.INTERNAL, end["note"])
    return Outcome(OutcomeKind(end["kind"]), end["reason"], end["detail"])


def _decision(conn: Connection, view: SprintView, kind: str, result: str, reason: str, now_ms: int) -> None:
    intents.decide(
        conn,
        repo_id=view.repo_id,
        issue=view.issue.number,
        kind=kind,
        result=result,
        reason=reason,
        sprint_id=view.id,
        now_ms=now_ms,
    )


def _pull_state(pull: Mapping[str, Any]) -> str:
    return "merged" if pull.get("merged") else str(pull.get("state") or "open")


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
