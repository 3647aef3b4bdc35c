"""The frame of the REST API: routes, callers, scopes, redirects of renamed repositories, paging and the form of errors."""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, TypeVar

from aiohttp import web

from bot.demo.forge.acts import Actor, Acts, RefusedError
from bot.demo.forge.auth import BadCredentialsError, identify, scope_error
from bot.demo.forge.hooks import Hooks
from bot.demo.forge.payloads import Shapes
from bot.demo.forge.state import Issue, Label, Level, Repo, State, Token, User

PREFIX: Final = "/api/v1"
PULLS: Final = "/repos/{owner}/{repo}/pulls"
JSON_TYPE: Final = "application/json;charset=utf-8"
DEFAULT_PAGE: Final = 30
LOGIN: Final = web.RequestKey("login", str)
ROUTE: Final = web.RequestKey("route", str)
_RFC3339: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)")
T = TypeVar("T")


@dataclass(slots=True)
class Site:
    """What every handler needs: the state, the acts, and how the server is addressed. No URL here has a final slash."""

    state: State
    acts: Acts
    hooks: Hooks
    page_cap: int
    url: str = ""
    root_url: str = ""

    def shapes(self, viewer: User | None, host: str = "") -> Shapes:
        return Shapes(self.state, self.root_url, host or self.url, viewer)


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer: `data` becomes JSON unless it is `...` (no body); `total` becomes X-Total-Count, `links` asks for a Link header."""

    data: Any = ...
    status: int = 200
    total: int | None = None
    links: bool = False
    raw: bytes | None = None
    content_type: str = "text/plain; charset=utf-8"


@dataclass(slots=True)
class Call:
    """One request to the API."""

    site: Site
    request: web.Request
    user_or_none: User | None
    token: Token | None
    shapes: Shapes
    repo_or_none: Repo | None = None
    body: dict[str, Any] = field(default_factory=dict)

    @property
    def state(self) -> State:
        return self.site.state

    @property
    def acts(self) -> Acts:
        return self.site.acts

    @property
    def user(self) -> User:
        if self.user_or_none is None:
            raise RefusedError(401, "token is required")
        return self.user_or_none

    @property
    def actor(self) -> Actor:
        return Actor(self.user, self.shapes)

    @property
    def repo(self) -> Repo:
        if self.repo_or_none is None:
            raise self.acts.not_found()
        return self.repo_or_none

    def var(self, name: str) -> str:
        return self.request.match_info[name]

    def number(self, name: str) -> int:
        """A number in the path; what is none is not found."""
        try:
            return int(self.var(name))
        except ValueError as error:
            raise self.acts.not_found() from error

    def query(self, name: str) -> str:
        return self.request.query.get(name, "")

    def text(self, name: str, default: str = "") -> str:
        value = self.body.get(name, default)
        return default if value is None else str(value)

    def issue(self, *, missing: int = 404) -> Issue:
        """The issue or pull request of the path; comments and timeline of a missing one are 500."""
        issue = self.repo.issues.get(self.number("index"))
        if issue is None:
            raise RefusedError(500, "") if missing == 500 else self.acts.not_found()  # noqa: PLR2004
        return issue

    def pull(self) -> Issue:
        issue = self.issue()
        if issue.pull is None:
            raise self.acts.not_found()
        return issue

    def need(self, level: Level, message: str | None = "user should have a permission to write to a repo") -> None:
        if not self.state.may(self.repo, self.user, level):
            raise RefusedError(403, message)

    def integer(self, name: str, default: int = 0) -> int:
        """A number of the body; anything else is 422, as Go's decoder says it."""
        value = self.body.get(name)
        if value is None:
            return default
        if not isinstance(value, int):
            raise RefusedError(422, f"json: cannot unmarshal {name} into Go value of type int64")
        return value

    def labels(self) -> list[Label]:
        """Labels by id, as the creation of an issue names them; unknown ids vanish."""
        wanted = self.body.get("labels") or []
        if not isinstance(wanted, list) or any(not isinstance(i, int) for i in wanted):
            raise RefusedError(422, "json: cannot unmarshal labels into Go value of type []int64")
        return [label for i in wanted if (label := self.state.label_of(self.repo, i)) is not None]

    def people(self, value: Any) -> list[User]:
        """Accounts by name; an unknown one is 422."""
        found = []
        for name in value or []:
            user = self.state.find_user(str(name))
            if user is None:
                raise RefusedError(422, f"Assignee does not exist: [name: {name}]")
            found.append(user)
        return found

    def since(self, name: str = "since") -> int | None:
        """A time in the query, in seconds; bad times are 422."""
        value = self.query(name)
        if not value:
            return None
        if not _RFC3339.fullmatch(value):
            raise RefusedError(422, f'parsing time "{value}" as "2006-01-02T15:04:05Z07:00": cannot parse')
        return int(datetime.fromisoformat(value).timestamp())

    @property
    def per_page(self) -> int:
        limit = self._int("limit") or DEFAULT_PAGE
        return min(limit, self.site.page_cap) if limit > 0 else DEFAULT_PAGE

    def _int(self, name: str) -> int:
        try:
            return int(self.query(name) or 0)
        except ValueError:
            return 0

    def page(self, items: Sequence[T]) -> list[T]:
        """One page of a list. The cap is silent."""
        start = (max(self._int("page"), 1) - 1) * self.per_page
        return list(items[start : start + self.per_page])

    def listed(self, items: Sequence[T], shape: Callable[[T], Any], *, links: bool = False) -> Reply:
        return Reply([shape(item) for item in self.page(items)], total=len(items), links=links)


Handler = Callable[[Call], Awaitable[Reply]]


