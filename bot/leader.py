"""What one process of the fleet does for all: admit, offer again, sweep what no workflow owns, keep positions true."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

import structlog
from sqlalchemy.engine import Connection

from bot import admission
from bot.config import Settings
from bot.engine import Engine, parse_workflow_id, workflow_id
from bot.failpoints import Failpoints
from bot.models import EventKind, FailureReason, Outcome, OutcomeKind, SprintEvent, SprintId, Stop, WaitingReason
from bot.repositories import open_pr_caps
from bot.store import Store, breakers, cursors, intents, pauses, plans, sprints, steps, workers

log = structlog.get_logger()

SHOWN_PLACES = 5
SHOWN_HELD = 20
FAR_PLACES = 50
FAR_SECONDS = 600.0
AGE_SECONDS = 60.0
DAY_MS = 86_400_000
HELD = (WaitingReason.PAUSED, WaitingReason.QUIET_HOURS, WaitingReason.BUDGET, WaitingReason.OPEN_PRS)
DEAD = frozenset({"ERROR", "CANCELLED", "MAX_RECOVERY_ATTEMPTS_EXCEEDED", "SUCCESS"})


class Leader:
    """Admission and sweeps. `kick()` runs admission at once; the tick is the net for what other processes did."""

    def __init__(
        self,
        store: Store,
        engine: Engine,
        *,
        settings: Settings,
        is_leader: Callable[[], bool],
        observe: Callable[[SprintEvent], None],
        kick_projector: Callable[[], None],
        repo_ids: Callable[[], dict[int, str]],
        failpoint: Failpoints,
        now_ms: Callable[[], int],
        providers: Callable[[], Sequence[str]] = tuple,
    ) -> None:
        self._store = store
        self._engine = engine
        self._settings = settings
        self._is_leader = is_leader
        self._observe = observe
        self._kick_projector = kick_projector
        self._repo_ids = repo_ids
        self._failpoint = failpoint
        self._now_ms = now_ms
        self._providers = providers
        self._event = asyncio.Event()
        self._places: dict[str, int] = {}
        self._held: dict[int, WaitingReason] | None = None
        self._last = dict.fromkeys(("sweep", "age", "far", "hold", "lost"), 0.0)

    def kick(self) -> None:
        """Something changed: look at the queue now."""
        self._event.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                if self._due("lost", self._settings.timing.beat_seconds):
                    await self._requeue_lost()
                if self._is_leader():
                    await self.round()
            except Exception:
                log.exception("leader.round")
            try:
                # Not wait_for, which before Python 3.12 swallows a cancellation that meets the event.
                async with asyncio.timeout(self._settings.timing.tick_seconds):
                    await self._event.wait()
            except TimeoutError:
                continue
            finally:
                self._event.clear()

    async def round(self) -> None:
        """One look at the queue and at what is due of the sweeps."""
        while await self._store.write(self._admit):
            self._engine.kick()
        if self._due("age", AGE_SECONDS):
            await self._store.write(self._age)
        if self._due("sweep", self._settings.timing.beat_seconds):
            await self._sweep()
            await self._let_plans_go()
        await self._show_places()

    def _due(self, name: str, seconds: float) -> bool:
        now = time.monotonic()
        if now - self._last[name] < seconds:
            return False
        self._last[name] = now
        return True

    def _age(self, conn: Connection) -> None:
        if self._store.lead(conn, "ageing"):
            sprints.age(conn, wait_ms=self._settings.queue.ageing_minutes * 60_000, now_ms=self._now_ms())

    def _admit(self, conn: Connection) -> bool:
        if not self._store.lead(conn, "admission"):
            return False
        now = self._now_ms()
        rows = {row[0]: row for row in (*sprints.heads(conn, now), *sprints.follow_ups_due(conn, now))}
        heads = [admission.Head(row.id, row.repo_id, row.repo, row.issue, row.priority, row.queued_ms, row.pr) for row in rows.values()]
        if not heads:
            return False
        admitted = False
        policy = self._policy(conn, now)
        answers = admission.decide(heads, sprints.in_flight(conn), policy)
        if _forge_away(conn, now):
            # What is admitted now would only come back.
            answers = [_without_forge(answer) for answer in answers]
        self._hold(conn, answers, now)
        for answer in answers:
            if isinstance(answer, admission.Wait):
                self._wait(conn, answer, now)
                continue
            k = sprints.admit(conn, answer.head.id, now)
            if k is None:
                continue
            for breaker in admission.breakers_of(answer.head.repo_id, policy.breakers):
                breakers.take_probe(conn, breaker, answer.head.id, answer.head.issue, answer.head.repo_id, now)
            self._failpoint("admit.before_commit")
            self._engine.enqueue(conn, answer.head.id, k, priority=answer.head.priority)
            intents.decide(
                conn,
                repo_id=answer.head.repo_id,
                issue=answer.head.issue,
                kind="admit",
                result="ok",
                reason=f"admitted, time {k}",
                sprint_id=answer.head.id,
                now_ms=now,
            )
            admitted = True
            self._observe(SprintEvent(EventKind.ADMITTED, SprintId(answer.head.id), now))
        if admitted:
            self._failpoint("admit.after_commit")
        return admitted

    def _hold(self, conn: Connection, answers: Sequence[admission.Admit | admission.Wait], now: int) -> None:
        """A policy that holds the head holds its whole repository: what stands behind it must not look like work the fleet owes."""
        before = dict.fromkeys(sprints.held_repositories(conn, HELD)) if self._held is None else self._held
        held = {answer.head.repo_id: answer for answer in answers if isinstance(answer, admission.Wait) and answer.reason in HELD}
        for repo_id in before.keys() - held.keys():
            sprints.release(conn, repo_id, HELD, now)
            sprints.show_first(conn, repo_id, limit=SHOWN_HELD, now_ms=now)
        # What came back to the queue with a reason of its own is found by the look at all of them, now and then.
        all_of_them = bool(held) and self._due("hold", AGE_SECONDS)
        for repo_id, answer in held.items():
            renamed = all_of_them or before.get(repo_id) != answer.reason
            sprints.hold(conn, answer.head.id, repo_id, answer.reason, answer.note, now_ms=now, renamed=renamed)
            if before.get(repo_id) != answer.reason:
                sprints.show_first(conn, repo_id, limit=SHOWN_HELD, now_ms=now)
        self._held = {repo_id: answer.reason for repo_id, answer in held.items()}

    def _wait(self, conn: Connection, answer: admission.Wait, now: int) -> None:
        if sprints.wait(conn, answer.head.id, answer.reason, answer.note, now):
            intents.decide(
                conn,
                repo_id=answer.head.repo_id,
                issue=answer.head.issue,
                kind="wait",
                result=answer.reason,
                reason=answer.note,
                sprint_id=answer.head.id,
                now_ms=now,
            )

    def _policy(self, conn: Connection, now: int) -> admission.Policy:
        timeout = int(self._settings.timing.lease_seconds * 1000)
        live = [worker for worker in workers.live(conn, timeout) if not worker.draining]
        names = {name.casefold(): repo_id for repo_id, name in self._repo_ids().items()}
        caps: dict[int, int] = {}
        pr_caps: dict[int, int] = {}
        own_caps = open_pr_caps(conn)
        for repository in self._settings.repositories:
            repo_id = names.get(repository.name.casefold())
            if repo_id is not None:
                caps[repo_id] = min(repository.max_running, self._settings.queue.max_per_repository)
                # 0 means that there is no limit; of two limits the lower one counts.
                limits = [limit for limit in (repository.max_open_prs, own_caps.get(repo_id, 0)) if limit]
                pr_caps[repo_id] = min(limits, default=0)
        budget = self._settings.queue.usd_per_day
        return admission.Policy(
            capacity=sum(worker.capacity for worker in live),
            max_running=self._settings.queue.max_running,
            caps=caps,
            default_cap=self._settings.queue.max_per_repository,
            pr_caps=pr_caps,
            open_prs=sprints.open_prs(conn) if any(pr_caps.values()) else {},
            pauses=pauses.current(conn, now),
            providers=tuple(self._providers()),
            breakers=breakers.opened(conn),
            now_ms=now,
            budget_usd=budget,
            spent_usd=steps.spent_since(conn, now - DAY_MS) if budget else 0.0,
        )

    async def _let_plans_go(self) -> None:
        """Plans on which nobody decided in time."""
        if await self._store.read(lambda conn: plans.is_due(conn, self._now_ms())):
            await self._store.write(lambda conn: plans.expire(conn, self._now_ms()))
            self._kick_projector()

    async def _sweep(self) -> None:
        settled = await self._store.write(self._sweep_orphans)
        foreign = await self._store.read(self._foreign)
        for workflow in foreign:
            await self._requeue(workflow, "the service was upgraded")
        if settled:
            log.warning("leader.orphans_settled", sprints=settled)
        if settled or foreign:
            self._kick_projector()

    def _foreign(self, conn: Connection) -> list[str]:
        """Workflows of a version that no live process runs any more: an upgrade that rolls over the fleet leaves the others alone."""
        found = self._engine.foreign(conn)
        if not found:
            return []
        alive = {worker.app_version for worker in workers.live(conn, int(self._settings.timing.lease_seconds * 1000))}
        return [workflow for workflow, version in found if version not in alive]

    def _sweep_orphans(self, conn: Connection) -> list[str]:
        """A sprint in flight whose workflow is gone or ended would block its issue for ever: it is settled here (engine.md, "Orphan sweep")."""
        if not self._store.lead(conn, "sweep"):
            return []
        now = self._now_ms()
        candidates = sprints.untouched(conn, before_ms=now - int(self._settings.timing.lease_seconds * 1000))
        statuses = self._engine.statuses(conn, [workflow_id(sprint, k) for sprint, k, _, _ in candidates])
        settled = []
        for sprint, k, stop, _ in candidates:
            status = statuses.get(workflow_id(sprint, k))
            if status is not None and status not in DEAD:
                continue
            kind = OutcomeKind.CANCELLED if stop == Stop.CANCEL else OutcomeKind.FAILED
            reason = "" if kind is OutcomeKind.CANCELLED else FailureReason.INTERNAL
            outcome = Outcome(kind, reason, f"its workflow ended as {status or 'missing'}")
            if sprints.settle(
                conn, sprint, k, me=None, outcome=outcome, spent=steps.spent(conn, sprint), steps=steps.count(conn, sprint), now_ms=now
            ):
                view = sprints.get(conn, sprint)
                if view is not None:
                    intents.decide_of(conn, view, kind="settle", result=kind, reason=outcome.detail, now_ms=now)
                settled.append(sprint)
        return settled

    async def _requeue_lost(self) -> None:
        """What this process took and does not run any more; in each process, because no other knows what it runs."""
        for workflow in await self._store.read(self._lost):
            log.warning("leader.lost", workflow=workflow)
            await self._requeue(workflow, "its run was lost")
            self._kick_projector()

    def _lost(self, conn: Connection) -> list[str]:
        lost = set(self._engine.lost(conn))
        if not lost:
            return []
        before = self._now_ms() - int(self._settings.timing.lease_seconds * 1000)
        return [workflow_id(sprint, k) for sprint, k, _, _ in sprints.untouched(conn, before_ms=before) if workflow_id(sprint, k) in lost]

    async def _requeue(self, workflow: str, note: str) -> None:
        sprint, k = parse_workflow_id(workflow)
        await self._engine.cancel(sprint, k)
        now = self._now_ms()
        await self._store.write(
            lambda conn: sprints.requeue(conn, sprint, k, me=None, reason=WaitingReason.REQUEUED, note=note, not_before_ms=0, now_ms=now)
        )

    async def _show_places(self) -> None:
        far = self._due("far", FAR_SECONDS)
        limit = FAR_PLACES if far else SHOWN_PLACES
        places = await self._store.read(lambda conn: sprints.positions(conn, limit=limit))
        moved = [sprint for sprint, place in places.items() if sprint in self._places and self._places[sprint] != place]
        if moved:
            now = self._now_ms()
            await self._store.write(lambda conn: sprints.raise_positions(conn, moved, now))
            self._kick_projector()
        known = {} if far else {sprint: place for sprint, place in self._places.items() if place > SHOWN_PLACES}
        self._places = {**known, **places}


def _forge_away(conn: Connection, now_ms: int) -> bool:
    """Whether the watchdog, which was told to, holds everything back until the forge answers."""
    held = cursors.get(conn, cursors.FORGE_HOLD)
    return held is not None and int(held["until_ms"]) > now_ms


def _without_forge(answer: admission.Admit | admission.Wait) -> admission.Admit | admission.Wait:
    return answer if isinstance(answer, admission.Wait) else admission.Wait(answer.head, WaitingReason.FORGE, "")
