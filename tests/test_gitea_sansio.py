"""Deliveries as running servers sent them, what must be refused, and how requests and replies are read."""

from __future__ import annotations

import copy
import hashlib
import hmac
import json
import pickle
import traceback
from datetime import UTC, datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from bot.gitea import errors, sansio, shapes
from bot.gitea.sansio import Event

DATA = Path(__file__).parent / "data" / "gitea"
SECRET = b"fixture-secret"
BODIES = sorted(DATA.glob("recorded-*/deliveries/*.body"))
REPLIES = sorted(DATA.glob("recorded-*/replies/*.json"))


def recorded(path):
    headers = json.loads(path.with_name(path.name.removesuffix(".body") + ".headers.json").read_text())
    return headers, path.read_bytes()


def name(path):
    return f"{path.parts[-3]}/{path.name}"


def signed(body, secret=SECRET, **headers):
    mac = hmac.new(secret, body, hashlib.sha256).hexdigest()
    return {"Content-Type": "application/json", "X-Gitea-Event-Type": "issues", "X-Gitea-Signature": mac} | headers


ISSUE = json.dumps({"action": "opened", "number": 1, "issue": {"number": 1}, "repository": {"id": 5, "full_name": "acme/rocket"}}).encode()


def test_there_is_something_to_read():
    assert len(BODIES) > 90
    assert len(REPLIES) > 120


@pytest.mark.parametrize("path", BODIES, ids=name)
def test_every_recorded_delivery_is_accepted(path):
    headers, body = recorded(path)
    event = Event.from_http(headers, body, [b"another", SECRET])
    payload = json.loads(body)
    assert event.event_type == path.name.split(".")[-2]
    assert event.event == headers["X-Gitea-Event"]
    assert event.delivery == headers["X-Gitea-Delivery"]
    assert event.action == payload.get("action")
    assert event.repo_id == payload["repository"]["id"]
    assert event.full_name == "acme/rocket"
    assert event.sender_id == payload["sender"]["id"]
    assert event.sender_login == payload["sender"]["login"]
    assert event.is_pull is event.event_type.startswith("pull_request")
    assert event.data == payload
    assert event.digest == hashlib.sha256(event.event_type.encode() + b"\0" + body).hexdigest()
    assert sansio.is_test_push(event) is path.name.startswith("hook-test.")
    assert Event.from_stored(event.event_type, event.body).digest == event.digest


@pytest.mark.parametrize("path", BODIES, ids=name)
def test_a_captured_body_fits_no_other_event(path):
    """The signature does not cover the event name, so the shape must give the swap away."""
    headers, body = recorded(path)
    own = headers["X-Gitea-Event-Type"]
    for other in set(shapes._SHAPES) - {own}:
        with pytest.raises(errors.Malformed):
            Event.from_http({**headers, "X-Gitea-Event-Type": other}, body, [SECRET])


def test_the_same_body_under_another_name_is_another_record():
    assert Event.from_stored("zebra", ISSUE).digest != Event.from_stored("issues", ISSUE).digest


@pytest.mark.parametrize("version", ["1.22", "1.26"])
def test_a_replay_is_the_same_record(version):
    folder = DATA / f"recorded-{version}" / "deliveries"
    again = Event.from_http(*recorded(folder / "replayed.issue_label.body"), [SECRET])
    events = [Event.from_http(*recorded(path), [SECRET]) for path in folder.glob("*.issue_label.body") if "replayed" not in path.name]
    twins = [event for event in events if event.digest == again.digest]
    assert len(twins) == 1
    assert twins[0].delivery != again.delivery


def test_either_of_two_secrets_is_accepted():
    for secret in (b"old", b"new"):
        assert Event.from_http(signed(ISSUE, secret), ISSUE, [b"old", b"new"]).action == "opened"


