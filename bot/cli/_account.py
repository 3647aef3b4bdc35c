"""What `init` does with an administrator's token: an account for the bot, its own token, its place in the repositories; the administrator's is not kept."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from pathlib import Path

from bot.config import read_secret
from bot.doctor import explain
from bot.gitea import accounts
from bot.gitea.aiohttp import GiteaClient
from bot.gitea.errors import ForgeError, NotFound
from bot.gitea.forge import REPO, Forge
from bot.models import UserError
from bot.redaction import Secret

SCOPES = ("write:issue", "write:repository", "read:user")
ADMIN_SCOPES = "write:admin,write:repository,read:user"
IMPATIENT = 0.1


async def hire(
    url: str,
    admin_token: Secret,
    *,
    login: str,
    repositories: Sequence[str],
    kept: Path,
    ca_file: Path | None,
    write: Callable[[Path, str], None],
    say: Callable[[str, str], None],
) -> Secret:
    """The token of the account `login`, administrator of the repositories; made where it is missing. `kept` is the file that has its token.

    A second run goes on where the first one stopped. Raises UserError; an account that is there already and whose token is unknown is not touched.
    """
    async with GiteaClient(url, admin_token, ca_file=ca_file, jitter=lambda: IMPATIENT) as client:
        try:
            return await _hire(client, url, login=login, repositories=repositories, kept=kept, ca_file=ca_file, write=write, say=say)
        except ForgeError as error:
            detail, remedy = explain(error)
            raise UserError(f"with the administrator's token: {detail}. Remedy: {remedy}; it needs the scopes {ADMIN_SCOPES}") from None


async def _hire(
    client: GiteaClient,
    url: str,
    *,
    login: str,
    repositories: Sequence[str],
    kept: Path,
    ca_file: Path | None,
    write: Callable[[Path, str], None],
    say: Callable[[str, str], None],
) -> Secret:
    forge = Forge(client)
    me = await forge.me()
    if not me.get("is_admin"):
        raise UserError(
            f"'{me.get('login')}' is no administrator of this server. Remedy: an administrator's token, or the bot's own with --token-file"
        )
    if str(me.get("login", "")).casefold() == login.casefold():
        raise UserError(f"'{login}' is the administrator. Remedy: name another account for the bot with --bot")
    for name in repositories:
        owner, _, repo = name.partition("/")
        try:
            await forge.repo(owner, repo)
        except NotFound:
            raise UserError(f"there is no repository {name}. Remedy: mend --repository; nothing was changed") from None
    token = await _kept_token(url, login, kept, ca_file)
    if token is None:
        token = await _new_account(client, url, login, ca_file)
        write(kept, token.reveal() + "\n")
        say("ok", f"made the account '{login}'; its password was thrown away, its token is in {kept}")
    for name in repositories:
        owner, _, repo = name.partition("/")
        route = REPO + "/collaborators/{login}"
        await client.put(route, {"permission": "admin"}, owner=owner, repo=repo, login=login)
        say("ok", f"'{login}' is an administrator of {name}")
    return token


async def _kept_token(url: str, login: str, kept: Path, ca_file: Path | None) -> Secret | None:
    """The token of an earlier run, where it is that account's."""
    token = _read(kept)
    if token is None:
        return None
    async with GiteaClient(url, token, ca_file=ca_file, jitter=lambda: IMPATIENT) as client:
        try:
            owner = str((await Forge(client).me()).get("login", ""))
        except ForgeError as error:
            raise UserError(
                f"the token in {kept} opens nothing: {explain(error)[0]}. Remedy: put that file away and run this again"
            ) from None
    if owner.casefold() != login.casefold():
        raise UserError(f"the token in {kept} belongs to '{owner}'. Remedy: --bot {owner}, or put that file away")
    return token


def _read(kept: Path) -> Secret | None:
    return read_secret(kept) if kept.exists() else None


async def _new_account(client: GiteaClient, url: str, login: str, ca_file: Path | None) -> Secret:
    try:
        await client.getitem("/users/{login}", login=login)
    except NotFound:
        pass
    else:
        raise UserError(f"there is an account '{login}' already. Remedy: give its token with --token-file, or another name with --bot")
    password = Secret(secrets.token_urlsafe(32))
    await accounts.create(client, login, password, email=f"{login}@noreply.invalid")
    return await accounts.token(url, login, password, name="timmy-dispatch", scopes=SCOPES, ca_file=ca_file)
