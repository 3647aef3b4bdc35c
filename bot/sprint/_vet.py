"""Vet: the tree is judged, never what the agent says of it."""

from __future__ import annotations

from bot.models import OutcomeKind, SprintState, SprintView, WaitingReason
from bot.sprint._ends import _without_changes, end_with, requeue
from bot.sprint._work import Work
from bot.store import follow_ups, sprints
from bot.workspace import Policy


class Vet(Work):
    """The third step."""

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
