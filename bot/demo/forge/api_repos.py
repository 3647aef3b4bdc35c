"""Repositories, collaborators, branches, files, commit statuses and hooks."""

from __future__ import annotations

import base64
import binascii

from bot.demo.forge import gitio
from bot.demo.forge.acts import RefusedError
from bot.demo.forge.api import Call, Reply, Route
from bot.demo.forge.hooks import precise
from bot.demo.forge.payloads import Json, stamp
from bot.demo.forge.state import Hook, HookLevel, Level, Repo, User


async def _create(call: Call, owner: User) -> Reply:
    name = call.text("name")
    if not name or "/" in name or name in {".", ".."}:
        raise RefusedError(422, "[Name]: Required")
    files = {"README.md": f"# {name}\n\n{call.text('description')}".strip() + "\n"} if call.body.get("auto_init") else None
    repo = await call.acts.create_repo(
        call.actor,
        owner,
        name,
        files=files,
        private=bool(call.body.get("private")),
        default_branch=call.text("default_branch", "main") or "main",
    )
    repo.description = call.text("description")
    return Reply(call.shapes.repo(repo, call.user), 201)


async def create_own(call: Call) -> Reply:
    return await _create(call, call.user)


async def create_for(call: Call) -> Reply:
    """For another account (site admin) or an organisation (its owners)."""
    owner = call.state.find_user(call.request.match_info.get("username") or call.request.match_info.get("org", ""))
    if owner is None:
        raise call.acts.not_found()
    if not call.user.is_admin and call.user.id not in owner.owners:
        raise RefusedError(403, "user should be an owner of the organization")
    return await _create(call, owner)


async def get_repo(call: Call) -> Reply:
    return Reply(call.shapes.repo(call.repo, call.user_or_none))


async def get_by_id(call: Call) -> Reply:
    repo = call.state.repos.get(call.number("id"))
    if repo is None or not call.state.may(repo, call.user_or_none, "read"):
        raise call.acts.not_found()
    return Reply(call.shapes.repo(repo, call.user_or_none))


async def edit_repo(call: Call) -> Reply:
    """Rename, archive, privacy, description, default branch. Sends no delivery."""
    call.need("admin", "user should be an admin of a repo")
    repo = call.repo
    name = call.text("name")
    if name and name != repo.name:
        try:
            call.state.rename_repo(repo, name)
        except ValueError as error:
            raise RefusedError(422, str(error)) from error
    repo.archived = bool(call.body.get("archived", repo.archived))
    repo.private = bool(call.body.get("private", repo.private))
    repo.has_pulls = bool(call.body.get("has_pull_requests", repo.has_pulls))
    repo.description = call.text("description", repo.description)
    repo.default_branch = call.text("default_branch", repo.default_branch)
    return Reply(call.shapes.repo(repo, call.user))


async def delete_repo(call: Call) -> Reply:
    if not call.state.may(call.repo, call.user, "owner"):
        raise RefusedError(403, "user should be an owner of the repo")
    await call.acts.delete_repo(call.actor, call.repo)
    return Reply(status=204)


async def fork_repo(call: Call) -> Reply:
    return Reply(call.shapes.repo(await call.acts.fork(call.actor, call.repo, call.text("name")), call.user), 202)


async def own_repos(call: Call) -> Reply:
    def mine(repo: Repo) -> bool:
        user, owner = call.user, call.state.by_id(repo.owner_id)
        return owner.id == user.id or user.id in owner.owners or user.id in repo.collaborators

    found = [r for r in call.state.repos.values() if mine(r)]
    return call.listed(found, lambda r: call.shapes.repo(r, call.user), links=True)


async def search_repos(call: Call) -> Reply:
    word = call.query("q").lower()
    found = [r for r in call.state.repos.values() if word in r.name.lower() and call.state.may(r, call.user_or_none, "read")]
    data = [call.shapes.repo(r, call.user_or_none) for r in call.page(found)]
    return Reply({"ok": True, "data": data}, total=len(found), links=True)


# people


def _account(call: Call, *, unknown: int) -> User:
    login = call.var("collaborator")
    user = call.state.find_user(login)
    if user is None:
        raise RefusedError(unknown, f"user does not exist [uid: 0, name: {login}]")
    return user


async def list_collaborators(call: Call) -> Reply:
    found = [call.state.by_id(i) for i in call.repo.collaborators]
    return call.listed(found, lambda u: call.shapes.user(u, call.user))


async def is_collaborator(call: Call) -> Reply:
    if _account(call, unknown=422).id not in call.repo.collaborators:
        raise call.acts.not_found()
    return Reply(status=204)


