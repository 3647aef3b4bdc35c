"""Plain pages for people who look at the forge, and the web form whose labels anybody may set."""

from __future__ import annotations

import hmac
import html
import re
import secrets
from datetime import UTC, datetime
from typing import Final

from aiohttp import web

from bot.demo.forge import gitio
from bot.demo.forge.acts import Actor, RefusedError
from bot.demo.forge.api import LOGIN, ROUTE, Site, find_repo
from bot.demo.forge.state import Entry, Issue, Label, Repo, User

COOKIE: Final = "forge_session"
_STYLE: Final = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:1.5rem auto;padding:0 1rem;color:#222;background:#fff}
a{color:#0550ae;text-decoration:none}a:hover{text-decoration:underline}
article{border:1px solid #ccc;border-radius:6px;margin:1rem 0;overflow-wrap:anywhere}
article>header{background:#f3f4f6;padding:.3rem .8rem;color:#555}article>div{padding:.2rem .8rem}
.label{border-radius:1em;padding:.05em .6em;border:1px solid #0003;font-size:85%}
.event{color:#555;margin:.4rem .8rem}pre{overflow:auto;background:#f6f8fa;padding:.8rem;border-radius:6px}
.add{color:#116329}.del{color:#a40e26}textarea,input{width:100%;box-sizing:border-box;font:inherit}
"""
_HIDDEN: Final = re.compile(r"<!--.*?-->", re.DOTALL)
_LINK: Final = re.compile(r"https?://[^\s<>\"'()\[\]]+")
_EMOJI: Final = {
    "+1": "👍",
    "-1": "👎",
    "laugh": "😄",
    "hooray": "🎉",
    "confused": "😕",
    "heart": "❤️",
    "rocket": "🚀",
    "eyes": "👀",
}


def prose(text: str) -> str:
    """Text as paragraphs: escaped, HTML comments hidden, addresses made links."""
    shown = _LINK.sub(lambda m: f'<a href="{m[0]}" rel="nofollow">{m[0]}</a>', html.escape(_HIDDEN.sub("", text).strip(), quote=False))
    parts = re.split(r"\r?\n\s*\r?\n", shown)
    return "".join("<p>" + re.sub(r"\r?\n", "<br>\n", part) + "</p>\n" for part in parts if part)


def chip(label: Label) -> str:
    red, green, blue = (int(label.color[i : i + 2], 16) for i in (0, 2, 4))
    ink = "#000" if red * 0.3 + green * 0.59 + blue * 0.11 > 140 else "#fff"  # noqa: PLR2004
    return f'<span class="label" style="background:#{label.color};color:{ink}">{html.escape(label.name)}</span>'


class Pages:
    """All pages. Sessions are kept in memory; nothing here needs a script."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.sessions: dict[str, int] = {}

    def routes(self) -> list[web.RouteDef]:
        repo = "/{owner}/{repo}"
        return [
            web.get("/", self.home),
            web.get("/user/login", self.login_form),
            web.post("/user/login", self.login),
            web.post("/user/logout", self.logout),
            web.get(repo, self.repo),
            web.get(f"{repo}/issues", self.issues),
            web.get(f"{repo}/pulls", self.issues),
            web.get(f"{repo}/issues/new", self.new_form),
            web.post(f"{repo}/issues/new", self.new_issue),
            web.get(repo + r"/{kind:issues|pulls}/{index:\d+}", self.issue),
            web.get(repo + r"/pulls/{index:\d+}.{end:diff|patch}", self.diff),
            web.post(repo + r"/{kind:issues|pulls}/{index:\d+}/comments", self.comment),
        ]

    # the frame

    def _user(self, request: web.Request) -> User | None:
        user = self.site.state.users.get(self.sessions.get(request.cookies.get(COOKIE, ""), 0))
        request[LOGIN] = user.login if user else ""
        return user

    def _page(self, request: web.Request, title: str, body: str, *, status: int = 200) -> web.Response:
        user = self._user(request)
        leave = '<form method="post" action="/user/logout">{} <button>sign out</button></form>'
        who = leave.format(html.escape(user.login)) if user else '<a href="/user/login">sign in</a>'
        text = (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style></head>'
            f'<body><nav><a href="/">forge</a> · {who}</nav>\n<h1>{html.escape(title)}</h1>\n{body}</body></html>\n'
        )
        policy = "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'"
        return web.Response(status=status, text=text, content_type="text/html", headers={"Content-Security-Policy": policy})

    def _repo(self, request: web.Request) -> Repo:
        """The repository of the path if the caller may read it, by its old name too."""
        request[ROUTE] = "page"
        repo, old_name = find_repo(self.site, request.match_info["owner"], request.match_info["repo"])
        if repo is None or not self.site.state.may(repo, self._user(request), "read"):
            raise web.HTTPNotFound(text="404 page not found\n")
        if old_name:
            owner, name = request.match_info["owner"], request.match_info["repo"]
            raise web.HTTPTemporaryRedirect(request.raw_path.replace(f"/{owner}/{name}", f"/{self.site.state.full_name(repo)}", 1))
        return repo

    def _issue(self, request: web.Request) -> tuple[Repo, Issue]:
        repo = self._repo(request)
        issue = repo.issues.get(int(request.match_info["index"]))
        if issue is None:
            raise web.HTTPNotFound(text="404 page not found\n")
        return repo, issue

    def _signed(self, request: web.Request) -> Actor:
        user = self._user(request)
        if user is None:
            raise web.HTTPSeeOther("/user/login")
        return Actor(user, self.site.shapes(user, f"{request.scheme}://{request.host}"))

    # reading

    async def home(self, request: web.Request) -> web.Response:
        state, user = self.site.state, self._user(request)
        rows = []
        for repo in state.repos.values():
            if state.may(repo, user, "read"):
                full = html.escape(state.full_name(repo))
                rows.append(f'<li><a href="/{full}">{full}</a> {html.escape(repo.description)}</li>')
        return self._page(request, "Repositories", f"<ul>{''.join(rows) or '<li>none yet</li>'}</ul>")

    async def repo(self, request: web.Request) -> web.Response:
        repo = self._repo(request)
        full = self.site.state.full_name(repo)
        files = None if repo.empty else await self.site.acts.threads.run(gitio.tree, repo.path, repo.default_branch)
        readme = None if repo.empty else await self.site.acts.threads.run(gitio.read, repo.path, repo.default_branch, "README.md")
        branches = sorted(r.removeprefix("refs/heads/") for r in repo.refs if r.startswith("refs/heads/"))
        listed = "".join(f"<li>{html.escape(path)}{'/' if kind == 'tree' else ''}</li>" for _, kind, _, _, path in files or [])
        body = (
            f'<p><a href="/{html.escape(full)}/issues">issues</a> · <a href="/{html.escape(full)}/pulls">pull requests</a></p>'
            f"<p>branches: {', '.join(html.escape(b) for b in branches) or 'none'}</p><ul>{listed}</ul>"
            f"<article><div>{prose((readme or b'').decode(errors='replace'))}</div></article>"
        )
        return self._page(request, full, body)

    async def issues(self, request: web.Request) -> web.Response:
        repo = self._repo(request)
        pulls = request.path.endswith("/pulls")
        wanted = request.query.get("state", "open")
        rows = []
        for issue in sorted(repo.issues.values(), key=lambda i: -i.id):
            if (issue.pull is not None) == pulls and wanted in {"all", issue.state}:
                chips = " ".join(chip(label) for label in self.site.state.labels_on(repo, issue))
                rows.append(f'<li>#{issue.number} <a href="{self._href(repo, issue)}">{html.escape(issue.title)}</a> {chips}</li>')
        full = html.escape(self.site.state.full_name(repo))
        head = f'<p><a href="/{full}">{full}</a> · <a href="?state=all">all</a> · <a href="/{full}/issues/new">new issue</a></p>'
        title = "Pull requests" if pulls else "Issues"
        return self._page(request, title, f"{head}<ul>{''.join(rows) or '<li>none</li>'}</ul>")

    def _href(self, repo: Repo, issue: Issue) -> str:
        return f"/{html.escape(self.site.state.full_name(repo))}/{'pulls' if issue.pull else 'issues'}/{issue.number}"

    def _box(self, entry_id: str, *, user_id: int, when: int, text: str, reactions: list[str]) -> str:
        login = html.escape(self.site.state.by_id(user_id).login)
        time = datetime.fromtimestamp(when, UTC).strftime("%Y-%m-%d %H:%M:%S")
        marks = f'<div class="event">{" ".join(reactions)}</div>' if reactions else ""
        return f'<article id="{entry_id}"><header><b>{login}</b> {time} UTC</header><div>{prose(text)}</div>{marks}</article>\n'

    def _event(self, repo: Repo, entry: Entry) -> str:
        state = self.site.state
        label = state.label_of(repo, entry.label_id) if entry.label_id else None
        what = entry.type.replace("_", " ")
        if entry.type == "label":
            what = f"{'added' if entry.body == '1' else 'removed'} {chip(label) if label else 'a label'}"
        elif entry.type == "change_title":
            what = f"changed the title from <s>{html.escape(entry.old_title)}</s> to {html.escape(entry.new_title)}"
        elif entry.type == "assignees":
            other = state.users.get(entry.assignee_id)
            what = f"{'unassigned' if entry.removed else 'assigned'} {html.escape(other.login if other else 'somebody')}"
        elif entry.type in {"pull_ref", "issue_ref"} and entry.ref_issue:
            what = f"mentioned this in #{entry.ref_issue[1]}"
        elif entry.type in {"review", "code"} and entry.body:
            where = f" on <code>{html.escape(entry.path)}</code>" if entry.path else ""
            what = f"reviewed{where}: {prose(entry.body)}"
        return f'<div class="event">{html.escape(state.by_id(entry.user_id).login)} {what}</div>\n'

    async def issue(self, request: web.Request) -> web.Response:
        repo, issue = self._issue(request)
        if (issue.pull is not None) != (request.match_info["kind"] == "pulls"):
            raise web.HTTPSeeOther(self._href(repo, issue))
        chips = " ".join(chip(label) for label in self.site.state.labels_on(repo, issue))
        word = "merged" if issue.pull and issue.pull.merged else issue.state
        parts = [f"<p>{word} · {chips}</p>"]
        if issue.pull:
            pull = issue.pull
            parts.append(
                f"<p>{html.escape(pull.head)} → {html.escape(pull.base)} · {pull.changed_files} files, +{pull.additions} -{pull.deletions}"
                f"{'' if pull.mergeable else ' · has conflicts'}</p>"
            )
        marks = [_EMOJI.get(r.content, r.content) for r in issue.reactions]
        parts.append(self._box("issue", user_id=issue.user_id, when=issue.created, text=issue.body, reactions=marks))
        for entry in issue.entries:
            if entry.type == "comment":
                marks = [_EMOJI.get(r.content, r.content) for r in entry.reactions]
                name = f"issuecomment-{entry.id}"
                parts.append(self._box(name, user_id=entry.user_id, when=entry.created, text=entry.body, reactions=marks))
            else:
                parts.append(self._event(repo, entry))
        if issue.pull:
            raw = await self.site.acts.threads.run(gitio.diff, repo.path, issue.pull.merge_base, issue.pull.head_sha)
            parts.append(f"<h2>Changes</h2><pre>{_coloured(raw.decode(errors='replace'))}</pre>")
        if self._user(request):
            parts.append(
                f'<form method="post" action="{self._href(repo, issue)}/comments"><textarea name="content" rows="4"></textarea>'
                f"<button>comment</button></form>"
            )
        return self._page(request, f"#{issue.number} {issue.title}", "".join(parts))

    async def diff(self, request: web.Request) -> web.Response:
        repo, issue = self._issue(request)
        if issue.pull is None:
            raise web.HTTPNotFound(text="404 page not found\n")
        return web.Response(body=await self.site.acts.threads.run(gitio.diff, repo.path, issue.pull.merge_base, issue.pull.head_sha))

    # writing

    async def login_form(self, request: web.Request) -> web.Response:
        form = (
            '<form method="post" action="/user/login"><p>name <input name="user_name" autofocus></p>'
            '<p>password <input name="password" type="password"></p><button>sign in</button></form>'
        )
        return self._page(request, "Sign in", form)

    async def login(self, request: web.Request) -> web.Response:
        form = await request.post()
        user = self.site.state.find_user(str(form.get("user_name", "")))
        given = str(form.get("password", "")).encode()
        if user is None or user.is_org or not hmac.compare_digest(user.password.encode(), given):
            return self._page(request, "Sign in", "<p>Name or password is wrong.</p>", status=403)
        session = secrets.token_urlsafe(24)
        self.sessions[session] = user.id
        reply = web.Response(status=303, headers={"Location": "/"})
        reply.set_cookie(COOKIE, session, httponly=True, samesite="Strict")
        return reply

    async def logout(self, request: web.Request) -> web.Response:
        self.sessions.pop(request.cookies.get(COOKIE, ""), None)
        reply = web.Response(status=303, headers={"Location": "/"})
        reply.del_cookie(COOKIE)
        return reply

    async def new_form(self, request: web.Request) -> web.Response:
        repo = self._repo(request)
        boxes = " ".join(
            f'<label>{chip(label)} <input type="checkbox" name="label_ids" value="{label.id}" style="width:auto"></label>'
            for label in repo.labels
        )
        form = (
            '<form method="post"><p>title <input name="title"></p><p><textarea name="content" rows="8"></textarea></p>'
            f"<p>{boxes}</p><button>create issue</button></form>"
        )
        return self._page(request, "New issue", form)

    async def new_issue(self, request: web.Request) -> web.Response:
        """Any reader may set any label here, unlike in the API: that is how Gitea's form is."""
        repo, actor = self._repo(request), self._signed(request)
        form = await request.post()
        ids = {int(i) for i in ",".join(str(v) for v in form.getall("label_ids", [])).split(",") if i.strip().isdigit()}
        labels = [label for i in sorted(ids) if (label := self.site.state.label_of(repo, i))]
        try:
            issue = await self.site.acts.open_issue(
                actor, repo, title=str(form.get("title", "")), body=str(form.get("content", "")), labels=labels, via="web"
            )
        except RefusedError as error:
            return self._page(request, "New issue", f"<p>{html.escape(error.message or 'refused')}</p>", status=error.status)
        return web.Response(status=303, headers={"Location": self._href(repo, issue)})

    async def comment(self, request: web.Request) -> web.Response:
        (repo, issue), actor = self._issue(request), self._signed(request)
        form = await request.post()
        try:
            await self.site.acts.comment(actor, repo, issue, str(form.get("content", "")))
        except RefusedError as error:
            return self._page(request, "Comment", f"<p>{html.escape(error.message or 'refused')}</p>", status=error.status)
        return web.Response(status=303, headers={"Location": self._href(repo, issue)})


def _coloured(diff: str) -> str:
    kinds = {"+": "add", "-": "del"}
    lines = []
    for line in diff.splitlines():
        kind = "" if line.startswith(("+++", "---")) else kinds.get(line[:1], "")
        lines.append(f'<span class="{kind}">{html.escape(line)}</span>' if kind else html.escape(line))
    return "\n".join(lines)
