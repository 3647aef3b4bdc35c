"""What every step shares: it claims first, ends in one of three ways whatever goes wrong, and passes when repeated."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from typing import Any, NoReturn

import structlog
from sqlalchemy.engine import Connection

from bot import feedback
from bot.authorise import Denied, NotYet
from bot.config import RepositorySettings, Settings
from bot.gitea.errors import ForgeError, Moved, NotFound, Unauthorized, may_recover
from bot.lease import Fenced
from bot.models import (
    Actor,
    EventKind,
    FailureReason,
    Json,
    OutcomeKind,
    PullFacts,
    SprintEvent,
    SprintId,
    SprintState,
    SprintView,
    Stop,
    WaitingReason,
)
from bot.repo_config import narrow
from bot.sandbox import SandboxUnavailable
from bot.sprint._ends import ANEW, GONE, NEXT, Kit, Stopped, end_with, requeue
from bot.store import is_away, sprints
from bot.workspace import GitFailed, GitKilled, GitRefused, GitUnavailable, Refusal, TreeRefused

log = structlog.get_logger()

DAY_MS = 86_400_000
FIRST_BACKOFF_MS = 2_000
LAST_BACKOFF_MS = 300_000
FLAG_SECONDS = 0.5
# What a step returned is recorded by the engine a moment after it ended.
RECORD_SECONDS = 0.2
AWAY_SECONDS = 1.0
UNWELCOME = "the forge refuses my token"
SCARCE_RETRY_MS = 30_000
SCARCE = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk's quota is used up",
    errno.EROFS: "the disk cannot be written to",
    errno.EMFILE: "the service has too many files open",
    errno.ENFILE: "this machine has too many files open",
    errno.ENOMEM: "this machine has no memory left",
    errno.EAGAIN: "this machine starts no more processes",
}
SAID = {os.strerror(number).lower(): why for number, why in SCARCE.items() if number != errno.EAGAIN}


class Stage:
    """Stops, errors, claims and changes of state."""

    def __init__(self, kit: Kit) -> None:
        self.kit = kit
        self._tasks: dict[str, asyncio.Future[Any]] = {}
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
        scarce = _scarce(error, kit.workspaces.lacks)
        if scarce:
            log.error("sprint.machine_short", sprint=sprint_id, stage=name, short_of=scarce, error=kit.scrub(str(error)))
            return requeue(WaitingReason.REQUEUED, scarce, not_before_ms=kit.now_ms() + SCARCE_RETRY_MS).end
        match error:
            case GitKilled():
                return await self._later(sprint_id, str(error), why="this machine ended what it needs")
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
            case NotFound() if await self._out_of_sight(sprint_id):
                return await self._later(sprint_id, str(error), why="I cannot see the repository")
            case ForgeError() | TimeoutError() | ConnectionError():
                if isinstance(error, Unauthorized):
                    return await self._later(sprint_id, str(error), why=UNWELCOME)
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
            if error.kind is Refusal.AUTH:
                return await self._later(sprint_id, str(error), why=UNWELCOME)
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

    async def _out_of_sight(self, sprint_id: str) -> bool:
        """Whether a 404 is of the whole repository, which says nothing of what was asked for."""
        view = await self.kit.store.read(lambda conn: sprints.get(conn, sprint_id))
        try:
            await self.kit.repositories.must_be_seen(view.repo_id if view is not None else 0)
        except ForgeError:
            return True
        return False

    async def _tidy(self, sprint_id: str) -> None:
        """Removes what a sprint left on this disk; that it cannot be is nothing of the sprint."""
        try:
            await self.kit.workspaces.remove(sprint_id)
        except Exception:
            log.exception("sprint.tidy", sprint=sprint_id)

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
        if stop == Stop.REVISE:
            return requeue(WaitingReason.REQUEUED, ANEW)
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
            ours = f" ({judgement.operator_error})" if judgement.operator_error else ""
            raise end_with(OutcomeKind.REFUSED, self.kit.scrub(f"{view.requester} may not ask for this any more: {judgement.reason}{ours}"))

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

    async def _narrowed(self, view: SprintView) -> tuple[Settings, RepositorySettings]:
        """The settings as the repository's default branch narrows them at this moment, whatever branch the sprint works on."""
        config = await self.kit.repositories.config(view.repo_id)
        return narrow(self.kit.settings, self._repo(view)[1], config)


def _scarce(error: BaseException, lacks: Callable[[], str]) -> str:
    """What this machine is short of where that is why a step failed, or "": nothing is wrong with the sprint then, and it waits."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and not isinstance(cause, ConnectionError | TimeoutError) and cause.errno in SCARCE:
            return SCARCE[cause.errno]
        cause = cause.__cause__
    if isinstance(error, GitFailed | GitRefused | GitUnavailable):
        # What the forge's own git says begins with `remote:`, and is not about this machine.
        said = re.search(r"(?m)^(?:git [a-z-]+: )?(?:fatal|error): .*?(" + "|".join(SAID) + ")", str(error), re.IGNORECASE)
        if said:
            return SAID[said[1].lower()]
    return lacks() if isinstance(error, OSError | GitFailed | TreeRefused | SandboxUnavailable) else ""


def _pull_state(pull: Mapping[str, Any]) -> str:
    return "merged" if pull.get("merged") else str(pull.get("state") or "open")


async def all_or_none(*work: Awaitable[Any]) -> list[Any]:
    """What all of them return; where one fails the others end before its error is raised, so that none goes on behind a step that has ended."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
