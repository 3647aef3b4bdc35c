"""What people and programs do in the forge, each act with its effects and its deliveries; the API, git and the pages all end here."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from bot.demo.forge import gitio
from bot.demo.forge.gitio import ZERO, Commit, Person
from bot.demo.forge.hooks import Hooks, encode
from bot.demo.forge.payloads import CLOSING, MENTION, Json, Shapes, closes
from bot.demo.forge.state import ALLOWED_REACTIONS, Entry, Hook, Issue, Label, Level, Pull, Reaction, Repo, Review, State, Status, User

REVIEW_EVENTS: Final = {
    "APPROVED": "pull_request_review_approved",
    "APPROVE": "pull_request_review_approved",
    "REQUEST_CHANGES": "pull_request_review_rejected",
    "COMMENT": "pull_request_review_comment",
}


class RefusedError(Exception):
    """An answer that is not 2xx. A message of None stands for an empty body, as some of Gitea's 403 have."""

    def __init__(self, status: int, message: str | None = "", *, errors: bool = False) -> None:
        super().__init__(f"{status} {message}")
        self.status = status
        self.message = message
        self.errors = errors


@dataclass(frozen=True, slots=True)
class Actor:
    """Who acts, and how the payloads of this act address the server."""

    user: User
    shapes: Shapes


@dataclass(frozen=True, slots=True)
class Update:
    """A ref that a push moved; ZERO stands for absent."""

    ref: str
    old: str
    new: str


