"""Issues, comments, reactions, labels, timeline, dependencies: the part of the API the bot uses most."""

from __future__ import annotations

from typing import Any

from bot.demo.forge.acts import RefusedError
from bot.demo.forge.api import Call, Reply, Route
from bot.demo.forge.state import Entry, Issue, Label, Reaction, Repo, User

SCOPES = ("issue",)


def _named_user(call: Call, name: str) -> User | None:
    """The account a filter names; an unknown one makes the whole list 404."""
    login = call.query(name)
    if not login:
        return None
    user = call.state.find_user(login)
    if user is None:
        raise call.acts.not_found()
    return user


def _select(call: Call, repo: Repo, *, label_ids: list[int]) -> list[Issue]:
    """Issues by state, type, labels (all of them) and time, newest created first."""
    state, kind = call.query("state") or "open", call.query("type")
    since, before = call.since(), call.since("before")
    creator, assignee = _named_user(call, "created_by"), _named_user(call, "assigned_by")
    word = call.query("q").lower()
    found = [
        issue
        for issue in repo.issues.values()
        if state in {"all", issue.state}
        and (kind not in {"issues", "pulls"} or (issue.pull is not None) == (kind == "pulls"))
        and all(label in issue.label_ids for label in label_ids)
        and (since is None or issue.updated >= since)
        and (before is None or issue.updated <= before)
        and (creator is None or issue.user_id == creator.id)
        and (assignee is None or assignee.id in issue.assignees)
        and (not word or word in issue.title.lower())
    ]
    return sorted(found, key=lambda i: -i.id)


async def list_issues(call: Call) -> Reply:
    names = [n for n in call.query("labels").split(",") if n]
    # Names the repository does not know are discarded; when none is left, nothing is filtered any more.
    known = [label.id for name in names if (label := call.state.label_named(call.repo, name, with_org=False))]
    return call.listed(_select(call, call.repo, label_ids=known), lambda i: call.shapes.issue(call.repo, i), links=True)


async def search_issues(call: Call) -> Reply:
    """Over all readable repositories; several labels match ANY."""
    names = {n for n in call.query("labels").split(",") if n}
    found: list[tuple[Repo, Issue]] = []
    for repo in call.state.repos.values():
        if call.state.may(repo, call.user_or_none, "read"):
            found += [
                (repo, issue)
                for issue in _select(call, repo, label_ids=[])
                if not names or names & {label.name for label in call.state.labels_on(repo, issue)}
            ]
    found.sort(key=lambda pair: -pair[1].id)
    return call.listed(found, lambda pair: call.shapes.issue(*pair), links=True)


async def create_issue(call: Call) -> Reply:
    assignees = call.people(call.body.get("assignees"))
    issue = await call.acts.open_issue(
        call.actor, call.repo, title=call.text("title"), body=call.text("body"), labels=call.labels(), assignees=assignees
    )
    if call.body.get("closed"):
        await call.acts.edit_issue(call.actor, call.repo, issue, state="closed")
    return Reply(call.shapes.issue(call.repo, issue), 201)


async def get_issue(call: Call) -> Reply:
    return Reply(call.shapes.issue(call.repo, call.issue()))


def check_version(call: Call, issue: Issue) -> None:
    """`content_version` of 1.26: a PATCH made from an older text is a 409."""
    if not call.state.old and call.integer("content_version", issue.content_version) != issue.content_version:
        raise RefusedError(409, "the content has been changed meanwhile")


def optional(call: Call, name: str) -> str | None:
    value = call.body.get(name)
    return None if value is None else str(value)


async def edit_issue(call: Call) -> Reply:
    issue = call.issue()
    check_version(call, issue)
    people = call.people(call.body["assignees"]) if call.body.get("assignees") is not None else None
    await call.acts.edit_issue(
        call.actor,
        call.repo,
        issue,
        title=optional(call, "title"),
        body=optional(call, "body"),
        state=optional(call, "state"),
        assignees=people,
    )
    return Reply(call.shapes.issue(call.repo, issue), 201)


async def delete_issue(call: Call) -> Reply:
    await call.acts.delete_issue(call.actor, call.repo, call.issue())
    return Reply(status=204)


async def lock_issue(call: Call) -> Reply:
    await call.acts.lock(call.actor, call.repo, call.issue(), locked=call.request.method == "PUT")
    return Reply(status=204)


# comments


def _window(call: Call, entries: list[Entry]) -> list[Entry]:
    since, before = call.since(), call.since("before")
    return [e for e in entries if (since is None or e.updated >= since) and (before is None or e.updated <= before)]


async def issue_comments(call: Call) -> Reply:
    """All of them: this list ignores paging."""
    issue = call.issue(missing=500)
    found = _window(call, issue.comments)
    return Reply([call.shapes.comment(call.repo, issue, e) for e in found], total=len(found))


async def repo_comments(call: Call) -> Reply:
    pairs = [(issue, entry) for issue in call.repo.issues.values() for entry in _window(call, issue.comments)]
    pairs.sort(key=lambda pair: pair[1].id)

    def shape(pair: tuple[Issue, Entry]) -> Any:
        return call.shapes.comment(call.repo, *pair)

    if call.state.old and "page" not in call.request.query:
        return Reply([shape(pair) for pair in pairs], total=len(pairs))
    return call.listed(pairs, shape)


