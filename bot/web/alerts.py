"""The receiver of Alertmanager's notifications: who is let in is decided before a byte of the body is read, and 2xx means that the row is durable."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable

import structlog
from aiohttp import web

from bot.models import UserError
from bot.redaction import Secret

BODY_CAP = 1024 * 1024
READ_SECONDS = 10.0

log = structlog.get_logger(__name__)

Handler = Callable[[web.Request], Awaitable[web.Response]]


class _TooLargeError(Exception):
    """More than BODY_CAP bytes."""


def receiver(take: Callable[[bytes], Awaitable[None]], token: Secret) -> Handler:
    """`POST /alerts`. `take(body)` returns when the notification is stored, and raises UserError for what is none.

    200 stored; 400 no notification; 401 no or another token; 408 too slow; 413 too large; 503 it cannot be stored now (Alertmanager tries again).
    """

    async def handle(request: web.Request) -> web.Response:
        if not _allowed(request.headers.get("Authorization", ""), token):
            log.warning("alerts.refused", peer=request.remote)
            return _answer(401, "a bearer token is needed", {"WWW-Authenticate": "Bearer"})
        try:
            await take(await _read(request))
        except _TooLargeError:
            return _answer(413, f"the body is larger than {BODY_CAP} bytes")
        except TimeoutError:
            return _answer(408, "the body did not arrive in time")
        except (ConnectionError, web.RequestPayloadError):
            return _answer(400, "the body did not arrive whole")
        except UserError as error:
            log.warning("alerts.malformed", error=str(error), peer=request.remote)
            return _answer(400, str(error))
        except Exception:
            log.exception("alerts.failed")
            return _answer(503, "the notification could not be stored", {"Retry-After": "5"})
        return _answer(200, "stored")

    return handle


def _allowed(header: str, token: Secret) -> bool:
    scheme, _, given = header.partition(" ")
    # Bytes, because a header may hold what is no ASCII, which a comparison of texts would refuse with an exception.
    fits = hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), token.reveal().encode())
    return fits and scheme.casefold() == "bearer" and bool(token)


async def _read(request: web.Request) -> bytes:
    if request.content_length is not None and request.content_length > BODY_CAP:
        raise _TooLargeError
    body = bytearray()
    async with asyncio.timeout(READ_SECONDS):
        async for part in request.content.iter_any():
            body += part
            if len(body) > BODY_CAP:
                raise _TooLargeError
    return bytes(body)


def _answer(status: int, text: str, headers: dict[str, str] | None = None) -> web.Response:
    response = web.Response(status=status, text=text + "\n", headers=headers)
    if status in (401, 408, 413):
        response.force_close()
    return response
