"""The Nous login belongs to Hermes: we read its key and let Hermes refresh it, one at a time, and never call the token endpoint ourselves."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bot.models import DispatchError
from bot.providers.hermes_config import NousKey, read_nous_key
from bot.providers.hermes_program import HermesError, run_hermes
from bot.redaction import Secret, terminal

MARGIN_MS: Final = 120_000
LEASE: Final = "nous/refresh"
LEASE_SECONDS: Final = 30.0
WAIT_SECONDS: Final = 15.0
POLL_SECONDS: Final = 0.25
COMMAND_SECONDS: Final = 30.0
_STATUS: Final = re.compile(r"^nous: logged (in|out)(?: \((.*)\))?\s*$", re.MULTILINE)


class LoggedOutError(DispatchError):
    """Nobody is logged in; only a person can mend it."""


class RefreshPendingError(DispatchError):
    """Somebody else is refreshing, or Hermes could not be run; to be tried again in a while."""


@dataclass(frozen=True, slots=True)
class Login:
    """What `hermes auth status nous` says. `known` is False where its output was not understood."""

    known: bool
    logged_in: bool
    reason: str = ""


def parse_status(output: str) -> Login:
    """Reads the command's output: it exits with 0 whatever the answer."""
    match = _STATUS.search(output)
    if match is None:
        return Login(known=False, logged_in=False, reason="the output of `hermes auth status nous` was not understood")
    return Login(known=True, logged_in=match[1] == "in", reason=terminal(match[2] or "")[:200])


class NousLogin:
    """Gives a key that is good for at least two minutes.

    `run` runs `hermes auth status nous` and returns its output; `lease` gives True to one caller of all workers (the health store's).
    """

    def __init__(
        self,
        *,
        read: Callable[[], NousKey | None],
        run: Callable[[], Awaitable[str]],
        lease: Callable[[str, float], Awaitable[bool]],
        now_ms: Callable[[], int],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        on_refresh: Callable[[str], None] | None = None,
    ) -> None:
        self._read = read
        self._run = run
        self._lease = lease
        self._now_ms = now_ms
        self._sleep = sleep
        self._on_refresh = on_refresh or (lambda _result: None)
        self._lock = asyncio.Lock()

    async def fresh(self, *, rejected: Secret | None = None) -> Secret:
        """A key to use now; `rejected` is one the server has just refused. Raises LoggedOutError or RefreshPendingError."""
        if key := self._usable(rejected):
            return key
        async with self._lock:
            if key := self._usable(rejected):
                return key
            if await self._lease(LEASE, LEASE_SECONDS):
                return await self._refresh(rejected)
            for _ in range(int(WAIT_SECONDS / POLL_SECONDS)):
                await self._sleep(POLL_SECONDS)
                if key := self._usable(rejected):
                    return key
        raise RefreshPendingError("the Nous key is being refreshed by another worker")

    async def _refresh(self, rejected: Secret | None) -> Secret:
        status = parse_status(await self._run())
        if status.known and not status.logged_in:
            self._on_refresh("logged_out")
            raise LoggedOutError(f"logged out of Nous{': ' if status.reason else ''}{status.reason}; run `hermes auth add nous`")
        # A key with less than two minutes left is still good for a call; one that was refused is not.
        current = self._read()
        if current is None or not current.key or current.key == rejected or 0 < current.expires_ms <= self._now_ms():
            self._on_refresh("failed")
            raise RefreshPendingError(status.reason or "Hermes gave no new Nous key")
        self._on_refresh("ok")
        return current.key

    def _usable(self, rejected: Secret | None) -> Secret | None:
        current = self._read()
        if current is None or not current.key or current.key == rejected:
            return None
        return current.key if current.expires_ms - self._now_ms() > MARGIN_MS else None


def nous_login(
    home: Path,
    environ: Mapping[str, str],
    *,
    lease: Callable[[str, float], Awaitable[bool]],
    now_ms: Callable[[], int],
    on_refresh: Callable[[str], None] | None = None,
) -> NousLogin:
    """The login of the Hermes home `home`, refreshed by the `hermes` program found on PATH."""
    return NousLogin(
        read=lambda: read_nous_key(home), run=lambda: auth_status(home, environ), lease=lease, now_ms=now_ms, on_refresh=on_refresh
    )


async def auth_status(home: Path, environ: Mapping[str, str]) -> str:
    """Output of `hermes auth status nous` (1.5 s); raises RefreshPendingError where it cannot be run or hangs."""
    try:
        _, output = await run_hermes(home, environ, "auth", "status", "nous", seconds=COMMAND_SECONDS)
    except HermesError as error:
        raise RefreshPendingError(str(error)) from None
    return output