async def set_collaborator(call: Call) -> Reply:
    call.need("admin", "user should be an admin of a repo")
    user = _account(call, unknown=422)
    words: dict[str, Level] = {"read": "read", "write": "write", "admin": "admin"}
    word = call.text("permission", "write")
    if word not in words:
        raise RefusedError(422, "[Permission]: invalid")
    call.acts.set_collaborator(call.repo, user, "none" if call.request.method == "DELETE" else words[word])
    return Reply(status=204)


async def permission(call: Call) -> Reply:
    """Repository and site admins may ask about anybody, others about themselves only, and not even that on 1.22."""
    login = call.var("collaborator")
    own = login.lower() == call.user.login.lower() and not call.state.old
    if not own and not call.state.may(call.repo, call.user, "admin"):
        raise RefusedError(
            403,
            "Only admins can query all permissions, repo admins can query all repo permissions, collaborators can query only their own",
        )
    user = _account(call, unknown=404)
    level = call.state.level(call.repo, user)
    return Reply({"permission": level, "role_name": level, "user": call.shapes.user(user, call.user)})


async def assignees(call: Call) -> Reply:
    ids = dict.fromkeys([*call.repo.collaborators, call.repo.owner_id])
    people = [call.state.by_id(i) for i in ids]
    return Reply([call.shapes.user(u, call.user_or_none) for u in people if not u.is_org])


# branches and files


async def list_branches(call: Call) -> Reply:
    names = sorted(ref.removeprefix("refs/heads/") for ref in call.repo.refs if ref.startswith("refs/heads/"))
    shown = [
        call.shapes.branch(call.repo, name, await call.acts.commit(call.repo, call.repo.refs[f"refs/heads/{name}"]))
        for name in call.page(names)
    ]
    return Reply(shown, total=len(names), links=not call.state.old)


async def _branch(call: Call, name: str) -> Json:
    sha = call.repo.refs.get(f"refs/heads/{name}")
    if sha is None:
        raise call.acts.not_found()
    return call.shapes.branch(call.repo, name, await call.acts.commit(call.repo, sha))


async def get_branch(call: Call) -> Reply:
    return Reply(await _branch(call, call.var("branch")))


async def create_branch(call: Call) -> Reply:
    call.need("write")
    name = call.text("new_branch_name")
    await call.acts.create_branch(call.actor, call.repo, name, call.text("old_ref_name") or call.text("old_branch_name"))
    return Reply(await _branch(call, name), 201)


async def delete_branch(call: Call) -> Reply:
    call.need("write")
    await call.acts.delete_branch(call.actor, call.repo, call.var("branch"))
    return Reply(status=204)


async def list_refs(call: Call) -> Reply:
    """The references whose names begin as the path says, in one list without pages; 404 where there is none, as seen on 1.26.3."""
    wanted = f"refs/{call.var('ref')}"
    found = {ref: sha for ref, sha in sorted(call.repo.refs.items()) if ref.startswith(wanted)}
    if not found:
        raise call.acts.not_found()
    git = f"{call.shapes.api}/repos/{call.state.full_name(call.repo)}/git"
    return Reply(
        [
            {"ref": ref, "url": f"{git}/{ref}", "object": {"type": "commit", "sha": sha, "url": f"{git}/commits/{sha}"}}
            for ref, sha in found.items()
        ]
    )


def _protection(call: Call, name: str) -> Json:
    lists = (
        "push_whitelist_usernames",
        "push_whitelist_teams",
        "merge_whitelist_usernames",
        "merge_whitelist_teams",
        "status_check_contexts",
        "approvals_whitelist_username",
        "approvals_whitelist_teams",
    )
    now = stamp(call.state.now())
    return {
        "branch_name": name,
        "rule_name": name,
        "enable_push": False,
        "enable_push_whitelist": False,
        "required_approvals": 0,
        **{key: [] for key in lists},
        "created_at": now,
        "updated_at": now,
    }


async def protect(call: Call) -> Reply:
    """Protects one branch against every push; patterns and allow-lists are not modelled."""
    call.need("admin", "user should be an admin of a repo")
    name = call.text("rule_name") or call.text("branch_name")
    if not name:
        raise RefusedError(422, "[RuleName]: Required")
    call.repo.protected.add(name)
    return Reply(_protection(call, name), 201)


async def list_protections(call: Call) -> Reply:
    call.need("admin", "user should be an admin of a repo")
    return Reply([_protection(call, name) for name in sorted(call.repo.protected)])