async def create_comment(call: Call) -> Reply:
    call.acts.writable(call.repo)
    issue = call.issue(missing=500)
    entry = await call.acts.comment(call.actor, call.repo, issue, call.text("body"))
    return Reply(call.shapes.comment(call.repo, issue, entry), 201)


def _comment(call: Call) -> tuple[Issue, Entry]:
    found = call.state.find_entry(call.repo, call.number("id"))
    if found is None or found[1].type not in {"comment", "review", "code", "label", "close", "reopen", "change_title"}:
        raise call.acts.not_found()
    return found


async def get_comment(call: Call) -> Reply:
    issue, entry = _comment(call)
    return Reply(call.shapes.comment(call.repo, issue, entry)) if entry.type == "comment" else Reply(status=204)


async def edit_comment(call: Call) -> Reply:
    issue, entry = _comment(call)
    changed = await call.acts.edit_comment(call.actor, call.repo, issue, entry=entry, body=call.text("body"))
    shown = call.shapes.comment(call.repo, issue, entry)
    if not changed and not call.state.old:
        shown["user"] = None
    return Reply(shown)


async def delete_comment(call: Call) -> Reply:
    issue, entry = _comment(call)
    await call.acts.delete_comment(call.actor, call.repo, issue, entry)
    return Reply(status=204)


# reactions


def _reactions(call: Call) -> tuple[Issue, list[Reaction]]:
    if "index" in call.request.match_info:
        issue = call.issue()
        return issue, issue.reactions
    issue, entry = _comment(call)
    return issue, entry.reactions


async def list_reactions(call: Call) -> Reply:
    issue, reactions = _reactions(call)
    del issue
    return Reply([call.shapes.reaction(r) for r in reactions])


async def add_reaction(call: Call) -> Reply:
    issue, reactions = _reactions(call)
    reaction, fresh = await call.acts.react(call.actor, issue, reactions, call.text("content"))
    return Reply(call.shapes.reaction(reaction), 201 if fresh else 200)


async def delete_reaction(call: Call) -> Reply:
    await call.acts.unreact(call.actor, _reactions(call)[1], call.text("content"))
    return Reply(status=200 if call.state.old else 204)


# labels


async def issue_labels(call: Call) -> Reply:
    return Reply(call.shapes.labels(call.repo, call.issue()))


def _chosen(call: Call) -> list[Label]:
    """Labels by names or by ids, not mixed; unknown ones vanish, and 1.22 does not see the organisation's names."""
    wanted = call.body.get("labels") or []
    if not isinstance(wanted, list) or {type(item) for item in wanted} not in ({str}, {int}, set()):
        raise RefusedError(400, "labels should be an array of strings or integers")
    found = []
    for item in wanted:
        named = isinstance(item, str)
        label = call.state.label_named(call.repo, item, with_org=not call.state.old) if named else call.state.label_of(call.repo, int(item))
        if label is not None:
            found.append(label)
    return found


async def add_labels(call: Call) -> Reply:
    issue = call.issue()
    await call.acts.add_labels(call.actor, call.repo, issue, _chosen(call), replace=call.request.method == "PUT")
    return Reply(call.shapes.labels(call.repo, issue))


async def remove_label(call: Call) -> Reply:
    issue = call.issue()
    try:
        label = call.state.label_of(call.repo, int(call.var("id")))
    except ValueError:
        label = None
    if label is None:
        raise RefusedError(422, f"label does not exist [label_id: {call.var('id')}]")
    await call.acts.remove_label(call.actor, call.repo, issue, label)
    return Reply(status=204)


async def clear_labels(call: Call) -> Reply:
    await call.acts.clear_labels(call.actor, call.repo, call.issue())
    return Reply(status=204)


async def repo_labels(call: Call) -> Reply:
    return call.listed(call.repo.labels, lambda label: call.shapes.label(call.repo, label))


async def create_label(call: Call) -> Reply:
    call.need("write")
    label = call.acts.create_label(
        call.repo,
        call.text("name"),
        color=call.text("color"),
        exclusive=bool(call.body.get("exclusive")),
        text=call.text("description"),
    )
    return Reply(call.shapes.label(call.repo, label), 201)


def _label(call: Call) -> Label:
    label = next((label for label in call.repo.labels if label.id == call.number("id")), None)
    if label is None:
        raise call.acts.not_found()
    return label


async def get_label(call: Call) -> Reply:
    return Reply(call.shapes.label(call.repo, _label(call)))


async def edit_label(call: Call) -> Reply:
    call.need("write")
    label = _label(call)
    label.name, label.color = call.text("name", label.name), call.text("color", label.color).lstrip("#")
    label.description, label.exclusive = call.text("description", label.description), bool(call.body.get("exclusive", label.exclusive))
    return Reply(call.shapes.label(call.repo, label))


async def delete_label(call: Call) -> Reply:
    call.need("write")
    label = _label(call)
    call.repo.labels.remove(label)
    for issue in call.repo.issues.values():
        if label.id in issue.label_ids:
            issue.label_ids.remove(label.id)
    return Reply(status=204)


