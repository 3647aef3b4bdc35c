"""Every row of the error table, as values."""

from __future__ import annotations

from email.utils import formatdate

import pytest

from bot.providers.classify import LONGEST_MS, After, ErrorClass, Failure, Seen, classify, diagnose, retry_after_ms

E = ErrorClass
NOW = 1_800_000_000_000


@pytest.mark.parametrize(
    ("status", "text", "code", "expected"),
    [
        (401, "bad key", "", E.AUTH),
        (403, "forbidden", "", E.AUTH),
        (403, "Key limit exceeded (total limit)", "", E.BILLING),
        (403, "your credit balance is too low", "", E.BILLING),
        (402, "Payment required", "", E.BILLING),
        (402, "usage limit reached, try again in 5 minutes", "", E.RATE_LIMIT),
        (402, "quota exhausted, resets at noon", "", E.RATE_LIMIT),
        (402, "quota exhausted", "", E.BILLING),
        (404, "The model `x` does not exist", "model_not_found", E.MODEL_GONE),
        (404, "model not found: insufficient credits", "", E.BILLING),
        (404, "page not found", "", E.BAD_ENDPOINT),
        (408, "", "", E.TIMEOUT),
        (413, "", "", E.CONTEXT_OVERFLOW),
        (400, "This model's maximum context length is 8192 tokens", "context_length_exceeded", E.CONTEXT_OVERFLOW),
        (500, "n_ctx_slot exceeded", "", E.CONTEXT_OVERFLOW),
        (503, "prompt is too long", "", E.CONTEXT_OVERFLOW),
        (502, "context length", "", E.SERVER),
        (429, "Rate limit reached", "", E.RATE_LIMIT),
        (429, "the model is overloaded", "", E.OVERLOADED),
        (429, "You exceeded your current quota", "insufficient_quota", E.BILLING),
        (400, "Unsupported parameter: 'max_tokens' is not supported with this model", "", E.BAD_REQUEST),
        (500, "unsupported parameter: max_tokens exceed the context length", "", E.BAD_REQUEST),
        (400, "invalid 'messages[1]'", "", E.BAD_REQUEST),
        (400, "invalid model name", "", E.MODEL_GONE),
        (422, "unprocessable", "", E.BAD_REQUEST),
        (400, "flagged by our content policy", "", E.REFUSED),
        (403, "x", "content_filter", E.REFUSED),
        (500, "boom", "", E.SERVER),
        (502, "bad gateway", "", E.SERVER),
        (504, "", "", E.SERVER),
        (503, "", "", E.OVERLOADED),
        (529, "", "", E.OVERLOADED),
        (307, "", "", E.BAD_ENDPOINT),
        (405, "", "", E.BAD_ENDPOINT),
    ],
)
def test_by_status(status, text, code, expected):
    assert classify(Failure(Seen.STATUS, status=status, text=text, code=code)) is expected


@pytest.mark.parametrize(
    ("seen", "text", "code", "expected"),
    [
        (Seen.CONNECT, "refused", "", E.TIMEOUT),
        (Seen.TIMEOUT, "", "", E.TIMEOUT),
        (Seen.TLS, "certificate verify failed", "", E.BAD_ENDPOINT),
        (Seen.GARBAGE, "our content policy page", "", E.GARBAGE),
        (Seen.CUT, "", "", E.CUT),
        (Seen.ERROR_BODY, "upstream said no", "429", E.RATE_LIMIT),
        (Seen.ERROR_BODY, "", "context_length_exceeded", E.CONTEXT_OVERFLOW),
        (Seen.ERROR_BODY, "hm", "", E.GARBAGE),
        (Seen.ERROR_IN_STREAM, "insufficient credits", "", E.BILLING),
        (Seen.ERROR_IN_STREAM, "overloaded", "overloaded_error", E.OVERLOADED),
        (Seen.ERROR_IN_STREAM, "too many tokens", "", E.CONTEXT_OVERFLOW),
        (Seen.ERROR_IN_STREAM, "hm", "", E.CUT),
        (Seen.ERROR_BODY, "", "content_filter", E.REFUSED),
    ],
)
def test_by_kind(seen, text, code, expected):
    assert classify(Failure(seen, text=text, code=code)) is expected


