"""Accounts as a site administrator makes them; Gitea gives a token only to whoever comes with the account's own password."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from pathlib import Path

import aiohttp
from yarl import URL

from bot.gitea.abc import GiteaAPI
from bot.gitea.errors import ForgeError, NotSent
from bot.redaction import Secret

CREATED = 201
TOTAL_SECONDS = 30.0


async def create(admin: GiteaAPI, login: str, password: Secret, *, email: str) -> int:
    """A user who need not change the password; returns the id. Raises ForgeError (422: the name or address is taken)."""
    data = {"username": login, "password": password.reveal(), "email": email, "must_change_password": False}
    return int((await admin.post("/admin/users", data))["id"])


async def token(url: str, login: str, password: Secret, *, name: str, scopes: Sequence[str], ca_file: Path | None = None) -> Secret:
    """A new access token of that account. Raises ForgeError."""
    route = f"/users/{login}/tokens"
    tls = ssl.create_default_context(cafile=str(ca_file)) if ca_file else True
    auth = aiohttp.encode_basic_auth(login, password.reveal(), encoding="utf-8")
    timeout = aiohttp.ClientTimeout(total=TOTAL_SECONDS)
    try:
        async with (
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=tls), timeout=timeout, headers={"Authorization": auth}) as session,
            session.post(URL(f"{url}/api/v1{route}"), json={"name": name, "scopes": list(scopes)}, allow_redirects=False) as reply,
        ):
            if reply.status != CREATED:
                raise ForgeError((await reply.text())[:200], status=reply.status, method="POST", route=route)
            return Secret(str((await reply.json())["sha1"]))
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise NotSent(f"{type(error).__name__} while a token was asked for") from None
