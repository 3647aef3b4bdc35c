"""The account may do in each repository what the bot needs, and cannot do what it must not."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from bot.doctor import Check, Patient, Probe, explain, fail, ok, refused, warn
from bot.gitea.errors import Forbidden, ForgeError, RateLimited, Unauthorized, Unavailable
from bot.gitea.forge import REPO, Forge


async def run(patient: Patient) -> AsyncIterator[Probe]:
    """Every configured repository."""
    for settings in patient.settings.repositories:
        listed = bool(settings.allow_users or patient.settings.allow_users)
        async for probe in repository(patient.forge, settings.name, listed=listed, base=settings.base_branch):
            yield probe


async def repository(forge: Forge, full_name: str, *, listed: bool = False, base: str = "") -> AsyncIterator[Probe]:
    """Access, scopes and branches of one repository; `listed` says that users are allowed by name where permissions cannot be asked."""
    owner, _, name = full_name.partition("/")
    try:
        record = await forge.repo(owner, name)
    except ForgeError as error:
        yield refused(full_name, error)
        return
    if str(record.get("full_name", "")).casefold() != full_name.casefold():
        new = record.get("full_name")
        yield fail(full_name, f"the repository is called '{new}' now", f"write {new} into dispatch.yml")
        return
    for probe in _condition(record, full_name):
        yield probe
    for probe in _access(record, full_name, listed=listed):
        yield probe
    yield await scopes(forge, full_name, admin=bool((record.get("permissions") or {}).get("admin")))
    async for probe in _branches(forge, record, full_name, base=base):
        yield probe


def _condition(record: dict[str, Any], full_name: str) -> list[Probe]:
    found = []
    if record.get("archived"):
        found.append(
            fail(full_name, "the repository is archived and takes no pull request", "unarchive it, or take it out of dispatch.yml")
        )
    if record.get("mirror"):
        found.append(fail(full_name, "the repository is a mirror and takes no push", "take it out of dispatch.yml"))
    if record.get("has_issues") is False:
        found.append(fail(full_name, "issues are switched off", "switch them on in the repository's settings"))
    if record.get("has_pull_requests") is False:
        found.append(fail(full_name, "pull requests are switched off", "switch them on in the repository's settings"))
    if record.get("empty"):
        found.append(warn(full_name, "the repository is empty: there is nothing to work on yet", "push a first commit"))
    return found


def _access(record: dict[str, Any], full_name: str, *, listed: bool) -> list[Probe]:
    permissions = record.get("permissions") or {}
    if not permissions.get("push"):
        return [fail(full_name, "the bot cannot push", "make its account a collaborator with administrator rights")]
    if permissions.get("admin"):
        return [ok(full_name, "administrator rights")]
    detail = "the bot is no administrator, so Gitea does not tell it who may write"
    remedy = "make its account an administrator of the repository"
    if listed:
        return [warn(full_name, f"{detail}; only the users in `allow_users` can trigger", remedy)]
    return [fail(full_name, f"{detail}: everybody would be refused", f"{remedy}, or list people in `allow_users`")]


async def scopes(forge: Forge, full_name: str, *, admin: bool) -> Probe:
    """Proves the token's scopes by calls that change nothing: they take away a label and a hook that cannot exist."""
    owner, _, name = full_name.partition("/")
    routes = {"write:issue": REPO + "/labels/{id}", **({"write:repository": REPO + "/hooks/{id}"} if admin else {})}
    for scope, route in routes.items():
        try:
            await forge.api.delete(route, owner=owner, repo=name, id=0)
        except (Unauthorized, Unavailable, RateLimited) as error:
            return refused(f"{full_name} scopes", error)
        except Forbidden as error:
            return fail(f"{full_name} scopes", f"{scope} is missing: {error.message or 'refused'}", explain(error)[1])
        except ForgeError:
            continue  # refused for another reason than the token: the scope is there
    return ok(f"{full_name} scopes", " and ".join(routes))


async def _branches(forge: Forge, record: dict[str, Any], full_name: str, *, base: str) -> AsyncIterator[Probe]:
    if record.get("empty"):
        return
    branch = base or str(record.get("default_branch", ""))
    found = await forge.branch(full_name, branch)
    if found is None:
        yield fail(full_name, f"there is no branch '{branch}'", "mend `base_branch` in dispatch.yml")
    elif not found.get("protected"):
        yield warn(
            f"{full_name} branch",
            f"'{branch}' is not protected: only the bot's own manners keep it from pushing there",
            "protect it in Settings, Branches, and leave the bot out of those who may push",
        )
    elif found.get("user_can_push"):
        yield warn(f"{full_name} branch", f"the bot may push to the protected branch '{branch}'", "take it off the branch's push list")
    else:
        yield ok(f"{full_name} branch", f"'{branch}' is protected")
    if await forge.branch(full_name, "dispatch") is not None:
        yield fail(
            f"{full_name} branch",
            "a branch is called `dispatch`, so git refuses every `dispatch/issue-N`",
            "rename that branch",
        )


plugin = Check("rights", run, forge=True, rank=20)