@pytest.mark.parametrize("family", ["X-Gitea-Signature", "X-Forgejo-Signature", "X-Hub-Signature-256"])
def test_each_family_of_headers_is_enough(family):
    headers = signed(ISSUE)
    mac = headers.pop("X-Gitea-Signature")
    headers[family.upper()] = f"sha256={mac}" if family.startswith("X-Hub") else mac
    assert Event.from_http(headers, ISSUE, [SECRET]).repo_id == 5


MAC = signed(ISSUE)["X-Gitea-Signature"]


@pytest.mark.parametrize(
    ("kind", "signatures"),
    [
        (errors.Unsigned, {}),
        (errors.Unsigned, {"X-Gitea-Signature": ""}),
        (errors.Unsigned, {"X-Gitea-Signature": "", "X-Hub-Signature-256": "sha256=", "X-Hub-Signature": "sha1="}),
        (errors.Unsigned, {"X-Hub-Signature-256": ""}),
        (errors.Unsigned, {"X-Hub-Signature": "sha1=" + hmac.new(SECRET, ISSUE, hashlib.sha1).hexdigest()}),
        (errors.BadSignature, {"X-Gitea-Signature": "sha256="}),
        (errors.BadSignature, {"X-Gitea-Signature": f"sha256={MAC}"}),
        (errors.BadSignature, {"X-Hub-Signature-256": MAC}),
        (errors.BadSignature, {"X-Gitea-Signature": MAC.upper()}),
        (errors.BadSignature, {"X-Gitea-Signature": f" {MAC}"}),
        (errors.BadSignature, {"X-Gitea-Signature": MAC[:-1]}),
        (errors.BadSignature, {"X-Gitea-Signature": "ü" * 64}),
        (errors.BadSignature, {"X-Gitea-Signature": "\udcff" * 64}),
        (errors.BadSignature, {"X-Gitea-Signature": "\ud800" * 64}),
        (errors.BadSignature, {"X-Gitea-Signature": signed(ISSUE, b"foreign")["X-Gitea-Signature"]}),
        (errors.BadSignature, {"X-Gitea-Signature": MAC, "X-Forgejo-Signature": "0" * 64}),
        (errors.BadSignature, {"X-Gitea-Signature": MAC, "X-Hub-Signature-256": "sha256="}),
        (errors.BadSignature, {"X-Gitea-Signature": "", "X-Hub-Signature-256": f"sha256={MAC}"}),
    ],
    ids=repr,
)
def test_bad_signatures_are_refused_with_401(kind, signatures):
    headers = signed(ISSUE)
    del headers["X-Gitea-Signature"]
    with pytest.raises(kind) as refused:
        Event.from_http(headers | signatures, ISSUE, [SECRET])
    assert refused.value.status == 401
    assert refused.value.reason


def test_repeated_signature_headers_must_agree():
    headers = CIMultiDict(signed(ISSUE))
    headers.add("x-gitea-signature", MAC)
    assert Event.from_http(headers, ISSUE, [SECRET]).action == "opened"
    headers.add("x-gitea-signature", "0" * 64)
    with pytest.raises(errors.BadSignature):
        Event.from_http(headers, ISSUE, [SECRET])


@pytest.mark.parametrize("secrets", [[], [b""]])
def test_without_a_secret_nothing_passes_unless_insecure_is_said(secrets):
    empty_key = hmac.new(b"", ISSUE, hashlib.sha256).hexdigest()
    with pytest.raises(errors.Unsigned):
        Event.from_http(signed(ISSUE, **{"X-Gitea-Signature": empty_key}), ISSUE, secrets)
    headers = signed(ISSUE)
    del headers["X-Gitea-Signature"]
    assert Event.from_http(headers, ISSUE, secrets, insecure=True).action == "opened"
    with pytest.raises(errors.Unsigned):
        Event.from_http(headers, ISSUE, [SECRET], insecure=True)