@dataclass(frozen=True, slots=True)
class Route:
    """A path as the OpenAPI files write it. `scopes` are the categories a token needs; reads without a token stay possible unless
    `signed`; `new_only` marks what 1.22 does not have.
    """

    method: str
    path: str
    handler: Handler
    scopes: tuple[str, ...] = ("repository",)
    signed: bool = False
    new_only: bool = False

    @property
    def pattern(self) -> str:
        """Branches and files may hold slashes, whether escaped or not."""
        path = re.sub(r"\{(branch|filepath|ref)\}", r"{\1:.+}", self.path)
        return PREFIX + path.replace("{index}.{diffType}", r"{index:\d+}.{diffType:diff|patch}")


def error_reply(site: Site, error: RefusedError) -> web.Response:
    if error.message is None:
        return web.Response(status=error.status)
    body: dict[str, Any] = {"errors": None} if error.errors else {}
    body |= {"message": error.message, "url": f"{site.root_url}/api/swagger"}
    return web.Response(status=error.status, body=json.dumps(body).encode(), headers={"Content-Type": JSON_TYPE})


def moved(site: Site, request: web.Request, repo: Repo) -> web.Response:
    """The redirect of a renamed repository, on every method; Location is a path, and only a GET has a page."""
    full = site.state.full_name(repo)
    status, word = (307, "Temporary Redirect") if site.state.old else (301, "Moved Permanently")
    owner, name = request.match_info["owner"], request.match_info["repo"]
    target = request.raw_path.replace(f"/{owner}/{name}", f"/{full}", 1)
    reply = web.Response(status=status, headers={"Location": target})
    if request.method in {"GET", "HEAD"}:
        reply.text, reply.content_type = f'<a href="{target}">{word}</a>.\n\n', "text/html"
    return reply


def find_repo(site: Site, owner: str, name: str) -> tuple[Repo | None, bool]:
    """A repository and whether it was found under an old name."""
    repo = site.state.find_repo(owner, name)
    if repo is not None:
        return repo, False
    old = site.state.redirects.get((owner.lower(), name.lower()))
    return (site.state.repos.get(old), True) if old is not None else (None, False)


def adapt(site: Site, route: Route) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """The aiohttp handler of a route."""
    write = route.method not in {"GET", "HEAD"}

    async def handle(request: web.Request) -> web.StreamResponse:
        request[ROUTE] = route.path
        try:
            reply = await _answer(request)
        except RefusedError as error:
            reply = error_reply(site, error)
        if site.state.old:
            reply.headers["X-Frame-Options"] = "SAMEORIGIN"
        return reply

    async def _answer(request: web.Request) -> web.Response:
        try:
            identity = identify(site.state, request.headers.get("Authorization", ""))
        except BadCredentialsError as error:
            raise RefusedError(401, str(error)) from error
        user = identity.user
        if user is not None:
            request[LOGIN] = user.login
            if user.must_change_password:
                raise RefusedError(403, f"You must change your password. Change it at: {site.root_url}/user/change_password")
        if user is None and (write or route.signed):
            raise RefusedError(401, "token is required")
        lacking = scope_error(site.state, identity.token, route.scopes, write=write)
        if lacking:
            raise RefusedError(403, lacking)
        host = f"{request.scheme}://{request.host}"
        call = Call(site, request, user, identity.token, site.shapes(user, host))
        if "/{owner}/{repo}" in route.path:
            repo, old_name = find_repo(site, request.match_info["owner"], request.match_info["repo"])
            public_only = identity.token is not None and "public-only" in identity.token.scopes
            if repo is None or not site.state.may(repo, user, "read") or (public_only and repo.private):
                raise site.acts.not_found()
            if old_name:
                return moved(site, request, repo)
            if route.path.startswith(PULLS) and (repo.empty or not repo.has_pulls):
                raise site.acts.not_found()
            call.repo_or_none = repo
        if request.body_exists:
            call.body = await _body(request)
        return _render(call, await route.handler(call))

    return handle


async def _body(request: web.Request) -> dict[str, Any]:
    raw = await request.read()
    if not raw:
        return {}
    try:
        data = json.loads(raw)
    except ValueError as error:
        raise RefusedError(422, f"json: {error}") from error
    if not isinstance(data, dict):
        raise RefusedError(422, "json: cannot unmarshal into an object")
    return data


def _render(call: Call, reply: Reply) -> web.Response:
    headers: dict[str, str] = {}
    if reply.total is not None:
        headers |= {"X-Total-Count": str(reply.total), "Access-Control-Expose-Headers": "X-Total-Count"}
        if reply.links and reply.total > call.per_page:
            headers["Link"] = _link(call, reply.total)
            headers["Access-Control-Expose-Headers"] = "Link, X-Total-Count"
    if reply.raw is not None:
        return web.Response(status=reply.status, body=reply.raw, headers={**headers, "Content-Type": reply.content_type})
    if reply.data is ...:
        return web.Response(status=reply.status, headers=headers)
    body = json.dumps(reply.data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
    return web.Response(status=reply.status, body=body, headers={**headers, "Content-Type": JSON_TYPE})


def _link(call: Call, total: int) -> str:
    """The Link header, built from ROOT_URL as Gitea does, wherever the request came to."""
    page = int(call.query("page") or 1) if call.query("page").isdigit() else 1
    last = -(-total // call.per_page)
    targets = {"next": page + 1, "last": last} if page < last else {}
    targets |= {"first": 1, "prev": page - 1} if page > 1 else {}
    parts = []
    for rel, number in targets.items():
        query = call.request.rel_url.update_query(page=number)
        parts.append(f'<{call.site.root_url}{query.raw_path_qs}>; rel="{rel}"')
    return ",".join(parts)
