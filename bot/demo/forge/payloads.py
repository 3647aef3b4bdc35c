"""The JSON shapes of Gitea's API and deliveries, by personality; which URL carries which host is copied from recordings, contradictions included."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from bot.demo.forge.gitio import Commit, Person
from bot.demo.forge.state import Entry, Hook, Issue, Label, Reaction, Repo, Review, State, Status, User

Json = dict[str, Any]
ZERO_TIME: Final = "0001-01-01T00:00:00Z"
EPOCH: Final = "1970-01-01T00:00:00Z"


def stamp(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def stamp_or_none(seconds: int) -> str | None:
    return stamp(seconds) if seconds else None


@dataclass(frozen=True, slots=True)
class Shapes:
    """Builds JSON for one request. `root` is ROOT_URL, `host` the address the request came to; both end without a slash.

    `viewer` decides about e-mail addresses as in Gitea: one's own account shows everything, another's address is shown to people who
    are signed in, and many places (comments, senders) build the account as for nobody, which gives a noreply address.
    """

    state: State
    root: str
    host: str
    viewer: User | None = None

    @property
    def html(self) -> str:
        """Base of `html_url`, `clone_url` and `avatar_url`: 1.26 takes the request's host, 1.22 knows only ROOT_URL."""
        return self.root if self.state.old else self.host

    @property
    def api(self) -> str:
        return f"{self.root}/api/v1"

    # accounts

    def user(self, user: User, viewer: User | None = None) -> Json:
        own = viewer is not None and (viewer.id == user.id or viewer.is_admin)
        noreply = f"{user.login}@noreply.localhost" if self.state.old else f"{user.id}+{user.login}@noreply.localhost"
        digest = hashlib.md5(user.login.encode(), usedforsecurity=False).hexdigest()
        return {
            "id": user.id,
            "login": user.login,
            "login_name": "",
            "source_id": 0,
            "full_name": "",
            "email": user.email if viewer is not None else noreply,
            "avatar_url": f"{self.html}/avatars/{digest}",
            "html_url": f"{self.html}/{user.login}",
            "language": "",
            "is_admin": user.is_admin if own else False,
            "last_login": EPOCH if own else ZERO_TIME,
            "created": stamp(user.created),
            "restricted": False,
            "active": own,
            "prohibit_login": False,
            "location": "",
            "website": "",
            "description": "",
            "visibility": "public",
            "followers_count": 0,
            "following_count": 0,
            "starred_repos_count": 0,
            "username": user.login,
        }

    def maybe(self, user_id: int) -> Json | None:
        return self.user(self.state.by_id(user_id)) if user_id in self.state.users else None

    def users(self, ids: Iterable[int]) -> list[Json]:
        return [self.user(self.state.by_id(i)) for i in ids if i in self.state.users]

    def organization(self, org: User) -> Json:
        shown = self.user(org)
        return {
            "id": org.id,
            "name": org.login,
            "full_name": "",
            "email": "",
            "avatar_url": shown["avatar_url"],
            "description": "",
            "website": "",
            "location": "",
            "visibility": "public",
            "repo_admin_change_team_access": False,
            "username": org.login,
        }

    # repositories

    def repo(self, repo: Repo, whose: User | str | None = None) -> Json:
        """`whose` permissions are in it: a user's, "owner" (all), or None (nothing at all, as in hook tests)."""
        state, full = self.state, self.state.full_name(repo)
        new = not state.old
        if isinstance(whose, User):
            level = state.level(repo, whose)
            permissions = {"admin": level in {"admin", "owner"}, "push": level in {"write", "admin", "owner"}, "pull": level != "none"}
        else:
            permissions = dict.fromkeys(("admin", "push", "pull"), whose == "owner")
        parent = state.repos.get(repo.parent_id)
        opened = [i for i in repo.issues.values() if i.state == "open"]
        pulls = sum(1 for i in opened if i.pull is not None)
        out: Json = {
            "id": repo.id,
            "owner": self.user(state.by_id(repo.owner_id), self.viewer),
            "name": repo.name,
            "full_name": full,
            "description": repo.description,
            "empty": repo.empty,
            "private": repo.private,
            "fork": parent is not None,
            "template": False,
        }
        if parent is not None:
            out["parent"] = self.repo(parent, whose)
        elif state.old:
            out["parent"] = None
        out |= {
            "mirror": False,
            "size": repo.size,
            "language": "",
            "languages_url": f"{self.api}/repos/{full}/languages",
            "html_url": f"{self.html}/{full}",
            "url": f"{self.api}/repos/{full}",
            "link": "",
            "ssh_url": f"git@localhost:{full}.git",
            "clone_url": f"{self.html}/{full}.git",
            "original_url": "",
            "website": "",
            "stars_count": 0,
            "forks_count": sum(1 for r in state.repos.values() if r.parent_id == repo.id) if len(state.repos) > 1 else 0,
            "watchers_count": 1,
        }
        if new:
            out["branch_count"] = sum(1 for name in repo.refs if name.startswith("refs/heads/"))
        out |= {
            "open_issues_count": len(opened) - pulls,
            "open_pr_counter": pulls,
            "release_counter": 0,
            "default_branch": repo.default_branch,
            "archived": repo.archived,
            "created_at": stamp(repo.created),
            "updated_at": stamp(repo.updated),
            "archived_at": EPOCH,
            "permissions": permissions,
        }
        if new:
            out["has_code"] = True
        # A fork has its issues switched off, and then says nothing about its tracker.
        out["has_issues"] = parent is None
        if parent is None:
            out["internal_tracker"] = {
                "enable_time_tracker": True,
                "allow_only_contributors_to_track_time": True,
                "enable_issue_dependencies": True,
            }
        out |= {
            "has_wiki": True,
            "has_pull_requests": repo.has_pulls,
            "has_projects": True,
            "projects_mode": "all",
            "has_releases": True,
            "has_packages": True,
            "has_actions": True,
            "ignore_whitespace_conflicts": False,
            "allow_merge_commits": True,
            "allow_rebase": True,
            "allow_rebase_explicit": True,
            "allow_squash_merge": True,
            "allow_fast_forward_only_merge": True,
            "allow_rebase_update": True,
        }
        if new:
            out |= {"allow_manual_merge": False, "autodetect_manual_merge": False}
        out |= {
            "default_delete_branch_after_merge": False,
            "default_merge_style": "merge",
            "default_allow_maintainer_edit": new,
            "avatar_url": "",
            "internal": False,
            "mirror_interval": "",
            "object_format_name": "sha1",
            "mirror_updated": ZERO_TIME,
        }
        last: Json = {"topics": [], "licenses": []} if new else {"repo_transfer": None}
        return out | last

    def branch(self, repo: Repo, name: str, commit: Commit) -> Json:
        guarded = name in repo.protected
        write = self.state.may(repo, self.viewer, "write")
        return {
            "name": name,
            "commit": self.payload_commit(repo, commit, verified=True),
            "protected": guarded,
            "required_approvals": 0,
            "enable_status_check": False,
            "status_check_contexts": [],
            "user_can_push": write and not guarded,
            "user_can_merge": write,
            "effective_branch_protection_name": name if guarded else "",
        }

    def label(self, repo: Repo | None, label: Label) -> Json:
        base = f"orgs/{label.org}" if label.org or repo is None else f"repos/{self.state.full_name(repo)}"
        return {
            "id": label.id,
            "name": label.name,
            "exclusive": label.exclusive,
            "is_archived": False,
            "color": label.color,
            "description": label.description,
            "url": f"{self.api}/{base}/labels/{label.id}",
        }

    def labels(self, repo: Repo, issue: Issue) -> list[Json]:
        return [self.label(repo, label) for label in self.state.labels_on(repo, issue)]

    def hook(self, hook: Hook) -> Json:
        out: Json = {"id": hook.id}
        if not self.state.old:
            out["name"] = ""
        return out | {
            "type": "gitea",
            "branch_filter": hook.branch_filter,
            "config": {"content_type": hook.content_type, "url": hook.url},
            "events": sorted(hook.events, key=lambda e: hashlib.md5(e.encode(), usedforsecurity=False).digest()),
            "authorization_header": hook.authorization,
            "active": hook.active,
            "updated_at": stamp(hook.updated),
            "created_at": stamp(hook.created),
        }

    # issues

    def issue(self, repo: Repo, issue: Issue) -> Json:
        full = self.state.full_name(repo)
        pull = issue.pull
        page = f"{self.html}/{full}/{'pulls' if pull else 'issues'}/{issue.number}"
        assignees = self.users(issue.assignees)
        out: Json = {
            "id": issue.id,
            "url": f"{self.api}/repos/{full}/issues/{issue.number}",
            "html_url": page,
            "number": issue.number,
            "user": self.user(self.state.by_id(issue.user_id), self.viewer),
            "original_author": "",
            "original_author_id": 0,
            "title": issue.title,
            "body": issue.body,
            "ref": "",
            "assets": [],
            "labels": self.labels(repo, issue),
            "milestone": None,
            "assignee": assignees[0] if assignees else None,
            "assignees": assignees or None,
            "state": issue.state,
            "is_locked": issue.locked,
            "comments": len(issue.comments),
            "created_at": stamp(issue.created),
            "updated_at": stamp(issue.updated),
            "closed_at": stamp_or_none(issue.closed),
            "due_date": None,
        }
        if not self.state.old:
            out["time_estimate"] = 0
        out |= {
            "pull_request": pull
            and {"merged": bool(pull.merged), "merged_at": stamp_or_none(pull.merged), "draft": issue.draft, "html_url": page},
            "repository": {"id": repo.id, "name": repo.name, "owner": full.partition("/")[0], "full_name": full},
            "pin_order": 0,
        }
        return out if self.state.old else out | {"content_version": issue.content_version}

    def comment(self, repo: Repo, issue: Issue, entry: Entry) -> Json:
        full = self.state.full_name(repo)
        page = f"{self.html}/{full}/{'pulls' if issue.pull else 'issues'}/{issue.number}"
        return {
            "id": entry.id,
            "html_url": f"{page}#issuecomment-{entry.id}",
            "pull_request_url": page if issue.pull else "",
            "issue_url": "" if issue.pull else page,
            "user": self.user(self.state.by_id(entry.user_id)),
            "original_author": "",
            "original_author_id": 0,
            "body": entry.body,
            "assets": [],
            "created_at": stamp(entry.created),
            "updated_at": stamp(entry.updated),
        }

    def timeline(self, repo: Repo, issue: Issue, entry: Entry) -> Json:
        comment = self.comment(repo, issue, entry)
        label = self.state.label_of(repo, entry.label_id) if entry.label_id else None
        ref = None
        if entry.ref_issue and (other := self.state.repos.get(entry.ref_issue[0])) and entry.ref_issue[1] in other.issues:
            ref = self.issue(other, other.issues[entry.ref_issue[1]])
        return {
            "id": entry.id,
            "type": entry.type,
            **{k: comment[k] for k in ("html_url", "pull_request_url", "issue_url", "user", "body", "created_at", "updated_at")},
            "old_project_id": 0,
            "project_id": 0,
            "old_milestone": None,
            "milestone": None,
            "tracked_time": None,
            "old_title": entry.old_title,
            "new_title": entry.new_title,
            "old_ref": entry.old_ref,
            "new_ref": entry.new_ref,
            "ref_issue": ref,
            "ref_comment": None,
            "ref_action": entry.ref_action,
            "ref_commit_sha": entry.commit if entry.type == "commit_ref" else "",
            "review_id": entry.review_id,
            "label": label and self.label(repo, label),
            "assignee": self.maybe(entry.assignee_id),
            "assignee_team": None,
            "removed_assignee": entry.removed,
            "resolve_doer": None,
            "dependent_issue": None,
        }

    def reaction(self, reaction: Reaction) -> Json:
        return {
            "user": self.user(self.state.by_id(reaction.user_id), self.viewer),
            "content": reaction.content,
            "created_at": stamp(reaction.created),
        }

    # pull requests

    def pull(self, repo: Repo, issue: Issue, *, listed: bool = False, mergeable: bool | None = None) -> Json:
        """`listed` leaves out the counts and who merged, as lists do since 1.23; `mergeable` overrides what is known (a push says false at first)."""
        pull = issue.pr
        state, full, old = self.state, self.state.full_name(repo), self.state.old
        page = f"{self.html}/{full}/pulls/{issue.number}"
        empty: list[Json] | None = None if old or listed else []
        assignees, reviewers = self.users(issue.assignees), self.users(pull.reviewers)
        head_repo = state.repos.get(pull.head_repo_id)
        reviews = sum(1 for r in pull.reviews if r.state not in {"PENDING", "REQUEST_REVIEW"})
        out: Json = {
            "id": pull.id,
            "url": page,
            "number": issue.number,
            "user": self.user(state.by_id(issue.user_id), self.viewer),
            "title": issue.title,
            "body": issue.body,
            "labels": self.labels(repo, issue),
            "milestone": None,
            "assignee": assignees[0] if assignees else None,
            "assignees": assignees or empty,
            "requested_reviewers": reviewers or empty,
        }
        if not old:
            out["requested_reviewers_teams"] = empty
        out |= {"state": issue.state, "draft": issue.draft, "is_locked": issue.locked, "comments": len(issue.comments)}
        if old or reviews:
            out["review_comments"] = reviews
        if old or not listed:
            out |= {"additions": pull.additions, "deletions": pull.deletions, "changed_files": pull.changed_files}
        base_sha = repo.refs.get(f"refs/heads/{pull.base}", pull.base_sha)
        out |= {
            "html_url": page,
            "diff_url": f"{self.root}/{full}/pulls/{issue.number}.diff",
            "patch_url": f"{self.root}/{full}/pulls/{issue.number}.patch",
            "mergeable": pull.mergeable if mergeable is None else mergeable,
            "merged": bool(pull.merged),
            "merged_at": stamp_or_none(pull.merged),
            "merge_commit_sha": pull.merge_sha or None,
            "merged_by": None if listed and not old else self.maybe(pull.merged_by),
            "allow_maintainer_edit": not old,
            "base": {"label": pull.base, "ref": pull.base, "sha": base_sha, "repo_id": repo.id, "repo": self.repo(repo, self.viewer)},
            "head": {
                "label": pull.head,
                "ref": f"refs/pull/{issue.number}/head" if pull.head_gone or head_repo is None else pull.head,
                "sha": pull.head_sha,
                "repo_id": pull.head_repo_id if head_repo else -1,
                "repo": self.repo(head_repo, self.viewer) if head_repo else None,
            },
            "merge_base": pull.merge_base,
            "due_date": None,
            "created_at": stamp(issue.created),
            "updated_at": stamp(issue.updated),
            "closed_at": stamp_or_none(issue.closed),
            "pin_order": 0,
        }
        return out if old else out | {"content_version": issue.content_version}

    def review(self, repo: Repo, issue: Issue, review: Review) -> Json:
        page = f"{self.html}/{self.state.full_name(repo)}/pulls/{issue.number}"
        pull = issue.pull
        return {
            "id": review.id,
            "user": self.user(self.state.by_id(review.user_id), self.viewer),
            "team": None,
            "state": review.state,
            "body": review.body,
            "commit_id": review.commit,
            "stale": pull is not None and bool(review.commit) and review.commit != pull.head_sha,
            "official": review.official,
            "dismissed": review.dismissed,
            "comments_count": len(review.comments),
            "submitted_at": stamp(review.created),
            "updated_at": stamp(review.updated),
            "html_url": f"{page}#issuecomment-{review.entry_id}" if review.entry_id else "",
            "pull_request_url": page,
        }

    def review_comment(self, repo: Repo, issue: Issue, entry: Entry) -> Json:
        page = f"{self.html}/{self.state.full_name(repo)}/pulls/{issue.number}"
        return {
            "id": entry.id,
            "body": entry.body,
            "user": self.user(self.state.by_id(entry.user_id), self.viewer),
            "resolver": self.maybe(entry.resolver_id),
            "pull_request_review_id": entry.review_id,
            "created_at": stamp(entry.created),
            "updated_at": stamp(entry.updated),
            "path": entry.path,
            "commit_id": entry.commit,
            "original_commit_id": "",
            "diff_hunk": entry.hunk,
            "position": max(entry.line, 0),
            "original_position": max(-entry.line, 0),
            "html_url": f"{page}#issuecomment-{entry.id}",
            "pull_request_url": page,
        }

    # commits

    def payload_commit(self, repo: Repo, commit: Commit, *, verified: bool = False) -> Json:
        """A commit as push deliveries carry it; `verified` is the form of hook tests and branches, without files."""

        def who(person: Person) -> Json:
            known = next((u.login for u in self.state.users.values() if u.email and u.email == person.email), "")
            return {"name": person.name, "email": person.email, "username": known}

        unsigned = {"verified": False, "reason": "gpg.error.not_signed_commit", "signature": "", "signer": None, "payload": ""}
        return {
            "id": commit.sha,
            "message": commit.message,
            "url": f"{self.root}/{self.state.full_name(repo)}/commit/{commit.sha}",
            "author": who(commit.author),
            "committer": who(commit.committer),
            "verification": unsigned if verified else None,
            "timestamp": stamp(commit.committer.when),
            "added": None if verified else commit.added,
            "removed": None if verified else commit.removed,
            "modified": None if verified else commit.modified,
        }

    def status(self, repo: Repo, status: Status) -> Json:
        return {
            "id": status.id,
            "status": status.state,
            "target_url": status.target_url,
            "description": status.description,
            "url": f"{self.api}/repos/{self.state.full_name(repo)}/statuses/{status.sha}",
            "context": status.context,
            "creator": self.user(self.state.by_id(status.user_id)),
            "created_at": stamp(status.created),
            "updated_at": stamp(status.created),
        }

    def combined(self, repo: Repo, sha: str, statuses: list[Status]) -> Json:
        """The combined status; without any status 1.22 answers with blanks, 1.26 with `pending`. A warning fails only 1.26."""
        full = self.state.full_name(repo)
        if not statuses and self.state.old:
            return {"state": "", "sha": "", "total_count": 0, "statuses": None, "repository": None, "commit_url": "", "url": ""}
        found = {s.state for s in statuses}
        if self.state.old:
            word = next((s for s in ("error", "failure", "warning", "pending") if s in found), "success")
        elif found & {"error", "failure", "warning"}:
            word = "failure"
        else:
            word = "success" if found and found <= {"success", "skipped"} else "pending"
        return {
            "state": word,
            "sha": sha,
            "total_count": len(statuses),
            "statuses": [self.status(repo, s) for s in statuses] or None,
            "repository": self.repo(repo, self.viewer),
            "commit_url": f"{self.api}/repos/{full}/commits/{sha}" if not self.state.old else "",
            "url": f"{self.api}/repos/{full}/commits/{sha}/status" if not self.state.old else "",
        }


CLOSING: Final = re.compile(r"(?i)\b(?:close[sd]?|fix(?:e[sd])?|resolve[sd]?)[: ]+#(\d+)\b")
MENTION: Final = re.compile(r"(?<![\w/#])#(\d+)\b")


def closes(text: str) -> list[int]:
    """Numbers of the issues a text says it closes, in order, once each."""
    return list(dict.fromkeys(int(n) for n in CLOSING.findall(text)))