def _ref(call: Call) -> str:
    return call.query("ref") or call.repo.default_branch


async def _content(call: Call, path: str, ref: str) -> Json | list[Json]:
    full = call.state.full_name(call.repo)
    sha = await call.acts.threads.run(gitio.resolve, call.repo.path, ref)
    if not sha:
        raise call.acts.not_found()
    parent = path.rpartition("/")[0]
    listed = await call.acts.threads.run(gitio.tree, call.repo.path, sha, parent)
    found = next((e for e in listed or [] if e[4] == path), None)
    if path and found is None:
        raise call.acts.not_found()

    def shape(entry: tuple[str, str, str, int, str], content: bytes | None) -> Json:
        _, kind, blob, size, where = entry
        api = f"{call.shapes.api}/repos/{full}/contents/{where}?ref={ref}"
        html = f"{call.shapes.html}/{full}/src/branch/{ref}/{where}"
        git = f"{call.shapes.api}/repos/{full}/git/{'trees' if kind == 'tree' else 'blobs'}/{blob}"
        return {
            "name": where.rpartition("/")[2],
            "path": where,
            "sha": blob,
            "last_commit_sha": sha,
            "type": {"tree": "dir", "blob": "file"}.get(kind, kind),
            "size": size,
            "encoding": None if content is None else "base64",
            "content": None if content is None else base64.b64encode(content).decode(),
            "target": None,
            "url": api,
            "html_url": html,
            "git_url": git,
            "download_url": f"{call.shapes.html}/{full}/raw/branch/{ref}/{where}" if kind == "blob" else None,
            "submodule_git_url": None,
            "_links": {"self": api, "git": git, "html": html},
        }

    if found is not None and found[1] == "blob":
        return shape(found, await call.acts.threads.run(gitio.read, call.repo.path, sha, path))
    folder = await call.acts.threads.run(gitio.tree, call.repo.path, sha, path)
    return [shape(entry, None) for entry in folder or []]


async def get_contents(call: Call) -> Reply:
    return Reply(await _content(call, call.request.match_info.get("filepath", "").strip("/"), _ref(call)))


async def get_raw(call: Call) -> Reply:
    content = await call.acts.threads.run(gitio.read, call.repo.path, _ref(call), call.var("filepath"))
    if content is None:
        raise call.acts.not_found()
    return Reply(raw=content)


async def write_file(call: Call) -> Reply:
    """Create (POST), create or update (PUT) or delete one file: a commit by the caller, with all that a push causes."""
    call.need("write")
    path, method = call.var("filepath"), call.request.method
    branch = call.text("branch") or call.repo.default_branch
    target = call.text("new_branch") or branch
    exists = not call.repo.empty and await call.acts.threads.run(gitio.read, call.repo.path, branch, path) is not None
    if exists and method == "POST":
        raise RefusedError(422, f"repository file already exists [path: {path}]")
    if not exists and (method == "DELETE" or call.text("sha")):
        raise call.acts.not_found()
    try:
        content = None if method == "DELETE" else base64.b64decode(call.text("content"), validate=True)
    except binascii.Error as error:
        raise RefusedError(422, f"illegal base64 data: {error}") from error
    verb = "Delete" if content is None else "Update" if exists else "Add"
    sha = await call.acts.push_files(
        call.actor,
        call.repo,
        branch=target,
        from_branch=branch,
        files={path: content},
        message=call.text("message") or f"{verb} {path}\n",
    )
    commit = await call.acts.commit(call.repo, sha)
    full, root = call.state.full_name(call.repo), call.site.root_url
    verification = {"verified": False, "reason": "gpg.error.not_signed_commit", "signature": "", "signer": None, "payload": ""}
    shown: Json = {
        "content": None if content is None else await _content(call, path, target),
        "commit": {
            "url": f"{call.shapes.api}/repos/{full}/git/commits/{sha}",
            "sha": sha,
            "created": stamp(commit.committer.when),
            "html_url": f"{root}/{full}/commit/{sha}",
            "author": {"name": commit.author.name, "email": commit.author.email, "date": stamp(commit.author.when)},
            "committer": {"name": commit.committer.name, "email": commit.committer.email, "date": stamp(commit.committer.when)},
            "parents": [],
            "message": commit.message,
            "tree": None,
        },
        "verification": verification,
    }
    return Reply(shown, 201 if not exists else 200)