class Acts:
    """All acts. They check what Gitea's services check, change the state, then fire deliveries. Git runs in threads."""

    def __init__(self, state: State, hooks: Hooks) -> None:
        self.state = state
        self.hooks = hooks
        self.threads = gitio.Threads()
        self._locks: dict[int, asyncio.Lock] = {}

    def _lock(self, repo: Repo) -> asyncio.Lock:
        return self._locks.setdefault(repo.id, asyncio.Lock())

    def person(self, user: User) -> Person:
        return Person(user.login, user.email or f"{user.login}@noreply.localhost", self.state.now())

    def not_found(self) -> RefusedError:
        return RefusedError(404, "The target couldn't be found." if self.state.old else "not found", errors=True)

    def writable(self, repo: Repo) -> None:
        """Raise the 423 of an archived repository."""
        if repo.archived:
            full = self.state.full_name(repo)
            raise RefusedError(423, f"<Repository {repo.id}:{full}> is archived" if self.state.old else f"{full} is archived")

    # deliveries

    def _fire_issue(
        self, actor: Actor, repo: Repo, issue: Issue, *, event: str, action: str, whose: User | None = None, changes: Json | None = None
    ) -> None:
        """An issue event, or its pull request twin; `event` is the part after `issue` ("" for the event itself)."""
        event_type = (f"pull_request{event}" if issue.pull else f"issue{event}") if event else ("pull_request" if issue.pull else "issues")
        if not self.hooks.wanted(repo, event_type):
            return
        shapes = actor.shapes
        author = self.state.by_id(issue.user_id)
        payload: Json = {"action": action, "number": issue.number}
        if changes is not None:
            payload["changes"] = changes if self.state.old else {**changes, "added_labels": None, "removed_labels": None}
        if issue.pull:
            permission: User | str = "owner" if event in {"_label", "_sync"} else (whose or author)
            unknown = False if event == "_sync" else None
            payload |= {
                "pull_request": shapes.pull(repo, issue, mergeable=unknown),
                "requested_reviewer": None,
                "repository": shapes.repo(repo, permission),
                "sender": shapes.user(actor.user),
                "commit_id": "",
                "review": None,
            }
        else:
            payload |= {
                "issue": shapes.issue(repo, issue),
                "repository": shapes.repo(repo, whose or author),
                "sender": shapes.user(actor.user),
                "commit_id": "",
            }
        self.hooks.fire(repo, event_type, payload)

    def _fire_comment(self, actor: Actor, repo: Repo, issue: Issue, *, entry: Entry, action: str, before: str | None = None) -> None:
        event_type = "pull_request_comment" if issue.pull else "issue_comment"
        if not self.hooks.wanted(repo, event_type):
            return
        shapes = actor.shapes
        payload: Json = {"action": action, "issue": shapes.issue(repo, issue)}
        if issue.pull and not self.state.old:
            payload["pull_request"] = shapes.pull(repo, issue)
        payload["comment"] = shapes.comment(repo, issue, entry)
        if before is not None:
            changes: Json = {"body": {"from": before}}
            payload["changes"] = changes if self.state.old else {**changes, "added_labels": None, "removed_labels": None}
        payload |= {
            "repository": shapes.repo(repo, actor.user),
            "sender": shapes.user(actor.user),
            "is_pull": issue.pull is not None,
        }
        self.hooks.fire(repo, event_type, payload)

    # repositories

    async def create_repo(
        self,
        actor: Actor,
        owner: User,
        name: str,
        *,
        files: Mapping[str, str | bytes] | None = None,
        private: bool = False,
        default_branch: str = "main",
        message: str = "Initial commit",
    ) -> Repo:
        """A real bare repository. Without files (None) it stays empty. 409 when the name is taken."""
        try:
            repo = self.state.add_repo(owner, name, default_branch=default_branch, private=private)
        except ValueError as error:
            raise RefusedError(409, str(error)) from error
        repo.empty = files is None

        def build() -> dict[str, str]:
            gitio.init(repo.path, default_branch)
            if files is not None:
                gitio.commit_files(repo.path, default_branch, files=files, message=message, author=self.person(actor.user))
            return gitio.refs(repo.path)

        repo.refs = await self.threads.run(build)
        return repo

    async def fork(self, actor: Actor, source: Repo, name: str = "") -> Repo:
        try:
            repo = self.state.add_repo(actor.user, name or source.name, default_branch=source.default_branch, private=source.private)
        except ValueError as error:
            raise RefusedError(409, str(error)) from error
        repo.parent_id, repo.empty, repo.size = source.id, source.empty, source.size
        await self.threads.run(gitio.fork, source.path, repo.path)
        repo.refs = await self.threads.run(gitio.refs, repo.path)
        return repo

    async def delete_repo(self, actor: Actor, repo: Repo) -> None:
        owner = self.state.by_id(repo.owner_id)
        payload = {
            "action": "deleted",
            "repository": actor.shapes.repo(repo, "owner"),
            "organization": actor.shapes.user(owner),
            "sender": actor.shapes.user(actor.user),
        }
        self.hooks.fire(repo, "repository", payload)
        self.state.remove_repo(repo)
        await self.threads.run(shutil.rmtree, repo.path, ignore_errors=True)

    # issues

    def _mentions(self, actor: Actor, repo: Repo, issue: Issue, text: str) -> None:
        """Cross references: the other issue's timeline gets an entry, which moves its `updated_at`."""
        closing = set(closes(text)) if issue.pull else set()
        for number in dict.fromkeys(int(n) for n in MENTION.findall(text)):
            other = repo.issues.get(number)
            if other is not None and other is not issue:
                entry = self.state.add_entry(repo, other, "pull_ref" if issue.pull else "issue_ref", user=actor.user)
                entry.ref_issue = (repo.id, issue.number)
                entry.ref_action = "closes" if number in closing else "none"

    def _new_issue(self, actor: Actor, repo: Repo, *, title: str, body: str, pull: Pull | None = None) -> Issue:
        now = self.state.now()
        issue = Issue(
            id=self.state.next_id("issue"),
            number=repo.next_number,
            user_id=actor.user.id,
            title=title,
            body=body,
            created=now,
            updated=now,
            pull=pull,
        )
        repo.next_number += 1
        repo.issues[issue.number] = issue
        return issue

    async def open_issue(
        self,
        actor: Actor,
        repo: Repo,
        *,
        title: str,
        body: str = "",
        labels: Iterable[Label] = (),
        assignees: Iterable[User] = (),
        via: Literal["web", "api"] = "api",
    ) -> Issue:
        """Open an issue. The API drops the labels of somebody who may not write; the web form takes them from any reader."""
        self.writable(repo)
        if not title.strip():
            raise RefusedError(422, "[Title]: Required")
        issue = self._new_issue(actor, repo, title=title, body=body)
        writer = self.state.may(repo, actor.user, "write")
        chosen = list(labels) if writer or via == "web" else []
        for label in chosen:
            self._attach(actor, repo, issue, label)
        for user in assignees if writer else ():
            issue.assignees.append(user.id)
        self._mentions(actor, repo, issue, body)
        self._fire_issue(actor, repo, issue, event="", action="opened")
        if chosen:
            self._fire_issue(actor, repo, issue, event="_label", action="label_updated")
        for user_id in issue.assignees:
            self._assigned(actor, repo, issue, self.state.by_id(user_id), removed=False)
        return issue

    def may_edit(self, actor: Actor, repo: Repo, issue: Issue) -> bool:
        return issue.user_id == actor.user.id or self.state.may(repo, actor.user, "write")

    async def edit_issue(
        self,
        actor: Actor,
        repo: Repo,
        issue: Issue,
        *,
        title: str | None = None,
        body: str | None = None,
        state: str | None = None,
        assignees: list[User] | None = None,
    ) -> None:
        """PATCH of an issue or pull request: each kind of change is its own delivery, state last. An empty 403 for strangers."""
        if not self.may_edit(actor, repo, issue):
            raise RefusedError(403, None)
        if state is not None and issue.pull and issue.pull.merged:
            raise RefusedError(412, "cannot change state of this pull request, it was already merged")
        if state == "closed" and any(self._is_open(*blocker) for blocker in issue.blocked_by):
            raise RefusedError(412, "cannot close this issue or pull request because it still has open dependencies")
        if title is not None and title != issue.title:
            before, issue.title = issue.title, title
            entry = self.state.add_entry(repo, issue, "change_title", user=actor.user)
            entry.old_title, entry.new_title = before, title
            self._fire_issue(actor, repo, issue, event="", action="edited", changes={"title": {"from": before}})
        if body is not None and body != issue.body:
            before, issue.body = issue.body, body
            issue.content_version += 1
            issue.updated = self.state.now()
            self._mentions(actor, repo, issue, body)
            self._fire_issue(actor, repo, issue, event="", action="edited", changes={"body": {"from": before}})
        if assignees is not None and self.state.may(repo, actor.user, "write"):
            wanted = [u.id for u in assignees]
            for user_id in [i for i in issue.assignees if i not in wanted]:
                issue.assignees.remove(user_id)
                self._assigned(actor, repo, issue, self.state.by_id(user_id), removed=True)
            for user_id in [i for i in wanted if i not in issue.assignees]:
                issue.assignees.append(user_id)
                self._assigned(actor, repo, issue, self.state.by_id(user_id), removed=False)
        if state in {"open", "closed"} and state != issue.state:
            if state == "open" and issue.pull:
                await self._revive(repo, issue)
            self._set_state(actor, repo, issue, closed=state == "closed")

    def _is_open(self, repo_id: int, number: int) -> bool:
        repo = self.state.repos.get(repo_id)
        return repo is not None and number in repo.issues and repo.issues[number].state == "open"

    async def _revive(self, repo: Repo, issue: Issue) -> None:
        """Before a pull request is opened again: its branch must be there, and may have moved."""
        pull = issue.pr
        head_repo = self.state.repos.get(pull.head_repo_id)
        sha = head_repo.refs.get(f"refs/heads/{pull.head}") if head_repo else None
        if sha is None:
            raise RefusedError(412, "the head branch of this pull request does not exist any more")
        pull.head_gone, pull.head_sha = False, sha
        await self._compare(repo, issue)

    def _assigned(self, actor: Actor, repo: Repo, issue: Issue, user: User, *, removed: bool) -> None:
        entry = self.state.add_entry(repo, issue, "assignees", user=actor.user)
        entry.assignee_id, entry.removed = user.id, removed
        action = "unassigned" if removed else "assigned"
        self._fire_issue(actor, repo, issue, event="_assign", action=action, whose=actor.user)

    def _set_state(self, actor: Actor, repo: Repo, issue: Issue, *, closed: bool, commit: str = "") -> None:
        issue.state = "closed" if closed else "open"
        issue.closed = self.state.now() if closed else 0
        entry = self.state.add_entry(repo, issue, "close" if closed else "reopen", user=actor.user)
        entry.commit = commit
        self._fire_issue(actor, repo, issue, event="", action="closed" if closed else "reopened")

    async def delete_issue(self, actor: Actor, repo: Repo, issue: Issue) -> None:
        """Repository admins only; the delivery carries the issue as it was."""
        if not self.state.may(repo, actor.user, "admin"):
            raise RefusedError(403, None)
        del repo.issues[issue.number]
        self._fire_issue(actor, repo, issue, event="", action="deleted", whose=actor.user)

    async def lock(self, actor: Actor, repo: Repo, issue: Issue, *, locked: bool = True) -> None:
        """Locks silently: no delivery."""
        if not self.state.may(repo, actor.user, "write"):
            raise RefusedError(403, None)
        if issue.locked != locked:
            issue.locked = locked
            self.state.add_entry(repo, issue, "lock" if locked else "unlock", user=actor.user)

    # comments and reactions

    async def comment(self, actor: Actor, repo: Repo, issue: Issue, body: str) -> Entry:
        self.writable(repo)
        if not body:
            raise RefusedError(422, "[Body]: Required")
        if issue.locked and not self.state.may(repo, actor.user, "write"):
            raise RefusedError(403, "This issue or pull request is locked")
        entry = self.state.add_entry(repo, issue, "comment", user=actor.user, body=body)
        self._mentions(actor, repo, issue, CLOSING.sub("", body))
        self._fire_comment(actor, repo, issue, entry=entry, action="created")
        return entry

    async def edit_comment(self, actor: Actor, repo: Repo, issue: Issue, *, entry: Entry, body: str) -> bool:
        """False when nothing changed; 1.22 fires `edited` even then. An empty 403 for whoever neither wrote it nor may write."""
        self.writable(repo)
        if entry.user_id != actor.user.id and not self.state.may(repo, actor.user, "write"):
            raise RefusedError(403, None)
        before, entry.body = entry.body, body
        changed = before != body
        if changed or self.state.old:
            entry.updated = self.state.now()
            self._fire_comment(actor, repo, issue, entry=entry, action="edited", before=before)
        return changed

    async def delete_comment(self, actor: Actor, repo: Repo, issue: Issue, entry: Entry) -> None:
        if entry.user_id != actor.user.id and not self.state.may(repo, actor.user, "write"):
            raise RefusedError(403, None)
        self.state.remove_entry(issue, entry)
        self._fire_comment(actor, repo, issue, entry=entry, action="deleted")

    async def react(self, actor: Actor, issue: Issue, reactions: list[Reaction], content: str) -> tuple[Reaction, bool]:
        """The reaction and whether it is new. Fires nothing and moves nothing."""
        if content not in ALLOWED_REACTIONS:
            raise RefusedError(403, f"'{content}' is not an allowed reaction")
        if issue.locked and actor.user.id != issue.user_id:
            raise RefusedError(403, "This issue or pull request is locked")
        found = next((r for r in reactions if r.user_id == actor.user.id and r.content == content), None)
        if found is not None:
            return found, False
        reaction = Reaction(user_id=actor.user.id, content=content, created=self.state.now())
        reactions.append(reaction)
        return reaction, True

    async def unreact(self, actor: Actor, reactions: list[Reaction], content: str) -> None:
        reactions[:] = [r for r in reactions if (r.user_id, r.content) != (actor.user.id, content)]

    # labels

    def create_label(
        self, repo: Repo | None, name: str, *, color: str, exclusive: bool = False, text: str = "", org: User | None = None
    ) -> Label:
        """A label of the repository or of the organisation. Duplicates are accepted, as in Gitea."""
        color = color.lstrip("#").lower()
        if len(color) == 3:  # noqa: PLR2004
            color = "".join(c * 2 for c in color)
        if not name or len(color) != 6 or any(c not in "0123456789abcdef" for c in color):  # noqa: PLR2004
            raise RefusedError(422, "[Color]: invalid colour" if name else "[Name]: Required")
        label = Label(
            id=self.state.next_id("label"), name=name, color=color, description=text, exclusive=exclusive, org=org.login if org else ""
        )
        if org is not None:
            org.labels.append(label)
        elif repo is not None:
            repo.labels.append(label)
        return label

    def _attach(self, actor: Actor, repo: Repo, issue: Issue, label: Label) -> None:
        if label.id in issue.label_ids:
            return
        if label.scope:
            for other in [o for o in self.state.labels_on(repo, issue) if o.scope == label.scope]:
                self._detach(actor, repo, issue, other)
        issue.label_ids.append(label.id)
        self.state.add_entry(repo, issue, "label", user=actor.user, body="1").label_id = label.id

    def _detach(self, actor: Actor, repo: Repo, issue: Issue, label: Label) -> None:
        if label.id in issue.label_ids:
            issue.label_ids.remove(label.id)
            self.state.add_entry(repo, issue, "label", user=actor.user).label_id = label.id

    def _may_label(self, actor: Actor, repo: Repo) -> None:
        if not self.state.may(repo, actor.user, "write"):
            raise RefusedError(403, None)

    async def add_labels(self, actor: Actor, repo: Repo, issue: Issue, labels: list[Label], *, replace: bool = False) -> None:
        """Add, or with `replace` set, the labels. Fires `label_updated` even when nothing changes."""
        self._may_label(actor, repo)
        if replace:
            for old in [o for o in self.state.labels_on(repo, issue) if o not in labels]:
                self._detach(actor, repo, issue, old)
        for label in labels:
            self._attach(actor, repo, issue, label)
        self._fire_issue(actor, repo, issue, event="_label", action="label_updated")

    async def remove_label(self, actor: Actor, repo: Repo, issue: Issue, label: Label) -> None:
        self._may_label(actor, repo)
        self._detach(actor, repo, issue, label)
        self._fire_issue(actor, repo, issue, event="_label", action="label_updated")

    async def clear_labels(self, actor: Actor, repo: Repo, issue: Issue) -> None:
        """Remove all; as recorded, the delivery still shows the labels that were there."""
        self._may_label(actor, repo)
        before = list(issue.label_ids)
        for label in self.state.labels_on(repo, issue):
            self._detach(actor, repo, issue, label)
        after, issue.label_ids = issue.label_ids, before
        self._fire_issue(actor, repo, issue, event="_label", action="label_cleared")
        issue.label_ids = after

    # git

    async def push_files(
        self, actor: Actor, repo: Repo, *, branch: str, files: Mapping[str, str | bytes | None], message: str, from_branch: str = ""
    ) -> str:
        """A commit by this person on a branch, new or old, with all that a push causes. Returns the new head."""
        self.writable(repo)
        if branch in repo.protected:
            raise RefusedError(403, f"Not allowed to push to protected branch {branch}")
        ref = f"refs/heads/{branch}"
        async with self._lock(repo):
            old = repo.refs.get(ref, "")
            parent = old or repo.refs.get(f"refs/heads/{from_branch or repo.default_branch}", "")

            def build() -> str:
                return gitio.commit_files(repo.path, branch, files=files, message=message, author=self.person(actor.user), parent=parent)

            try:
                new = await self.threads.run(build)
            except gitio.GitError as error:
                raise RefusedError(422, str(error)) from error
            await self._moved(actor, repo, [Update(ref, old or ZERO, new)])
        return new

    async def create_branch(self, actor: Actor, repo: Repo, name: str, source: str) -> None:
        self.writable(repo)
        if repo.empty:
            raise RefusedError(404, "Git Repository is empty.")
        if f"refs/heads/{name}" in repo.refs:
            raise RefusedError(409, "The branch already exists.")
        async with self._lock(repo):
            sha = await self.threads.run(gitio.resolve, repo.path, source or repo.default_branch)
            if not sha:
                raise RefusedError(500, "")
            try:
                await self.threads.run(gitio.set_ref, repo.path, f"refs/heads/{name}", sha)
            except gitio.GitError as error:
                raise RefusedError(409, "The branch with the same name already exists.") from error
            await self._moved(actor, repo, [Update(f"refs/heads/{name}", ZERO, sha)])

    async def delete_branch(self, actor: Actor, repo: Repo, name: str) -> None:
        self.writable(repo)
        old = repo.refs.get(f"refs/heads/{name}")
        if old is None:
            raise self.not_found()
        if name == repo.default_branch:
            raise RefusedError(403, "can't delete default branch" if self.state.old else "branch is the default branch")
        if name in repo.protected:
            raise RefusedError(403, "branch protected")
        async with self._lock(repo):
            await self.threads.run(gitio.set_ref, repo.path, f"refs/heads/{name}", "")
            await self._moved(actor, repo, [Update(f"refs/heads/{name}", old, ZERO)])

    async def pushed(self, actor: Actor, repo: Repo, updates: list[Update]) -> None:
        """What follows a push over git: only refs that really moved count. `actor` addresses the server by ROOT_URL, as recorded."""
        async with self._lock(repo):
            now = await self.threads.run(gitio.refs, repo.path)
            await self._moved(actor, repo, [u for u in updates if now.get(u.ref, ZERO) == u.new and u.old != u.new])

    async def _moved(self, actor: Actor, repo: Repo, updates: list[Update]) -> None:
        inner = Actor(actor.user, Shapes(actor.shapes.state, actor.shapes.root, actor.shapes.root, actor.user))
        for update in updates:
            branch = update.ref.removeprefix("refs/heads/") if update.ref.startswith("refs/heads/") else ""
            if update.new == ZERO:
                repo.refs.pop(update.ref, None)
            else:
                repo.refs[update.ref] = update.new
            repo.updated = self.state.now()
            if repo.empty and branch:
                repo.empty = False
                if f"refs/heads/{repo.default_branch}" not in repo.refs:
                    repo.default_branch = branch
            await self._fire_push(inner, repo, update, branch)
            if branch:
                await self._pulls_follow(inner, repo, update, branch)

    async def _fire_push(self, actor: Actor, repo: Repo, update: Update, branch: str) -> None:
        shapes = actor.shapes
        kind = "branch" if branch else "tag"
        tail = {"repository": shapes.repo(repo, "owner"), "sender": shapes.user(actor.user)}
        short = update.ref.split("/", 2)[-1]
        if update.new == ZERO:
            self.hooks.fire(repo, "delete", {"ref": short, "ref_type": kind, "pusher_type": "user", **tail})
            return
        if update.old == ZERO:
            self.hooks.fire(repo, "create", {"sha": update.new, "ref": short, "ref_type": kind, **tail})
        default = branch == repo.default_branch
        if not default and not self.hooks.wanted(repo, "push", update.ref):
            return
        base = update.old if update.old != ZERO else repo.refs.get(f"refs/heads/{repo.default_branch}", ZERO)
        known = [f"^{base}"] if base not in {ZERO, update.new} or update.old != ZERO else []
        commits = await self.threads.run(gitio.log, repo.path, update.new, *known, limit=100)
        listed = [shapes.payload_commit(repo, c) for c in commits[:5]]
        payload = {
            "ref": update.ref,
            "before": update.old,
            "after": update.new,
            "compare_url": f"{shapes.root}/{self.state.full_name(repo)}/compare/{base}...{update.new}",
            "commits": listed,
            "total_commits": len(commits),
            "head_commit": listed[0] if listed else None,
            "repository": tail["repository"],
            "pusher": shapes.user(actor.user),
            "sender": tail["sender"],
        }
        self.hooks.fire(repo, "push", payload, ref=update.ref)
        if default and update.old != ZERO:
            for commit in reversed(commits):
                self._close_by_text(actor, repo, commit.message, commit=commit.sha)

    def _close_by_text(self, actor: Actor, repo: Repo, text: str, *, commit: str) -> None:
        for number in closes(text):
            other = repo.issues.get(number)
            if other is not None and other.pull is None and other.state == "open":
                self._set_state(actor, repo, other, closed=True, commit=commit)

    async def _pulls_follow(self, actor: Actor, repo: Repo, update: Update, branch: str) -> None:
        for base in list(self.state.repos.values()):
            for issue in [i for i in base.issues.values() if i.pull and i.state == "open"]:
                pull = issue.pr
                if pull.head_repo_id == repo.id and pull.head == branch:
                    if update.new == ZERO:
                        pull.head_gone = True
                        self._set_state(actor, base, issue, closed=True)
                        continue
                    pull.head_sha = update.new
                    await self._compare(base, issue)
                    body = {"is_force_push": False, "commit_ids": [update.new]}
                    self.state.add_entry(base, issue, "pull_push", user=actor.user, body=json.dumps(body))
                    self._fire_issue(actor, base, issue, event="_sync", action="synchronized")
                elif base is repo and pull.base == branch and update.new != ZERO:
                    await self._compare(base, issue)

    async def _compare(self, repo: Repo, issue: Issue) -> None:
        """Fetch the head into the base repository and see what a merge would do."""
        pull = issue.pr
        base_sha = repo.refs.get(f"refs/heads/{pull.base}", pull.base_sha)
        head_repo = self.state.repos.get(pull.head_repo_id)

        def work() -> gitio.Comparison:
            ref = f"refs/pull/{issue.number}/head"
            if head_repo is not None and head_repo is not repo:
                gitio.run(repo.path, "fetch", "--quiet", "--no-tags", str(head_repo.path), f"+{pull.head_sha}:{ref}")
            else:
                (repo.path / ref).parent.mkdir(parents=True, exist_ok=True)
                (repo.path / ref).write_text(f"{pull.head_sha}\n")
            return gitio.compare(repo.path, base_sha, pull.head_sha)

        found = await self.threads.run(work)
        pull.base_sha, pull.merge_base, pull.mergeable = base_sha, found.merge_base, found.mergeable
        pull.additions, pull.deletions, pull.changed_files = found.additions, found.deletions, found.changed_files
        repo.refs[f"refs/pull/{issue.number}/head"] = pull.head_sha

    # pull requests

    async def open_pull(self, actor: Actor, repo: Repo, *, head: str, base: str, title: str, body: str = "") -> Issue:
        """Refusals in Gitea's order and words; an empty diff is accepted."""
        self.writable(repo)
        if not repo.has_pulls or repo.empty:
            raise self.not_found()
        owner, colon, branch = head.rpartition(":")
        head_repo: Repo | None = repo
        if colon and owner.lower() != self.state.by_id(repo.owner_id).login.lower():
            user = self.state.find_user(owner.partition("/")[0])
            family = [r for r in self.state.repos.values() if user and r.owner_id == user.id and r.parent_id == repo.id]
            head_repo = family[0] if family else None
        elif not colon:
            branch = head
        if head_repo is repo and branch == base:
            raise RefusedError(422, "Invalid PullRequest: There are no changes between the head and the base")
        if head_repo is None or f"refs/heads/{base}" not in repo.refs or f"refs/heads/{branch}" not in head_repo.refs:
            raise self.not_found()
        for other in repo.issues.values():
            pull = other.pull
            if pull and other.state == "open" and (pull.head_repo_id, pull.head, pull.base) == (head_repo.id, branch, base):
                raise RefusedError(
                    409,
                    f"pull request already exists for these targets [id: {pull.id}, issue_id: {other.number}, head_repo_id: {head_repo.id}, "
                    f"base_repo_id: {repo.id}, head_branch: {branch}, base_branch: {base}]",
                )
        if not title.strip():
            raise RefusedError(422, "[Title]: Required")
        base_sha, head_sha = repo.refs[f"refs/heads/{base}"], head_repo.refs[f"refs/heads/{branch}"]
        pull = Pull(
            id=self.state.next_id("pull"),
            head_repo_id=head_repo.id,
            head=branch,
            base=base,
            head_sha=head_sha,
            base_sha=base_sha,
            merge_base=base_sha,
        )
        issue = self._new_issue(actor, repo, title=title, body=body, pull=pull)
        try:
            await self._compare(repo, issue)
        except gitio.GitError as error:
            del repo.issues[issue.number]
            raise RefusedError(422, f"Invalid PullRequest: {error}") from error
        self._mentions(actor, repo, issue, body)
        self._fire_issue(actor, repo, issue, event="", action="opened")
        return issue

    async def retarget(self, actor: Actor, repo: Repo, issue: Issue, base: str) -> None:
        """Another base for an open pull request; that it has one already changes nothing."""
        pull = issue.pr
        if not self.may_edit(actor, repo, issue):
            raise RefusedError(403, None)
        if base == pull.base:
            return
        if f"refs/heads/{base}" not in repo.refs:
            raise RefusedError(404, f"new base '{base}' not exist")
        if pull.merged or issue.state == "closed":
            raise RefusedError(409 if pull.merged else 422, "The pull request is merged or closed")
        for other in repo.issues.values():
            taken = other.pull if other.state == "open" else None
            if taken and (taken.head_repo_id, taken.head, taken.base) == (pull.head_repo_id, pull.head, base):
                raise RefusedError(409, "pull request already exists for these targets")
        before, pull.base = pull.base, base
        await self._compare(repo, issue)
        entry = self.state.add_entry(repo, issue, "change_target_branch", user=actor.user)
        entry.old_ref, entry.new_ref = before, base
        self._fire_issue(actor, repo, issue, event="", action="edited", changes={"ref": {"from": before}})

    async def merge(self, actor: Actor, repo: Repo, issue: Issue, *, style: str = "merge", message: str = "", drop: bool = False) -> None:
        """Merge, close what the body closes, and push: three deliveries at once. `drop` deletes the head branch afterwards."""
        pull = issue.pr
        self.writable(repo)
        if not self.state.may(repo, actor.user, "write"):
            raise RefusedError(405, "User not allowed to merge PR")
        if pull.merged or issue.state == "closed":
            raise RefusedError(405 if pull.merged else 404, "The PR is already merged" if pull.merged else "not found")
        if issue.draft:
            raise RefusedError(405, "Work in progress PRs cannot be merged")
        async with self._lock(repo):
            author = self.state.by_id(issue.user_id)
            base_ref = f"refs/heads/{pull.base}"
            old = repo.refs[base_ref]
            if style == "squash":
                trailer = f"Co-authored-by: {author.login} <{author.email}>\nCo-committed-by: {author.login} <{author.email}>\n"
                text = message or f"{issue.title} (#{issue.number})\n\n{trailer}"
            else:
                text = message or f"Merge pull request '{issue.title}' (#{issue.number}) from {pull.head} into {pull.base}\n"

            def work() -> str:
                return gitio.merge(
                    repo.path,
                    base_ref=base_ref,
                    base=old,
                    head=pull.head_sha,
                    style=style,
                    message=text,
                    author=self.person(author if style == "squash" else actor.user),
                    committer=self.person(actor.user),
                )

            try:
                new = await self.threads.run(work)
            except gitio.GitError as error:
                raise RefusedError(409, "Merge conflict, please resolve it by hand") from error
            now = self.state.now()
            repo.refs[base_ref] = new
            pull.merged, pull.merged_by, pull.merge_sha = now, actor.user.id, new
            issue.state, issue.closed = "closed", now
            self.state.add_entry(repo, issue, "merge_pull", user=actor.user).commit = new
            self._fire_issue(actor, repo, issue, event="", action="closed", whose=actor.user)
            if pull.base == repo.default_branch:
                self._close_by_text(actor, repo, f"{issue.title}\n{issue.body}", commit=new)
            await self._moved(actor, repo, [Update(base_ref, old, new)])
        head_repo = self.state.repos.get(pull.head_repo_id)
        if drop and head_repo is not None:
            await self.delete_branch(actor, head_repo, pull.head)
            pull.head_gone = True

    async def request_review(self, actor: Actor, repo: Repo, issue: Issue, reviewers: list[User], *, remove: bool = False) -> list[Review]:
        """Asks for a review, again once somebody has reviewed, or takes the request back; who is asked already is left out."""
        pull = issue.pr
        made: list[Review] = []
        for user in reviewers:
            asked = next((review for review in pull.reviews if review.state == "REQUEST_REVIEW" and review.user_id == user.id), None)
            if (asked is not None) is not remove:
                continue
            entry = self.state.add_entry(repo, issue, "review_request", user=actor.user)
            entry.assignee_id, entry.removed = user.id, remove
            if asked is not None:
                pull.reviews.remove(asked)
                pull.reviewers.remove(user.id)
            else:
                now = self.state.now()
                review = Review(self.state.next_id("review"), user.id, "REQUEST_REVIEW", "", "", now, now)
                review.official = self.state.may(repo, user, "write")
                for earlier in pull.reviews:
                    if earlier.user_id == user.id:
                        earlier.official = False
                pull.reviews.append(review)
                if user.id not in pull.reviewers:
                    pull.reviewers.append(user.id)
                made.append(review)
            action = "review_request_removed" if remove else "review_requested"
            self._fire_review(actor, repo, issue, event_type="pull_request_review_request", action=action, reviewer=user)
        return made

    async def dismiss_review(self, actor: Actor, repo: Repo, issue: Issue, review: Review, message: str) -> None:
        """Fires nothing."""
        if review.state not in {"APPROVED", "REQUEST_CHANGES"}:
            raise RefusedError(403, "not need to dismiss this review because it's type is not Approve or change request")
        review.dismissed, review.official, review.updated = True, False, self.state.now()
        self.state.add_entry(repo, issue, "dismiss_review", user=actor.user, body=message)

    def _fire_review(
        self, actor: Actor, repo: Repo, issue: Issue, *, event_type: str, action: str, reviewer: User | None, review: Json | None = None
    ) -> None:
        if not self.hooks.wanted(repo, event_type):
            return
        shapes = actor.shapes
        payload = {
            "action": action,
            "number": issue.number,
            "pull_request": shapes.pull(repo, issue),
            "requested_reviewer": reviewer and shapes.user(reviewer),
            "repository": shapes.repo(repo, actor.user),
            "sender": shapes.user(actor.user),
            "commit_id": "",
            "review": review,
        }
        self.hooks.fire(repo, event_type, payload)

    async def review(
        self, actor: Actor, repo: Repo, issue: Issue, *, event: str, body: str = "", comments: list[dict[str, Any]] | None = None
    ) -> Review:
        """A review with line comments `{path, body, new_position, old_position}`. COMMENT without any text is 422."""
        pull = issue.pr
        state = {"APPROVE": "APPROVED", "": "PENDING"}.get(event, event)
        if state not in {"APPROVED", "REQUEST_CHANGES", "COMMENT", "PENDING"}:
            raise RefusedError(422, "unknown review event")
        if state in {"APPROVED", "REQUEST_CHANGES"} and actor.user.id == issue.user_id:
            raise RefusedError(422, f"{'approve' if state == 'APPROVED' else 'reject'} your own pull is not allowed")
        if state in {"COMMENT", "REQUEST_CHANGES"} and not body and not comments:
            raise RefusedError(422, "review event requires a body or a comment" if state == "COMMENT" else "review event needs a body")
        now = self.state.now()
        review = Review(self.state.next_id("review"), actor.user.id, state, body, pull.head_sha, now, now)
        review.official = state in {"APPROVED", "REQUEST_CHANGES"} and self.state.may(repo, actor.user, "write")
        if state != "PENDING":
            pull.reviews = [known for known in pull.reviews if known.state != "REQUEST_REVIEW" or known.user_id != actor.user.id]
        if review.official:
            for earlier in pull.reviews:
                if earlier.user_id == actor.user.id and earlier.official:
                    earlier.official, earlier.dismissed, earlier.updated = False, True, now
        for item in comments or []:
            line = int(item.get("new_position") or 0) or -int(item.get("old_position") or 0)
            entry = self.state.add_entry(repo, issue, "code", user=actor.user, body=str(item.get("body", "")))
            entry.path, entry.line, entry.review_id, entry.commit = str(item.get("path", "")), line, review.id, pull.head_sha
            entry.hunk = await self._hunk(repo, pull, entry.path, line)
            review.comments.append(entry)
        pull.reviews.append(review)
        if state != "PENDING":
            top = self.state.add_entry(repo, issue, "review", user=actor.user, body=body)
            review.entry_id, top.review_id = top.id, review.id
            kind = REVIEW_EVENTS[state]
            reviewer = None if self.state.old else actor.user
            shown = {"type": kind, "content": body}
            self._fire_review(actor, repo, issue, event_type=kind, action="reviewed", reviewer=reviewer, review=shown)
        return review

    async def _hunk(self, repo: Repo, pull: Pull, path: str, line: int) -> str:
        """The lines of the diff up to the commented one, at most four, under a hunk header."""
        content = await self.threads.run(gitio.read, repo.path, pull.head_sha if line > 0 else pull.merge_base, path)
        lines = (content or b"").decode(errors="replace").splitlines()[: abs(line)][-4:]
        sign = "+" if line > 0 else "-"
        return f"@@ -0,0 +1,{max(abs(line), 1)} @@\n" + "\n".join(f"{sign}{text}" for text in lines)

    # statuses and hooks

    async def set_status(
        self, actor: Actor, repo: Repo, *, sha: str, state: str, context: str = "", description: str = "", target_url: str = ""
    ) -> Status:
        """A commit status; an unknown commit is 500 with an empty message, as recorded."""
        if state not in {"pending", "success", "error", "failure", "warning", "skipped"}:
            raise RefusedError(422, "[State]: invalid")
        known = await self.threads.run(gitio.resolve, repo.path, sha)
        if not known or known != sha:
            raise RefusedError(500, "")
        status = Status(
            id=self.state.next_id("status"),
            sha=sha,
            state=state,
            context=context or "default",
            description=description,
            target_url=target_url,
            user_id=actor.user.id,
            created=self.state.now(),
        )
        repo.statuses.append(status)
        if self.hooks.wanted(repo, "status"):
            shapes = actor.shapes
            commit = await self.commit(repo, sha)
            payload = {
                "commit": shapes.payload_commit(repo, commit),
                "context": status.context,
                "created_at": shapes.status(repo, status)["created_at"],
                "description": description,
                "id": status.id,
                "repository": shapes.repo(repo, "owner"),
                "sender": shapes.user(actor.user),
                "sha": sha,
                "state": state,
                "target_url": target_url or f"{shapes.host}/",
                "updated_at": shapes.status(repo, status)["updated_at"],
            }
            self.hooks.fire(repo, "status", payload)
        return status

    async def commit(self, repo: Repo, sha: str) -> Commit:
        found = await self.threads.run(gitio.log, repo.path, sha, limit=1)
        return found[0]

    async def test_hook(self, actor: Actor, repo: Repo, hook: Hook) -> None:
        """A push with `before == after`; nothing at all when the hook sleeps, wants no push, or the repository is empty."""
        sha = repo.refs.get(f"refs/heads/{repo.default_branch}")
        if sha is None or not hook.active or "push" not in hook.events:
            return
        shapes = actor.shapes
        commit = shapes.payload_commit(repo, await self.commit(repo, sha), verified=True)
        payload = {
            "ref": f"refs/heads/{repo.default_branch}",
            "before": sha,
            "after": sha,
            "compare_url": f"{shapes.root}/{self.state.full_name(repo)}/compare/{sha}...{sha}",
            "commits": [commit],
            "total_commits": 1,
            "head_commit": commit,
            "repository": shapes.repo(repo, None),
            "pusher": shapes.user(actor.user),
            "sender": shapes.user(actor.user),
        }
        self.hooks.send(hook, "push", encode(payload))

    def set_collaborator(self, repo: Repo, user: User, level: Level) -> None:
        """`none` removes. Fires nothing, and assigned issues stay assigned."""
        if level == "none":
            repo.collaborators.pop(user.id, None)
        else:
            repo.collaborators[user.id] = level
