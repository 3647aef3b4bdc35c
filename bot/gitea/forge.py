"""The operations the bot needs of a forge, with every quirk of the API handled here and nothing decided beyond it."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import aclosing
from datetime import datetime
from typing import Any, TypedDict

from bot.gitea import errors
from bot.gitea.abc import GiteaAPI, Token

Record = dict[str, Any]

REPO = "/repos/{owner}/{repo}"
ISSUE = REPO + "/issues/{index}"
COMMENT = REPO + "/issues/comments/{id}"
PULL = REPO + "/pulls/{index}"
HOOK = REPO + "/hooks/{id}"

ROUTES = (
    "/user",
    "/users/search",
    "/version",
    "/settings/api",
    "/settings/ui",
    "/repositories/{id}",
    REPO,
    ISSUE,
    COMMENT,
    PULL,
    HOOK,
    HOOK + "/tests",
    COMMENT + "/reactions",
    PULL + "/reviews",
    PULL + "/reviews/{id}/comments",
    PULL + "/requested_reviewers",
    REPO + "/actions/runs",
    REPO + "/actions/runs/{id}/jobs",
    REPO + "/actions/jobs/{id}/logs",
    *(ISSUE + part for part in ("/comments", "/dependencies", "/labels", "/labels/{id}", "/reactions", "/timeline")),
    *(
        REPO + part
        for part in (
            "/hooks",
            "/issues",
            "/issues/comments",
            "/labels",
            "/labels/{id}",
            "/pulls",
            "/branches/{branch}",
            "/git/refs/{ref}",
        )
    ),
    *(REPO + part for part in ("/commits/{ref}/status", "/collaborators/{login}/permission", "/contents/{path}")),
)
"""Every route this file asks: the closed set of the metric label `endpoint`."""
SETTLE_SECONDS = 1.0
_MARKER = re.compile(r"<!-- timmy-dispatch:v1 [^>\n]*-->")


class Forge:
    """`repo` is always "owner/name"; numbers are those of issues and pull requests, ids those of everything else.

    Records come back as the forge sent them. Errors are `ForgeError`s. A renamed repository answers reads as before and writes
    with `Moved`: ask `resolve` for the new name. Creates end with one object even when their answer is lost, as long as the text
    holds a hidden marker; without one `OutcomeUnknown` is raised.
    """

    def __init__(self, api: GiteaAPI) -> None:
        self.api = api
        self._me: Record | None = None

    async def me(self) -> Record:
        """The bot's own account, asked once."""
        if self._me is None:
            self._me = _record(await self.api.getitem("/user"), "/user")
        return self._me

    def remember_me(self, me: Record) -> None:
        """Who the bot is, known from an earlier start, so that a silent forge need not be asked."""
        self._me = dict(me)

    async def version(self) -> str:
        """`1.26.3`, `15.0.3+gitea-1.22.0` or `development`; needs no scope."""
        return str(_record(await self.api.getitem("/version"), "/version").get("version", ""))

    async def settings(self) -> Record:
        """What the API and the pages allow, in one record: `max_response_items`, `allowed_reactions` and more."""
        api, ui = await self.api.getitem("/settings/api"), await self.api.getitem("/settings/ui")
        return {**_record(api, "/settings/api"), **_record(ui, "/settings/ui")}

    async def repo(self, owner: str, name: str) -> Record:
        """A repository, also under a former name; `permissions` are the bot's own."""
        return await self._get(REPO, owner=owner, repo=name)

    async def repo_by_id(self, repo_id: int) -> Record:
        """A repository by the number that survives renames and transfers."""
        return await self._get("/repositories/{id}", id=repo_id)

    async def resolve(self, repo_id: int) -> str:
        """The present "owner/name"."""
        return _text(await self.repo_by_id(repo_id), "full_name", "/repositories/{id}")

    async def issue(self, repo: str, number: int) -> Record:
        """An issue or pull request (`pull_request` is not null)."""
        return await self._get(ISSUE, **_path(repo), index=number)

    async def issues_since(
        self,
        repo: str,
        since: datetime | None = None,
        labels: Collection[str] | None = None,
        *,
        state: str = "all",
    ) -> list[Record]:
        """Issues (no pull requests) updated at or after `since` that carry all `labels`, newest first.

        Labels are checked again here: the server drops names it does not know, and then lists every issue.
        """
        params = {"type": "issues", "state": state, "since": since, "labels": sorted(labels) if labels else None}
        found = await _all(self.api.getiter(REPO + "/issues", params, **_path(repo)))
        return [issue for issue in found if not issue.get("pull_request") and set(labels or ()) <= _names(issue.get("labels"))]

    async def comments(self, repo: str, number: int, since: datetime | None = None) -> list[Record]:
        """Comments of an issue or pull request, oldest first."""
        return await _all(self.api.getiter(ISSUE + "/comments", {"since": since}, probe=ISSUE, **_path(repo), index=number))

    async def comments_since(self, repo: str, since: datetime | None = None) -> list[Record]:
        """Comments of the whole repository created or edited at or after `since`; issues and pull requests mixed."""
        return await _all(self.api.getiter(REPO + "/issues/comments", {"since": since}, **_path(repo)))

    async def timeline(self, repo: str, number: int) -> list[Record]:
        """Everything that happened to an issue, oldest first."""
        return await _all(self.api.getiter(ISSUE + "/timeline", probe=ISSUE, **_path(repo), index=number))

    async def label_adder(self, repo: str, number: int, label: str) -> tuple[int, Record, str] | None:
        """(timeline id, user, time) of the event that added the label it carries now; None where nobody can be credited."""
        added: Record | None = None
        for item in await self.timeline(repo, number):
            if item.get("type") == "label" and (item.get("label") or {}).get("name") == label:
                added = item if item.get("body") == "1" else None
        if added is None or not added.get("user"):
            return None
        return int(added["id"]), added["user"], str(added.get("created_at", ""))

    async def assigner(self, repo: str, number: int, user_id: int) -> tuple[int, Record, str] | None:
        """The same of the event that assigned this user, who is assigned now."""
        assigned: Record | None = None
        for item in await self.timeline(repo, number):
            if item.get("type") == "assignees" and (item.get("assignee") or {}).get("id") == user_id:
                assigned = None if item.get("removed_assignee") else item
        if assigned is None or not assigned.get("user"):
            return None
        return int(assigned["id"]), assigned["user"], str(assigned.get("created_at", ""))

    async def permission(self, repo: str, login: str) -> str:
        """none, read, write, admin or owner.

        Raises `NotFound` for an unknown user and `Forbidden` where the bot is no repository admin: an operator's error.
        """
        route = REPO + "/collaborators/{login}/permission"
        return _text(await self._get(route, **_path(repo), login=login), "permission", route)

    async def login_of(self, user_id: int) -> str:
        """What somebody is called today; "" where nobody has this id, or the bot may not see them."""
        reply = await self.api.getitem("/users/search", {"uid": user_id, "limit": 1})
        found = _record(reply, "/users/search").get("data")
        people = found if isinstance(found, list) else []
        return next((str(person.get("login") or "") for person in people if person.get("id") == user_id), "")

    async def comment(self, repo: str, number: int, body: str) -> Record:
        """Comment on an issue or pull request, once, found again by the marker in `body` when the answer is lost."""
        marker = _marker(body)

        async def create() -> Any:
            return await self.api.post(ISSUE + "/comments", {"body": body}, **_path(repo), index=number)

        async def find() -> Record | None:
            # Gitea answers 500 for a missing issue: the true reason comes from here.
            await self.issue(repo, number)
            return await self.find_comment(repo, number, marker, (await self.me())["id"]) if marker else None

        return await self._create(create, find, adopt=marker is not None)

    async def find_comment(self, repo: str, number: int, marker: str, author_id: int, since: datetime | None = None) -> Record | None:
        """The oldest comment of that author that holds the marker."""
        for comment in await self.comments(repo, number, since):
            if marker in (comment.get("body") or "") and (comment.get("user") or {}).get("id") == author_id:
                return comment
        return None

    async def get_comment(self, repo: str, comment_id: int) -> Record | None:
        """A comment; None for timeline entries without text. Raises `NotFound` when it was deleted."""
        reply = await self.api.getitem(COMMENT, **_path(repo), id=comment_id)
        return None if reply is None else _record(reply, COMMENT)

    async def edit_comment(self, repo: str, comment_id: int, body: str) -> Record:
        """Replace the text; `user` in the reply is null when nothing changed. Raises `NotFound` when it was deleted."""
        reply = await self.api.patch(COMMENT, {"body": body}, idempotent=True, **_path(repo), id=comment_id)
        return _record(reply, COMMENT, "PATCH")

    async def react(self, repo: str, comment_id: int, content: str) -> None:
        """Add a reaction to a comment; a repeated one changes nothing. `Forbidden` where the server does not offer it."""
        await self.api.post(COMMENT + "/reactions", {"content": content}, idempotent=True, **_path(repo), id=comment_id)

    async def unreact(self, repo: str, comment_id: int, content: str) -> None:
        """Take the bot's reaction back from a comment."""
        await self.api.delete(COMMENT + "/reactions", {"content": content}, **_path(repo), id=comment_id)

    async def react_issue(self, repo: str, number: int, content: str) -> None:
        """As `react`, on the issue itself."""
        await self.api.post(ISSUE + "/reactions", {"content": content}, idempotent=True, **_path(repo), index=number)

    async def unreact_issue(self, repo: str, number: int, content: str) -> None:
        """As `unreact`, on the issue itself."""
        await self.api.delete(ISSUE + "/reactions", {"content": content}, **_path(repo), index=number)

    async def labels(self, repo: str) -> list[Record]:
        """Labels of the repository, without those of its organization."""
        return await _all(self.api.getiter(REPO + "/labels", **_path(repo)))

    async def ensure_label(self, repo: str, name: str, *, color: str, description: str = "", exclusive: bool = False) -> Record:
        """The label of that name, made where it is missing (the server accepts duplicates) and set exclusive or not; its colour and
        description stay as people left them. `color` is `#rrggbb`.
        """

        async def find() -> Record | None:
            return next((label for label in await self.labels(repo) if label.get("name") == name), None)

        async def create() -> Any:
            fields = {"name": name, "color": color, "description": description, "exclusive": exclusive}
            return await self.api.post(REPO + "/labels", fields, **_path(repo))

        found = await find()
        if found is None:
            return await self._create(create, find)
        if bool(found.get("exclusive")) is exclusive:
            return found
        route = REPO + "/labels/{id}"
        return _record(
            await self.api.patch(route, {"exclusive": exclusive}, idempotent=True, **_path(repo), id=found["id"]), route, "PATCH"
        )

    async def add_labels(self, repo: str, number: int, names: Sequence[str]) -> list[str]:
        """Add labels; returns the names the issue has now. Compare: unknown names vanish without an error."""
        reply = await self.api.post(ISSUE + "/labels", {"labels": list(names)}, idempotent=True, **_path(repo), index=number)
        return sorted(_names(reply))

    async def remove_label(self, repo: str, number: int, label_id: int) -> None:
        """Take a label off; no error where it was not set. Raises `Invalid` for an id the repository does not know."""
        await self.api.delete(ISSUE + "/labels/{id}", **_path(repo), index=number, id=label_id)

    async def create_issue(self, repo: str, title: str, body: str, *, label_ids: Sequence[int] = ()) -> Record:
        """Open an issue, once, found again by the marker in `body` when the answer is lost."""
        marker = _marker(body)

        async def create() -> Any:
            return await self.api.post(REPO + "/issues", {"title": title, "body": body, "labels": list(label_ids)}, **_path(repo))

        async def find() -> Record | None:
            if marker is None:
                return None
            own_id = (await self.me())["id"]
            mine = (issue for issue in await self.issues_since(repo) if (issue.get("user") or {}).get("id") == own_id)
            return next((issue for issue in mine if marker in (issue.get("body") or "")), None)

        return await self._create(create, find, adopt=marker is not None)

    async def edit_issue(self, repo: str, number: int, **fields: object) -> Record:
        """Set fields such as `title`, `body`, `state`."""
        return _record(await self.api.patch(ISSUE, fields, idempotent=True, **_path(repo), index=number), ISSUE, "PATCH")

    async def pulls(self, repo: str, state: str = "all") -> list[Record]:
        """Pull requests that are open, closed or either, newest first; none where the repository is empty or has them switched off."""
        try:
            return await _all(self.api.getiter(REPO + "/pulls", {"state": state}, **_path(repo)))
        except errors.NotFound:
            await self._get(REPO, **_path(repo))
            return []

    async def pull(self, repo: str, number: int) -> Record:
        """One pull request."""
        return await self._get(PULL, **_path(repo), index=number)

    async def find_pull(self, repo: str, repo_id: int, head: str, base: str, marker: str | None = None) -> Record | None:
        """The pull request from branch `head` of the repository itself into `base`, or with the marker in its text; in any state.

        An open one is preferred, then the newest. Merged or closed counts: a person may have been faster.
        """
        newest: Record | None = None
        async with aclosing(self.api.getiter(REPO + "/pulls", {"state": "all"}, **_path(repo))) as pulls:
            async for item in pulls:
                pull: Record = item
                if not (_has_head(pull, repo_id, head, base) or _holds(pull, marker)):
                    continue
                if pull.get("state") == "open":
                    return pull
                newest = max(newest or pull, pull, key=lambda candidate: int(candidate["number"]))
        return newest

    async def create_pull(self, repo: str, head: str, base: str, title: str, body: str) -> Record:
        """Open a pull request, bare; one that is open for this head and base already, or holds the marker of `body`, is adopted.

        Raises `NotFound` where head, base or pull requests are missing, `Invalid` where head is base.
        """
        marker = _marker(body)

        async def create() -> Any:
            fields = {"head": head, "base": base, "title": title, "body": body}
            return await self.api.post(REPO + "/pulls", fields, **_path(repo))

        async def find() -> Record | None:
            repo_id = (await self._get(REPO, **_path(repo)))["id"]
            found = await self.find_pull(repo, repo_id, head, base, marker)
            # An older pull request of the same branch that was closed before is not the one asked for.
            return found if found and (found.get("state") == "open" or _holds(found, marker)) else None

        try:
            return await self._create(create, find)
        except errors.Conflict:
            found = await find()
            if found is None:
                raise
            return found

    async def edit_pull(self, repo: str, number: int, **fields: object) -> Record:
        """Set fields such as `title`, `body`, `state`."""
        return _record(await self.api.patch(PULL, fields, idempotent=True, **_path(repo), index=number), PULL, "PATCH")

    async def branch(self, repo: str, name: str) -> Record | None:
        """A branch, None where there is none."""
        try:
            return await self._get(REPO + "/branches/{branch}", **_path(repo), branch=name)
        except errors.NotFound:
            return None

    async def heads(self, repo: str, prefix: str) -> dict[str, str]:
        """Branch -> commit of every branch whose name begins with `prefix`, as git has them; {} where there is none, or no such repository.

        Read from git itself, not from the forge's own table of branches, which follows a push a moment later. Some servers answer one
        exact match with an object instead of a list.
        """
        route = REPO + "/git/refs/{ref}"
        try:
            found = await self.api.getitem(route, None, **_path(repo), ref=f"heads/{prefix}")
        except errors.NotFound:
            return {}
        refs = [found] if isinstance(found, dict) else found if isinstance(found, list) else [found]
        heads = {}
        for ref in refs:
            record = _record(ref, route)
            heads[_text(record, "ref", route).removeprefix("refs/heads/")] = _text(_record(record.get("object"), route), "sha", route)
        return {name: sha for name, sha in heads.items() if name.startswith(prefix)}

    async def content(self, repo: str, path: str) -> Any:
        """What stands at a path of the default branch: a record with `type`, `size` and for a file its `content` in base64; a list for a folder.

        None where nothing stands there, or the repository is empty.
        """
        try:
            return await self.api.getitem(REPO + "/contents/{path}", None, **_path(repo), path=path)
        except errors.NotFound:
            return None

    async def dependencies(self, repo: str, number: int) -> list[Record]:
        """Issues that block this one; none where the server or repository has dependencies switched off."""
        try:
            return await _all(self.api.getiter(ISSUE + "/dependencies", **_path(repo), index=number))
        except errors.NotFound:
            return []

    async def hooks(self, repo: str) -> list[Record]:
        """Webhooks of the repository. Their `events` are precise names and must never be sent back."""
        return await _all(self.api.getiter(REPO + "/hooks", **_path(repo)))

    async def create_hook(self, repo: str, url: str, secret: Token, events: Sequence[str]) -> Record:
        """Install an active JSON webhook. One with the same address may exist (rotation of the secret) and is left alone."""
        before = {hook["id"] for hook in await self.hooks(repo)}

        async def create() -> Any:
            config = {"url": url, "content_type": "json", "secret": secret.reveal()}
            return await self.api.post(REPO + "/hooks", {"type": "gitea", "config": config, **_hook_fields(events)}, **_path(repo))

        async def find() -> Record | None:
            new = (hook for hook in await self.hooks(repo) if hook["id"] not in before)
            return next((hook for hook in new if (hook.get("config") or {}).get("url") == url), None)

        return await self._create(create, find)

    async def update_hook(self, repo: str, hook_id: int, url: str, events: Sequence[str]) -> Record:
        """Set address and events, and activate. The secret stays: the API cannot change it."""
        fields = {"config": {"url": url, "content_type": "json"}, **_hook_fields(events)}
        return _record(await self.api.patch(HOOK, fields, idempotent=True, **_path(repo), id=hook_id), HOOK, "PATCH")

    async def delete_hook(self, repo: str, hook_id: int) -> None:
        """Remove a webhook; one that is gone already is no error."""
        try:
            await self.api.delete(HOOK, **_path(repo), id=hook_id)
        except errors.NotFound:
            return

    async def test_hook(self, repo: str, hook_id: int) -> None:
        """Ask for a test push. Success says nothing: wait for the delivery; an empty repository sends none."""
        await self.api.post(HOOK + "/tests", idempotent=True, **_path(repo), id=hook_id)

    async def combined_status(self, repo: str, ref: str) -> Record:
        """`state`, `total_count` and all `statuses` of a commit. Without any, `total_count` is 0 and `state` "pending" or ""."""
        route = REPO + "/commits/{ref}/status"
        status = await self._get(route, **_path(repo), ref=ref)
        statuses = status.get("statuses") or []
        if len(statuses) < int(status.get("total_count") or 0):
            statuses = await _all(self.api.getiter(route, key="statuses", **_path(repo), ref=ref))
        return {**status, "statuses": statuses}

    async def reviews(self, repo: str, number: int) -> list[Record]:
        """Reviews of a pull request."""
        return await _all(self.api.getiter(PULL + "/reviews", **_path(repo), index=number))

    async def review_comments(self, repo: str, number: int, review_id: int) -> list[Record]:
        """Line comments of a review; `resolver` is null while unresolved."""
        return await _all(self.api.getiter(PULL + "/reviews/{id}/comments", **_path(repo), index=number, id=review_id))

    async def request_review(self, repo: str, number: int, login: str) -> None:
        """Ask somebody to review, again or for the first time; somebody who is asked already changes nothing.

        Raises `Invalid` or `NotFound` for somebody who cannot.
        """
        await self.api.post(PULL + "/requested_reviewers", {"reviewers": [login]}, idempotent=True, **_path(repo), index=number)

    async def action_runs(self, repo: str, head_sha: str) -> list[Record]:
        """The runs of Actions for a commit; none where the server has no Actions (before Gitea 1.25, Forgejo's are others)."""
        try:
            runs = await _all(self.api.getiter(REPO + "/actions/runs", {"head_sha": head_sha}, key="workflow_runs", **_path(repo)))
        except (errors.NotFound, errors.Forbidden):
            return []
        # A server that does not know the filter lists them all.
        return [run for run in runs if run.get("head_sha") == head_sha]

    async def action_jobs(self, repo: str, run_id: int) -> list[Record]:
        """The jobs of a run: `name`, `conclusion`."""
        try:
            return await _all(self.api.getiter(REPO + "/actions/runs/{id}/jobs", key="jobs", **_path(repo), id=run_id))
        except (errors.NotFound, errors.Forbidden):
            return []

    async def action_log(self, repo: str, job_id: int) -> str:
        """The log of a job, "" where there is none."""
        try:
            return await self.api.gettext(REPO + "/actions/jobs/{id}/logs", **_path(repo), id=job_id)
        except (errors.NotFound, errors.Forbidden):
            return ""

    async def _get(self, route: str, **variables: str | int) -> Record:
        return _record(await self.api.getitem(route, None, **variables), route)

    async def _create(
        self,
        create: Callable[[], Awaitable[Any]],
        find: Callable[[], Awaitable[Record | None]],
        *,
        adopt: bool = True,
    ) -> Record:
        """Create; after a doubtful end look, create once more, look again. With `adopt` False looking cannot tell: give up."""
        doubt = errors.OutcomeUnknown("no object in the reply")
        for _ in range(2):
            try:
                reply = await create()
            except errors.OutcomeUnknown as error:
                doubt = error
            else:
                if isinstance(reply, dict):
                    return reply
            # A proxy may give up on a server that is still at work.
            await self.api.sleep(SETTLE_SECONDS)
            try:
                found = await find()
            except (errors.Unavailable, errors.RateLimited) as error:
                raise doubt from error
            if found is not None:
                return found
            if not adopt:
                break
        raise doubt