async def get_tree(call: Call) -> Reply:
    sha = await call.acts.threads.run(gitio.resolve, call.repo.path, call.var("sha"))
    found = await call.acts.threads.run(gitio.tree, call.repo.path, sha, recursive=bool(call.query("recursive"))) if sha else None
    if found is None:
        raise call.acts.not_found()
    base = f"{call.shapes.api}/repos/{call.state.full_name(call.repo)}/git"
    tree = [
        {"path": p, "mode": mode, "type": kind, "size": size, "sha": blob, "url": f"{base}/{kind}s/{blob}"}
        for mode, kind, blob, size, p in found
    ]
    return Reply(
        {"sha": sha, "url": f"{base}/trees/{sha}", "tree": tree, "truncated": False, "page": 1, "total_count": len(tree)},
        total=len(tree),
    )


# statuses


async def create_status(call: Call) -> Reply:
    call.need("write")
    status = await call.acts.set_status(
        call.actor,
        call.repo,
        sha=call.var("sha"),
        state=call.text("state"),
        context=call.text("context"),
        description=call.text("description"),
        target_url=call.text("target_url"),
    )
    return Reply(call.shapes.status(call.repo, status), 201)


async def _sha(call: Call) -> str:
    sha = await call.acts.threads.run(gitio.resolve, call.repo.path, call.var("ref"))
    if not sha:
        raise call.acts.not_found()
    return sha


async def combined_status(call: Call) -> Reply:
    """Pages its `statuses`; the state and the count are of all."""
    sha = await _sha(call)
    found = call.state.combined(call.repo, sha)
    shown = call.shapes.combined(call.repo, sha, found)
    if shown["statuses"]:
        shown["statuses"] = call.page(shown["statuses"]) or None
    return Reply(shown, total=None if call.state.old and not found else len(found))


async def list_statuses(call: Call) -> Reply:
    sha = await _sha(call)
    found = [s for s in reversed(call.repo.statuses) if s.sha == sha]
    return call.listed(found, lambda s: call.shapes.status(call.repo, s))


async def action_runs(call: Call) -> Reply:
    """No runner lives here: the list is there, and empty."""
    del call
    return Reply({"workflow_runs": [], "total_count": 0}, total=0)


# hooks


def _target(call: Call) -> tuple[HookLevel, int]:
    """Level and owner of the hooks a path is about, after the check that the caller may manage them."""
    path = call.request.path
    if call.repo_or_none is not None:
        call.need("admin", "user should be an admin of a repo")
        return "repository", call.repo.id
    if "org" in call.request.match_info:
        org = call.state.find_user(call.var("org"))
        if org is None or (call.user.id not in org.owners and not call.user.is_admin):
            raise call.acts.not_found() if org is None else RefusedError(403, "Must be an organization owner")
        return "organization", org.id
    if "/admin/" in path:
        if not call.user.is_admin:
            raise RefusedError(403, "user should be the site admin")
        return "system", 0
    return "user", call.user.id


def _hooks(call: Call) -> list[Hook]:
    level, owner = _target(call)
    return [h for h in call.state.hooks.values() if h.level == level and h.owner == owner]


def _hook(call: Call) -> Hook:
    hook = next((h for h in _hooks(call) if h.id == call.number("id")), None)
    if hook is None:
        raise call.acts.not_found()
    return hook


async def list_hooks(call: Call) -> Reply:
    return call.listed(_hooks(call), call.shapes.hook)


async def get_hook(call: Call) -> Reply:
    return Reply(call.shapes.hook(_hook(call)))


def _events(call: Call) -> set[str]:
    return precise([str(e) for e in call.body.get("events") or []], old=call.state.old)


async def create_hook(call: Call) -> Reply:
    """`active` is false unless said, no `events` means push, unknown names vanish."""
    level, owner = _target(call)
    if call.text("type") not in {"gitea", "gogs", "slack", "discord"}:
        raise RefusedError(422, f"Invalid hook type: {call.text('type')}")
    config = call.body.get("config") or {}
    for name in ("url", "content_type"):
        if name not in config:
            raise RefusedError(422, f"Missing config option: {name}")
    if config["content_type"] not in {"json", "form"}:
        raise RefusedError(422, "Invalid content type")
    if not str(config["url"]).startswith(("http://", "https://")):
        raise RefusedError(422, "Invalid url")
    now = call.state.now()
    hook = Hook(
        id=call.state.next_id("hook"),
        url=str(config["url"]),
        content_type=str(config["content_type"]),
        secret=str(config.get("secret") or ""),
        events=_events(call),
        active=bool(call.body.get("active", False)),
        created=now,
        updated=now,
        branch_filter=call.text("branch_filter"),
        authorization=call.text("authorization_header"),
        level=level,
        owner=owner,
    )
    call.state.hooks[hook.id] = hook
    return Reply(call.shapes.hook(hook), 201)


