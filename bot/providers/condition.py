"""The condition of each entry: who may be called now, what a failure changes, and who gets the one probe after a cool-down."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from bot.providers.classify import After, Diagnosis, ErrorClass
from bot.providers.entries import Entry
from bot.providers.health import EntryHealth, EntryState, HealthStore, held_key

PROBE_SECONDS: Final = 120.0
_JITTER: Final = 0.1
_FINE: Final = EntryHealth()
_SEVERITY: Final = (EntryState.HEALTHY, EntryState.HALF_OPEN, EntryState.COOLING, EntryState.DOWN, EntryState.PAUSED)


@dataclass(frozen=True, slots=True)
class Condition:
    """One entry at one moment. `failures` in a row decide how long the next cool-down is; `ill_keys` are the health rows that hold it back."""

    state: EntryState
    until_ms: int
    reason: str
    failures: int
    ill_keys: tuple[str, ...]


class Conditions:
    """Reads and changes the shared health by the rules of the chain."""

    def __init__(self, store: HealthStore, *, now_ms: Callable[[], int], random: Callable[[], float]) -> None:
        self._store = store
        self._now_ms = now_ms
        self._random = random

    async def of(self, entry: Entry) -> Condition:
        """The condition now, as all workers see it."""
        return self._of(entry, await self._store.load())

    async def of_all(self, entries: list[Entry]) -> list[Condition]:
        """The same for many, read once."""
        rows = await self._store.load()
        return [self._of(entry, rows) for entry in entries]

    def _of(self, entry: Entry, rows: Mapping[str, EntryHealth]) -> Condition:
        now = self._now_ms()
        own = rows.get(entry.name, _FINE)
        states = [_state(entry, own, now), _state(entry, rows.get(_whole(entry), _FINE), now)]
        held = rows.get(held_key(entry.provider), _FINE)
        if held.state is EntryState.PAUSED or held.until_ms > now:
            states.append((held.state, held.until_ms, held.reason))
        if entry.hint_until_ms > now:
            states.append((EntryState.COOLING, entry.hint_until_ms, "rate_limit: seen by Hermes"))
        worst = max(states, key=lambda state: (_SEVERITY.index(state[0]), state[1]))
        ill = tuple(key for key in (_whole(entry), entry.name) if rows.get(key, _FINE) != _FINE)
        return Condition(*worst, failures=own.failures, ill_keys=ill)

    async def take_probe(self, condition: Condition) -> bool:
        """True for the one caller of all workers that may try an entry whose cool-down is over; give it back with `end_probe`."""
        taken: list[str] = []
        for key in condition.ill_keys:
            if not await self._store.try_lease(key, PROBE_SECONDS):
                for held in taken:
                    await self._store.release(held)
                return False
            taken.append(key)
        return True

    async def end_probe(self, condition: Condition) -> None:
        """After the probe, whatever came of it."""
        for key in condition.ill_keys:
            await self._store.release(key)

    async def recovered(self, condition: Condition) -> None:
        """The entry answered."""
        for key in condition.ill_keys:
            await self._store.save(key, _FINE)

    async def fell_ill(self, entry: Entry, diagnosis: Diagnosis, text: str, *, failures: int) -> int:
        """Stores what a failure means for the entry; gives the moment it may be called again, 0 where the failure says nothing about that."""
        if diagnosis.after is After.NOTHING:
            return 0
        reason = f"{diagnosis.error.value}: {text}" if text else diagnosis.error.value
        if diagnosis.after is After.DOWN:
            fingerprint = entry.fingerprint(with_key=diagnosis.error is ErrorClass.AUTH)
            await self._store.save(entry.name, EntryHealth(EntryState.DOWN, 0, reason, failures + 1, fingerprint))
            return 0
        until = self._now_ms() + int(diagnosis.cool_ms * (1 + _JITTER * self._random()))
        key = _whole(entry) if diagnosis.after is After.COOL_PROVIDER else entry.name
        await self._store.save(key, EntryHealth(EntryState.COOLING, until, reason, failures + 1))
        return until


def _whole(entry: Entry) -> str:
    return f"{entry.provider}/*"


def _state(entry: Entry, health: EntryHealth, now_ms: int) -> tuple[EntryState, int, str]:
    if health.state is EntryState.HEALTHY:
        return EntryState.HEALTHY, 0, ""
    if health.state is EntryState.DOWN:
        same = health.fingerprint in {entry.fingerprint(with_key=True), entry.fingerprint(with_key=False)}
        return (EntryState.DOWN, 0, health.reason) if same else (EntryState.HEALTHY, 0, "")
    state = EntryState.COOLING if health.until_ms > now_ms else EntryState.HALF_OPEN
    return state, health.until_ms, health.reason