@given(body=st.binary(max_size=200), secret=st.binary(min_size=1, max_size=40), flip=st.integers(min_value=0))
def test_one_bit_changed_is_a_bad_signature(body, secret, flip):
    headers = signed(body, secret)
    changed = bytearray(body or b"x")
    changed[flip // 8 % len(changed)] ^= 1 << flip % 8
    with pytest.raises(errors.BadSignature):
        Event.from_http(headers, bytes(changed), [secret])


@given(body=st.binary(max_size=200), secrets=st.lists(st.binary(min_size=1, max_size=20), min_size=1, max_size=4), pick=st.integers(0, 3))
def test_an_authentic_body_is_read_or_malformed_and_never_breaks(body, secrets, pick):
    headers = signed(body, secrets[pick % len(secrets)])
    try:
        Event.from_http(headers, body, secrets)
    except errors.Malformed as refused:
        assert refused.status == 400


@given(value=st.text(max_size=80))
def test_no_signature_text_breaks_the_check(value):
    with pytest.raises((errors.BadSignature, errors.Unsigned)):
        Event.from_http(signed(ISSUE, **{"X-Gitea-Signature": value}), ISSUE, [b"other"])


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "Application/JSON", "application/json;charset=utf-8"])
def test_json_may_name_its_charset(kind):
    assert Event.from_http(signed(ISSUE, **{"Content-Type": kind}), ISSUE, [SECRET]).action == "opened"


def test_form_bodies_are_refused_with_advice():
    with pytest.raises(errors.UnsupportedMedia, match="content type to application/json") as refused:
        Event.from_http(signed(ISSUE, **{"Content-Type": "application/x-www-form-urlencoded"}), ISSUE, [SECRET])
    assert refused.value.status == 415


@pytest.mark.parametrize("kind", ["", "text/plain", "multipart/form-data", "application/jsonp"])
def test_other_media_are_refused(kind):
    with pytest.raises(errors.UnsupportedMedia):
        Event.from_http(signed(ISSUE, **{"Content-Type": kind}), ISSUE, [SECRET])


def test_too_large():
    with pytest.raises(errors.TooLarge) as refused:
        Event.from_http(signed(ISSUE), ISSUE, [SECRET], max_bytes=len(ISSUE) - 1)
    assert refused.value.status == 413
    assert Event.from_http(signed(ISSUE), ISSUE, [SECRET], max_bytes=len(ISSUE))


@pytest.mark.parametrize("event_type", ["", "Issues", "a b", "x" * 60, "issues\n", "é"])
def test_no_event_type(event_type):
    with pytest.raises(errors.Malformed, match="Event-Type"):
        Event.from_http(signed(ISSUE, **{"X-Gitea-Event-Type": event_type}), ISSUE, [SECRET])


def test_two_event_types_are_one_too_many():
    headers = CIMultiDict(signed(ISSUE))
    headers.add("X-Gitea-Event-Type", "push")
    with pytest.raises(errors.Malformed, match="twice"):
        Event.from_http(headers, ISSUE, [SECRET])


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe{}",
        b'{"a":NaN}',
        b'{"issue":' + b"[" * 200_000,
        b'{"a":' + b"9" * 5000 + b"}",
        ISSUE.decode().encode("utf-16"),
    ],
    ids=lambda body: repr(body[:12]),
)
def test_authentic_rubbish_is_malformed(body):
    with pytest.raises(errors.Malformed):
        Event.from_http(signed(body), body, [SECRET])


@pytest.mark.parametrize(
    ("event_type", "payload"),
    [
        ("issues", {"action": 5, "issue": {}}),
        ("issues", {"issue": {}}),
        ("issues", {"action": "opened", "issue": [1]}),
        ("issue_comment", {"action": "created", "issue": {}, "is_pull": False}),
        ("issue_comment", {"action": "created", "issue": {}, "comment": "x", "is_pull": False}),
        ("issue_comment", {"action": "created", "issue": {}, "comment": {}}),
        ("pull_request", {"action": "opened", "pull_request": 1}),
        ("pull_request_review_approved", {"action": "reviewed", "pull_request": {}, "review": {"type": "pull_request_review_rejected"}}),
        ("pull_request_review_approved", {"action": "reviewed", "pull_request": {}, "review": 1}),
        ("push", {"ref": "refs/heads/main", "before": "a"}),
        ("repository", {"action": "deleted", "repository": {}, "issue": {}}),
        ("repository", {"repository": {}}),
        ("status", {"sha": "a"}),
        ("create", {"ref": "main"}),
    ],
)
def test_wrong_shapes_are_malformed(event_type, payload):
    with pytest.raises(errors.Malformed):
        Event.from_stored(event_type, json.dumps(payload).encode())


