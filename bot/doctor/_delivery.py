"""Proves that a delivery arrives: a receiver on the webhook's own port, or what the running service saw."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from aiohttp import web

from bot.config import Settings, split_listen
from bot.fleet.hooks import LOOKED_AT, arrivals
from bot.fleet.probes._proof import Proof
from bot.gitea.errors import BadDelivery
from bot.gitea.forge import Forge
from bot.gitea.sansio import Event
from bot.listeners import close
from bot.redaction import Secret

BODY_CAP = 8 * 1024**2


class PortBusyError(Exception):
    """The webhook's address cannot be listened on; `held` where another program has it, else it is no address of this machine."""

    def __init__(self, held: bool) -> None:  # noqa: FBT001
        self.held = held
        super().__init__("in use" if held else "not an address of this machine")


class Receiver:
    """Listens on `listen` while it is open and remembers which repositories sent an authentic push. Opening raises PortBusyError."""

    def __init__(self, listen: str, secrets: Sequence[Secret]) -> None:
        self._host, self._port = split_listen(listen)
        self._secrets = [secret.reveal().encode() for secret in secrets]
        self._pushed: set[str] = set()
        self._changed = asyncio.Condition()
        self.forged = 0
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=BODY_CAP)
        app.router.add_post("/{path:.*}", self._take)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, self._host, self._port).start()
        except OSError as error:
            await close(self._runner)
            raise PortBusyError(error.errno == errno.EADDRINUSE) from None
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._runner is not None:
            await close(self._runner)

    async def wait(self, full_name: str, seconds: float) -> Proof:
        """PROVEN once that repository has pushed; FORGED at once when something came whose signature does not fit; else SILENT."""
        wanted = full_name.casefold()
        before = self.forged
        try:
            async with asyncio.timeout(seconds), self._changed:
                await self._changed.wait_for(lambda: wanted in self._pushed or self.forged > before)
        except TimeoutError:
            return Proof.SILENT
        return Proof.PROVEN if wanted in self._pushed else Proof.FORGED

    def forget(self, full_name: str) -> None:
        """Before another try with the same repository."""
        self._pushed.discard(full_name.casefold())

    async def _take(self, request: web.Request) -> web.Response:
        try:
            event = Event.from_http(request.headers, await request.read(), self._secrets, max_bytes=BODY_CAP)
        except BadDelivery as refused:
            self.forged += 1
            status = refused.status
        else:
            if event.event_type == "push":
                self._pushed.add((event.full_name or "").casefold())
            # Anything else is left to reconciliation: nobody is here to work on it.
            status = 200 if event.event_type == "push" else 503
        async with self._changed:
            self._changed.notify_all()
        return web.Response(status=status)


async def prove(receiver: Receiver, forge: Forge, full_name: str, *, hook_id: int, seconds: float) -> Proof:
    """Asks for a test delivery and waits for it; an empty repository sends none."""
    owner, _, name = full_name.partition("/")
    if (await forge.repo(owner, name)).get("empty"):
        return Proof.EMPTY
    receiver.forget(full_name)
    await forge.test_hook(full_name, hook_id)
    return await receiver.wait(full_name, seconds)


async def last_test_push_ms(settings: Settings) -> int:
    """When the service saw a test push last (Unix milliseconds), 0 where it never did or its database is not there yet."""
    from bot.store import Store, cursors

    store = Store(settings.database_url())
    try:
        if store.path is not None and not store.path.exists():
            return 0
        return int(await store.read(lambda conn: cursors.get(conn, cursors.LAST_TEST_PUSH)) or 0)
    finally:
        store.close()


async def last_arrivals_ms(settings: Settings) -> dict[str, int]:
    """`owner/name` in small letters -> when the service stored its last delivery (Unix milliseconds), among the newest of all repositories."""
    from bot.store import Store, deliveries

    store = Store(settings.database_url())
    try:
        if store.path is not None and not store.path.exists():
            return {}
        rows = await store.read(lambda conn: deliveries.newest(conn, limit=LOOKED_AT))
    except Exception:
        # A database that cannot be read is told by its own check.
        return {}
    finally:
        store.close()
    return arrivals(rows)