# timeline and dependencies


async def timeline(call: Call) -> Reply:
    """Oldest first; the total is the size of *this* page, code comments are filtered after paging, and an empty page is null."""
    issue = call.issue(missing=500)
    found = _window(call, issue.entries)
    if not (call.state.old and "page" not in call.request.query):
        found = call.page(found)
    shown = [call.shapes.timeline(call.repo, issue, e) for e in found if e.type != "code"]
    return Reply(shown or None, total=len(shown))


async def dependencies(call: Call) -> Reply:
    issue = call.issue()
    pairs = [(repo, repo.issues[n]) for i, n in issue.blocked_by if (repo := call.state.repos.get(i)) and n in repo.issues]
    shown = []
    for repo, other in call.page(pairs):
        entry = call.shapes.issue(repo, other)
        if not call.state.may(repo, call.user_or_none, "read"):
            entry |= {"title": "HIDDEN", "body": ""}
        shown.append(entry)
    return Reply(shown, total=None if call.state.old else len(pairs))


async def change_dependency(call: Call) -> Reply:
    call.acts.writable(call.repo)
    call.need("write")
    issue = call.issue()
    owner, name = call.text("owner"), call.text("repo")
    repo = call.state.find_repo(owner, name) if owner and name else call.repo
    number = call.integer("index")
    if repo is None or number not in repo.issues:
        raise call.acts.not_found()
    blocker = (repo.id, number)
    if call.request.method == "POST" and blocker not in issue.blocked_by:
        issue.blocked_by.append(blocker)
        call.state.add_entry(call.repo, issue, "add_dependency", user=call.user)
    elif call.request.method == "DELETE" and blocker in issue.blocked_by:
        issue.blocked_by.remove(blocker)
        call.state.add_entry(call.repo, issue, "remove_dependency", user=call.user)
    return Reply(call.shapes.issue(call.repo, issue), 201 if call.request.method == "POST" else 200)


_REPO = "/repos/{owner}/{repo}"
_ISSUE = f"{_REPO}/issues/{{index}}"
_COMMENT = f"{_REPO}/issues/comments/{{id}}"

ROUTES = (
    Route("GET", "/repos/issues/search", search_issues, SCOPES),
    Route("GET", f"{_REPO}/issues", list_issues, SCOPES),
    Route("POST", f"{_REPO}/issues", create_issue, SCOPES),
    Route("GET", f"{_REPO}/issues/comments", repo_comments, SCOPES),
    Route("GET", _COMMENT, get_comment, SCOPES),
    Route("PATCH", _COMMENT, edit_comment, SCOPES),
    Route("DELETE", _COMMENT, delete_comment, SCOPES),
    Route("GET", f"{_COMMENT}/reactions", list_reactions, SCOPES),
    Route("POST", f"{_COMMENT}/reactions", add_reaction, SCOPES),
    Route("DELETE", f"{_COMMENT}/reactions", delete_reaction, SCOPES),
    Route("GET", _ISSUE, get_issue, SCOPES),
    Route("PATCH", _ISSUE, edit_issue, SCOPES),
    Route("DELETE", _ISSUE, delete_issue, SCOPES),
    Route("GET", f"{_ISSUE}/comments", issue_comments, SCOPES),
    Route("POST", f"{_ISSUE}/comments", create_comment, SCOPES),
    Route("GET", f"{_ISSUE}/reactions", list_reactions, SCOPES),
    Route("POST", f"{_ISSUE}/reactions", add_reaction, SCOPES),
    Route("DELETE", f"{_ISSUE}/reactions", delete_reaction, SCOPES),
    Route("GET", f"{_ISSUE}/labels", issue_labels, SCOPES),
    Route("POST", f"{_ISSUE}/labels", add_labels, SCOPES),
    Route("PUT", f"{_ISSUE}/labels", add_labels, SCOPES),
    Route("DELETE", f"{_ISSUE}/labels", clear_labels, SCOPES),
    Route("DELETE", f"{_ISSUE}/labels/{{id}}", remove_label, SCOPES),
    Route("GET", f"{_ISSUE}/timeline", timeline, SCOPES),
    Route("GET", f"{_ISSUE}/dependencies", dependencies, SCOPES),
    Route("POST", f"{_ISSUE}/dependencies", change_dependency, SCOPES),
    Route("DELETE", f"{_ISSUE}/dependencies", change_dependency, SCOPES),
    Route("PUT", f"{_ISSUE}/lock", lock_issue, SCOPES, new_only=True),
    Route("DELETE", f"{_ISSUE}/lock", lock_issue, SCOPES, new_only=True),
    Route("GET", f"{_REPO}/labels", repo_labels, SCOPES),
    Route("POST", f"{_REPO}/labels", create_label, SCOPES),
    Route("GET", f"{_REPO}/labels/{{id}}", get_label, SCOPES),
    Route("PATCH", f"{_REPO}/labels/{{id}}", edit_label, SCOPES),
    Route("DELETE", f"{_REPO}/labels/{{id}}", delete_label, SCOPES),
)