@pytest.mark.parametrize(
    ("event_type", "payload"),
    [
        ("issues", {"action": "pinned", "issue": {}, "novel": 1}),
        ("pull_request_sync", {"action": "synchronized", "pull_request": {}, "before": "a", "after": "b"}),
        ("pull_request_comment", {"action": "created", "issue": {}, "comment": {}, "is_pull": True, "pull_request": {}}),
        ("repository", {"action": "created", "repository": {"id": 1}, "organization": None, "sender": {"id": 1}}),
        ("create", {"ref": "v1", "ref_type": "tag", "sha": "a"}),
        ("delete", {"ref": "b", "ref_type": "branch", "pusher_type": "user"}),
        ("workflow_run", {"action": "completed", "workflow": {}, "workflow_run": {}, "pull_request": None}),
        ("action_run_failure", {"run": {"id": 1}, "prior_status": "success", "last_run": None}),
        ("something_new", {"anything": 1}),
    ],
)
def test_what_servers_send_or_may_send_passes(event_type, payload):
    event = Event.from_stored(event_type, json.dumps(payload).encode())
    assert event.event_type == event_type


def test_missing_or_odd_people_and_places_are_none():
    event = Event.from_stored("action_run_failure", b'{"run":{}}')
    assert (event.repo_id, event.full_name, event.sender_id, event.sender_login) == (None, None, None, None)
    odd = Event.from_stored("zebra", b'{"repository":{"id":true,"full_name":7},"sender":[],"action":{}}')
    assert (odd.repo_id, odd.full_name, odd.sender_id, odd.action) == (None, None, None, None)


def test_a_delivery_id_that_could_forge_log_lines_is_dropped():
    assert Event.from_http(signed(ISSUE, **{"X-Gitea-Delivery": "a\nb"}), ISSUE, [SECRET]).delivery == ""


def test_an_event_prints_without_its_text():
    assert "rocket" in repr(Event.from_stored("issues", ISSUE))
    assert "body" not in repr(Event.from_stored("issues", ISSUE))


def test_only_a_push_that_moves_nothing_is_a_test():
    def push(before, after):
        return Event.from_stored("push", json.dumps({"ref": "refs/heads/main", "before": before, "after": after}).encode())

    assert sansio.is_test_push(push("a", "a"))
    assert not sansio.is_test_push(push("a", "b"))
    assert not sansio.is_test_push(push("", ""))
    assert not sansio.is_test_push(Event.from_stored("zebra", b'{"before":"a","after":"a"}'))


# --- requests


def test_templates_escape_every_part():
    assert sansio.expand("/repos/{owner}/{repo}/branches/{b}", owner="a", repo="ü b", b="dispatch/issue-7") == (
        "/repos/a/%C3%BC%20b/branches/dispatch%2Fissue-7"
    )


@pytest.mark.parametrize("bad", ["", ".", ".."])
def test_a_part_that_a_path_would_swallow_is_refused(bad):
    with pytest.raises(ValueError, match="cannot be the"):
        sansio.expand("/repos/{owner}", owner=bad)


@pytest.mark.parametrize("variables", [{}, {"owner": "a", "extra": "b"}, {"other": "a"}])
def test_templates_take_exactly_their_variables(variables):
    with pytest.raises(ValueError, match="takes the variables"):
        sansio.expand("/repos/{owner}", **variables)


