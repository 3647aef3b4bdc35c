"""What is known of the providers, kept where every process sees it: their health, what holds them, the history of their outages."""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy.engine import Connection

from bot.models import PauseScope
from bot.providers.health import EntryHealth, EntryState, held_key
from bot.store import Store, breakers, outages, pauses, providers


class StoredHealth:
    """Provider health in the store, shared by all workers."""

    def __init__(self, store: Store, now_ms: Callable[[], int]) -> None:
        self._store = store
        self._now_ms = now_ms

    async def load(self) -> dict[str, EntryHealth]:
        """Every entry known."""
        return await self._store.read(self._load)

    def _load(self, conn: Connection) -> dict[str, EntryHealth]:
        found = {key: EntryHealth.from_json(value) for key, value in providers.load(conn).items()}
        for breaker in breakers.opened(conn):
            if breaker.scope is PauseScope.PROVIDER:
                found[held_key(breaker.provider)] = EntryHealth(EntryState.COOLING, breaker.due_ms, "its breaker is open")
        for name, pause in pauses.paused_providers(conn, self._now_ms()).items():
            found[held_key(name)] = EntryHealth(EntryState.PAUSED, pause.until_ms or 0, f"paused by {pause.by}")
        return found

    async def save(self, key: str, health: EntryHealth) -> None:
        """One entry, and the history of its outages."""

        def write(conn: Connection) -> None:
            providers.save(conn, key, health.to_json())
            if health.state is EntryState.HEALTHY:
                outages.ended(conn, key, self._now_ms())
            else:
                outages.began(conn, key, reason=health.reason, until_ms=health.until_ms or None, now_ms=self._now_ms())

        await self._store.write(write)

    async def try_lease(self, key: str, seconds: float) -> bool:
        """True for one caller until the time is over."""
        return await self._store.write(lambda conn: providers.try_lease(conn, key, seconds=seconds, now_ms=self._now_ms()))

    async def release(self, key: str) -> None:
        """Gives the lease back."""
        await self._store.write(lambda conn: providers.release(conn, key))
