"""What the model may read from the forge: named operations on its own issue and repository, filtered to the text of people with write access."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from bot.gitea.abc import GiteaAPI
from bot.gitea.errors import ForgeError
from bot.models import Actor, Permission, RepoId, UserError

PAGE = 20
TEXT_CAP = 4_000
FILE_CAP = 60_000
MASKED = "(not shown: its author has no write access here)"

Arguments = Mapping[str, str | int]
PermissionOf = Callable[[RepoId, str, Actor], Awaitable[Permission]]


_REPO = "/repos/{owner}/{repo}"
_PATH_PARTS = re.compile(r"(?:/\{p\d+\})+$")

ROUTES = tuple(
    _REPO + part for part in ("/pulls/{index}/files", "/pulls/{index}/commits", "/milestones", "/branches", "/commits", "/contents/{path}")
)
"""Routes that only this file asks, as `read_route` gives them."""


def read_route(route: str) -> str:
    """A route template with the parts of a path folded into one, so that it is one of a closed set."""
    return _PATH_PARTS.sub("/{path}", route)


class IssueReader:
    """GET only, this repository only; paths and references were checked by the tool before they come here."""

    def __init__(self, api: GiteaAPI, permission_of: PermissionOf, *, repo_id: RepoId, repo: str, issue: int) -> None:
        self._api = api
        self._permission_of = permission_of
        self._repo_id = repo_id
        self._repo = repo
        self._issue = issue

    async def read(self, operation: str, arguments: Mapping[str, str | int]) -> str:
        """The answer as JSON text; raises UserError in the forge's words where it refuses, or where there is no such operation."""
        reader = {
            "issue": self._read_issue,
            "comments": self._comments,
            "pull": self._pull,
            "pull_files": self._pull_files,
            "pull_commits": self._pull_commits,
            "labels": self._labels,
            "milestones": self._milestones,
            "branches": self._branches,
            "commits": self._commits,
            "contents": self._contents,
        }.get(operation)
        if reader is None:
            raise UserError(f"there is no operation {operation}")
        try:
            found = await reader(arguments)
        except ForgeError as error:
            raise UserError(f"the forge answered: {error}") from error
        return json.dumps(found, ensure_ascii=False, indent=1)

    async def _get(self, path: str, params: Mapping[str, str | int] | None = None, **variables: str | int) -> Any:
        owner, _, repo = self._repo.partition("/")
        return await self._api.getitem("/repos/{owner}/{repo}" + path, params, owner=owner, repo=repo, **variables)

    async def _trusted(self, user: Mapping[str, Any] | None) -> bool:
        if not user:
            return False
        actor = Actor(int(user.get("id") or -1), str(user.get("login") or ""))
        try:
            return await self._permission_of(self._repo_id, self._repo, actor) >= Permission.WRITE
        except ForgeError:
            return False

    async def _text(self, record: Mapping[str, Any]) -> str:
        return str(record.get("body") or "")[:TEXT_CAP] if await self._trusted(record.get("user")) else MASKED

    async def _read_issue(self, _arguments: Arguments) -> Any:
        issue = await self._get("/issues/{index}", index=self._issue)
        labels = [label["name"] for label in issue.get("labels") or ()]
        return {
            "number": issue["number"],
            "title": issue["title"],
            "state": issue["state"],
            "labels": labels,
            "body": await self._text(issue),
        }

    async def _comments(self, arguments: Arguments) -> Any:
        comments = await self._get("/issues/{index}/comments", index=self._issue) or []
        first = (int(arguments.get("page", 1)) - 1) * PAGE
        return [
            {"by": (item.get("user") or {}).get("login"), "at": item.get("created_at"), "text": await self._text(item)}
            for item in comments[first : first + PAGE]
        ]

    async def _pull(self, arguments: Arguments) -> Any:
        pull = await self._get("/pulls/{index}", index=arguments["number"])
        names = ("number", "title", "state", "merged", "draft")
        head, base = pull.get("head") or {}, pull.get("base") or {}
        return {
            **{name: pull.get(name) for name in names},
            "head": head.get("label"),
            "base": base.get("ref"),
            "body": await self._text(pull),
        }

    async def _pull_files(self, arguments: Arguments) -> Any:
        files = await self._get("/pulls/{index}/files", _page(arguments), index=arguments["number"]) or []
        return [{name: item.get(name) for name in ("filename", "status", "additions", "deletions")} for item in files]

    async def _pull_commits(self, arguments: Arguments) -> Any:
        return [_commit(item) for item in await self._get("/pulls/{index}/commits", _page(arguments), index=arguments["number"]) or []]

    async def _labels(self, arguments: Arguments) -> Any:
        return [
            {"name": item["name"], "description": item.get("description")} for item in await self._get("/labels", _page(arguments)) or []
        ]

    async def _milestones(self, arguments: Arguments) -> Any:
        return [{"title": item["title"], "state": item["state"]} for item in await self._get("/milestones", _page(arguments)) or []]

    async def _branches(self, arguments: Arguments) -> Any:
        return [{"name": item["name"], "sha": item["commit"]["id"]} for item in await self._get("/branches", _page(arguments)) or []]

    async def _commits(self, arguments: Arguments) -> Any:
        params = {**_page(arguments), **({"sha": arguments["ref"]} if "ref" in arguments else {})}
        return [_commit(item) for item in await self._get("/commits", params) or []]

    async def _contents(self, arguments: Arguments) -> Any:
        params = {"ref": arguments["ref"]} if "ref" in arguments else None
        template = "/contents/" + "/".join(f"{{p{n}}}" for n, _ in enumerate(str(arguments.get("path", "")).split("/")))
        parts = {f"p{n}": part for n, part in enumerate(str(arguments.get("path", "")).split("/"))}
        found = await self._get(template, params, **parts)
        if isinstance(found, list):
            return [{"path": item["path"], "type": item["type"], "size": item.get("size")} for item in found]
        raw = base64.b64decode(found.get("content") or "")
        return {"path": found["path"], "size": found.get("size"), "text": raw[:FILE_CAP].decode("utf-8", "replace")}


def _page(arguments: Arguments) -> dict[str, str | int]:
    return {"page": arguments.get("page", 1), "limit": PAGE}


def _commit(item: Mapping[str, Any]) -> Mapping[str, Any]:
    commit = item.get("commit") or {}
    message = str(commit.get("message") or "").partition("\n")[0][:200]
    return {"sha": item.get("sha"), "at": (commit.get("author") or {}).get("date"), "subject": message}
