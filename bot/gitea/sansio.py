"""Everything about Gitea's wire that needs no I/O: what a delivery must prove, what a request carries, what a reply means."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NoReturn
from urllib.parse import quote, urlencode, urljoin, urlsplit

from bot.gitea import errors, shapes

API_PATH = "/api/v1"
MAX_REPLY = 16 * 1024 * 1024
MAX_MESSAGE = 200
REDIRECTS = frozenset({301, 302, 303, 307, 308})
SUCCESSES = frozenset({200, 201, 202, 204, 205})
DELAY_BASE = 0.5
DELAY_CAP = 20.0

_SIGNATURES = (("X-Gitea-Signature", ""), ("X-Forgejo-Signature", ""), ("X-Hub-Signature-256", "sha256="))
_HEX_MAC = re.compile(r"[0-9a-f]{64}")
_EVENT_TYPE = re.compile(r"[a-z][a-z_]{0,49}")
_DELIVERY_ID = re.compile(r"[0-9A-Za-z-]{1,64}")
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_DOTTED = re.compile(r"(?:^|/)(?:\.|%2e){1,2}(?:/|$)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Event:
    """An authentic delivery.

    `event_type` is precise and the one to route on, `event` coarse and for logs; `delivery` is new with every replay, `digest`
    (SHA-256 of event type, NUL, body, in hex) is not. `action` is None where the event has none. `repo_id`, `full_name`,
    `sender_id` and `sender_login` are None where the payload lacks them (Forgejo's `action_run_*` lacks all four).
    """

    event_type: str
    event: str
    action: str | None
    delivery: str
    is_pull: bool
    repo_id: int | None
    full_name: str | None
    sender_id: int | None
    sender_login: str | None
    data: dict[str, Any] = field(repr=False, compare=False)
    digest: str
    body: bytes = field(repr=False, compare=False)

    @classmethod
    def from_http(
        cls,
        headers: Mapping[str, str],
        body: bytes,
        secrets: Sequence[bytes],
        *,
        insecure: bool = False,
        max_bytes: int | None = None,
    ) -> Event:
        """Verify a request as received, then read it; any of `secrets` may have signed it.

        `headers` may be a multidict: repeated headers are all looked at. `insecure` allows an empty `secrets` and nothing else.
        Raises a `BadDelivery`, whose status is the answer.
        """
        if max_bytes is not None and len(body) > max_bytes:
            raise errors.TooLarge(f"the body exceeds {max_bytes} bytes")
        _require_json(_values(headers, "Content-Type"))
        _verify(headers, body, [secret for secret in secrets if secret], insecure=insecure)
        event_type = _only(headers, "X-Gitea-Event-Type")
        coarse, delivery = _only(headers, "X-Gitea-Event"), _only(headers, "X-Gitea-Delivery")
        return cls.from_stored(event_type, body, event=coarse, delivery=delivery if _DELIVERY_ID.fullmatch(delivery) else "")

    @classmethod
    def from_stored(cls, event_type: str, body: bytes, *, event: str = "", delivery: str = "") -> Event:
        """Read a delivery that was verified before it was stored. Raises `Malformed`."""
        if not _EVENT_TYPE.fullmatch(event_type):
            raise errors.Malformed("the X-Gitea-Event-Type header is missing or no event name")
        data = _parse(body)
        if not shapes.fits(event_type, data):
            raise errors.Malformed(f"the body is not that of the event {event_type}")
        action = data.get("action")
        repository, sender = _object(data, "repository"), _object(data, "sender")
        return cls(
            event_type=event_type,
            event=event if _EVENT_TYPE.fullmatch(event) else "",
            action=action if isinstance(action, str) else None,
            delivery=delivery,
            is_pull=_is_pull(event_type, data),
            repo_id=_number(repository, "id"),
            full_name=_text(repository, "full_name"),
            sender_id=_number(sender, "id"),
            sender_login=_text(sender, "login"),
            data=data,
            digest=hashlib.sha256(event_type.encode() + b"\0" + body).hexdigest(),
            body=body,
        )


def is_test_push(event: Event) -> bool:
    """True for what Gitea sends when a hook is tested: a push that moves nothing."""
    before = event.data.get("before")
    return event.event_type == "push" and isinstance(before, str) and before != "" and before == event.data.get("after")


def _require_json(content_types: Sequence[str]) -> None:
    kinds = {value.partition(";")[0].strip().lower() for value in content_types}
    if kinds == {"application/x-www-form-urlencoded"}:
        raise errors.UnsupportedMedia("form bodies are not accepted: set the webhook's content type to application/json")
    if kinds != {"application/json"}:
        raise errors.UnsupportedMedia("the content type must be application/json")


def _verify(headers: Mapping[str, str], body: bytes, secrets: Sequence[bytes], *, insecure: bool) -> None:
    if not secrets:
        if insecure:
            return
        raise errors.Unsigned("no webhook secret is configured")
    sent = [(value, prefix) for name, prefix in _SIGNATURES for value in _values(headers, name)]
    if all(value in {"", prefix} for value, prefix in sent):
        raise errors.Unsigned("the delivery is not signed: set a secret on the webhook")
    macs = {value.removeprefix(prefix) if value.startswith(prefix) else "" for value, prefix in sent}
    mac = macs.pop()
    if macs or not _HEX_MAC.fullmatch(mac):
        raise errors.BadSignature("the signature headers are malformed or disagree")
    fits = False
    for secret in secrets:
        expected = hmac.new(secret, body, hashlib.sha256).hexdigest()
        fits |= hmac.compare_digest(expected.encode(), mac.encode())
    if not fits:
        raise errors.BadSignature("the signature fits none of the configured secrets")


def _parse(body: bytes) -> dict[str, Any]:
    try:
        data = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise errors.Malformed("the body is not JSON") from None
    if not isinstance(data, dict):
        raise errors.Malformed("the body is no JSON object")
    return data


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _is_pull(event_type: str, data: dict[str, Any]) -> bool:
    if isinstance(data.get("is_pull"), bool):
        return bool(data["is_pull"])
    return event_type.startswith("pull_request") or _object(data, "issue").get("pull_request") is not None


def _values(headers: Mapping[str, str], name: str) -> list[str]:
    return [value for key, value in headers.items() if key.lower() == name.lower()]


def header(headers: Mapping[str, str], name: str) -> str:
    """The first value of a header, whatever its case; "" without one."""
    return next(iter(_values(headers, name)), "")


def _only(headers: Mapping[str, str], name: str) -> str:
    values = set(_values(headers, name))
    if len(values) > 1:
        raise errors.Malformed(f"the header {name} is given twice with different values")
    return values.pop() if values else ""


def _object(data: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = data.get(key)
    return value if isinstance(value, dict) else {}


def _number(data: Mapping[str, Any], key: str) -> int | None:
    value = data.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _text(data: Mapping[str, Any], key: str) -> str | None:
    value = data.get(key)
    return value if isinstance(value, str) else None


def base_url(address: str) -> str:
    """The configured address of the server without trailing slash or `/api/v1`; its sub-path is kept. Raises `ValueError`."""
    parts = urlsplit(address.strip())
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError("the address of the forge must begin with http:// or https:// and name a host")
    if parts.username is not None or parts.query or parts.fragment:
        raise ValueError("the address of the forge must hold no user, password, query or fragment")
    path = parts.path.rstrip("/").removesuffix(API_PATH).rstrip("/")
    if _DOTTED.search(path):
        raise ValueError("the path of the forge's address must hold no dot segments")
    return f"{parts.scheme}://{parts.netloc}{path}"


def within(base: str, address: str) -> bool:
    """True where an absolute address has the scheme, host, port and sub-path of `base`, so that the token may go there."""
    try:
        home, there = urlsplit(base), urlsplit(address)
        same = _origin(home.scheme, home.hostname, home.port) == _origin(there.scheme, there.hostname, there.port)
    except ValueError:
        return False
    clean = there.username is None and "\\" not in address and not _DOTTED.search(there.path)
    return same and clean and f"{there.path}/".startswith(f"{home.path}/")


def _origin(scheme: str, host: str | None, port: int | None) -> tuple[str, str, int]:
    return scheme, (host or "").lower(), port or {"http": 80, "https": 443}.get(scheme, 0)


def expand(template: str, /, **variables: str | int) -> str:
    """Fill `{name}` in a URL template, each value escaped as one path part (`dispatch%2Fissue-7`).

    Raises `ValueError` for a missing or unused variable, and for values that a path would swallow: "", "." and "..".
    """
    names = set(_PLACEHOLDER.findall(template))
    if names != set(variables):
        raise ValueError(f"{template} takes the variables {sorted(names)}, not {sorted(variables)}")

    def escaped(match: re.Match[str]) -> str:
        value = str(variables[match[1]])
        if value in {"", ".", ".."}:
            raise ValueError(f"{value!r} cannot be the {match[1]} in {template}")
        return quote(value, safe="")

    return _PLACEHOLDER.sub(escaped, template)


def with_query(url: str, params: Mapping[str, object] | None) -> str:
    """Append parameters the way Gitea reads them: None left out, booleans in lower case, lists joined by commas, times in UTC."""
    pairs = [(key, _parameter(value)) for key, value in (params or {}).items() if value is not None]
    if not pairs:
        return url
    return f"{url}{'&' if '?' in url else '?'}{urlencode(pairs, quote_via=quote)}"


def _parameter(value: object) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case datetime():
            return timestamp(value)
        case list() | tuple():
            return ",".join(_parameter(item) for item in value)
        case _:
            return str(value)


def timestamp(moment: datetime) -> str:
    """RFC 3339 in UTC with `Z`, whole seconds, rounded down; a naive time raises `ValueError`."""
    if moment.tzinfo is None:
        raise ValueError("a time for the forge needs a time zone")
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class RequestHeaders(Mapping[str, str]):
    """Headers of one request; their repr does not show the credential, so that a traceback with locals does not either."""

    __slots__ = ("_fields",)

    def __init__(self, fields: Mapping[str, str]) -> None:
        self._fields = dict(fields)

    def __getitem__(self, name: str) -> str:
        return self._fields[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def __repr__(self) -> str:
        return f"RequestHeaders({', '.join(self._fields)})"


def prepare(token: str, user_agent: str, data: object = None) -> tuple[RequestHeaders, bytes]:
    """Headers and body of a request; without `data` the body is empty. Raises `ValueError` for a token no header can carry."""
    if not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError("the forge token holds characters that no header can carry")
    fields = {"Accept": "application/json", "User-Agent": user_agent}
    if token:
        fields["Authorization"] = f"token {token}"
    if data is None:
        return RequestHeaders(fields), b""
    return RequestHeaders({**fields, "Content-Type": "application/json"}), json.dumps(data).encode()


def follow(base: str, url: str, status: int, headers: Mapping[str, str]) -> str | None:
    """Where a redirected GET goes on, None where it must not: no redirect, or one that leaves `base`.

    A query that the server forgot is kept, or a list would silently fall back to its first page.
    """
    location = header(headers, "Location")
    if status not in REDIRECTS or not location:
        return None
    try:
        target = urljoin(url, location)
    except ValueError:
        return None
    query = urlsplit(url).query
    if query and "?" not in target:
        target = f"{target.partition('#')[0]}?{query}"
    return target if within(base, target) else None


_ERRORS: dict[int, type[errors.ForgeError]] = {
    401: errors.Unauthorized,
    403: errors.Forbidden,
    404: errors.NotFound,
    408: errors.Unavailable,
    409: errors.Conflict,
    410: errors.NotFound,
    412: errors.PreconditionFailed,
    423: errors.Archived,
    429: errors.RateLimited,
} | dict.fromkeys(REDIRECTS, errors.Moved)


def decode(status: int, headers: Mapping[str, str], body: bytes, *, method: str = "GET", route: str = "", now: float = 0.0) -> Any:
    """The JSON of a successful reply, None for an empty one; any other reply raises the `ForgeError` that fits.

    `now` is Unix time, for a `Retry-After` that is a date. A GET answered 200 without a body is a `BadReply`: it was cut off.
    """
    if status in SUCCESSES:
        return _decode_success(status, headers, body, method=method, route=route)
    by_class = {4: errors.Invalid, 5: errors.Unavailable}.get(status // 100, errors.BadReply)
    message = "moved" if status in REDIRECTS else _message(headers, body)
    error = _ERRORS.get(status, by_class)(message, status=status, method=method, route=route, headers=headers)
    if isinstance(error, errors.Moved):
        error.location = header(headers, "Location")
    if isinstance(error, errors.RateLimited | errors.Unavailable):
        error.retry_after = retry_after(header(headers, "Retry-After"), now)
    raise error


def _decode_success(status: int, headers: Mapping[str, str], body: bytes, *, method: str, route: str) -> Any:
    if status in {204, 205}:
        return None
    fault = ""
    if not body:
        if method != "GET":
            return None
        fault = "the body is missing"
    elif len(body) > MAX_REPLY:
        fault = f"the body exceeds {MAX_REPLY} bytes"
    elif "html" in header(headers, "Content-Type"):
        fault = f"a web page where JSON was expected: {_excerpt(body)}"
    else:
        try:
            return json.loads(body.decode("utf-8"))
        except (ValueError, RecursionError):
            fault = f"broken JSON: {_excerpt(body)}"
    raise errors.BadReply(fault, status=status, method=method, route=route, headers=headers)


def _message(headers: Mapping[str, str], body: bytes) -> str:
    """The forge's own words: `message` of a JSON object, else the beginning of the text; "" where there are none."""
    if "json" in header(headers, "Content-Type") or body[:1] == b"{":
        try:
            data = json.loads(body[:MAX_REPLY].decode("utf-8"))
        except (ValueError, RecursionError):
            return _excerpt(body)
        message = data.get("message") if isinstance(data, dict) else None
        return _excerpt(message.encode("utf-8", "replace")) if isinstance(message, str) else ""
    return _excerpt(body)


def _excerpt(body: bytes) -> str:
    return " ".join(body[: 4 * MAX_MESSAGE].decode("utf-8", "replace").split())[:MAX_MESSAGE]


def retry_after(value: str, now: float) -> float | None:
    """Seconds to wait, from either form of the header (a number, or a date against Unix time `now`); None where it is neither."""
    value = value.strip()
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        moment = parsedate_to_datetime(value)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    return max(0.0, (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() - now)


def may_repeat(error: errors.ForgeError, *, idempotent: bool) -> bool:
    """Whether the same request may be sent again: it was turned away, never left, or does no harm twice."""
    if isinstance(error, errors.RateLimited):
        return True
    return isinstance(error, errors.Unavailable) and (idempotent or not error.sent)


def in_doubt(error: errors.ForgeError, *, idempotent: bool) -> bool:
    """Whether a request that is not idempotent may have been carried out although it failed."""
    return not idempotent and (isinstance(error, errors.BadReply) or (isinstance(error, errors.Unavailable) and error.sent))


def delay(error: errors.ForgeError, attempt: int, jitter: float) -> float:
    """Seconds to wait after the failed `attempt` (from 1): what the server asked for, else exponential; `jitter` is in [0, 1)."""
    asked = getattr(error, "retry_after", None)
    if isinstance(asked, float):
        return asked
    return jitter * float(min(DELAY_CAP, DELAY_BASE * 2.0**attempt))


def page_items(reply: Any, key: str | None) -> list[Any] | None:
    """The items of one page, of `reply[key]` where lists are wrapped; `null` is an empty page; None where it is no list."""
    if key is not None:
        if not isinstance(reply, dict) or key not in reply:
            return None
        reply = reply[key]
    if reply is None:
        return []
    return reply if isinstance(reply, list) else None


def page_total(reply: Any, headers: Mapping[str, str]) -> int | None:
    """How many items the whole list has: `X-Total-Count`, else `total_count` of a wrapped list; None where neither says."""
    value = header(headers, "X-Total-Count").strip()
    if value.isascii() and value.isdigit() and len(value) < 10:  # noqa: PLR2004
        return int(value)
    return _number(reply, "total_count") if isinstance(reply, dict) else None


def identity(item: Any) -> object:
    """What makes an item of a list the same item on another page: its id, else (reactions have none) its whole content."""
    number = _number(item, "id") if isinstance(item, dict) else None
    return number or json.dumps(item, sort_keys=True)
