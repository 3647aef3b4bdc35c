"""Who is calling: tokens by header or by Basic, passwords by Basic, scopes of tokens; the texts are those of the recordings."""

from __future__ import annotations

import base64
import binascii
import hmac
from dataclasses import dataclass

from bot.demo.forge.state import State, Token, User


class BadCredentialsError(Exception):
    """A credential was given and is wrong; the text is what Gitea answers with 401."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Nobody, a user by password (no token, so no scopes), or a user by token."""

    user: User | None = None
    token: Token | None = None


def identify(state: State, header: str) -> Identity:
    """Read an Authorization header: `token T`, `Bearer T`, or Basic with a password or a token on either side."""
    if not header:
        return Identity()
    kind, _, rest = header.partition(" ")
    if kind.lower() in {"token", "bearer"}:
        return _by_token(state, rest.strip())
    if kind.lower() != "basic":
        raise _wrong(state)
    try:
        name, _, secret = base64.b64decode(rest, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError) as error:
        raise _wrong(state) from error
    for candidate in (secret, name):
        if candidate in state.tokens:
            return _by_token(state, candidate)
    user = state.find_user(name)
    if user is None or user.is_org or not hmac.compare_digest(user.password.encode(), secret.encode()):
        raise _wrong(state)
    return Identity(user)


def _by_token(state: State, value: str) -> Identity:
    token = state.tokens.get(value)
    if token is None:
        raise _wrong(state)
    return Identity(state.by_id(token.user_id), token)


def _wrong(state: State) -> BadCredentialsError:
    return BadCredentialsError("user does not exist [uid: 0, name: ]" if state.old else "invalid username, password or token")


def scope_error(state: State, token: Token | None, categories: tuple[str, ...], *, write: bool) -> str:
    """Empty when the token may, else the text of the 403. Every category is needed."""
    if token is None or not categories or all(token.allows(c, write=write) for c in categories):
        return ""
    needed = ", ".join(f"{'write' if write else 'read'}:{c}" for c in categories)
    if state.old:
        return f"token does not have at least one of required scope(s): [{needed}]"
    return f"token does not have at least one of required scope(s), required=[{needed}], token scope={','.join(token.scopes)}"
