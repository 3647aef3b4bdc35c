"""Runs the probes by the clock and acts on what they find only where it is told to, seldom, never against a pause, and never twice."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import structlog
from sqlalchemy.engine import Connection

from bot.fleet.probes import WATCHDOG, MendError, Probe, Reach, ago, probes
from bot.models import Pause, PauseScope
from bot.settings import WatchdogSettings
from bot.snapshot import Finding, ProbeState, ProbeTarget, ProbeVerdict
from bot.store import intents, pauses
from bot.store import probes as rows

log = structlog.get_logger()

OFF, WATCH, ACT = "off", "watch", "act"
HOUR_MS, DAY_MS = 3_600_000, 86_400_000
FIRST_SECONDS = 60.0
# Two operators who ask for the same at the same moment are one.
WISH_MS = 10_000
# A turn is somebody else's after its look, its actions and this (seconds) have had their time.
SLACK_SECONDS = 60.0
WAIT_SECONDS = 0.2
MOST_ACTS = 5
DOUBLINGS = 16

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Measure:
    """How often a probe may act. `distance_ms` is the first distance between two actions on a target, `period_ms` that of its looks, `most` the
    actions of all probes in an hour.
    """

    policy: str
    distance_ms: int
    period_ms: int
    most: int

    def after(self, acts: int) -> int:
        """How long (ms) nothing is done about a target after so many actions; it doubles with each, up to a day."""
        if acts <= 0:
            return 0
        return max(self.period_ms, min(DAY_MS, self.distance_ms << min(acts - 1, DOUBLINGS)))


def refusal(
    measure: Measure, finding: Finding, standing: ProbeTarget, *, holds: Iterable[Pause], recent: int, wished: bool, now_ms: int
) -> str:
    """Why nothing is done about a finding now, or "". `recent` counts the actions of the last hour, `wished` says that an operator asked for it.

    An operator's wish needs no policy and waits for no distance; a pause holds it as well.
    """
    if not finding.mendable or finding.verdict not in (ProbeVerdict.WARN, ProbeVerdict.FAILING):
        return "there is nothing that would help"
    if measure.policy == OFF or (measure.policy != ACT and not wished):
        return "it is only watched"
    if held := next((pause for pause in holds if _holds(pause, finding)), None):
        return f"a pause by {held.by} holds"
    if standing.acted_ms is not None:
        distance = min(WISH_MS, measure.period_ms) if wished else measure.after(standing.acts)
        if now_ms < standing.acted_ms + distance:
            return f"the last action was {ago((now_ms - standing.acted_ms) / 1000)} ago"
    if recent >= measure.most and not wished:
        return f"{recent} actions in the last hour are enough"
    return ""


def _holds(pause: Pause, finding: Finding) -> bool:
    match pause.scope:
        case PauseScope.FLEET:
            return True
        case PauseScope.REPO:
            return pause.repo_id == finding.repo_id
        case PauseScope.PROVIDER:
            return bool(finding.provider) and pause.provider == finding.provider


@dataclass(frozen=True, slots=True)
class _Act:
    """An action that is under way: its decision's row, and what it answers to."""

    finding: Finding
    decision: int
    said: str
    ok: bool


