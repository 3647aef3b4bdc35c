"""One class per cause, each carrying what a caller decides by; no text here ever holds a token or a URL."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

NO_HEADERS: Mapping[str, str] = MappingProxyType({})


class ForgeError(Exception):
    """The forge refused, failed or could not be reached.

    `status` is the HTTP status or None where there was no answer, `route` the URL template (not the URL), `message` the forge's
    own words, at most a few hundred characters and possibly empty. Survives pickling.
    """

    def __init__(
        self,
        message: str = "",
        *,
        status: int | None = None,
        method: str = "",
        route: str = "",
        headers: Mapping[str, str] = NO_HEADERS,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.method = method
        self.route = route
        self.headers = dict(headers)

    def __str__(self) -> str:
        """`GET /repos/{owner}/{repo}: 404 not found`, leaving out what is unknown."""
        call = " ".join(part for part in (self.method, self.route) if part)
        answer = " ".join(part for part in (str(self.status or ""), self.message) if part) or "no answer"
        return f"{call}: {answer}" if call else answer


class Unauthorized(ForgeError):
    """401: no token, or one the server does not know."""


class Forbidden(ForgeError):
    """403: scope, permission, lock or an account that must change its password; the message may be empty."""


class NotFound(ForgeError):
    """404 or 410: missing, or hidden from this token."""


class Moved(ForgeError):
    """3xx that is not followed; `location` is what the server named, unchecked: resolve by repository id instead."""

    location: str = ""


class Conflict(ForgeError):
    """409: the object exists, or changed since it was read."""


class PreconditionFailed(ForgeError):
    """412: open dependencies, or a pull request that is merged."""


class Invalid(ForgeError):
    """400, 422 and every other 4xx: the request itself is wrong."""


class Archived(ForgeError):
    """423: the repository takes no writes."""


class RateLimited(ForgeError):
    """429; `retry_after` in seconds, None where the server named no time."""

    retry_after: float | None = None


class Unavailable(ForgeError):
    """5xx, 408 or a network failure; `sent` is False when the request certainly never left."""

    retry_after: float | None = None
    sent: bool = True


class BadReply(ForgeError):
    """A success whose body is not what the API promises: HTML, broken, cut off, too large, or of the wrong shape."""


class OutcomeUnknown(ForgeError):
    """A request that creates may or may not have been carried out: look for the object before repeating."""


class ForeignOrigin(ForgeError):
    """The address lies outside the configured server; nothing was sent."""


def is_transient(error: BaseException) -> bool:
    """True where the same question may be answered later: 5xx, network, timeout, 429.

    `OutcomeUnknown` counts too: a look at the forge settles it later. Whoever repeats such a create looks for its object first.
    """
    return isinstance(error, Unavailable | RateLimited | OutcomeUnknown | TimeoutError | ConnectionError)


def may_recover(error: BaseException) -> bool:
    """True where asking again makes sense although the forge did answer: `is_transient`, a token that is renewed, a repository that is found under its
    new name, a maintenance page in place of JSON.
    """
    return is_transient(error) or isinstance(error, Unauthorized | Moved | BadReply)


class NotSent(Exception):
    """An adapter could not open the connection: the request never left, whatever its method."""


class Lost(Exception):
    """An adapter sent the request, or part of it, and got no complete answer."""


class BadDelivery(Exception):
    """A webhook request that is refused: `status` is the answer, `reason` its text (safe to show)."""

    status: ClassVar[int] = 400

    def __init__(self, reason: str = "") -> None:
        super().__init__(reason)
        self.reason = reason


class Unsigned(BadDelivery):
    """No usable signature header at all, or no secret to check one with."""

    status = 401


class BadSignature(BadDelivery):
    """Signatures that are malformed, disagree, or fit none of the secrets."""

    status = 401


class UnsupportedMedia(BadDelivery):
    """Not JSON."""

    status = 415


class TooLarge(BadDelivery):
    """Above the cap of the receiver."""

    status = 413


class Malformed(BadDelivery):
    """Authentic bytes that are no event: no or doubtful type, broken JSON, or a body of another event."""

    status = 400
