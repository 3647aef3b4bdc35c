"""The forge's nouns: everything that Gitea keeps in its database is held in memory here, and only git data is on disk."""

from __future__ import annotations

import itertools
import re
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

Personality = Literal["1.26", "1.22"]
Level = Literal["none", "read", "write", "admin", "owner"]
HookLevel = Literal["repository", "organization", "user", "system"]

LEVELS: Final[tuple[Level, ...]] = ("none", "read", "write", "admin", "owner")
ACTIONS_ID: Final = -2
ALLOWED_REACTIONS: Final = ("+1", "-1", "laugh", "hooray", "confused", "heart", "rocket", "eyes")
# Gitea prints the scopes of a token in this order, whatever order they were asked for in.
SCOPE_CATEGORIES: Final = ("activitypub", "admin", "misc", "notification", "organization", "package", "issue", "repository", "user")


@dataclass(slots=True)
class User:
    """A person, a bot or (`is_org`) an organisation. The password is kept in clear: it guards a demo in memory, nothing else."""

    id: int
    login: str
    created: int
    password: str = field(repr=False)
    email: str = ""
    is_admin: bool = False
    is_org: bool = False
    must_change_password: bool = False
    owners: set[int] = field(default_factory=set)
    labels: list[Label] = field(default_factory=list)


@dataclass(slots=True)
class Token:
    id: int
    name: str
    value: str = field(repr=False)
    scopes: tuple[str, ...]
    user_id: int

    def allows(self, category: str, *, write: bool) -> bool:
        """Write implies read; `all` implies everything."""
        held = set(self.scopes)
        return bool(held & {"all", f"write:{category}"}) or (not write and f"read:{category}" in held)


@dataclass(slots=True)
class Label:
    id: int
    name: str
    color: str
    description: str = ""
    exclusive: bool = False
    org: str = ""

    @property
    def scope(self) -> str:
        return self.name.rpartition("/")[0] if self.exclusive else ""


@dataclass(slots=True)
class Reaction:
    user_id: int
    content: str
    created: int


@dataclass(slots=True)
class Entry:
    """One line of an issue's timeline; a comment is the entry of type `comment`. `extra` holds what only some types have."""

    id: int
    type: str
    user_id: int
    body: str
    created: int
    updated: int
    reactions: list[Reaction] = field(default_factory=list)
    label_id: int = 0
    assignee_id: int = 0
    removed: bool = False
    old_title: str = ""
    new_title: str = ""
    old_ref: str = ""
    new_ref: str = ""
    ref_issue: tuple[int, int] | None = None
    ref_action: str = "none"
    review_id: int = 0
    path: str = ""
    line: int = 0
    hunk: str = ""
    commit: str = ""
    resolver_id: int = 0


@dataclass(slots=True)
class Review:
    id: int
    user_id: int
    state: str
    body: str
    commit: str
    created: int
    updated: int
    entry_id: int = 0
    official: bool = False
    dismissed: bool = False
    comments: list[Entry] = field(default_factory=list)


@dataclass(slots=True)
class Pull:
    """What an issue that is a pull request has besides; shas are of the last push, `head_gone` says that the branch was deleted."""

    id: int
    head_repo_id: int
    head: str
    base: str
    head_sha: str
    base_sha: str
    merge_base: str
    head_gone: bool = False
    mergeable: bool = True
    additions: int = 0
    deletions: int = 0
    changed_files: int = 0
    merged: int = 0
    merged_by: int = 0
    merge_sha: str = ""
    reviewers: list[int] = field(default_factory=list)
    reviews: list[Review] = field(default_factory=list)


@dataclass(slots=True)
class Issue:
    id: int
    number: int
    user_id: int
    title: str
    body: str
    created: int
    updated: int
    state: Literal["open", "closed"] = "open"
    closed: int = 0
    locked: bool = False
    content_version: int = 0
    label_ids: list[int] = field(default_factory=list)
    assignees: list[int] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    reactions: list[Reaction] = field(default_factory=list)
    blocked_by: list[tuple[int, int]] = field(default_factory=list)
    pull: Pull | None = None

    @property
    def comments(self) -> list[Entry]:
        return [e for e in self.entries if e.type == "comment"]

    @property
    def pr(self) -> Pull:
        """The pull request this issue is; LookupError when it is none."""
        if self.pull is None:
            raise LookupError(f"#{self.number} is not a pull request")
        return self.pull

    @property
    def draft(self) -> bool:
        return self.pull is not None and re.match(r"(?i)\s*(WIP:|\[WIP\])", self.title) is not None


@dataclass(slots=True)
class Status:
    id: int
    sha: str
    state: str
    context: str
    description: str
    target_url: str
    user_id: int
    created: int


