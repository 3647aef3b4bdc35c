"""Samples the fleet and its machine every minute: what changed is an event, what could not be asked is unknown, and nothing here holds the fleet up."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import structlog

from bot.fleet import _facts, _proc
from bot.fleet._facts import Facts
from bot.fleet._sampling import Answer, OneAtATime, Sampler
from bot.fleet._sources import Moment, Records, Sources
from bot.fleet._states import Facets, diff
from bot.fleet._streams import SCHEMA, Last, Streams, when
from bot.models import UserError
from bot.settings import Settings
from bot.store import Store, samples

log = structlog.get_logger()

FIRST_SECONDS = 1.0
JUMP_SECONDS = 5.0
LOCK_SECONDS = 5.0
DEADLINE_SHARE = 0.3
OK, UNKNOWN = "ok", "unknown"
BEGAN = {"event": "began", "entity": "collector", "before": {}, "after": {}}


@dataclass(frozen=True, slots=True)
class Clock:
    """One reading: wall clock (Unix ms), seconds since the boot (suspend counts), and which boot."""

    wall_ms: int
    boot_seconds: float
    boot_id: str


@dataclass(frozen=True, slots=True)
class Sample:
    """What one round saw, as `metrics.jsonl` has it, its events, and the bytes that were written."""

    record: Mapping[str, Any]
    events: tuple[Mapping[str, Any], ...]
    written: int

    @property
    def missed(self) -> tuple[str, ...]:
        """Sources that are unknown in it."""
        return tuple(name for name, found in self.record["sources"].items() if found["status"] != OK)


def read_clock() -> Clock:
    """Now."""
    return Clock(time.time_ns() // 1_000_000, time.clock_gettime(time.CLOCK_BOOTTIME), _proc.boot_id())


class Collector:
    """One host's samples. `run` belongs to the process that keeps the state folder; `collect` may be called beside it by another process."""

    def __init__(
        self,
        store: Store,
        forge: Records,
        *,
        settings: Settings,
        node_id: str,
        repositories: Callable[[], Mapping[int, str]],
        environ: Mapping[str, str],
        is_keeper: Callable[[], bool],
        missed: Callable[[str], None],
        scrub: Callable[[str], str],
        clock: Callable[[], Clock] = read_clock,
    ) -> None:
        self._store = store
        self._settings = settings
        self._node_id = node_id
        self._is_keeper = is_keeper
        self._missed = missed
        self._scrub = scrub
        self._clock = clock
        given = settings.collector
        self._deadline = min(given.deadline_seconds, given.every_seconds * DEADLINE_SHARE)
        self._streams = Streams(settings.telemetry_dir(), rotate_bytes=given.rotate_bytes, keep_files=given.keep_files)
        self._sampler = Sampler()
        self._files = OneAtATime("files")
        self._sources = Sources(settings, forge, rows=self._facts, repositories=repositories, environ=environ)
        self._told = ""

    async def run(self) -> None:
        """Until cancelled; a round that fails is said once, and the next is tried."""
        every = self._settings.collector.every_seconds
        try:
            due = time.monotonic() + min(FIRST_SECONDS, every)
            while True:
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                if self._is_keeper():
                    await self._round()
                # What a suspended machine slept through is not made up for.
                due = max(due + every, time.monotonic())
        finally:
            await self.close()

    async def close(self) -> None:
        """Lets go of what still hangs."""
        await asyncio.gather(self._sampler.close(), self._files.close(), self._sources.close())

    async def _round(self) -> None:
        try:
            sample = await self.collect()
        except UserError as error:
            fault = str(error)
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"
        else:
            fault = "".join(f"{name}: {sample.record['sources'][name]['why']}; " for name in sample.missed)
        if fault and fault != self._told:
            log.warning("collector.missed", fault=fault)
        self._told = fault

    async def collect(self) -> Sample:
        """One sample: asked, written, compared. Raises UserError where the files cannot be written and StoreError or what the database raises
        where the rows cannot; the one does not keep the other.
        """
        last, memory, judged_from = None, {}, 0
        with contextlib.suppress(UserError, OSError):
            last = await self._files.run(self._read, self._deadline)
        clock = self._clock()
        if last is not None:
            memory, judged_from = last.memory, _judged_from(last, clock)
        began = time.perf_counter()
        answers = await self._sampler.take(self._sources.at(Moment(clock.wall_ms, judged_from, memory)), self._deadline)
        for name, answer in answers.items():
            if answer.found is None:
                self._missed(name)
        record = {
            "schema": SCHEMA,
            "at": when(clock.wall_ms),
            "wall_ms": clock.wall_ms,
            "boot_seconds": round(clock.boot_seconds, 3),
            "boot_id": clock.boot_id,
            "node": self._node_id,
            "took_ms": round((time.perf_counter() - began) * 1000, 1),
            "sources": {name: self._outcome(answer) for name, answer in answers.items()},
        }
        gauges = {name: None if answer.found is None else answer.found.gauges for name, answer in answers.items()}
        try:
            return await self._files.run(lambda: self._write(record, answers, clock), self._deadline)
        finally:
            await self._store.write(lambda conn: samples.put(conn, self._node_id, gauges, clock.wall_ms))

    def _read(self) -> Last | None:
        self._streams.prepare()
        return self._streams.last()

    def _write(self, record: Mapping[str, Any], answers: Mapping[str, Answer], clock: Clock) -> Sample:
        self._streams.prepare()
        with self._streams.alone(LOCK_SECONDS):
            last = self._streams.last()
            if last is not None:
                self._streams.mend(last)
            jump = 0.0 if last is None else jumped(last, clock)
            number = max(clock.wall_ms, 0 if last is None else last.number + 1)
            state = _state_of(answers, last, jump=bool(jump))
            stamp = {"schema": SCHEMA, "sample": number, "at": record["at"], "wall_ms": clock.wall_ms}
            # Without an earlier state all there is would count as new.
            found = [BEGAN] if last is None else [event.to_json() for event in diff(last.state, state)]
            events = tuple({**stamp, **event} for event in found)
            whole = {**stamp, **record, "clock_jump_seconds": round(jump, 3), "events": len(events)}
            memory = {} if last is None else dict(last.memory)
            memory |= {name: dict(answer.found.memory) for name, answer in answers.items() if answer.found is not None}
            newest = Last(
                number=number,
                wall_ms=clock.wall_ms,
                boot_seconds=clock.boot_seconds,
                boot_id=clock.boot_id,
                judged_from_ms=0 if last is None else _judged_from(last, clock),
                state=state,
                events=events,
                memory=memory,
            )
            return Sample(whole, events, self._streams.write(whole, newest))

    def _outcome(self, answer: Answer) -> dict[str, Any]:
        took = {"took_ms": round(answer.seconds * 1000, 1)}
        if answer.found is None:
            return {"status": UNKNOWN, **took, "why": self._scrub(answer.why)}
        return {"status": OK, **took, **answer.found.data}

    def _facts(self) -> Facts:
        lease_ms = int(self._settings.timing.lease_seconds * 1000)
        return self._store.read_sync(lambda conn: _facts.read(conn, node_id=self._node_id, lease_ms=lease_ms))


