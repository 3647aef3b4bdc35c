"""What a failed model call means and what to do about it: the error table as pure functions of status, text, headers and kind."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from enum import StrEnum
from typing import Final


class ErrorClass(StrEnum):
    """Why a call failed; a closed set, also the metric label `result`."""

    AUTH = "auth"
    BILLING = "billing"
    RATE_LIMIT = "rate_limit"
    OVERLOADED = "overloaded"
    MODEL_GONE = "model_gone"
    BAD_ENDPOINT = "bad_endpoint"
    TIMEOUT = "timeout"
    CONTEXT_OVERFLOW = "context_overflow"
    BAD_REQUEST = "bad_request"
    REFUSED = "refused"
    SERVER = "server"
    GARBAGE = "garbage"
    CUT = "cut"


class Seen(StrEnum):
    """What the client saw: a status, no connection, silence, a broken certificate, nonsense, a cut stream, or an error inside a 200."""

    STATUS = "status"
    CONNECT = "connect"
    TIMEOUT = "timeout"
    TLS = "tls"
    GARBAGE = "garbage"
    CUT = "cut"
    ERROR_BODY = "error_body"
    ERROR_IN_STREAM = "error_in_stream"


@dataclass(frozen=True, slots=True)
class Failure:
    """One failed call. `started` says that a 200 had come, so that the provider may have billed; `received` counts characters of the partial reply."""

    seen: Seen
    status: int = 0
    text: str = ""
    code: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    started: bool = False
    received: int = 0


class After(StrEnum):
    """What a failure does to the entry's health."""

    NOTHING = "nothing"
    COOL = "cool"
    COOL_PROVIDER = "cool_provider"
    DOWN = "down"


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """`delays` are the waits (seconds) before each try again at the same entry; then `after` holds, for `cool_ms`.

    `repair` names the request parameter to change for one immediate try again.
    """

    error: ErrorClass
    delays: tuple[float, ...] = ()
    after: After = After.NOTHING
    cool_ms: int = 0
    repair: str = ""


POLICY: Final = (
    "content policy",
    "content_policy",
    "content filter",
    "content_filter",
    "content management policy",
    "usage policies",
    "safety system",
)
CONTEXT: Final = (
    "context length", "context window", "context size", "context_length", "maximum context", "too many tokens", "token limit", "prompt is too long",
    "input is too long", "reduce the length", "max_model_len", "n_ctx_slot", "maximum number of tokens",
)  # fmt: skip
OVERLOAD: Final = ("overloaded", "at capacity", "over capacity")
CREDIT: Final = (
    "insufficient credits", "insufficient_quota", "credit balance", "payment required", "out of funds", "free tier", "top up",
    "exceeded your current quota", "key limit exceeded", "spending limit",
)  # fmt: skip
MODEL: Final = ("model not found", "model_not_found", "does not exist", "invalid model", "no such model")
LIMIT: Final = ("limit exceeded", "usage limit", "limit reached")
RESET: Final = ("try again", "resets at", "retry", "wait", "window")
UNSUPPORTED: Final = (
    "unsupported parameter",
    "unsupported_parameter",
    "unknown parameter",
    "unrecognized request argument",
    "unsupported value",
)
REPAIRABLE: Final = ("max_tokens", "stream_options")

CODES: Final[Mapping[str, ErrorClass]] = {
    "context_length_exceeded": ErrorClass.CONTEXT_OVERFLOW,
    "insufficient_quota": ErrorClass.BILLING,
    "rate_limit_exceeded": ErrorClass.RATE_LIMIT,
    "rate_limit_error": ErrorClass.RATE_LIMIT,
    "model_not_found": ErrorClass.MODEL_GONE,
    "invalid_api_key": ErrorClass.AUTH,
    "authentication_error": ErrorClass.AUTH,
    "overloaded_error": ErrorClass.OVERLOADED,
    "server_error": ErrorClass.SERVER,
    "internal_error": ErrorClass.SERVER,
    "api_error": ErrorClass.SERVER,
    "invalid_request_error": ErrorClass.BAD_REQUEST,
}

DOUBLING_MS: Final = 30_000
DOUBLING_CAP_MS: Final = 600_000
BILLING_MS: Final = 3_600_000
RATE_LIMIT_MS: Final = 60_000
NOUS_RATE_LIMIT_MS: Final = 300_000
NOUS_UPSTREAM_MS: Final = 30_000
SHORTEST_MS: Final = 1_000
LONGEST_MS: Final = 6 * 3_600_000
# A wait that is not longer than this is spent in place; a longer one is a cool-down.
PATIENCE_MS: Final = 5_000
BACKOFF: Final = (1.0, 2.0, 4.0)