@given(value=st.text(min_size=1).filter(lambda value: value not in {".", ".."} and value.isprintable()))
def test_no_value_leaves_its_part_of_the_path(value):
    path = sansio.expand("/a/{x}/b", x=value)
    assert path.count("/") == 3
    assert not set(path) & set("?#\\ ")


def test_queries_are_written_as_gitea_reads_them():
    moment = datetime(2026, 1, 2, 3, 4, 5, 999_999, tzinfo=timezone(timedelta(hours=2)))
    url = sansio.with_query("/x", {"since": moment, "none": None, "yes": True, "labels": ["a b", "c"], "page": 1})
    assert url == "/x?since=2026-01-02T01%3A04%3A05Z&yes=true&labels=a%20b%2Cc&page=1"
    assert sansio.with_query("/x?a=1", {"b": 2}) == "/x?a=1&b=2"
    assert sansio.with_query("/x", None) == "/x"
    with pytest.raises(ValueError, match="time zone"):
        sansio.timestamp(datetime(2026, 1, 2))


@pytest.mark.parametrize(
    ("address", "base"),
    [
        ("http://git.example", "http://git.example"),
        ("https://git.example/sub/", "https://git.example/sub"),
        ("https://git.example:3000/sub/api/v1/", "https://git.example:3000/sub"),
        (" http://[::1]:3000 ", "http://[::1]:3000"),
    ],
)
def test_base_urls(address, base):
    assert sansio.base_url(address) == base


@pytest.mark.parametrize(
    "address",
    ["git.example", "ftp://git.example", "http://", "http://me:pw@git.example", "http://g/?a=1", "http://g/#f", "http://g/a/../b"],
)
def test_addresses_that_cannot_be_a_forge(address):
    with pytest.raises(ValueError, match="forge"):
        sansio.base_url(address)


@pytest.mark.parametrize(
    ("there", "inside"),
    [
        ("http://git.example/sub/api/v1/user", True),
        ("http://GIT.example:80/sub", True),
        ("http://git.example/subway/api", False),
        ("http://git.example/api/v1/user", False),
        ("https://git.example/sub/api", False),
        ("http://git.example:81/sub/api", False),
        ("http://git.example.evil.test/sub/api", False),
        ("http://git.example@evil.test/sub/api", False),
        ("http://u@git.example/sub/api", False),
        ("http://git.example\\@evil.test/sub/", False),
        ("http://git.example/sub/../evil", False),
        ("http://git.example/sub/%2e%2E/evil", False),
        ("http://git.example:port/sub", False),
        ("//git.example/sub", False),
    ],
)
def test_the_token_stays_within_the_configured_address(there, inside):
    assert sansio.within("http://git.example/sub", there) is inside


def test_prepared_requests():
    headers, body = sansio.prepare("s3cr3t-token", "agent/1", {"body": "\ud800é"})
    assert dict(headers) == {
        "Accept": "application/json",
        "User-Agent": "agent/1",
        "Authorization": "token s3cr3t-token",
        "Content-Type": "application/json",
    }
    assert json.loads(body) == {"body": "\ud800é"}
    assert body.isascii()
    assert "s3cr3t" not in repr(headers)
    assert len(headers) == 4
    bare, empty = sansio.prepare("", "agent/1")
    assert set(bare) == {"Accept", "User-Agent"}
    assert empty == b""


@pytest.mark.parametrize("token", ["a b", "a\nb", "tökén"])
def test_a_token_no_header_can_carry_is_refused_without_showing_it(token):
    with pytest.raises(ValueError, match="characters") as refused:
        sansio.prepare(token, "agent")
    assert token not in str(refused.value)


# --- replies

STATUS_ERRORS = {
    301: errors.Moved,
    307: errors.Moved,
    401: errors.Unauthorized,
    403: errors.Forbidden,
    404: errors.NotFound,
    409: errors.Conflict,
    422: errors.Invalid,
    423: errors.Archived,
    500: errors.Unavailable,
}


