"""What is known about each entry of the chain, kept where all workers see it and a restart does not forget it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Protocol


class EntryState(StrEnum):
    """HALF_OPEN is never stored: it is a cool-down that is over, with one probe still to come. PAUSED is an operator's word, not a failure."""

    HEALTHY = "healthy"
    COOLING = "cooling"
    HALF_OPEN = "half_open"
    DOWN = "down"
    PAUSED = "paused"


@dataclass(frozen=True, slots=True)
class EntryHealth:
    """State of one entry (or, under the key `provider/*`, of a whole provider).

    `until_ms` is the end of a cool-down, `failures` how many times in a row it failed, `fingerprint` the configuration a DOWN was found with:
    another one lifts it.
    """

    state: EntryState = EntryState.HEALTHY
    until_ms: int = 0
    reason: str = ""
    failures: int = 0
    fingerprint: str = ""

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EntryHealth:
        """What `to_json` gave; an empty mapping is a healthy entry."""
        return cls(**{**data, "state": EntryState(data.get("state", EntryState.HEALTHY))})


def held_key(provider: str) -> str:
    """Where `HealthStore.load` tells that a person, the configured hours or the breaker holds a whole provider; never saved."""
    return f"held:{provider}"


def available(health: Mapping[str, Any], at_ms: int) -> bool:
    """Whether an entry with this stored record could be called at that moment."""
    known = EntryHealth.from_json(health)
    return known.state is EntryState.HEALTHY or (known.state is EntryState.COOLING and known.until_ms <= at_ms)


class HealthStore(Protocol):
    """Shared by all workers, survives restarts. Keys are `provider/model`, or `provider/*` for a whole provider."""

    async def load(self) -> dict[str, EntryHealth]: ...

    async def save(self, key: str, health: EntryHealth) -> None: ...

    async def try_lease(self, key: str, seconds: float) -> bool:
        """True for exactly one caller until `seconds` have passed or the lease is released."""

    async def release(self, key: str) -> None:
        """Gives a lease back."""


class MemoryHealth:
    """A HealthStore for one process: `doctor`, the canary and single runs that have no database."""

    def __init__(self, now_ms: Callable[[], int]) -> None:
        self._now_ms = now_ms
        self._rows: dict[str, EntryHealth] = {}
        self._leases: dict[str, int] = {}

    async def load(self) -> dict[str, EntryHealth]:
        """A copy of all rows."""
        return dict(self._rows)

    async def save(self, key: str, health: EntryHealth) -> None:
        """Replaces the row."""
        self._rows[key] = health

    async def try_lease(self, key: str, seconds: float) -> bool:
        """See HealthStore."""
        now = self._now_ms()
        if self._leases.get(key, 0) > now:
            return False
        self._leases[key] = now + int(seconds * 1000)
        return True

    async def release(self, key: str) -> None:
        """See HealthStore."""
        self._leases.pop(key, None)
