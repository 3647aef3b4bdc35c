"""Version, settings, accounts, tokens, organisations and notifications."""

from __future__ import annotations

from bot.demo.forge.acts import RefusedError
from bot.demo.forge.api import DEFAULT_PAGE, Call, Reply, Route
from bot.demo.forge.payloads import Json, stamp
from bot.demo.forge.state import ALLOWED_REACTIONS, SCOPE_CATEGORIES, Token, User

VERSIONS = {"1.26": "1.26.3", "1.22": "1.22.6"}


async def version(call: Call) -> Reply:
    return Reply({"version": VERSIONS[call.state.personality]})


async def settings_api(call: Call) -> Reply:
    found: Json = {
        "max_response_items": call.site.page_cap,
        "default_paging_num": DEFAULT_PAGE,
        "default_git_trees_per_page": 1000,
        "default_max_blob_size": 10485760,
    }
    return Reply(found if call.state.old else found | {"default_max_response_size": 104857600})


async def settings_ui(call: Call) -> Reply:
    del call
    emojis = ["git", "gitea", "codeberg", "gitlab", "github", "gogs"]
    return Reply({"default_theme": "gitea-auto", "allowed_reactions": list(ALLOWED_REACTIONS), "custom_emojis": emojis})


# accounts


async def me(call: Call) -> Reply:
    return Reply(call.shapes.user(call.user, call.user))


def _person(call: Call) -> User:
    user = call.state.find_user(call.var("username"))
    if user is None:
        raise RefusedError(404, f"user redirect does not exist [name: {call.var('username')}]")
    return user


async def get_user(call: Call) -> Reply:
    return Reply(call.shapes.user(_person(call), call.user_or_none))


async def search_users(call: Call) -> Reply:
    """By id, or by a part of the name."""
    wanted, part = call.query("uid"), call.query("q").casefold()
    found = [u for u in call.state.users.values() if (str(u.id) == wanted if wanted not in {"", "0"} else part in u.login.casefold())]
    return Reply({"data": [call.shapes.user(user, call.user_or_none) for user in found], "ok": True})


async def user_repos(call: Call) -> Reply:
    owner = _person(call)
    found = [r for r in call.state.repos.values() if r.owner_id == owner.id and call.state.may(r, call.user_or_none, "read")]
    return call.listed(found, lambda r: call.shapes.repo(r, call.user_or_none), links=True)


def _admin(call: Call) -> None:
    if not call.user.is_admin:
        raise RefusedError(403, "user should be the site admin")


async def create_user(call: Call) -> Reply:
    """As in Gitea, an account made here must change its password first unless `must_change_password` is false."""
    _admin(call)
    login, email = call.text("username"), call.text("email")
    if not login or not email:
        raise RefusedError(422, "[Username]: Required" if not login else "[Email]: Required")
    try:
        user = call.state.add_user(login, email=email, password=call.text("password"))
    except ValueError as error:
        raise RefusedError(422, str(error)) from error
    user.must_change_password = bool(call.body.get("must_change_password", True))
    return Reply(call.shapes.user(user, call.user), 201)


async def delete_user(call: Call) -> Reply:
    _admin(call)
    user = _person(call)
    if any(r.owner_id == user.id for r in call.state.repos.values()) and not call.query("purge"):
        raise RefusedError(422, f"user still has ownership of repositories [uid: {user.id}]")
    for repo in [r for r in call.state.repos.values() if r.owner_id == user.id]:
        await call.acts.delete_repo(call.actor, repo)
    for repo in call.state.repos.values():
        repo.collaborators.pop(user.id, None)
    call.state.remove_user(user)
    return Reply(status=204)


async def rename_user(call: Call) -> Reply:
    _admin(call)
    try:
        call.state.rename_user(_person(call), call.text("new_username"))
    except ValueError as error:
        raise RefusedError(422, str(error)) from error
    return Reply(status=204)


async def list_users(call: Call) -> Reply:
    _admin(call)
    people = [u for u in call.state.users.values() if not u.is_org]
    return call.listed(people, lambda u: call.shapes.user(u, call.user), links=True)


# tokens


def _by_password(call: Call) -> User:
    """Tokens are managed with a password only, one's own or, for a site admin, anybody's."""
    if call.token is not None:
        raise RefusedError(401, "auth required")
    user = _person(call)
    if user.id != call.user.id and not call.user.is_admin:
        raise RefusedError(403, "doer should be the site admin or be same as the contextUser")
    return user


