"""Settle: one transaction on rows; and the five steps as the engine sees them."""

from __future__ import annotations

import asyncio
from functools import partial

import structlog
from sqlalchemy.engine import Connection

from bot import rounds
from bot.models import EventKind, FailureReason, Json, Outcome, OutcomeKind, SprintEvent, SprintState, SprintView, Stop, WaitingReason
from bot.sprint._ends import ANEW, requeue
from bot.sprint._publish import Publish
from bot.sprint._stage import FIRST_BACKOFF_MS, LAST_BACKOFF_MS
from bot.store import intents, plans, sprints, steps

log = structlog.get_logger()

FREE_ADMISSIONS = 3
HOUR_MS = 3_600_000


class SprintStages(Publish):
    """The five steps, as `bot.engine.Stages`."""

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
        if before.stop is Stop.REVISE and end["go"] == "settle" and end["kind"] not in (OutcomeKind.REFUSED, OutcomeKind.CANCELLED):
            # The words came when the agent had ended already: its plan is not the one that is wanted.
            end = requeue(WaitingReason.REQUEUED, ANEW).end
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
                intents.decide_of(conn, view, kind="requeue", result=end["reason"], reason=end["note"], now_ms=now)
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
            intents.decide_of(conn, view, kind="settle", result=outcome.kind, reason=outcome.detail or outcome.kind, now_ms=now)
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
