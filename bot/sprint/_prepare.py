"""Prepare: facts only, so that any host can go on; who may, what the issue says, where to begin."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from typing import Any

from bot import guard, replies
from bot.config import RepositorySettings
from bot.gitea.errors import Forbidden, NotFound
from bot.models import (
    Actor,
    EventKind,
    FailureReason,
    ObstacleKind,
    OpenPull,
    OutcomeKind,
    Permission,
    Plan,
    PlanState,
    SprintEvent,
    SprintState,
    SprintView,
    WaitingReason,
    text_hash,
)
from bot.repo_config import narrow
from bot.sprint._ends import Stopped, end_with, requeue
from bot.sprint._stage import Stage, all_or_none
from bot.store import follow_ups, plans, skips, sprints

LAST_BRANCH = 9
LEAST_FREE_BYTES = 512 * 1024 * 1024
DISK_RETRY_MS = 60_000


class Prepare(Stage):
    """The first step."""

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
        record = await kit.repositories.record(view.repo_id)
        async with self._fetching(view, repo, repository, record) as fetching:
            await self._look(view, k, repo, record, fetching, first=first)
        self._fetched.add((view.id, k))

    @contextlib.asynccontextmanager
    async def _fetching(
        self, view: SprintView, repo: str, repository: RepositorySettings, record: Mapping[str, Any]
    ) -> AsyncIterator[asyncio.Task[dict[str, str]] | None]:
        """The fetch of the branch that the work most likely begins at, under way while the forge is asked whether it may; whatever is left of it ends."""
        base = view.base_branch or repository.base_branch or str(record.get("default_branch") or "")
        object_format = str(record.get("object_format_name") or "")
        if view.follows_pull or not base or not object_format or record.get("archived") or record.get("empty"):
            yield None
            return
        task = asyncio.create_task(self.kit.workspaces.fetch(view.id, repo, [base], object_format=object_format))
        begun = False
        try:
            yield task
            begun = True
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            if not begun and not self.kit.workspaces.has_tree(view.id):
                await self._tidy(view.id)

    async def _look(
        self,
        view: SprintView,
        k: int,
        repo: str,
        record: Mapping[str, Any],
        fetching: asyncio.Task[dict[str, str]] | None,
        *,
        first: bool,
    ) -> None:
        """Whether the work may begin, and where."""
        kit = self.kit
        repository = self._repo(view)[1]
        _, issue, config, (pulls, blockers), standing = await all_or_none(
            self._allowed(view, repo),
            self._issue(view.repo_id, repo, view.issue.number),
            kit.repositories.config(view.repo_id, fresh=True),
            kit.decider.other_work(view.repo_id, repo, view.issue.number),
            kit.forge.heads(repo, stem_of(view)),
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
        base = _goes_into(view, pulls) or repository.base_branch or str(record.get("default_branch") or "main")
        await self._no_other_work(view, issue, pulls, blockers, first=first)
        again: dict[str, Any] = {}
        object_format = str(record.get("object_format_name") or "")
        if view.follows_pull:
            base, branch, base_sha, lease_sha, again = await self._begin_at_pull(view, repo, object_format)
        else:
            branch, base_sha, lease_sha = await self._begin_at(view, repo, base, standing, object_format, fetching)
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

    async def _issue(self, repo_id: int, repo: str, number: int) -> Mapping[str, Any]:
        try:
            return await self.kit.forge.issue(repo, number)
        except NotFound:
            await self.kit.repositories.must_be_seen(repo_id)
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

    async def _no_other_work(
        self, view: SprintView, issue: Mapping[str, Any], pulls: Sequence[OpenPull], blockers: Sequence[str], *, first: bool
    ) -> None:
        """What speaks against beginning, unless somebody asked with `force`; once begun, only the work of a person counts."""
        kit = self.kit
        options = (await kit.store.read(lambda conn: sprints.field(conn, view.id, "options"))).options
        if guard.FORCE in options:
            return
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

    async def _begin_at(
        self,
        view: SprintView,
        repo: str,
        base: str,
        standing: Collection[str],
        object_format: str,
        fetching: asyncio.Task[dict[str, str]] | None,
    ) -> tuple[str, str, str]:
        """(branch, base sha, lease sha): our branch if every head on it was recorded by us, else the next name that is free of persons.

        `standing` are the branches that the forge has for this issue, `fetching` brings what is likely the base.
        """
        kit = self.kit
        stem = stem_of(view)
        names = [stem, *(f"{stem}-{n}" for n in range(2, LAST_BRANCH + 1))]
        heads = await fetching if fetching is not None else {}
        wanted = [branch for branch in (base, *(name for name in names if name in standing)) if branch not in heads]
        if wanted:
            heads = heads | await kit.workspaces.fetch(view.id, repo, wanted, object_format=object_format)
        if base not in heads:
            raise end_with(OutcomeKind.FAILED, f"there is no branch `{base}` to begin at", FailureReason.CLONE)
        ours = await kit.store.read(lambda conn: sprints.heads_recorded(conn, view.repo_id, view.issue.number))
        if view.branch and view.head_sha and heads.get(view.branch, view.head_sha) == view.head_sha:
            return view.branch, view.base_sha or heads[base], heads.get(view.branch, "")
        for name in names:
            if name not in heads or heads[name] in ours:
                return name, heads[base], heads.get(name, "")
        raise end_with(OutcomeKind.FAILED, f"every branch from {stem} to {names[-1]} has commits of other people", FailureReason.PUSH)

    async def _begin_at_pull(self, view: SprintView, repo: str, object_format: str) -> tuple[str, str, str, str, dict[str, Any]]:
        """(base, branch, begin, lease, more): the head of the pull request, a person's commits included; once begun it stays while that stands.

        Where somebody pushed meanwhile, what was done is thrown away and begun again on top of it.
        """
        kit = self.kit
        pull, _ = await self._own_pull(view, repo)
        heads = await kit.workspaces.fetch(view.id, repo, [pull.base_branch, pull.head_branch], object_format=object_format)
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


def _goes_into(view: SprintView, pulls: Sequence[OpenPull]) -> str:
    """The branch that was asked for or begun at, else the one that our open pull request goes into, also where a person has changed that; else ""."""
    if "base" in view.options or view.base_sha:
        return view.base_branch
    return next((pull.base for pull in pulls if pull.own and pull.base), view.base_branch)


def stem_of(view: SprintView) -> str:
    """What the names of an issue's branches begin with."""
    return f"dispatch/issue-{view.issue.number}"