def jumped(last: Last, clock: Clock) -> float:
    """By how many seconds the wall clock was put forward (or back: negative) since the last sample; 0 for a little, and over a restart of the machine."""
    if last.boot_id != clock.boot_id or not clock.boot_id:
        return 0.0
    step = (clock.wall_ms - last.wall_ms) / 1000 - (clock.boot_seconds - last.boot_seconds)
    return step if abs(step) > JUMP_SECONDS else 0.0


def _judged_from(last: Last, clock: Clock) -> int:
    return clock.wall_ms if jumped(last, clock) else last.judged_from_ms


def _state_of(answers: Mapping[str, Answer], last: Last | None, *, jump: bool) -> dict[str, Facets]:
    """What is known now; of a source that was missed, what was known before."""
    before = {} if last is None else last.state
    state: dict[str, Facets] = {}
    for name, answer in answers.items():
        state[f"source/{name}"] = {"status": OK if answer.found is not None else UNKNOWN}
        if answer.found is not None:
            state |= {f"{name}/{entity}": facets for entity, facets in answer.found.state.items()}
        else:
            state |= {entity: facets for entity, facets in before.items() if entity.startswith(f"{name}/")}
    jumps = before.get("clock/wall", {}).get("jumps", 0)
    state["clock/wall"] = {"jumps": int(jumps) + jump}
    return state