_BUCKETS: Final = ("requests", "requests-1h", "tokens", "tokens-1h")
_BUCKET_RESET_SECONDS: Final = 60.0
_DURATION: Final = re.compile(r"(?:(\d+)h)?(?:(\d+)m(?!s))?(?:(\d+(?:\.\d+)?)s)?(?:(\d+(?:\.\d+)?)ms)?")


def classify(failure: Failure) -> ErrorClass:
    """The class of a failure. Order: content policy, status with its refinements, error code, text."""
    match failure.seen:
        case Seen.CONNECT | Seen.TIMEOUT:
            return ErrorClass.TIMEOUT
        case Seen.TLS:
            return ErrorClass.BAD_ENDPOINT
        case Seen.GARBAGE:
            return ErrorClass.GARBAGE
        case Seen.CUT:
            return ErrorClass.CUT
        case Seen.STATUS | Seen.ERROR_BODY | Seen.ERROR_IN_STREAM:
            pass
    text = f"{failure.text} {failure.code}".lower()
    if _has(text, POLICY):
        return ErrorClass.REFUSED
    status = failure.status if failure.seen is Seen.STATUS else _inner_status(failure.code)
    if status:
        return _by_status(status, text)
    known = CODES.get(failure.code.lower()) or _by_text(text)
    return known or (ErrorClass.GARBAGE if failure.seen is Seen.ERROR_BODY else ErrorClass.CUT)


def _inner_status(code: str) -> int:
    return int(code) if re.fullmatch(r"[345]\d\d", code) else 0


def _by_status(status: int, text: str) -> ErrorClass:
    if status in {400, 422} or status >= 500:  # noqa: PLR2004 - HTTP's own numbers
        if _has(text, UNSUPPORTED):
            return ErrorClass.BAD_REQUEST
        if status in {400, 500, 503} and _has(text, CONTEXT):
            return ErrorClass.CONTEXT_OVERFLOW
    match status:
        case 401:
            return ErrorClass.AUTH
        case 402:
            resets = _has(text, ("usage limit", "quota")) and _has(text, RESET)
            return ErrorClass.RATE_LIMIT if resets else ErrorClass.BILLING
        case 403:
            return ErrorClass.BILLING if _has(text, CREDIT + LIMIT) else ErrorClass.AUTH
        case 404:
            return _credit_or_model(text) or ErrorClass.BAD_ENDPOINT
        case 408:
            return ErrorClass.TIMEOUT
        case 413:
            return ErrorClass.CONTEXT_OVERFLOW
        case 429:
            if "insufficient_quota" in text:
                return ErrorClass.BILLING
            return ErrorClass.OVERLOADED if _has(text, OVERLOAD) else ErrorClass.RATE_LIMIT
        case 400:
            return _credit_or_model(text) or ErrorClass.BAD_REQUEST
        case 422:
            return ErrorClass.BAD_REQUEST
        case 503 | 529:
            return ErrorClass.OVERLOADED
        case 409 | 425:
            return ErrorClass.SERVER
        case _:
            return ErrorClass.SERVER if status >= 500 else ErrorClass.BAD_ENDPOINT  # noqa: PLR2004


def _credit_or_model(text: str) -> ErrorClass | None:
    if _has(text, CREDIT):
        return ErrorClass.BILLING
    return ErrorClass.MODEL_GONE if _has(text, MODEL) else None


def _by_text(text: str) -> ErrorClass | None:
    if _has(text, UNSUPPORTED):
        return ErrorClass.BAD_REQUEST
    if _has(text, CONTEXT):
        return ErrorClass.CONTEXT_OVERFLOW
    if _has(text, OVERLOAD):
        return ErrorClass.OVERLOADED
    if found := _credit_or_model(text):
        return found
    if "rate limit" in text or "too many requests" in text:
        return ErrorClass.RATE_LIMIT
    return None


def _has(text: str, words: tuple[str, ...]) -> bool:
    return any(word in text for word in words)