def _token(token: Token, *, created: int, secret: bool = False) -> Json:
    return {
        "id": token.id,
        "name": token.name,
        "sha1": token.value if secret else "",
        "token_last_eight": token.value[-8:],
        "scopes": list(token.scopes),
        "created_at": stamp(created),
        "last_used_at": stamp(created),
    }


async def list_tokens(call: Call) -> Reply:
    user = _by_password(call)
    found = [t for t in call.state.tokens.values() if t.user_id == user.id]
    return call.listed(found, lambda t: _token(t, created=user.created))


async def create_token(call: Call) -> Reply:
    user = _by_password(call)
    name, scopes = call.text("name"), [str(s) for s in call.body.get("scopes") or []]
    if not name or any(t.user_id == user.id and t.name == name for t in call.state.tokens.values()):
        raise RefusedError(400, "access token name has been used already" if name else "[Name]: Required")
    known = {"all", "public-only", *(f"{verb}:{c}" for verb in ("read", "write") for c in SCOPE_CATEGORIES)}
    if not scopes or not set(scopes) <= known:
        raise RefusedError(400, "access token must have a scope" if not scopes else "invalid access token scope")
    token = call.state.add_token(user, name=name, scopes=scopes)
    return Reply(_token(token, created=call.state.now(), secret=True), 201)


async def delete_token(call: Call) -> Reply:
    user = _by_password(call)
    wanted = call.var("token")
    token = next((t for t in call.state.tokens.values() if t.user_id == user.id and wanted in {t.name, str(t.id)}), None)
    if token is None:
        raise call.acts.not_found()
    del call.state.tokens[token.value]
    return Reply(status=204)


# organisations


def _org(call: Call) -> User:
    org = call.state.find_user(call.var("org"))
    if org is None or not org.is_org:
        raise call.acts.not_found()
    return org


async def create_org(call: Call) -> Reply:
    try:
        org = call.state.add_user(call.text("username"), is_org=True)
    except ValueError as error:
        raise RefusedError(422, str(error)) from error
    org.owners.add(call.user.id)
    return Reply(call.shapes.organization(org), 201)


async def get_org(call: Call) -> Reply:
    return Reply(call.shapes.organization(_org(call)))


async def org_labels(call: Call) -> Reply:
    return call.listed(_org(call).labels, lambda label: call.shapes.label(None, label))


async def create_org_label(call: Call) -> Reply:
    org = _org(call)
    if call.user.id not in org.owners and not call.user.is_admin:
        raise RefusedError(403, "Must be an organization owner")
    label = call.acts.create_label(
        None,
        call.text("name"),
        color=call.text("color"),
        exclusive=bool(call.body.get("exclusive")),
        text=call.text("description"),
        org=org,
    )
    return Reply(call.shapes.label(None, label), 201)


async def notifications(call: Call) -> Reply:
    """Nobody is notified here: the list is there for its scope check, and empty."""
    del call
    return Reply([], total=0)


ROUTES = (
    Route("GET", "/version", version, ()),
    Route("GET", "/settings/api", settings_api, ()),
    Route("GET", "/settings/ui", settings_ui, ()),
    Route("GET", "/user", me, ("user",), signed=True),
    Route("GET", "/users/search", search_users, ("user",)),
    Route("GET", "/users/{username}", get_user, ("user",)),
    Route("GET", "/users/{username}/repos", user_repos, ("user", "repository")),
    Route("GET", "/users/{username}/tokens", list_tokens, ("user",), signed=True),
    Route("POST", "/users/{username}/tokens", create_token, ("user",)),
    Route("DELETE", "/users/{username}/tokens/{token}", delete_token, ("user",)),
    Route("GET", "/admin/users", list_users, ("admin",), signed=True),
    Route("POST", "/admin/users", create_user, ("admin",)),
    Route("DELETE", "/admin/users/{username}", delete_user, ("admin",)),
    Route("POST", "/admin/users/{username}/rename", rename_user, ("admin",)),
    Route("POST", "/orgs", create_org, ("organization",)),
    Route("GET", "/orgs/{org}", get_org, ("organization",)),
    Route("GET", "/orgs/{org}/labels", org_labels, ("organization",)),
    Route("POST", "/orgs/{org}/labels", create_org_label, ("organization",)),
    Route("GET", "/notifications", notifications, ("notification",), signed=True),
)
