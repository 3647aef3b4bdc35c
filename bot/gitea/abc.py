"""The REST client without its I/O: retries only what is harmless to repeat, pages by totals, keeps the token on one origin."""

# ruff: noqa: A005 - absolute imports only; the name is that of the pattern

from __future__ import annotations

import abc
import asyncio
import random
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any, Protocol

from bot.gitea import errors, sansio

MAX_ATTEMPTS = 4
# The least a timeline takes: a page with something, and two without before its end is sure.
TIMELINE_PAGES = 3
BUDGET_SECONDS = 120.0
MAX_REDIRECTS = 3
PAGE_LIMIT = 50
SHORTEST_TOKEN = 8

RequestHook = Callable[[str, str, int | str, int, float], object]
Params = Mapping[str, object]


class Token(Protocol):
    """A secret that shows itself only when asked."""

    def reveal(self) -> str: ...


class GiteaAPI(abc.ABC):
    """One server and one account. URLs are templates under `/api/v1` such as `/repos/{owner}/{repo}/issues/{index}`.

    Every method returns the decoded JSON, or None for a reply without one, and raises a `ForgeError`.
    `on_request(route, method, status_or_reason, attempt, seconds)` is told of every single exchange; the reason is "not sent" or
    "lost". `max_items` stands for the server's `max_response_items`, else it is asked once. `clock` is monotonic, `wall` is Unix
    time, both in seconds; `jitter` yields numbers in [0, 1).
    """

    def __init__(
        self,
        base_url: str,
        token: Token,
        *,
        user_agent: str = "timmy-dispatch",
        on_request: RequestHook | None = None,
        max_items: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.base_url = sansio.base_url(base_url)
        self._token = token
        self._user_agent = user_agent
        self._on_request = on_request
        self._max_items = max_items
        self._clock = clock
        self._wall = wall
        self._jitter = jitter

    @abc.abstractmethod
    async def _request(self, method: str, url: str, headers: Mapping[str, str], body: bytes) -> tuple[int, Mapping[str, str], bytes]:
        """One exchange without following redirects. Raises `NotSent` or `Lost`."""

    @abc.abstractmethod
    async def sleep(self, seconds: float) -> None:
        """Wait."""

    async def getitem(self, url: str, params: Params | None = None, **variables: str | int) -> Any:
        """GET one object."""
        reply, _ = await self._call("GET", url, params=params, variables=variables)
        return reply

    async def gettext(self, url: str, **variables: str | int) -> str:
        """GET plain text, tried once: for what is good to have and not needed."""
        target, hops = self._locate(url, variables, "GET"), 0
        while True:
            status, headers, body = await self._send("GET", target, url, None, 1)
            follow = sansio.follow(self.base_url, target, status, headers) if hops < MAX_REDIRECTS else None
            if follow is None:
                break
            target, hops = follow, hops + 1
        if status != 200:  # noqa: PLR2004
            sansio.decode(status, headers, self._hide(body), method="GET", route=url, now=self._wall())
            raise errors.BadReply("a text was expected", status=status, method="GET", route=url, headers=headers)
        return self._hide(body).decode("utf-8", "replace")

    async def getiter(
        self,
        url: str,
        params: Params | None = None,
        key: str | None = None,
        *,
        probe: str | None = None,
        **variables: str | int,
    ) -> AsyncGenerator[Any, None]:
        """GET every item of a list, each once, whatever the server's paging habits.

        `key` names the list in a wrapping object. `probe` is asked when the first page fails with 500, and its error (say,
        `NotFound`) raised instead: Gitea answers 500 for the comments of a missing issue.
        """
        is_timeline = url.endswith("/timeline")
        limit = await self._page_limit()
        seen: set[object] = set()
        previous: set[object] = set()
        page, empty_pages, last_total = 0, 0, None
        pages: dict[int, tuple[Any, Mapping[str, str]]] = {}
        while True:
            page += 1
            if page not in pages:
                wanted = range(page, page + (TIMELINE_PAGES if is_timeline else 1))
                asks = (
                    self._call("GET", url, params={**(params or {}), "page": number, "limit": limit}, variables=variables, probe=probe)
                    for number in wanted
                )
                pages = dict(zip(wanted, await asyncio.gather(*asks), strict=True))
            reply, headers = pages[page]
            items = sansio.page_items(reply, key)
            if items is None:
                raise errors.BadReply("a list was expected", status=200, method="GET", route=url, headers=headers)
            found = {sansio.identity(item): item for item in items}
            fresh = found.keys() - seen
            for identity, item in found.items():
                if identity in fresh:
                    yield item
            seen |= fresh
            total = sansio.page_total(reply, headers)
            if not items:
                empty_pages += 1
                # The timeline is filtered after paging, so one empty page proves nothing there.
                if not is_timeline or empty_pages > 1:
                    return
                continue
            empty_pages = 0
            grew = total is not None and last_total is not None and total > last_total
            unpaged = len(items) > limit or (bool(previous) and previous <= found.keys())
            # A whole page seen before ends the list, unless so much was inserted in front that the pages moved on by one.
            if (unpaged or not fresh) and (fresh or not grew):
                return
            # A total that equals a full page may be that page's own count; one more request tells.
            if not is_timeline and total == len(seen) and len(items) != limit:
                return
            previous, last_total = set(found), total

    async def post(self, url: str, data: object = None, *, idempotent: bool = False, **variables: str | int) -> Any:
        """POST; `idempotent` marks one that does no harm twice. Otherwise a doubtful end raises `OutcomeUnknown`."""
        reply, _ = await self._call("POST", url, data=data, idempotent=idempotent, variables=variables)
        return reply

    async def patch(self, url: str, data: object = None, *, idempotent: bool = False, **variables: str | int) -> Any:
        """PATCH; `idempotent` marks one that only sets absolute values."""
        reply, _ = await self._call("PATCH", url, data=data, idempotent=idempotent, variables=variables)
        return reply

    async def put(self, url: str, data: object = None, **variables: str | int) -> Any:
        """PUT."""
        reply, _ = await self._call("PUT", url, data=data, variables=variables)
        return reply

    async def delete(self, url: str, data: object = None, **variables: str | int) -> Any:
        """DELETE. A 404 after an attempt of which no answer came means that attempt succeeded."""
        reply, _ = await self._call("DELETE", url, data=data, variables=variables)
        return reply

    async def _page_limit(self) -> int:
        if self._max_items is None:
            try:
                settings = await self.getitem("/settings/api")
            except errors.ForgeError as error:
                if errors.is_transient(error):
                    raise
                settings = None
            most = settings.get("max_response_items") if isinstance(settings, dict) else None
            self._max_items = most if isinstance(most, int) else PAGE_LIMIT
        return min(PAGE_LIMIT, self._max_items) if self._max_items > 0 else PAGE_LIMIT

    def _locate(self, template: str, variables: Mapping[str, str | int], method: str) -> str:
        path = sansio.expand(template, **variables)
        if path.startswith("/"):
            return f"{self.base_url}{sansio.API_PATH}{path}"
        if not sansio.within(self.base_url, path):
            raise errors.ForeignOrigin("the address lies outside the configured server", method=method)
        return path

    async def _call(
        self,
        method: str,
        template: str,
        *,
        variables: Mapping[str, str | int],
        params: Params | None = None,
        data: object = None,
        idempotent: bool | None = None,
        probe: str | None = None,
    ) -> tuple[Any, Mapping[str, str]]:
        url = sansio.with_query(self._locate(template, variables, method), params)
        harmless = idempotent if idempotent is not None else True
        deadline = self._clock() + BUDGET_SECONDS
        attempt, in_doubt = 0, False
        while True:
            attempt += 1
            try:
                return await self._exchange(method, url, template, data, attempt)
            except errors.NotFound:
                if method == "DELETE" and in_doubt:
                    return None, {}
                raise
            except errors.ForgeError as error:
                failure = error
            if sansio.in_doubt(failure, idempotent=harmless):
                raise errors.OutcomeUnknown(
                    failure.message, status=failure.status, method=method, route=template, headers=failure.headers
                ) from failure
            if attempt == MAX_ATTEMPTS or not sansio.may_repeat(failure, idempotent=harmless):
                raise failure
            if probe is not None and attempt == 1 and failure.status == 500:  # noqa: PLR2004
                await self.getitem(probe, None, **variables)
            in_doubt |= isinstance(failure, errors.Unavailable) and failure.sent
            delay = sansio.delay(failure, attempt, self._jitter())
            if self._clock() + delay > deadline:
                raise failure
            await self.sleep(delay)

    async def _exchange(self, method: str, url: str, route: str, data: object, attempt: int) -> tuple[Any, Mapping[str, str]]:
        hops = 0
        while True:
            status, headers, body = await self._send(method, url, route, data, attempt)
            target = sansio.follow(self.base_url, url, status, headers) if method == "GET" and hops < MAX_REDIRECTS else None
            if target is None:
                return sansio.decode(status, headers, self._hide(body), method=method, route=route, now=self._wall()), headers
            url, hops = target, hops + 1

    async def _send(self, method: str, url: str, route: str, data: object, attempt: int) -> tuple[int, Mapping[str, str], bytes]:
        headers, body = sansio.prepare(self._token.reveal(), self._user_agent, data)
        started = self._clock()
        outcome: int | str = "cancelled"
        try:
            reply = await self._request(method, url, headers, body)
            outcome = reply[0]
            return reply
        except (errors.NotSent, errors.Lost) as error:
            sent = isinstance(error, errors.Lost)
            outcome = "lost" if sent else "not sent"
            failure = errors.Unavailable(self._hide(str(error).encode()).decode() or outcome, method=method, route=route)
            failure.sent = sent
        finally:
            if self._on_request is not None:
                self._on_request(route, method, outcome, attempt, self._clock() - started)
        raise failure

    def _hide(self, body: bytes) -> bytes:
        """Strike the token out of what came back, before any of it becomes a message, a prompt or a row."""
        token = self._token.reveal().encode()
        return body.replace(token, b"***") if len(token) >= SHORTEST_TOKEN else body