def diagnose(failure: Failure, *, nous: bool, failures: int, now_ms: int) -> Diagnosis:
    """Class and next action. `failures` is how often in a row this entry has failed before (its cool-down doubles with each)."""
    error = classify(failure)
    doubling = min(DOUBLING_MS * 2 ** min(failures, 10), DOUBLING_CAP_MS)
    hint = retry_after_ms(failure.headers, now_ms)
    limited = failure.status == 429  # noqa: PLR2004
    match error:
        case ErrorClass.AUTH | ErrorClass.MODEL_GONE | ErrorClass.BAD_ENDPOINT:
            return Diagnosis(error, after=After.DOWN)
        case ErrorClass.BILLING:
            return Diagnosis(error, after=After.COOL, cool_ms=BILLING_MS)
        case ErrorClass.RATE_LIMIT | ErrorClass.OVERLOADED if nous and limited:
            return _nous_limit(error, failure.headers, hint)
        case ErrorClass.RATE_LIMIT:
            return Diagnosis(error, after=After.COOL, cool_ms=hint or RATE_LIMIT_MS)
        case ErrorClass.OVERLOADED if limited:
            return Diagnosis(error, after=After.COOL, cool_ms=hint or RATE_LIMIT_MS)
        case ErrorClass.SERVER | ErrorClass.OVERLOADED:
            if hint is None:
                return Diagnosis(error, BACKOFF, After.COOL, doubling)
            if hint > PATIENCE_MS:
                return Diagnosis(error, after=After.COOL, cool_ms=hint)
            return Diagnosis(error, tuple(max(delay, hint / 1000) for delay in BACKOFF), After.COOL, max(doubling, hint))
        case ErrorClass.TIMEOUT | ErrorClass.CUT | ErrorClass.GARBAGE:
            return Diagnosis(error, (0.0,), After.COOL, doubling)
        case ErrorClass.BAD_REQUEST:
            return Diagnosis(error, repair=_repair(failure.text))
        case ErrorClass.CONTEXT_OVERFLOW | ErrorClass.REFUSED:
            return Diagnosis(error)


def _repair(text: str) -> str:
    low = text.lower()
    return next((name for name in REPAIRABLE if name in low), "") if _has(low, UNSUPPORTED) else ""


def _nous_limit(error: ErrorClass, headers: Mapping[str, str], hint: int | None) -> Diagnosis:
    """An empty bucket is the account's and stops the provider; otherwise only the model behind it is short."""
    low = {name.lower(): value for name, value in headers.items()}
    resets = [
        reset
        for bucket in _BUCKETS
        if _number(low.get(f"x-ratelimit-remaining-{bucket}", "")) == 0
        and (reset := _seconds(low.get(f"x-ratelimit-reset-{bucket}", ""))) is not None
        and reset >= _BUCKET_RESET_SECONDS
    ]
    if resets:
        return Diagnosis(error, after=After.COOL_PROVIDER, cool_ms=_clamp(max(resets) * 1000))
    if hint is None and not any(name.startswith("x-ratelimit-") for name in low):
        return Diagnosis(error, after=After.COOL_PROVIDER, cool_ms=NOUS_RATE_LIMIT_MS)
    return Diagnosis(error, after=After.COOL, cool_ms=NOUS_UPSTREAM_MS)


def retry_after_ms(headers: Mapping[str, str], now_ms: int) -> int | None:
    """How long the reply's headers ask us to wait, 1 s to 6 h, or None. Nonsense (NaN, infinite, negative) is ignored; a past date is 1 s."""
    low = {name.lower(): value.strip() for name, value in headers.items()}
    millis = _number(low.get("retry-after-ms", ""))
    if millis is not None:
        return _clamp(millis)
    for name in ("x-ratelimit-reset-requests-1h", "x-ratelimit-reset-requests", "retry-after"):
        seconds = _seconds(low.get(name, ""))
        if seconds is not None:
            return _clamp(seconds * 1000)
    try:
        moment = parsedate_to_datetime(low.get("retry-after", "")).timestamp() * 1000
    except (ValueError, TypeError, OverflowError):
        return None
    return _clamp(moment - now_ms)


def _clamp(millis: float) -> int:
    return int(min(max(millis, SHORTEST_MS), LONGEST_MS))


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None


def _seconds(text: str) -> float | None:
    """Plain seconds, or the form `1h2m3.5s` that some servers send."""
    value = _number(text)
    if value is not None or not text:
        return value
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        return None
    hours, minutes, seconds, millis = (float(part or 0) for part in match.groups())
    return hours * 3600 + minutes * 60 + seconds + millis / 1000
