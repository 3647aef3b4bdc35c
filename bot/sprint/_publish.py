"""Publish: commit, push, pull request; each looked up before it is made."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any

import structlog

from bot import replies, rounds
from bot.gitea.errors import NotFound
from bot.models import EventKind, FailureReason, OutcomeKind, SprintEvent, SprintState, SprintView, WaitingReason
from bot.sprint._ends import Stopped, _in_brief, _why, end_with, requeue, verdict_of
from bot.sprint._prepare import LAST_BRANCH, stem_of
from bot.sprint._stage import _pull_state
from bot.sprint._vet import Vet
from bot.store import sprints, steps
from bot.workspace import GitFailed, GitKilled

log = structlog.get_logger()


class Publish(Vet):
    """The fourth step."""

    async def _publish(self, view: SprintView, k: int) -> None:
        kit = self.kit
        repo, _ = self._repo(view)
        row = await kit.store.read(lambda conn: sprints.field(conn, view.id, "tree", "agent_end", "agent_reason", "summary", "queued_ms"))
        _, pulls, heads = await asyncio.gather(self._allowed(view, repo), kit.forge.pulls(repo, "all"), kit.forge.heads(repo, view.branch))
        remote = heads.get(view.branch)
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
        elsewhere = False
        if found is None:
            found = await self._open_pull(view, pulls, branch)
            elsewhere = found is not None and (found.get("base") or {}).get("ref") != view.base_branch
        if found is None:
            await self._held()
            found = await self._create_pull(view, repo, branch, title, body)
            kit.failpoint("pr.created")
        else:
            created = False
            await self._held()
            # One pull request an issue: asked for another base, it is this one that goes there.
            moved = {"base": view.base_branch} if elsewhere else {}
            await kit.forge.edit_pull(repo, int(found["number"]), title=title, body=body, **moved)
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

    async def _create_pull(self, view: SprintView, repo: str, branch: str, title: str, body: str) -> Mapping[str, Any]:
        try:
            return await self.kit.forge.create_pull(repo, branch, view.base_branch, title, body)
        except NotFound:
            if await self.kit.workspaces.remote_head(repo, view.base_branch) is not None:
                raise
            detail = f"the branch `{view.base_branch}` was deleted meanwhile; what was done is on `{branch}`"
            raise end_with(OutcomeKind.FAILED, detail, FailureReason.PR) from None

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
        """Our open pull request on this branch, from an earlier sprint of the issue: it is updated. One that goes into the right base comes first."""
        me = (await self.kit.forge.me())["id"]
        found: Mapping[str, Any] | None = None
        for pull in pulls:
            head, base = pull.get("head") or {}, pull.get("base") or {}
            if (
                pull.get("state") == "open"
                and head.get("label") == branch
                and head.get("repo_id") == view.repo_id
                and (pull.get("user") or {}).get("id") == me
            ):
                if base.get("ref") == view.base_branch:
                    return pull
                found = found or pull
        return found

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
            if isinstance(error, GitKilled) or kit.workspaces.lacks():
                raise
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
        stem = stem_of(view)
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
