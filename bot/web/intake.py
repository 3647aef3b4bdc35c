"""The webhook: verified, filtered, and durable before its 2xx; nothing else happens while Gitea waits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

import structlog
from aiohttp import web
from sqlalchemy.engine import Connection

from bot.failpoints import Failpoints
from bot.gitea.errors import BadDelivery, BadSignature, Malformed, TooLarge, Unsigned
from bot.gitea.routing import Router
from bot.gitea.sansio import Event, is_test_push
from bot.redaction import MINIMUM_LENGTH, Secret
from bot.repositories import Repositories
from bot.store import Store, cursors, deliveries

log = structlog.get_logger()

AT_ONCE = 64
BUFFERED_BYTES = 128 * 1024 * 1024
FLUSH_SECONDS = 2.0


class _BusyError(Exception):
    """Too much is being received at once."""


class Intake:
    """Takes deliveries. `heard(ms)` counts every authentic one; the newest is written to the store every FLUSH_SECONDS, not with each."""

    def __init__(
        self,
        store: Store,
        router: Router,
        repositories: Repositories,
        *,
        secrets: Sequence[Secret],
        me_id: int,
        max_bytes: int,
        read_seconds: float,
        offer: Callable[[str], None],
        count: Callable[[str, str], None],
        handled: Callable[[str, float], None],
        failpoint: Failpoints,
        now_ms: Callable[[], int],
        hidden: Sequence[Secret] = (),
    ) -> None:
        self._store = store
        self._router = router
        self._repositories = repositories
        self._secrets = [secret.reveal().encode() for secret in secrets]
        self._hidden = [*self._secrets, *(secret.reveal().encode() for secret in hidden)]
        self._me_id = me_id
        self._max_bytes = max_bytes
        self._read_seconds = read_seconds
        self._offer = offer
        self._count = count
        self._handled = handled
        self._failpoint = failpoint
        self._now_ms = now_ms
        # Only what has arrived takes a place: whoever sends slowly holds up nobody, and all of them together no more than BUFFERED_BYTES.
        self._places = asyncio.Semaphore(AT_ONCE)
        self._buffered = 0
        self._written_ms = 0
        self.last_ms = 0
        self.last_test_ms = 0

    async def receive(self, request: web.Request) -> web.Response:
        """POST /webhook."""
        started = time.monotonic()
        event_type = "other"
        try:
            body = await self._read(request)
            async with self._places:
                event = Event.from_http(request.headers, body, self._secrets, max_bytes=self._max_bytes)
                event_type = event.event_type
                status, result, text = await self._take(event)
        except BadDelivery as error:
            status, text = error.status, error.reason
            result = "bad_signature" if isinstance(error, Unsigned | BadSignature) else "malformed"
            log.warning("intake.refused", status=status, reason=text, peer=request.remote)
        except TimeoutError:
            status, result, text = 408, "malformed", "the body did not arrive in time"
        except _BusyError:
            log.warning("intake.busy", peer=request.remote)
            status, result, text = 503, "error", "too much is being received at once"
        except Exception:
            log.exception("intake.failed")
            status, result, text = 503, "error", "the delivery could not be stored"
        self._count(event_type, result)
        self._handled(event_type, time.monotonic() - started)
        response = web.Response(status=status, text=text + "\n")
        if status in (408, 413, 503):
            response.force_close()
        return response

    async def _read(self, request: web.Request) -> bytes:
        if request.content_length is not None and request.content_length > self._max_bytes:
            raise TooLarge(f"the body is larger than {self._max_bytes} bytes")
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._read_seconds):
                async for part in request.content.iter_any():
                    size += len(part)
                    self._buffered += len(part)
                    if size > self._max_bytes:
                        raise TooLarge(f"the body is larger than {self._max_bytes} bytes")
                    if self._buffered > BUFFERED_BYTES:
                        raise _BusyError
                    parts.append(part)
        except (ConnectionError, web.RequestPayloadError) as error:
            raise Malformed("the body did not arrive whole") from error
        finally:
            self._buffered -= size
        return b"".join(parts)

    async def _take(self, event: Event) -> tuple[int, str, str]:
        now = self._now_ms()
        if is_test_push(event):
            self.last_ms = self.last_test_ms = now
            await self.flush()
            return 200, "ignored", "test delivery received"
        self.last_ms = now
        if event.sender_id is not None and event.sender_id == self._me_id:
            return 200, "ignored", "own event"
        if self._repositories.serves(event.repo_id, event.full_name) is None:
            log.info("intake.foreign_repository", repository=event.full_name, delivery=event.delivery)
            return 200, "ignored", "this repository is not served here"
        if not self._router.handles(event.event_type, event.action):
            return 200, "ignored", "nobody handles this event"
        body = self._without_secrets(event)
        stored = await self._store.write(
            lambda conn: deliveries.add(
                conn, digest=event.digest, event_type=event.event_type, delivery=event.delivery, body=body, now_ms=now
            )
        )
        self._failpoint("inbox.inserted")
        if not stored:
            return 200, "duplicate", "received before"
        self._offer(event.digest)
        return 202, "accepted", "stored"

    def _without_secrets(self, event: Event) -> bytes:
        """The body as it may be stored. A secret of ours that somebody wrote into an issue is struck out as the client does it with replies."""
        body = event.body
        for secret in self._hidden:
            if len(secret) >= MINIMUM_LENGTH and secret in body:
                body = body.replace(secret, b"***")
        if body is not event.body:
            log.error(
                "intake.secret_published", repository=event.full_name, delivery=event.delivery, remedy="revoke it: people can read it"
            )
        return body

    async def flush(self) -> None:
        """Writes when the last authentic delivery (and test) came."""
        if self.last_ms == self._written_ms:
            return
        last, test = self.last_ms, self.last_test_ms

        def write(conn: Connection) -> None:
            cursors.put(conn, cursors.LAST_DELIVERY, last)
            if test:
                cursors.put(conn, cursors.LAST_TEST_PUSH, test)

        await self._store.write(write)
        self._written_ms = last

    async def run(self) -> None:
        """Flushes until cancelled."""
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            try:
                await self.flush()
            except Exception:
                log.exception("intake.flush")