@dataclass(slots=True)
class Hook:
    """A webhook. `events` holds precise names; `owner` is the repository's or organisation's id by `level`."""

    id: int
    url: str
    content_type: str
    secret: str = field(repr=False)
    events: set[str]
    active: bool
    created: int
    updated: int
    branch_filter: str = ""
    authorization: str = field(default="", repr=False)
    level: HookLevel = "repository"
    owner: int = 0


@dataclass(slots=True)
class Repo:
    id: int
    owner_id: int
    name: str
    path: Path
    created: int
    updated: int
    default_branch: str = "main"
    private: bool = False
    empty: bool = False
    archived: bool = False
    description: str = ""
    size: int = 25
    parent_id: int = 0
    has_pulls: bool = True
    collaborators: dict[int, Level] = field(default_factory=dict)
    labels: list[Label] = field(default_factory=list)
    issues: dict[int, Issue] = field(default_factory=dict)
    statuses: list[Status] = field(default_factory=list)
    protected: set[str] = field(default_factory=set)
    refs: dict[str, str] = field(default_factory=dict)
    next_number: int = 1


def in_order(scopes: list[str] | tuple[str, ...]) -> tuple[str, ...]:
    """Scopes as Gitea stores them: by category, once each, write instead of read and write."""
    found: list[str] = ["all"] if "all" in scopes else []
    if not found:
        for category in SCOPE_CATEGORIES:
            found += next(([s] for s in (f"write:{category}", f"read:{category}") if s in scopes), [])
    return ("public-only", *found) if "public-only" in scopes else tuple(found)