class Watchdog:
    """One for each process; only the leader's looks. `acted(probe, target, ok=)` is told of every action, `scrub` takes secrets out of texts."""

    def __init__(
        self,
        reach: Reach,
        *,
        is_leader: Callable[[], bool],
        acted: Callable[..., None],
        scrub: Callable[[str], str],
        known: Mapping[str, Probe] | None = None,
    ) -> None:
        self.reach = reach
        self._is_leader = is_leader
        self._acted = acted
        self._scrub = scrub
        self._settings: WatchdogSettings = reach.settings.watchdog
        self._all = dict(probes() if known is None else known)
        self.probes = {name: probe for name, probe in self._all.items() if probe.wanted(reach.settings) and self.policy_of(name) != OFF}
        self._running: dict[str, asyncio.Task[bool]] = {}
        self._hung: dict[str, asyncio.Task[Any]] = {}
        # One at a time, so that all of them count each other; other processes are kept out by a lock of the database.
        self._claiming = asyncio.Lock()
        self._told: dict[str, tuple[ProbeVerdict, tuple[str, ...]]] = {}
        self._made = False
        for name in sorted({*self._settings.policy, *self._settings.every_seconds} - self._all.keys()):
            log.warning("watchdog.unknown_probe", probe=name, known=sorted(self._all))

    def policy_of(self, name: str) -> str:
        """`off`, `watch` or `act`."""
        return self._settings.policy.get(name, WATCH)

    def measure_of(self, name: str) -> Measure:
        """How often a probe may act."""
        probe = self.probes[name]
        seconds = self._settings.backoff_minutes * 60 if probe.distance_seconds is None else probe.distance_seconds
        return Measure(self.policy_of(name), int(seconds * 1000), self._period_ms(name), self._settings.actions_per_hour)

    def _period_ms(self, name: str) -> int:
        return int(self._settings.every_seconds.get(name, self.probes[name].period_seconds) * 1000)

    async def run(self) -> None:
        """Until cancelled; where it is switched off, it only takes down what it showed."""
        if not self._settings.enabled:
            await self.reach.store.write(lambda conn: rows.know(conn, {}, first_due_ms={}))
            return
        try:
            while True:
                try:
                    if self._is_leader():
                        await self.round()
                except Exception:
                    log.exception("watchdog.round")
                await asyncio.sleep(self.reach.settings.timing.tick_seconds)
        finally:
            tasks = [*self._running.values(), *self._hung.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def round(self) -> None:
        """Begins every look that is due or wished for; each runs by itself, so that one that hangs holds up no other."""
        await self.know()
        now = self.reach.now_ms()
        periods = {name: self._period_ms(name) for name in self.probes}
        for name in await self.reach.store.read(lambda conn: rows.due(conn, now, periods)):
            if name not in self._running:
                task = asyncio.create_task(self._turn(name), name=f"probe-{name}")
                self._running[name] = task
                task.add_done_callback(partial(self._over, name))

    def _over(self, name: str, task: asyncio.Task[bool]) -> None:
        self._running.pop(name, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("watchdog.turn", probe=name, exc_info=error)

    async def know(self, *, own: bool = True) -> None:
        """Makes the rows equal to the probes that are there, wanted, and not off; where they are not our `own`, only adds what is missing."""
        if self._made:
            return
        now = self.reach.now_ms()
        due = {name: now + min(self._period_ms(name), int(FIRST_SECONDS * 1000)) for name in self.probes}
        policies = {name: self.policy_of(name) for name in self.probes}
        await self.reach.store.write(lambda conn: rows.know(conn, policies, first_due_ms=due, own=own))
        self._made = True

    async def once(self, names: Collection[str], *, fix: bool, by: str) -> tuple[ProbeState, ...]:
        """Every one of these probes now, one after the other's start; with `fix` it may act as an operator wishes. Returns how they stand."""
        await self.know(own=False)
        if fix:
            await self.reach.store.write(lambda conn: rows.wish(conn, names, by))
        await asyncio.gather(*(self._turn_or_wait(name) for name in names if name in self.probes))
        return tuple(state for state in await self.reach.store.read(rows.states) if state.name in names)

    async def _turn_or_wait(self, name: str) -> None:
        """Our turn, or the end of that of the service, which is at it already."""
        deadline = asyncio.get_running_loop().time() + self.probes[name].limit_seconds + self.probes[name].mend_seconds
        if await self._turn(name):
            return
        while asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(WAIT_SECONDS)
            if not await self.reach.store.read(lambda conn: rows.taken(conn, name, self.reach.now_ms())):
                return

    async def _turn(self, name: str) -> bool:
        """Looks, and acts where nothing speaks against it; False where the turn is somebody else's."""
        probe, now = self.probes[name], self.reach.now_ms()
        lease_ms = int((2 * probe.limit_seconds + MOST_ACTS * probe.mend_seconds + SLACK_SECONDS) * 1000)
        turn = await self.reach.store.write(lambda conn: rows.take(conn, name, lease_ms=lease_ms, now_ms=now))
        if turn is None:
            return False
        found = await self._look(name, probe)
        acts: list[_Act] = []
        if probe.mend is not None:
            for finding in found or ():
                if len(acts) < MOST_ACTS and (act := await self._act(name, probe, finding, turn)) is not None:
                    acts.append(act)
        if acts:
            await self._confirm(name, acts, await self._look(name, probe))
        return True

    async def _look(self, name: str, probe: Probe) -> list[Finding] | None:
        """One look into its rows; None where it broke."""
        found, broken = await self._tried(name, probe)
        found = [replace(finding, reason=self._scrub(finding.reason)) for finding in found]
        verdict = ProbeVerdict.UNKNOWN if broken else rows.worst(finding.verdict for finding in found)
        period = self._period_ms(name)
        if verdict is not ProbeVerdict.OK and probe.again_seconds is not None:
            period = min(period, int(probe.again_seconds * 1000))
        measure, now = self.measure_of(name), self.reach.now_ms()

        def write(conn: Connection) -> None:
            rows.ended(conn, name, found, broken=self._scrub(broken), due_ms=now + period, distance_ms=measure.after, now_ms=now)

        await self.reach.store.write(write)
        bad = {finding.target: finding.reason for finding in found if finding.verdict is verdict}
        last, self._told[name] = self._told.get(name), (verdict, tuple(bad))
        # Said when it changes, not at every look.
        if self._told[name] != last and verdict in (ProbeVerdict.FAILING, ProbeVerdict.UNKNOWN):
            log.warning("watchdog.found", probe=name, verdict=verdict, broken=broken, found=bad)
        elif last is not None and last[0] in (ProbeVerdict.FAILING, ProbeVerdict.UNKNOWN) and verdict is ProbeVerdict.OK:
            log.info("watchdog.well", probe=name)
        return None if broken else found

    async def _tried(self, name: str, probe: Probe) -> tuple[Sequence[Finding], str]:
        """What it found, or why it came to nothing; a look that does not end is left behind, and not begun again until it has."""
        if name in self._hung and not self._hung[name].done():
            return (), "a look before this one still has not ended"
        task = asyncio.ensure_future(probe.look(self.reach))
        try:
            return await self._within(name, task, probe.limit_seconds), ""
        except TimeoutError:
            return (), f"it did not end within {probe.limit_seconds:g} s"
        except Exception as error:
            log.warning("watchdog.broken", probe=name, exc_info=error)
            return (), f"it broke: {type(error).__name__}: {error}"

    async def _within(self, name: str, work: asyncio.Future[T], seconds: float) -> T:
        """The result of work that may ignore its cancellation; raises TimeoutError when the time is over."""
        task = asyncio.ensure_future(work)
        try:
            done, _ = await asyncio.wait({task}, timeout=seconds)
        except asyncio.CancelledError:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await asyncio.wait({task}, timeout=1.0)
            raise
        if done:
            return task.result()
        task.cancel()
        if isinstance(task, asyncio.Task):
            self._hung[name] = task
        raise TimeoutError

    async def _act(self, name: str, probe: Probe, finding: Finding, turn: rows.Turn) -> _Act | None:
        """The one action on one finding, if nothing speaks against it and nobody else is about it."""
        async with self._claiming:
            decision = await self.reach.store.write(lambda conn: self._claim(conn, name, probe, finding, turn))
        if decision is None or probe.mend is None:
            return None
        said, ok, key = "", False, f"{name}: {finding.target}"
        try:
            if key in self._hung and not self._hung[key].done():
                raise MendError("the action before this one still has not ended")
            said = await self._within(key, asyncio.ensure_future(probe.mend(self.reach, finding)), probe.mend_seconds)
            ok = True
        except MendError as error:
            said = f"it did not help: {error}"
        except TimeoutError:
            said = f"it did not end within {probe.mend_seconds:g} s"
        except Exception as error:
            log.exception("watchdog.mend", probe=name, target=finding.target)
            said = f"it broke: {type(error).__name__}: {error}"
        self._acted(name, finding.target, ok=ok)
        log.warning("watchdog.acted", probe=name, target=finding.target, before=finding.reason, said=self._scrub(said), ok=ok)
        return _Act(finding, decision, self._scrub(said), ok)

    def _claim(self, conn: Connection, name: str, probe: Probe, finding: Finding, turn: rows.Turn) -> int | None:
        """The decision's row, or None where nothing is to be done; what an operator wished for in vain is a decision too."""
        now = self.reach.now_ms()
        if not self.reach.store.lead(conn, "watchdog"):
            return None
        standing = rows.standing(conn, name, finding.target)
        if standing is None:
            return None
        if standing.acted_ms is not None and standing.acted_ms > now:
            rows.set_back(conn, name, finding.target, now)
            return None
        why = refusal(
            self.measure_of(name),
            finding,
            standing,
            holds=pauses.current(conn, now),
            recent=rows.acts_since(conn, now - HOUR_MS),
            wished=bool(turn.wished_by),
            now_ms=now,
        )
        if why and not (turn.wished_by and finding.mendable):
            return None
        if not why and not rows.claim_act(conn, name, standing, now_ms=now):
            return None
        decision = intents.decide(
            conn,
            repo_id=finding.repo_id,
            issue=finding.issue,
            kind=rows.ACT + name,
            result=rows.REFUSED if why else rows.BEGUN,
            reason=f"{finding.target}: {finding.reason}. {why or probe.does}",
            actor=turn.wished_by or WATCHDOG,
            now_ms=now,
        )
        return None if why else decision

    async def _confirm(self, name: str, acts: Sequence[_Act], after: Sequence[Finding] | None) -> None:
        """What each action came to, with what is to be seen now."""
        seen = {finding.target: finding for finding in after or ()}

        def write(conn: Connection) -> None:
            for act in acts:
                now = (
                    seen[act.finding.target].reason
                    if act.finding.target in seen
                    else "nothing to see any more"
                    if after is not None
                    else "unknown"
                )
                reason = f"{act.finding.target}: {act.finding.reason}. {act.said}. Now: {now}"
                result = "ok" if act.ok else "error"
                rows.acted(conn, name, act.finding.target, decision=act.decision, result=result, reason=reason)

        await self.reach.store.write(write)


def told(states: Iterable[ProbeState]) -> ProbeVerdict:
    """The worst of all probes."""
    return rows.worst(state.verdict for state in states)
