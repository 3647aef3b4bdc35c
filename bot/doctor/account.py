"""The server is one we know, and the token belongs to an account made for the bot alone."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Any

from bot.doctor import Check, Patient, Probe, fail, ok, refused, warn
from bot.gitea.errors import ForgeError
from bot.gitea.forge import Forge

OLDEST_GITEA = (1, 22)
OLDEST_FORGEJO = 11
NEVER = ("0001", "1970")


async def run(patient: Patient) -> AsyncIterator[Probe]:
    """The version, then the account."""
    server = await version(patient.forge)
    yield server
    if server.unanswered:
        return
    async for probe in identity(patient.forge, people=(*patient.settings.operators, *patient.settings.allow_users)):
        yield probe


async def version(forge: Forge) -> Probe:
    """Whether the server answers and is one of the versions we know."""
    try:
        text = await forge.version()
    except ForgeError as error:
        return refused("server", error)
    return judge_version(text)


def judge_version(text: str) -> Probe:
    """Reads `1.26.3`, `1.27.0-rc0`, `15.0.3+gitea-1.22.0` and `development`."""
    name = "Forgejo" if "+gitea-" in text else "Gitea"
    numbers = re.match(r"v?(\d+)\.(\d+)", text)
    if numbers is None:
        return warn("server", f"{name} '{text}': an unversioned build", "the bot is tested with Gitea 1.22 to 1.27 and Forgejo 15")
    major, minor = int(numbers[1]), int(numbers[2])
    known = major >= OLDEST_FORGEJO if name == "Forgejo" else (major, minor) >= OLDEST_GITEA
    if not known:
        return fail("server", f"{name} {text} is too old", "upgrade to Gitea 1.22 or later, or Forgejo 11 or later")
    return ok("server", f"{name} {text}")


async def identity(forge: Forge, *, people: tuple[str, ...] = ()) -> AsyncIterator[Probe]:
    """Whose token it is; `people` are logins the settings know as persons."""
    try:
        me = await forge.me()
    except ForgeError as error:
        yield refused("account", error)
        return
    login = str(me.get("login", ""))
    yield ok("account", f"the token belongs to '{login}'")
    if me.get("is_admin"):
        yield warn(
            "account rights",
            f"'{login}' is a site administrator: whoever steals the token owns the server",
            "use an account of its own that is administrator of the bot's repositories only",
        )
    if _looks_like_a_person(me, people):
        yield warn(
            "account owner",
            f"'{login}' seems to be a person's own account, whose comments and labels the bot must ignore as its own",
            "make an account for the bot: gitea admin user create --username timmy --email timmy@example.org "
            "--random-password --must-change-password=false",
        )


def _looks_like_a_person(me: dict[str, Any], people: tuple[str, ...]) -> bool:
    """Bots have never signed in through the web pages."""
    signed_in = not str(me.get("last_login") or "").startswith(NEVER) and bool(me.get("last_login"))
    return signed_in or str(me.get("login", "")).casefold() in {person.casefold() for person in people}


plugin = Check("server and account", run, forge=True, rank=10)