class _RepoPath(TypedDict):
    owner: str
    repo: str


def _path(repo: str) -> _RepoPath:
    owner, slash, name = repo.partition("/")
    if not slash or not owner or not name or "/" in name:
        raise ValueError(f"{repo!r} is not of the form owner/name")
    return {"owner": owner, "repo": name}


def _record(reply: Any, route: str, method: str = "GET") -> Record:
    if not isinstance(reply, dict):
        raise errors.BadReply("an object was expected", status=200, method=method, route=route)
    return reply


def _text(record: Record, key: str, route: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise errors.BadReply(f"no {key} in the reply", status=200, method="GET", route=route)
    return value


async def _all(items: AsyncIterator[Any]) -> list[Record]:
    return [item async for item in items if isinstance(item, dict)]


def _names(labels: Iterable[Any] | None) -> set[str]:
    return {str(label.get("name")) for label in labels or () if isinstance(label, dict)}


def _marker(text: str) -> str | None:
    found = _MARKER.search(text)
    return found[0] if found else None


def _holds(pull: Mapping[str, Any], marker: str | None) -> bool:
    return marker is not None and marker in (pull.get("body") or "")


def _has_head(pull: Mapping[str, Any], repo_id: int, head: str, base: str) -> bool:
    there, here = pull.get("head") or {}, pull.get("base") or {}
    return there.get("label") == head and there.get("repo_id") == repo_id and here.get("ref") == base


def _hook_fields(events: Sequence[str]) -> Record:
    # Left out of a PATCH, each of these would be reset by the server.
    return {"active": True, "events": list(events), "branch_filter": "*", "authorization_header": ""}
