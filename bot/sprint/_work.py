"""Work: the agent in its tree, from its first step or from the step in flight."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import Awaitable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from bot import feedback, prompt, rounds
from bot.agents import AgentEnd, AgentJob, AgentResult
from bot.config import RepositorySettings
from bot.feedback import Feedback
from bot.gitea.errors import Forbidden, NotFound
from bot.models import (
    REVISES_PLAN,
    Actor,
    Comment,
    EventKind,
    FailureReason,
    IssueRef,
    Json,
    OutcomeKind,
    Permission,
    Plan,
    PlanState,
    SprintEvent,
    SprintState,
    SprintView,
    Stop,
    WaitingReason,
    text_hash,
)
from bot.sprint._ends import Stopped, _why, end_with, requeue
from bot.sprint._prepare import Prepare
from bot.sprint._stage import all_or_none
from bot.store import follow_ups, plans, sprints, steps
from bot.trajectory import StoredTrajectory

T = TypeVar("T")

RENEW_SECONDS = 30.0
SETUP_SECONDS = 900.0
SETUP_OUTPUT = 1_000
AGENTS_BYTES = 20_000
CHECK_OUTPUT = 4_000
SUMMARY = 8_000
# Less than what a prompt takes, so that the plan that was shown is the plan that is carried out.
PLAN = 16_000


class Work(Prepare):
    """The second step."""

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
        # What people wrote is read while the tree is made.
        (attempt, workdir), issue, comments = await all_or_none(
            self._ensure_workspace(view, k, repo),
            self._issue(view.repo_id, repo, view.issue.number),
            kit.decider.trusted_comments(view.repo_id, repo, view.issue.number),
        )
        deadline_ms = await self._deadline(view)
        _, repository = await self._narrowed(view)
        job = await self._job(view, k, repo, attempt, workdir, deadline_ms, repository, issue, comments)
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
        self,
        view: SprintView,
        k: int,
        repo: str,
        attempt: int,
        workdir: Path,
        deadline_ms: int,
        repository: RepositorySettings,
        issue: Mapping[str, Any],
        comments: list[Comment],
    ) -> AgentJob:
        kit = self.kit
        agents = await kit.workspaces.read_base_file(view.id, view.base_sha, "AGENTS.md", AGENTS_BYTES)
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
            # Whatever people wrote, also in AGENTS.md: no secret of ours goes to a provider.
            task=kit.scrub(task),
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
        renewal = asyncio.create_task(self._renew(view.id, job.deadline))
        try:
            return await self._unless_told(view, task)
        except asyncio.CancelledError:
            if _is_cancelled():
                raise
            return AgentResult(AgentEnd.STOPPED)
        finally:
            renewal.cancel()

    async def _renew(self, sprint_id: str, deadline: float) -> None:
        """While the agent is inside its deadline, a long call is no stall (observability.md, "Progress")."""
        kit = self.kit
        loop = asyncio.get_running_loop()
        while loop.time() < deadline:
            await asyncio.sleep(RENEW_SECONDS)
            with contextlib.suppress(Exception):
                await kit.store.write(lambda conn: sprints.renew_progress(conn, sprint_id, kit.lease.executor_id, kit.now_ms()))

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

    async def _stoppable(self, view: SprintView, work: Awaitable[T]) -> T:
        """Runs a command of the sprint so that a stop flag ends it at once."""
        try:
            return await self._unless_told(view, asyncio.ensure_future(work))
        except asyncio.CancelledError:
            if _is_cancelled():
                raise
            if self._halting:
                await self._park()
            raise self._stop_end(self._stops.pop(view.id, Stop.CANCEL), "") from None

    async def _unless_told(self, view: SprintView, task: asyncio.Future[T]) -> T:
        """What a task returns that `tell` can end; cancelled ourselves, it ends first."""
        self._tasks[view.id] = task
        try:
            return await task
        except asyncio.CancelledError:
            if _is_cancelled():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task
            raise
        finally:
            self._tasks.pop(view.id, None)


def _is_cancelled() -> bool:
    """Whether it is this very task that is to end, and not one that it waits for."""
    current = asyncio.current_task()
    return current is not None and current.cancelling() > 0


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