async def edit_hook(call: Call) -> Reply:
    """PATCH resets: events to push, filter and header to nothing unless sent; the secret cannot be changed."""
    hook = _hook(call)
    config = call.body.get("config") or {}
    hook.url = str(config.get("url", hook.url))
    hook.content_type = str(config.get("content_type", hook.content_type))
    hook.events = _events(call)
    hook.branch_filter, hook.authorization = call.text("branch_filter"), call.text("authorization_header")
    hook.active = bool(call.body.get("active", hook.active))
    hook.updated = call.state.now()
    return Reply(call.shapes.hook(hook))


async def delete_hook(call: Call) -> Reply:
    del call.state.hooks[_hook(call).id]
    return Reply(status=204)


async def test_hook(call: Call) -> Reply:
    await call.acts.test_hook(call.actor, call.repo, _hook(call))
    return Reply(status=204)


_REPO = "/repos/{owner}/{repo}"


def _hook_routes(base: str, scopes: tuple[str, ...]) -> tuple[Route, ...]:
    return (
        Route("GET", f"{base}/hooks", list_hooks, scopes, signed=True),
        Route("POST", f"{base}/hooks", create_hook, scopes),
        Route("GET", f"{base}/hooks/{{id}}", get_hook, scopes, signed=True),
        Route("PATCH", f"{base}/hooks/{{id}}", edit_hook, scopes),
        Route("DELETE", f"{base}/hooks/{{id}}", delete_hook, scopes),
    )


ROUTES = (
    Route("GET", "/user/repos", own_repos, ("user", "repository"), signed=True),
    Route("POST", "/user/repos", create_own, ("user", "repository")),
    Route("POST", "/admin/users/{username}/repos", create_for, ("admin",)),
    Route("POST", "/orgs/{org}/repos", create_for, ("organization", "repository")),
    Route("GET", "/repositories/{id}", get_by_id),
    Route("GET", "/repos/search", search_repos),
    Route("GET", _REPO, get_repo),
    Route("PATCH", _REPO, edit_repo),
    Route("DELETE", _REPO, delete_repo),
    Route("POST", f"{_REPO}/forks", fork_repo),
    Route("GET", f"{_REPO}/collaborators", list_collaborators, signed=True),
    Route("GET", f"{_REPO}/collaborators/{{collaborator}}", is_collaborator, signed=True),
    Route("PUT", f"{_REPO}/collaborators/{{collaborator}}", set_collaborator),
    Route("DELETE", f"{_REPO}/collaborators/{{collaborator}}", set_collaborator),
    Route("GET", f"{_REPO}/collaborators/{{collaborator}}/permission", permission, signed=True),
    Route("GET", f"{_REPO}/assignees", assignees),
    Route("GET", f"{_REPO}/branches", list_branches),
    Route("POST", f"{_REPO}/branches", create_branch),
    Route("GET", f"{_REPO}/branches/{{branch}}", get_branch),
    Route("DELETE", f"{_REPO}/branches/{{branch}}", delete_branch),
    Route("GET", f"{_REPO}/git/refs/{{ref}}", list_refs),
    Route("GET", f"{_REPO}/branch_protections", list_protections, signed=True),
    Route("POST", f"{_REPO}/branch_protections", protect),
    Route("GET", f"{_REPO}/contents", get_contents),
    Route("GET", f"{_REPO}/contents/{{filepath}}", get_contents),
    Route("POST", f"{_REPO}/contents/{{filepath}}", write_file),
    Route("PUT", f"{_REPO}/contents/{{filepath}}", write_file),
    Route("DELETE", f"{_REPO}/contents/{{filepath}}", write_file),
    Route("GET", f"{_REPO}/raw/{{filepath}}", get_raw),
    Route("GET", f"{_REPO}/git/trees/{{sha}}", get_tree),
    Route("POST", f"{_REPO}/statuses/{{sha}}", create_status),
    Route("GET", f"{_REPO}/commits/{{ref}}/status", combined_status),
    Route("GET", f"{_REPO}/commits/{{ref}}/statuses", list_statuses),
    Route("GET", f"{_REPO}/actions/runs", action_runs, signed=True, new_only=True),
    Route("POST", f"{_REPO}/hooks/{{id}}/tests", test_hook),
    *_hook_routes(_REPO, ("repository",)),
    *_hook_routes("/orgs/{org}", ("organization",)),
    *_hook_routes("/user", ("user",)),
    *_hook_routes("/admin", ("admin",)),
)