@pytest.mark.parametrize(
    ("failure", "after", "tries", "cool_ms"),
    [
        (Failure(Seen.STATUS, 401), After.DOWN, 0, 0),
        (Failure(Seen.STATUS, 402), After.COOL, 0, 3_600_000),
        (Failure(Seen.STATUS, 404), After.DOWN, 0, 0),
        (Failure(Seen.STATUS, 307), After.DOWN, 0, 0),
        (Failure(Seen.TLS), After.DOWN, 0, 0),
        (Failure(Seen.CONNECT), After.COOL, 1, 30_000),
        (Failure(Seen.CUT), After.COOL, 1, 30_000),
        (Failure(Seen.GARBAGE), After.COOL, 1, 30_000),
        (Failure(Seen.STATUS, 413), After.NOTHING, 0, 0),
        (Failure(Seen.STATUS, 429), After.COOL, 0, 60_000),
        (Failure(Seen.STATUS, 429, headers={"Retry-After": "7"}), After.COOL, 0, 7_000),
        (Failure(Seen.STATUS, 422), After.NOTHING, 0, 0),
        (Failure(Seen.ERROR_BODY, code="content_filter"), After.NOTHING, 0, 0),
        (Failure(Seen.STATUS, 500), After.COOL, 3, 30_000),
        (Failure(Seen.STATUS, 503), After.COOL, 3, 30_000),
        (Failure(Seen.STATUS, 503, headers={"retry-after": "90"}), After.COOL, 0, 90_000),
        (Failure(Seen.STATUS, 503, headers={"retry-after": "2"}), After.COOL, 3, 30_000),
    ],
)
def test_action(failure, after, tries, cool_ms):
    diagnosis = diagnose(failure, nous=False, failures=0, now_ms=NOW)
    assert (diagnosis.after, len(diagnosis.delays), diagnosis.cool_ms) == (after, tries, cool_ms)


def test_server_errors_back_off_and_double():
    assert diagnose(Failure(Seen.STATUS, 500), nous=False, failures=0, now_ms=NOW).delays == (1, 2, 4)
    assert [diagnose(Failure(Seen.CONNECT), nous=False, failures=n, now_ms=NOW).cool_ms for n in (0, 1, 2, 5, 99)] == [
        30_000,
        60_000,
        120_000,
        600_000,
        600_000,
    ]


def test_repair_is_named():
    text = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
    assert diagnose(Failure(Seen.STATUS, 400, text=text), nous=False, failures=0, now_ms=NOW).repair == "max_tokens"
    assert diagnose(Failure(Seen.STATUS, 400, text="max_tokens is too large"), nous=False, failures=0, now_ms=NOW).repair == ""


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, None),
        ({"Retry-After": "12"}, 12_000),
        ({"retry-after": "0"}, 1_000),
        ({"retry-after": "-5"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "1e99"}, LONGEST_MS),
        ({"retry-after": "soon"}, None),
        ({"retry-after": formatdate(NOW / 1000 + 90, usegmt=True)}, 90_000),
        ({"retry-after": formatdate(NOW / 1000 - 90, usegmt=True)}, 1_000),
        ({"retry-after-ms": "2500", "retry-after": "9"}, 2_500),
        ({"retry-after-ms": "nan", "retry-after": "9"}, 9_000),
        ({"x-ratelimit-reset-requests-1h": "40", "x-ratelimit-reset-requests": "20", "retry-after": "9"}, 40_000),
        ({"x-ratelimit-reset-requests": "6m0s"}, 360_000),
        ({"x-ratelimit-reset-requests": "20ms"}, 1_000),
    ],
)
def test_retry_after(headers, expected):
    assert retry_after_ms(headers, NOW) == expected


def test_nous_limits():
    def say(headers):
        diagnosis = diagnose(Failure(Seen.STATUS, 429, headers=headers), nous=True, failures=0, now_ms=NOW)
        return diagnosis.after, diagnosis.cool_ms

    assert say({"x-ratelimit-remaining-tokens-1h": "0", "x-ratelimit-reset-tokens-1h": "900"}) == (After.COOL_PROVIDER, 900_000)
    assert say({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "20"}) == (After.COOL, 30_000)
    assert say({"x-ratelimit-remaining-requests": "70", "x-ratelimit-reset-requests": "60"}) == (After.COOL, 30_000)
    assert say({}) == (After.COOL_PROVIDER, 300_000)
