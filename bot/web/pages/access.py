"""Who may read a page: whoever may read the repository on the forge, whoever holds the access token, or the key of that one sprint."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

import structlog
from aiohttp import web

from bot.gitea.errors import ForgeError, is_transient
from bot.gitea.forge import Forge
from bot.models import SprintView
from bot.redaction import Secret
from bot.replies import Links
from bot.settings import PagesSettings
from bot.web.pages.fresh import Fresh

log = structlog.get_logger()

COOKIE = "timmy_pages"
COOKIE_SECONDS = 30 * 86_400
ASK_SECONDS = 5.0
FRESH_SECONDS = 60.0
REMEMBERED_SECONDS = 3_600.0
TRIES = 10
TRIES_SECONDS = 60.0


class Openness:
    """Whether anybody may read a repository: what the forge answers somebody who has not signed in.

    `stranger` is the forge without a token, so that a server which shows nothing to strangers counts as private whatever its records say.
    A forge that does not answer is taken at its last word for an hour, then everything is private.
    """

    def __init__(self, stranger: Forge, *, seconds: float = FRESH_SECONDS, clock: Callable[[], float] = time.monotonic) -> None:
        self._stranger = stranger
        self._clock = clock
        self._last: dict[int, tuple[float, bool]] = {}
        self._fresh = Fresh(self._ask, seconds=seconds, clock=clock)

    async def __call__(self, repo_id: int) -> bool:
        """True where the repository and its owner are public."""
        return await self._fresh.get(repo_id)

    async def _ask(self, repo_id: int) -> bool:
        try:
            async with asyncio.timeout(ASK_SECONDS):
                record = await self._stranger.repo_by_id(repo_id)
        except (ForgeError, TimeoutError) as error:
            if isinstance(error, ForgeError) and not is_transient(error):
                self._last[repo_id] = (self._clock(), False)
                return False
            log.warning("pages.forge_silent", repo_id=repo_id, error=str(error))
            at, last = self._last.get(repo_id, (0.0, False))
            return last and self._clock() - at < REMEMBERED_SECONDS
        owner = record.get("owner") or {}
        opened = record.get("private") is False and not record.get("internal") and (owner.get("visibility") or "public") == "public"
        self._last[repo_id] = (self._clock(), opened)
        return opened


@dataclass(frozen=True, slots=True)
class Viewer:
    """Somebody who looks: `trusted` holds the access token, or the pages are open to all; `key` came with the address."""

    trusted: bool
    key: str = ""


class Gate:
    """The one decision over every page. `token` None: there is nothing to log in with."""

    def __init__(
        self, settings: PagesSettings, *, links: Links, token: Secret | None, secret: Secret, is_open: Callable[[int], Awaitable[bool]]
    ) -> None:
        self._visibility = settings.visibility
        self._links = links
        self._token = token
        self._is_open = is_open
        self._cookie = _cookie(secret, token) if token else ""
        self._failed: list[float] = []
        self.has_login = bool(token) and settings.visibility != "public"

    def viewer(self, request: web.Request) -> Viewer:
        """Who looks, from cookie, header and address."""
        return Viewer(self._visibility == "public" or self._trusted(request), request.query.get("key", ""))

    def _trusted(self, request: web.Request) -> bool:
        if self._token is None:
            return False
        scheme, _, bearer = request.headers.get("Authorization", "").partition(" ")
        by_header = scheme.casefold() == "bearer" and _same(bearer.strip(), self._token.reveal())
        return by_header or _same(request.cookies.get(COOKIE, ""), self._cookie)

    async def may_see(self, viewer: Viewer, view: SprintView) -> bool:
        """Whether this sprint's page is theirs to read."""
        key = self._links.key(view.id)
        return bool(key and _same(viewer.key, key)) or bool(await self.open_to(viewer, [view.repo_id]))

    async def open_to(self, viewer: Viewer, repositories: Iterable[int]) -> frozenset[int]:
        """Those of the repositories whose sprints they may see without a key."""
        asked = list(dict.fromkeys(repositories))
        if viewer.trusted:
            return frozenset(asked)
        if self._visibility != "repository":
            return frozenset()
        answers = await asyncio.gather(*(self._is_open(repo_id) for repo_id in asked))
        return frozenset(repo_id for repo_id, answer in zip(asked, answers, strict=True) if answer)

    def log_in(self, given: str, *, now: float) -> str | None:
        """The cookie for the right token, "" for a wrong one, None after TRIES wrong ones in TRIES_SECONDS."""
        self._failed = [at for at in self._failed if now - at < TRIES_SECONDS]
        if len(self._failed) >= TRIES:
            return None
        if self._token is not None and _same(given, self._token.reveal()):
            return self._cookie
        self._failed.append(now)
        return ""


def _cookie(secret: Secret, token: Secret) -> str:
    """What the browser keeps instead of the token; another token makes it void."""
    return hmac.new(secret.reveal().encode(), b"cookie:" + token.reveal().encode(), hashlib.sha256).hexdigest()


def _same(given: str, expected: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "replace"), expected.encode())