@pytest.mark.parametrize("path", REPLIES, ids=lambda path: f"{path.parts[-3]}/{path.stem}")
def test_every_recorded_reply_is_read(path):
    reply = json.loads(path.read_text())
    body, headers, method = reply["body"], reply["headers"], reply["request"]["method"]
    as_json = "json" in headers.get("Content-Type", "")
    raw = json.dumps(body).encode() if as_json else (body or "").encode()
    if reply["status"] < 300:
        assert sansio.decode(reply["status"], headers, raw, method=method) == body
        return
    with pytest.raises(STATUS_ERRORS[reply["status"]]) as raised:
        sansio.decode(reply["status"], headers, raw, method=method, route="/a/{b}")
    error = raised.value
    assert (error.status, error.method, error.route) == (reply["status"], method, "/a/{b}")
    assert str(error).startswith(f"{method} /a/{{b}}: {reply['status']}")
    assert "swagger" not in str(error)
    if as_json:
        assert error.message == (body["message"] if isinstance(body, dict) else "")
    if isinstance(error, errors.Moved):
        assert error.location.startswith("/api/v1/repos/acme/rocket2")


@pytest.mark.parametrize(
    ("status", "kind"),
    {
        400: errors.Invalid,
        405: errors.Invalid,
        408: errors.Unavailable,
        410: errors.NotFound,
        412: errors.PreconditionFailed,
        429: errors.RateLimited,
        502: errors.Unavailable,
        503: errors.Unavailable,
        504: errors.Unavailable,
        206: errors.BadReply,
        304: errors.BadReply,
        100: errors.BadReply,
    }.items(),
)
@pytest.mark.parametrize("body", [b"", b"null", b"[1]", b'{"message":7}', b"<html>no</html>", b'{"mess', b"\xff"])
@pytest.mark.parametrize("kind_header", [{}, {"content-type": "application/json"}, {"Content-Type": "text/html"}])
def test_no_body_breaks_an_error(status, kind, body, kind_header):
    with pytest.raises(errors.ForgeError) as raised:
        sansio.decode(status, kind_header, body, method="GET", route="/x")
    assert type(raised.value) is kind
    assert raised.value.status == status
    assert "/x" in str(raised.value)


def test_html_errors_keep_their_beginning():
    with pytest.raises(errors.Unavailable) as raised:
        sansio.decode(503, {"Content-Type": "text/html"}, b"<html>\n  over   loaded " + b"x" * 1000)
    assert raised.value.message.startswith("<html> over loaded xxx")
    assert len(raised.value.message) == 200


@pytest.mark.parametrize("status", [204, 205])
@pytest.mark.parametrize("body", [b"", b"<html>", b"{}"])
def test_no_content_is_none(status, body):
    assert sansio.decode(status, {}, body) is None


def test_success_without_a_body():
    assert sansio.decode(200, {}, b"", method="POST") is None
    assert sansio.decode(200, {}, b"", method="DELETE") is None
    assert sansio.decode(202, {}, b"", method="PATCH") is None
    with pytest.raises(errors.BadReply, match="missing"):
        sansio.decode(200, {}, b"", method="GET")