class State:
    """All nouns and their look-ups. Times are whole seconds since the epoch, as in Gitea. No I/O and no events."""

    def __init__(self, root: Path, *, personality: Personality, clock: Callable[[], float]) -> None:
        self.root = root
        self.personality: Personality = personality
        self.clock = clock
        self.users: dict[int, User] = {}
        self.repos: dict[int, Repo] = {}
        self.tokens: dict[str, Token] = {}
        self.hooks: dict[int, Hook] = {}
        self.redirects: dict[tuple[str, str], int] = {}
        self._by_login: dict[str, User] = {}
        self._by_name: dict[tuple[str, str], Repo] = {}
        self._entries: dict[int, tuple[Repo, Issue, Entry]] = {}
        self._counters: dict[str, Iterator[int]] = {}
        self.actions = User(id=ACTIONS_ID, login="gitea-actions", created=0, password="")

    @property
    def old(self) -> bool:
        """True for the personality of Gitea 1.22."""
        return self.personality == "1.22"

    def now(self) -> int:
        return int(self.clock())

    def next_id(self, kind: str) -> int:
        return next(self._counters.setdefault(kind, itertools.count(1)))

    # users

    def add_user(self, login: str, *, email: str = "", password: str = "", is_org: bool = False) -> User:
        if not login or login.lower() in self._by_login:
            raise ValueError(f"user already exists [name: {login}]")
        user = User(id=self.next_id("user"), login=login, created=self.now(), password=password or secrets.token_urlsafe(18))
        user.is_org = is_org
        user.email = email or ("" if is_org else f"{login}@example.org")
        self.users[user.id] = self._by_login[login.lower()] = user
        return user

    def find_user(self, login: str) -> User | None:
        return self._by_login.get(login.lower())

    def user(self, login: str) -> User:
        """KeyError when there is no such user."""
        return self._by_login[login.lower()]

    def by_id(self, user_id: int) -> User:
        return self.actions if user_id == ACTIONS_ID else self.users[user_id]

    def rename_user(self, user: User, login: str) -> None:
        """Everything of theirs moves along, and the old addresses of repositories redirect. ValueError where the name is taken."""
        if not login or self._by_login.get(login.lower(), user) is not user:
            raise ValueError(f"user already exists [name: {login}]")
        before = user.login.lower()
        del self._by_login[before]
        user.login, self._by_login[login.lower()] = login, user
        for repo in [repo for repo in self.repos.values() if repo.owner_id == user.id]:
            name = repo.name.lower()
            del self._by_name[before, name]
            self.redirects[before, name] = repo.id
            self._by_name[login.lower(), name] = repo
            self.redirects.pop((login.lower(), name), None)

    def remove_user(self, user: User) -> None:
        del self.users[user.id], self._by_login[user.login.lower()]
        self.tokens = {k: t for k, t in self.tokens.items() if t.user_id != user.id}

    def add_token(self, user: User, *, name: str, scopes: list[str]) -> Token:
        value = secrets.token_hex(20)
        token = Token(id=self.next_id("token"), name=name, value=value, scopes=in_order(scopes), user_id=user.id)
        self.tokens[value] = token
        return token

    # repositories

    def add_repo(self, owner: User, name: str, *, default_branch: str, private: bool) -> Repo:
        if (owner.login.lower(), name.lower()) in self._by_name:
            raise ValueError("The repository with the same name already exists.")
        number = self.next_id("repo")
        now = self.now()
        path = self.root / "repositories" / f"{number}.git"
        repo = Repo(
            id=number, owner_id=owner.id, name=name, path=path, created=now, updated=now, default_branch=default_branch, private=private
        )
        self.repos[number] = repo
        self._by_name[owner.login.lower(), name.lower()] = repo
        self.redirects.pop((owner.login.lower(), name.lower()), None)
        return repo

    def find_repo(self, owner: str, name: str) -> Repo | None:
        return self._by_name.get((owner.lower(), name.lower()))

    def repo(self, full_name: str) -> Repo:
        """KeyError when there is no such repository; an old name is not followed."""
        owner, _, name = full_name.partition("/")
        return self._by_name[owner.lower(), name.lower()]

    def rename_repo(self, repo: Repo, name: str) -> None:
        owner = self.by_id(repo.owner_id).login.lower()
        if (owner, name.lower()) in self._by_name:
            raise ValueError("The repository with the same name already exists.")
        del self._by_name[owner, repo.name.lower()]
        self.redirects[owner, repo.name.lower()] = repo.id
        repo.name = name
        self._by_name[owner, name.lower()] = repo
        self.redirects.pop((owner, name.lower()), None)

    def remove_repo(self, repo: Repo) -> None:
        del self.repos[repo.id], self._by_name[self.by_id(repo.owner_id).login.lower(), repo.name.lower()]
        self.hooks = {k: h for k, h in self.hooks.items() if h.level != "repository" or h.owner != repo.id}
        self.redirects = {k: v for k, v in self.redirects.items() if v != repo.id}

    def full_name(self, repo: Repo) -> str:
        return f"{self.by_id(repo.owner_id).login}/{repo.name}"

    # permissions

    def level(self, repo: Repo, user: User | None) -> Level:
        """What this user may do here, as the permission endpoint would say it."""
        reader: Level = "none" if repo.private else "read"
        if user is None:
            return reader
        if user.id == ACTIONS_ID:
            return "write"
        owner = self.by_id(repo.owner_id)
        if user.is_admin or user.id == owner.id or user.id in owner.owners:
            return "owner"
        return max(reader, repo.collaborators.get(user.id, "none"), key=LEVELS.index)

    def may(self, repo: Repo, user: User | None, need: Level) -> bool:
        return LEVELS.index(self.level(repo, user)) >= LEVELS.index(need)

    # labels and entries

    def label_of(self, repo: Repo, label_id: int) -> Label | None:
        labels = [*repo.labels, *self.by_id(repo.owner_id).labels]
        return next((label for label in labels if label.id == label_id), None)

    def label_named(self, repo: Repo, name: str, *, with_org: bool) -> Label | None:
        labels = [*repo.labels, *self.by_id(repo.owner_id).labels] if with_org else repo.labels
        return next((label for label in labels if label.name == name), None)

    def labels_on(self, repo: Repo, issue: Issue) -> list[Label]:
        found = [label for label in (self.label_of(repo, i) for i in issue.label_ids) if label is not None]
        return sorted(found, key=lambda label: label.name)

    def add_entry(self, repo: Repo, issue: Issue, type_: str, *, user: User, body: str = "") -> Entry:
        """Append to the timeline and move the issue's `updated_at`, as every entry does in Gitea."""
        now = self.now()
        entry = Entry(id=self.next_id("comment"), type=type_, user_id=user.id, body=body, created=now, updated=now)
        issue.entries.append(entry)
        issue.updated = max(issue.updated, now)
        self._entries[entry.id] = (repo, issue, entry)
        return entry

    def remove_entry(self, issue: Issue, entry: Entry) -> None:
        issue.entries.remove(entry)
        del self._entries[entry.id]

    def find_entry(self, repo: Repo, entry_id: int) -> tuple[Issue, Entry] | None:
        """A timeline entry of this repository, whatever its type."""
        found = self._entries.get(entry_id)
        if found is None or found[0] is not repo or repo.issues.get(found[1].number) is not found[1]:
            return None
        return found[1], found[2]

    def combined(self, repo: Repo, sha: str) -> list[Status]:
        """The newest status of each context on a commit, newest first."""
        newest: dict[str, Status] = {}
        for status in repo.statuses:
            if status.sha == sha:
                newest[status.context] = status
        return sorted(newest.values(), key=lambda s: -s.id)
