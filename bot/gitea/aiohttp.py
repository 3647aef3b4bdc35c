"""The aiohttp adapter: one pooled session, short timeouts, no redirects, no proxies or credentials from the environment."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp
from yarl import URL

from bot.gitea import errors, sansio
from bot.gitea.abc import GiteaAPI, Token

CONNECT_SECONDS = 5.0
TOTAL_SECONDS = 30.0
CONCURRENCY = 8
CHUNK = 64 * 1024


class GiteaClient(GiteaAPI):
    """`GiteaAPI` over one `aiohttp.ClientSession`, opened at the first request and closed by `close()` or `async with`.

    TLS certificates are always verified, against `ca_file` (PEM) where the server's authority is a private one. At most
    `concurrency` requests run at once. Other keywords are those of `GiteaAPI`.
    """

    def __init__(
        self,
        base_url: str,
        token: Token,
        *,
        ca_file: Path | None = None,
        concurrency: int = CONCURRENCY,
        connect_seconds: float = CONNECT_SECONDS,
        total_seconds: float = TOTAL_SECONDS,
        **options: Any,
    ) -> None:
        super().__init__(base_url, token, **options)
        self._tls = ssl.create_default_context(cafile=str(ca_file)) if ca_file else True
        self._slots = asyncio.Semaphore(concurrency)
        self._concurrency = concurrency
        self._timeout = aiohttp.ClientTimeout(total=total_seconds, connect=connect_seconds)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections; a later request opens new ones."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def _request(self, method: str, url: str, headers: Mapping[str, str], body: bytes) -> tuple[int, Mapping[str, str], bytes]:
        session = self._open()
        # The causes are cut off: aiohttp's exceptions hold the request with its headers.
        try:
            async with (
                self._slots,
                session.request(method, URL(url, encoded=True), headers=headers, data=body or None, allow_redirects=False) as reply,
            ):
                return reply.status, dict(reply.headers), await _read(reply)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError, aiohttp.InvalidURL) as error:
            raise errors.NotSent(_reason(error)) from None
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise errors.Lost(_reason(error)) from None

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=self._concurrency, ssl=self._tls),
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=self._timeout,
                trust_env=False,
            )
        return self._session


async def _read(reply: aiohttp.ClientResponse) -> bytes:
    """The body, cut one byte above the cap, which `sansio.decode` then refuses."""
    body = bytearray()
    async for chunk in reply.content.iter_chunked(CHUNK):
        body += chunk
        if len(body) > sansio.MAX_REPLY:
            break
    return bytes(body[: sansio.MAX_REPLY + 1])


def _reason(error: BaseException) -> str:
    """What failed, without address or headers: the class and, for a refused connection or a bad certificate, the system's words."""
    cause = getattr(error, "os_error", None) or getattr(error, "certificate_error", None) or error
    number = getattr(cause, "errno", None)
    # asyncio writes the address into the text of a refused connection.
    words = os.strerror(number) if isinstance(number, int) and number > 1 else None
    words = getattr(cause, "verify_message", None) or words or getattr(cause, "strerror", None)
    return f"{type(error).__name__}: {words}" if isinstance(words, str) and words else type(error).__name__