@pytest.mark.parametrize(
    ("headers", "body", "words"),
    [
        ({"Content-Type": "text/html"}, b"<title>Sign in</title>", "web page"),
        ({"Content-Type": "text/html"}, b"[]", "web page"),
        ({"Content-Type": "application/json"}, b'[{"id":1},', "broken JSON"),
        ({}, b"OK", "broken JSON"),
        ({}, b"\xff\xfe", "broken JSON"),
        ({}, b"[" * 200_000, "broken JSON"),
        ({}, b" " * (sansio.MAX_REPLY + 1), "exceeds"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_success_that_is_not_json(headers, body, words):
    with pytest.raises(errors.BadReply, match=words) as raised:
        sansio.decode(200, headers, body, route="/x")
    assert raised.value.headers == headers
    assert len(raised.value.message) < 300


NOW = datetime(2026, 11, 24, 21, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0.0),
        (" 120 ", 120.0),
        (format_datetime(NOW + timedelta(seconds=30), usegmt=True), 30.0),
        (format_datetime(NOW - timedelta(hours=1), usegmt=True), 0.0),
        ("Tue, 24 Nov 2026 21:00:10 -0000", 10.0),
        ("", None),
        ("-5", None),
        ("1.5", None),
        ("soon", None),
        ("²", None),
        ("9" * 5000, float("inf")),
    ],
)
def test_retry_after_in_both_forms(value, seconds):
    assert sansio.retry_after(value, NOW.timestamp()) == seconds


def test_delays_grow_with_jitter_and_give_way_to_the_server():
    error = errors.Unavailable()
    assert [sansio.delay(error, attempt, 1.0) for attempt in (1, 2, 3)] == [1.0, 2.0, 4.0]
    assert sansio.delay(error, 1, 0.25) == 0.25
    assert sansio.delay(error, 60, 1.0) == sansio.DELAY_CAP
    error.retry_after = 7.0
    assert sansio.delay(error, 1, 0.5) == 7.0
    assert sansio.delay(errors.BadReply(), 1, 0.5) == 0.5


def test_redirects_keep_to_the_origin_and_keep_their_query():
    base, url = "http://git.example", "http://git.example/api/v1/repos/a/b/issues?page=2&limit=50"
    moved = {"location": "/api/v1/repos/a/c/issues"}
    assert sansio.follow(base, url, 301, moved) == "http://git.example/api/v1/repos/a/c/issues?page=2&limit=50"
    assert sansio.follow(base, url, 307, {"Location": "/api/v1/x?page=2"}) == "http://git.example/api/v1/x?page=2"
    assert sansio.follow(base, url, 200, moved) is None
    assert sansio.follow(base, url, 301, {}) is None
    for foreign in ("http://other.example/x", "//other.example/x", "https://git.example/x", "http://[bad"):
        assert sansio.follow(base, url, 302, {"Location": foreign}) is None


def test_pages():
    assert sansio.page_items([1], None) == [1]
    assert sansio.page_items(None, None) == []
    assert sansio.page_items({"data": None}, "data") == []
    assert sansio.page_items({"data": [1]}, "data") == [1]
    for wrong in ({"data": {}}, {"other": []}, [1], "x"):
        assert sansio.page_items(wrong, "data") is None
    assert sansio.page_items({}, None) is None
    assert sansio.page_total([], {"x-total-count": "75"}) == 75
    assert sansio.page_total({"total_count": 3}, {"X-Total-Count": "x"}) == 3
    assert sansio.page_total([], {}) is None
    assert sansio.page_total({"total_count": True}, {}) is None


# --- errors


def test_errors_survive_pickling_and_copying():
    error = errors.Moved("m", status=301, method="GET", route="/x", headers={"A": "b"})
    error.location = "/y"
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is errors.Moved
        assert (str(again), again.location, again.headers) == (str(error), "/y", {"A": "b"})


def test_error_texts():
    assert str(errors.NotFound("gone", status=404, method="GET", route="/x/{y}")) == "GET /x/{y}: 404 gone"
    assert str(errors.Unavailable(method="GET", route="/x")) == "GET /x: no answer"
    assert str(errors.Forbidden(status=403, method="PATCH", route="/x")) == "PATCH /x: 403"
    assert str(errors.ForgeError("bare")) == "bare"
    assert "gone" in "".join(traceback.format_exception(errors.NotFound("gone")))


def test_what_may_be_asked_again():
    for error in (errors.Unavailable(), errors.RateLimited(), errors.OutcomeUnknown(), TimeoutError(), ConnectionResetError()):
        assert errors.is_transient(error)
    for error in (errors.NotFound(), errors.Forbidden(), errors.BadReply(), errors.ForeignOrigin(), ValueError()):
        assert not errors.is_transient(error)
