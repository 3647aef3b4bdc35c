"""The embedded forge: a Gitea-compatible server in this process, and the people who use it, as methods."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, Literal, Self

from aiohttp import web

from bot.demo.forge import api_issues, api_misc, api_pulls, api_repos
from bot.demo.forge.acts import Actor, Acts
from bot.demo.forge.api import PREFIX, Site, adapt
from bot.demo.forge.faults import API_ONLY, Fault, Faults, Match, Seen
from bot.demo.forge.git_http import GitHttp, lay_hooks
from bot.demo.forge.hooks import Delivery, Hooks, precise
from bot.demo.forge.pages import Pages
from bot.demo.forge.payloads import Shapes
from bot.demo.forge.state import Entry, Hook, HookLevel, Issue, Label, Level, Personality, Repo, State, Status, User
from bot.listeners import close

ROUTES: Final = (*api_misc.ROUTES, *api_issues.ROUTES, *api_pulls.ROUTES, *api_repos.ROUTES)
BODY_CAP: Final = 64 * 1024 * 1024
ALL_EVENTS: Final = ("issues", "pull_request", "push", "delete", "repository", "status", "workflow_run")


class ForgeServer:
    """A forge on one port. State lives in memory, git in `root`; `stop()` and `start()` play an outage, on the same port.

    The methods are what people do in a browser: each checks what Gitea checks, raises `RefusedError` where Gitea would refuse, and
    queues the deliveries Gitea would send. `repo` is a `Repo` or "owner/name". `root_url` is ROOT_URL, which may differ from the bound
    address on purpose; `allowed_hosts` is ALLOWED_HOST_LIST; `delivery_delay` in seconds is waited before each delivery; `clock` gives
    seconds since the epoch.
    """

    def __init__(
        self,
        root: Path,
        *,
        personality: Personality = "1.26",
        host: str = "127.0.0.1",
        port: int = 0,
        root_url: str | None = None,
        allowed_hosts: str = "loopback",
        delivery_delay: float = 0.0,
        page_cap: int = 50,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.root = root
        self.host = host
        self.port = port
        self._root_url = root_url.rstrip("/") if root_url else None
        self.state = State(root, personality=personality, clock=clock)
        self.hooks = Hooks(self.state, allowed_hosts=allowed_hosts, delay=delivery_delay)
        self.acts = Acts(self.state, self.hooks)
        self.faults = Faults()
        self.site = Site(self.state, self.acts, self.hooks, page_cap)
        self._pages = Pages(self.site)
        self._runner: web.AppRunner | None = None

    # the server

    @property
    def url(self) -> str:
        """The bound address, without a final slash; empty before the first start."""
        return self.site.url

    @property
    def root_url(self) -> str:
        return self.site.root_url

    @property
    def requests(self) -> list[Seen]:
        """Every request so far, in order of arrival."""
        return self.faults.requests

    @property
    def deliveries(self) -> list[Delivery]:
        """Every delivery so far, in order of queueing, with what became of it."""
        return self.hooks.deliveries

    @property
    def drop_deliveries(self) -> bool:
        """While true, deliveries are lost instead of sent. See `Hooks` for `copies`, `order`, `drop_next` and `workers`."""
        return self.hooks.drop

    @drop_deliveries.setter
    def drop_deliveries(self, drop: bool) -> None:
        self.hooks.drop = drop

    def _app(self) -> web.Application:
        app = web.Application(client_max_size=BODY_CAP, middlewares=[self.faults.middleware])
        for route in ROUTES:
            if not (route.new_only and self.state.old):
                app.router.add_route(route.method, route.pattern, adapt(self.site, route))
        folder = self.root / "hooks"
        lay_hooks(folder)
        app.router.add_get("/api/healthz", _healthz)
        app.router.add_route("*", PREFIX + "/{tail:.*}", self._no_route)
        app.add_routes(GitHttp(self.site, folder).routes())
        app.add_routes(self._pages.routes())
        return app

    async def _no_route(self, request: web.Request) -> web.Response:
        del request
        frame = {"X-Frame-Options": "SAMEORIGIN"} if self.state.old else {}
        return web.Response(status=404, body=b"404 page not found\n", headers={"Content-Type": "text/plain; charset=utf-8", **frame})

    async def start(self) -> None:
        """Bind, on the port of the last start if there was one, and send the deliveries that waited."""
        (self.root / "repositories").mkdir(parents=True, exist_ok=True)
        self._runner = web.AppRunner(self._app(), access_log=None, shutdown_timeout=0.5)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self.host, self.port, reuse_address=True)
        await site.start()
        self.port = int(self._runner.addresses[0][1])
        self.site.url = f"http://{self.host}:{self.port}"
        self.site.root_url = self._root_url or self.site.url
        await self.hooks.start()

    async def stop(self) -> None:
        """Close all listeners and connections; everything else stays as it is."""
        await self.hooks.stop()
        if self._runner is not None:
            await close(self._runner)
            self._runner = None
        self.acts.threads.close()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def drain(self) -> None:
        """Wait until no delivery is queued or on its way."""
        await self.hooks.idle()

    def fail_next(
        self,
        n: int = 1,
        *,
        status: int = 502,
        match: Match = API_ONLY,
        after_effect: bool = False,
        html: bool = False,
        reset: bool = False,
        truncate: bool = False,
        delay: float = 0.0,
        headers: Mapping[str, str] | None = None,
    ) -> Fault:
        """Spoil the next n requests that match (a predicate, or a pattern searched in "METHOD /path"; all of the API unless said).

        `after_effect`: the act happens and only its answer is lost. `reset` closes the connection without an answer, `truncate` breaks
        the true answer off in the middle, `html` answers with a page as proxies do. With status 200 only the delay (seconds) happens.
        The fault is returned so that a test can end it (`left = 0`).
        """
        fault = Fault(
            left=n,
            status=status,
            match=match,
            after_effect=after_effect,
            html=html,
            reset=reset,
            truncate=truncate,
            delay=delay,
            headers=headers or {},
        )
        self.faults.pending = [f for f in self.faults.pending if f.left > 0]
        self.faults.pending.append(fault)
        return fault

    # accounts

    async def create_user(
        self, login: str, *, admin: bool = False, must_change_password: bool = False, password: str = "", email: str = ""
    ) -> User:
        """A person. Without a password they get a random one, readable as `user.password`."""
        user = self.state.add_user(login, email=email, password=password)
        user.is_admin, user.must_change_password = admin, must_change_password
        return user

    async def create_org(self, login: str, *, owners: tuple[str, ...] = ()) -> User:
        org = self.state.add_user(login, is_org=True)
        org.owners.update(self.state.user(name).id for name in owners)
        return org

    async def create_token(self, login: str, scopes: list[str], *, name: str = "") -> str:
        user = self.state.user(login)
        return self.state.add_token(user, name=name or f"token-{len(self.state.tokens) + 1}", scopes=scopes).value

    async def revoke_token(self, token: str) -> None:
        """KeyError when there is no such token."""
        del self.state.tokens[token]

    # repositories

    def repo(self, repo: Repo | str) -> Repo:
        return self.state.repo(repo) if isinstance(repo, str) else repo

    def find_issue(self, repo: Repo | str, n: int) -> Issue:
        return self.repo(repo).issues[n]

    def actor(self, login: str) -> Actor:
        user = self.state.user(login)
        return Actor(user, Shapes(self.state, self.site.root_url, self.site.url, user))

    async def create_repo(
        self,
        owner_login: str,
        name: str,
        *,
        files: Mapping[str, str | bytes] | None = None,
        private: bool = False,
        default_branch: str = "main",
        empty: bool = False,
    ) -> Repo:
        """A real bare repository with one commit of `files`. An owner that does not exist becomes an organisation."""
        owner = self.state.find_user(owner_login) or await self.create_org(owner_login)
        content = None if empty else (files or {"README.md": f"# {name}\n"})
        actor = Actor(owner, self.site.shapes(owner))
        return await self.acts.create_repo(actor, owner, name, files=content, private=private, default_branch=default_branch)

    async def fork(self, repo: Repo | str, login: str, name: str = "") -> Repo:
        return await self.acts.fork(self.actor(login), self.repo(repo), name)

    async def add_collaborator(self, repo: Repo | str, login: str, permission: Level) -> None:
        self.acts.set_collaborator(self.repo(repo), self.state.user(login), permission)

    async def remove_collaborator(self, repo: Repo | str, login: str) -> None:
        self.acts.set_collaborator(self.repo(repo), self.state.user(login), "none")

    async def rename_repo(self, repo: Repo | str, name: str) -> None:
        """Sends nothing; the old name redirects."""
        self.state.rename_repo(self.repo(repo), name)

    async def archive_repo(self, repo: Repo | str, *, archived: bool = True) -> None:
        self.repo(repo).archived = archived

    async def delete_repo(self, repo: Repo | str, login: str) -> None:
        await self.acts.delete_repo(self.actor(login), self.repo(repo))

    async def protect_branch(self, repo: Repo | str, name: str) -> None:
        self.repo(repo).protected.add(name)

    async def create_hook(
        self,
        repo: Repo | str,
        url: str,
        *,
        secret: str = "",
        events: tuple[str, ...] = ALL_EVENTS,
        active: bool = True,
        content_type: Literal["json", "form"] = "json",
        branch_filter: str = "*",
        authorization: str = "",
        level: HookLevel = "repository",
    ) -> Hook:
        """A webhook of the repository, of its owner, or of the whole server, by `level`."""
        target = self.repo(repo)
        now = self.state.now()
        hook = Hook(
            id=self.state.next_id("hook"),
            url=url,
            content_type=content_type,
            secret=secret,
            events=precise(list(events), old=self.state.old),
            active=active,
            created=now,
            updated=now,
            branch_filter=branch_filter,
            authorization=authorization,
            level=level,
            owner={"repository": target.id, "system": 0}.get(level, target.owner_id),
        )
        self.state.hooks[hook.id] = hook
        return hook

    async def replay(self, delivery: Delivery) -> None:
        """Send the old body again under a new UUID."""
        self.hooks.replay(delivery)

    # labels

    async def create_label(self, repo: Repo | str, name: str, color: str, *, exclusive: bool = False) -> Label:
        return self.acts.create_label(self.repo(repo), name, color=color, exclusive=exclusive)

    async def create_org_label(self, org: str, name: str, color: str, *, exclusive: bool = False) -> Label:
        return self.acts.create_label(None, name, color=color, exclusive=exclusive, org=self.state.user(org))

    def _label(self, repo: Repo, name: str) -> Label:
        label = self.state.label_named(repo, name, with_org=True)
        if label is None:
            raise KeyError(name)
        return label

    async def add_label(self, repo: Repo | str, n: int, login: str, name: str) -> None:
        target = self.repo(repo)
        await self.acts.add_labels(self.actor(login), target, target.issues[n], [self._label(target, name)])

    async def remove_label(self, repo: Repo | str, n: int, login: str, name: str) -> None:
        target = self.repo(repo)
        await self.acts.remove_label(self.actor(login), target, target.issues[n], self._label(target, name))

    async def clear_labels(self, repo: Repo | str, n: int, login: str) -> None:
        target = self.repo(repo)
        await self.acts.clear_labels(self.actor(login), target, target.issues[n])

    # issues

    async def open_issue(
        self,
        repo: Repo | str,
        login: str,
        title: str,
        body: str = "",
        labels: tuple[str, ...] = (),
        via: Literal["web", "api"] = "web",
    ) -> Issue:
        """By the web form anybody's labels are taken, by the API only a writer's."""
        target = self.repo(repo)
        chosen = [self._label(target, name) for name in labels]
        return await self.acts.open_issue(self.actor(login), target, title=title, body=body, labels=chosen, via=via)

    async def comment(self, repo: Repo | str, n: int, login: str, body: str) -> Entry:
        target = self.repo(repo)
        return await self.acts.comment(self.actor(login), target, target.issues[n], body)

    def _comment(self, repo: Repo, comment_id: int) -> tuple[Issue, Entry]:
        found = self.state.find_entry(repo, comment_id)
        if found is None:
            raise KeyError(comment_id)
        return found

    async def edit_comment(self, repo: Repo | str, comment_id: int, login: str, body: str) -> None:
        target = self.repo(repo)
        issue, entry = self._comment(target, comment_id)
        await self.acts.edit_comment(self.actor(login), target, issue, entry=entry, body=body)

    async def delete_comment(self, repo: Repo | str, comment_id: int, login: str) -> None:
        target = self.repo(repo)
        issue, entry = self._comment(target, comment_id)
        await self.acts.delete_comment(self.actor(login), target, issue, entry)

    async def edit_issue(self, repo: Repo | str, n: int, login: str, *, title: str | None = None, body: str | None = None) -> None:
        """Works on pull requests too."""
        target = self.repo(repo)
        await self.acts.edit_issue(self.actor(login), target, target.issues[n], title=title, body=body)

    async def close_issue(self, repo: Repo | str, n: int, login: str) -> None:
        target = self.repo(repo)
        await self.acts.edit_issue(self.actor(login), target, target.issues[n], state="closed")

    async def reopen_issue(self, repo: Repo | str, n: int, login: str) -> None:
        target = self.repo(repo)
        await self.acts.edit_issue(self.actor(login), target, target.issues[n], state="open")

    async def assign(self, repo: Repo | str, n: int, login: str, *, assignees: tuple[str, ...]) -> None:
        """Replaces the assignees; each that goes and each that comes is a delivery."""
        target = self.repo(repo)
        people = [self.state.user(name) for name in assignees]
        await self.acts.edit_issue(self.actor(login), target, target.issues[n], assignees=people)

    async def lock(self, repo: Repo | str, n: int, login: str, *, locked: bool = True) -> None:
        target = self.repo(repo)
        await self.acts.lock(self.actor(login), target, target.issues[n], locked=locked)

    async def delete_issue(self, repo: Repo | str, n: int, login: str) -> None:
        target = self.repo(repo)
        await self.acts.delete_issue(self.actor(login), target, target.issues[n])

    async def add_dependency(self, repo: Repo | str, n: int, *, blocked_by: int) -> None:
        target = self.repo(repo)
        target.issues[n].blocked_by.append((target.id, blocked_by))

    # code

    async def push_file(
        self, repo: Repo | str, login: str, branch: str, path: str, content: str | bytes | None, message: str = "change"
    ) -> str:
        """A real commit by this person on a branch, made from the default branch if new. Returns the new head; None deletes the file."""
        target = self.repo(repo)
        return await self.acts.push_files(self.actor(login), target, branch=branch, files={path: content}, message=message)

    async def delete_branch(self, repo: Repo | str, login: str, name: str) -> None:
        await self.acts.delete_branch(self.actor(login), self.repo(repo), name)

    async def set_status(
        self, repo: Repo | str, sha: str, state: str, *, login: str = "gitea-actions", context: str = "ci/test", description: str = ""
    ) -> Status:
        """A commit status; the default sender is the Actions user, id -2."""
        actions = self.state.actions
        actor = Actor(actions, self.site.shapes(actions)) if login == actions.login else self.actor(login)
        return await self.acts.set_status(actor, self.repo(repo), sha=sha, state=state, context=context, description=description)

    async def open_pull(self, repo: Repo | str, login: str, *, head: str, title: str, base: str = "", body: str = "") -> Issue:
        target = self.repo(repo)
        return await self.acts.open_pull(self.actor(login), target, head=head, base=base or target.default_branch, title=title, body=body)

    async def merge_pull(self, repo: Repo | str, n: int, login: str, *, style: str = "squash") -> None:
        target = self.repo(repo)
        await self.acts.merge(self.actor(login), target, target.issues[n], style=style)

    async def request_review(self, repo: Repo | str, n: int, login: str, *, reviewers: tuple[str, ...]) -> None:
        target = self.repo(repo)
        people = [self.state.user(name) for name in reviewers]
        await self.acts.request_review(self.actor(login), target, target.issues[n], people)


async def _healthz(request: web.Request) -> web.Response:
    del request
    return web.json_response({"status": "pass", "description": "forge"})
