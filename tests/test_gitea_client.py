"""The client: what is sent again and what is not, that lists are whole, that the token stays home; last the aiohttp adapter."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import ssl
import subprocess
import traceback
from email.utils import formatdate
from urllib.parse import parse_qs, urlsplit

import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st

from bot.gitea import errors
from bot.gitea.abc import GiteaAPI
from bot.gitea.aiohttp import GiteaClient
from bot.redaction import Secret

TOKEN = "t0ken-0123456789abcdef"
BASE = "http://git.example/sub"
ISSUES = "/repos/{owner}/{repo}/issues"
HERE = {"owner": "acme", "repo": "rocket"}
JSON = {"Content-Type": "application/json"}
WALL = 1_700_000_000.0


class Canned(GiteaAPI):
    """Answers from a script (replies or exceptions, the last one repeated), or by a function of (method, url)."""

    def __init__(self, *script, answer=None, **options):
        self.now = 1000.0
        self.sent, self.slept, self.seen = [], [], []
        self.script, self.answer = list(script), answer
        options = {"max_items": 50, "jitter": lambda: 1.0, "on_request": lambda *facts: self.seen.append(facts)} | options
        super().__init__(
            options.pop("base_url", BASE), Secret(TOKEN), clock=lambda: self.now, wall=lambda: WALL + self.now - 1000, **options
        )

    async def _request(self, method, url, headers, body):
        self.sent.append((method, url, dict(headers), body))
        self.now += 0.25
        reply = self.answer(method, url) if self.answer else self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if isinstance(reply, BaseException):
            raise reply
        status, headers, body = reply
        return status, headers, body if isinstance(body, bytes) else json.dumps(body).encode()

    async def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds

    @property
    def calls(self):
        return [(method, url) for method, url, _, _ in self.sent]


OK = (200, JSON, {"id": 1})
EMPTY = (204, {}, b"")
HTML = (200, {"Content-Type": "text/html"}, b"<html>sign in</html>")
BUSY = (429, {}, b"")
DOWN = [(status, {"Content-Type": "text/html"}, b"<html>") for status in (500, 502, 503, 504)]
NOT_SENT = errors.NotSent("ClientConnectorError: Connection refused")
LOST = errors.Lost("ServerDisconnectedError")


# --- one request


async def test_a_request_on_the_wire():
    api = Canned(OK)
    assert await api.getitem(ISSUES + "/{index}", {"page": 1}, **HERE, index=7) == {"id": 1}
    method, url, headers, body = api.sent[0]
    assert (method, url, body) == ("GET", "http://git.example/sub/api/v1/repos/acme/rocket/issues/7?page=1", b"")
    assert headers == {"Accept": "application/json", "User-Agent": "timmy-dispatch", "Authorization": f"token {TOKEN}"}
    await api.post(ISSUES, {"title": "é"}, **HERE)
    assert json.loads(api.sent[1][3]) == {"title": "é"}
    assert api.sent[1][2]["Content-Type"] == "application/json"
    assert api.seen == [
        ("/repos/{owner}/{repo}/issues/{index}", "GET", 200, 1, 0.25),
        ("/repos/{owner}/{repo}/issues", "POST", 200, 1, 0.25),
    ]


async def test_the_other_verbs():
    api = Canned(EMPTY)
    assert await api.put("/a/{b}", {"x": 1}, b="c") is None
    assert await api.patch("/a/{b}", {"x": 1}, b="c") is None
    assert await api.delete("/a/{b}", {"content": "eyes"}, b="c") is None
    assert await api.post("/a/{b}", b="c") is None
    assert [(method, body) for method, _, _, body in api.sent] == [
        ("PUT", b'{"x": 1}'),
        ("PATCH", b'{"x": 1}'),
        ("DELETE", b'{"content": "eyes"}'),
        ("POST", b""),
    ]


# --- what is sent again

IDEMPOTENT = {
    "GET": lambda api: api.getitem("/x"),
    "PUT": lambda api: api.put("/x", {}),
    "DELETE": lambda api: api.delete("/x"),
    "PATCH marked": lambda api: api.patch("/x", {}, idempotent=True),
    "POST marked": lambda api: api.post("/x", {}, idempotent=True),
}
CREATING = {"POST": lambda api: api.post("/x", {}), "PATCH": lambda api: api.patch("/x", {})}


@pytest.mark.parametrize("call", (IDEMPOTENT | CREATING).values(), ids=(IDEMPOTENT | CREATING).keys())
@pytest.mark.parametrize("failure", [BUSY, NOT_SENT], ids=["429", "not sent"])
async def test_what_was_turned_away_or_never_left_is_sent_again(call, failure):
    api = Canned(failure, failure, failure, OK)
    assert await call(api) == {"id": 1}
    assert len(api.sent) == 4
    assert api.slept == [1.0, 2.0, 4.0]


@pytest.mark.parametrize("call", IDEMPOTENT.values(), ids=IDEMPOTENT.keys())
@pytest.mark.parametrize("failure", [*DOWN, LOST], ids=["500", "502", "503", "504", "lost"])
async def test_harmless_requests_are_sent_again_four_times_at_most(call, failure):
    api = Canned(failure, failure, failure, OK)
    assert await call(api) == {"id": 1}
    api = Canned(failure)
    with pytest.raises(errors.Unavailable) as raised:
        await call(api)
    assert len(api.sent) == 4
    assert raised.value.route == "/x"
    assert [attempt for _, _, _, attempt, _ in api.seen] == [1, 2, 3, 4]


@pytest.mark.parametrize("call", CREATING.values(), ids=CREATING.keys())
@pytest.mark.parametrize("failure", [*DOWN, LOST, HTML, (201, JSON, b'{"id":')], ids=["500", "502", "503", "504", "lost", "html", "cut"])
async def test_a_create_with_a_doubtful_end_is_sent_once(call, failure):
    api = Canned(failure, OK)
    with pytest.raises(errors.OutcomeUnknown) as raised:
        await call(api)
    assert len(api.sent) == 1
    assert api.slept == []
    assert raised.value.route == "/x"
    assert raised.value.status == (None if isinstance(failure, Exception) else failure[0])


@pytest.mark.parametrize("call", CREATING.values(), ids=CREATING.keys())
async def test_doubt_after_a_refused_attempt_is_still_doubt(call):
    api = Canned(BUSY, LOST, OK)
    with pytest.raises(errors.OutcomeUnknown):
        await call(api)
    assert len(api.sent) == 2


@pytest.mark.parametrize("call", IDEMPOTENT.values(), ids=IDEMPOTENT.keys())
async def test_success_that_is_not_json_is_not_asked_again(call):
    api = Canned(HTML)
    with pytest.raises(errors.BadReply):
        await call(api)
    assert len(api.sent) == 1


@pytest.mark.parametrize("call", (IDEMPOTENT | CREATING).values(), ids=(IDEMPOTENT | CREATING).keys())
@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 412, 422, 423])
async def test_a_definite_no_is_raised_at_once(call, status):
    api = Canned((status, JSON, {"message": "no", "url": "http://elsewhere/api/swagger"}))
    with pytest.raises(errors.ForgeError) as raised:
        await call(api)
    assert len(api.sent) == 1
    assert raised.value.status == status
    assert "elsewhere" not in str(raised.value)


async def test_a_delete_that_finds_nothing_after_a_lost_answer_has_succeeded():
    gone = (404, JSON, b"null")
    assert await Canned(LOST, gone).delete("/x") is None
    for clear in (BUSY, NOT_SENT):
        with pytest.raises(errors.NotFound):
            await Canned(clear, gone).delete("/x")


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("form", ["seconds", "date"])
async def test_retry_after_wins_over_our_own_delay(status, form):
    value = "30" if form == "seconds" else formatdate(WALL + 30.25, usegmt=True)
    api = Canned((status, {"retry-after": value}, b""), OK)
    assert await api.getitem("/x") == {"id": 1}
    assert api.slept == [pytest.approx(30, abs=1)]


async def test_retry_after_beyond_the_time_left_raises_at_once():
    api = Canned((429, {"Retry-After": "3600"}, b""))
    with pytest.raises(errors.RateLimited) as raised:
        await api.post("/x", {})
    assert raised.value.retry_after == 3600.0
    assert (len(api.sent), api.slept) == (1, [])


async def test_no_attempt_begins_after_the_budget():
    api = Canned((503, {"Retry-After": "50"}, b""))
    with pytest.raises(errors.Unavailable):
        await api.getitem("/x")
    assert api.slept == [50.0, 50.0]


async def test_jitter_is_drawn_from_what_was_given():
    api = Canned(BUSY, BUSY, OK, jitter=iter([0.5, 0.0]).__next__)
    await api.getitem("/x")
    assert api.slept == [0.5, 0.0]


async def test_the_hook_learns_reasons_too():
    api = Canned(NOT_SENT, LOST, OK)
    await api.getitem("/x")
    assert [facts[2:4] for facts in api.seen] == [("not sent", 1), ("lost", 2), (200, 3)]
    api = Canned(asyncio.CancelledError())
    with pytest.raises(asyncio.CancelledError):
        await api.post("/x", {})
    assert [facts[2] for facts in api.seen] == ["cancelled"]


# --- where the token goes


@pytest.mark.parametrize("status", [301, 307])
async def test_a_get_follows_a_rename(status):
    moved = (status, {"Location": "/sub/api/v1/repos/acme/rocket2"}, b"<a>Moved</a>")
    api = Canned(moved, OK)
    assert await api.getitem("/repos/{owner}/{repo}", **HERE) == {"id": 1}
    assert api.calls[1] == ("GET", "http://git.example/sub/api/v1/repos/acme/rocket2")
    assert [facts[0] for facts in api.seen] == ["/repos/{owner}/{repo}"] * 2


async def test_three_redirects_and_no_more():
    moved = (302, {"Location": "/sub/again"}, b"")
    assert await Canned(moved, moved, moved, OK).getitem("/x") == {"id": 1}
    api = Canned(moved)
    with pytest.raises(errors.Moved) as raised:
        await api.getitem("/x")
    assert len(api.sent) == 4
    assert raised.value.location == "/sub/again"


@pytest.mark.parametrize("verb", sorted({*IDEMPOTENT, *CREATING} - {"GET"}))
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_write_never_follows(verb, status):
    api = Canned((status, {"Location": "/sub/api/v1/y"}, b""))
    with pytest.raises(errors.Moved) as raised:
        await (IDEMPOTENT | CREATING)[verb](api)
    assert len(api.sent) == 1
    assert raised.value.location == "/sub/api/v1/y"
    assert "/sub" not in str(raised.value)


@pytest.mark.parametrize(
    "place",
    [
        "http://evil.example/x",
        "//evil.example/x",
        "https://git.example/sub/x",
        "http://git.example:81/sub/x",
        "/other/app",
        "/sub/../other",
    ],
)
async def test_a_redirect_elsewhere_is_not_followed(place):
    api = Canned((301, {"Location": place}, b""))
    with pytest.raises(errors.Moved) as raised:
        await api.getitem("/x")
    assert len(api.sent) == 1
    assert raised.value.location == place


@pytest.mark.parametrize("place", ["http://evil.example/x", "http://git.example/api/v1/user", "ssh://git@git.example/x", "user"])
async def test_an_address_elsewhere_raises_before_anything_is_sent(place):
    api = Canned(OK)
    with pytest.raises(errors.ForeignOrigin):
        await api.getitem(place)
    assert api.sent == []


async def test_an_absolute_address_at_home_is_fine():
    api = Canned(OK)
    await api.getitem("http://git.example/sub/api/healthz")
    assert api.calls == [("GET", "http://git.example/sub/api/healthz")]


async def test_link_headers_are_not_followed():
    link = {"Link": '<http://evil.example/api/v1/x?page=2>; rel="next"', "X-Total-Count": "2"}
    api = Canned((200, JSON | link, [{"id": 1}]), (200, JSON | link, [{"id": 2}]))
    assert [item["id"] async for item in api.getiter("/x")] == [1, 2]
    assert {urlsplit(url).hostname for _, url in api.calls} == {"git.example"}


@pytest.mark.parametrize(
    "script",
    [
        (403, JSON, {"message": f"the token {TOKEN} lacks a scope"}),
        (502, {"Content-Type": "text/html"}, f"<html>Authorization: token {TOKEN}".encode()),
        (200, {"Content-Type": "text/html"}, f"<html>{TOKEN}".encode()),
        errors.Lost(f"cannot send {TOKEN}"),
        errors.NotSent(f"cannot send {TOKEN}"),
    ],
)
@pytest.mark.parametrize("call", [IDEMPOTENT["GET"], CREATING["POST"]], ids=["GET", "POST"])
async def test_a_token_that_is_echoed_is_struck_out(script, call):
    api = Canned(script)
    with pytest.raises(errors.ForgeError) as raised:
        await call(api)
    shown = (
        "".join(traceback.format_exception(raised.value)) if not isinstance(script, Exception) else str(raised.value) + repr(raised.value)
    )
    assert TOKEN not in shown + repr(raised.value) + repr(vars(raised.value))
    assert TOKEN not in repr(api) + repr(vars(api)["_token"]) + repr(api.seen)


async def test_a_token_in_a_reply_never_comes_in():
    assert await Canned((200, JSON, {"body": TOKEN})).getitem("/x") == {"body": "***"}


# --- lists


async def collect(api, url="/x", **options):
    return [item["id"] async for item in api.getiter(url, **options)]


class Lists:
    """A server's list with its habits; `shift` new items appear in front after every request."""

    def __init__(self, *, total, empty, paged, cap, link, wrapped, shift, ids):
        self.items = list(ids)
        self.total, self.empty, self.paged, self.cap, self.link, self.wrapped, self.shift = total, empty, paged, cap, link, wrapped, shift
        self.requests = 0

    def __call__(self, method, url):
        self.requests += 1
        assert self.requests < 200, "the client loops"
        query = parse_qs(urlsplit(url).query)
        size = min(int(query["limit"][0]), self.cap)
        start = (int(query["page"][0]) - 1) * size
        page = self.items[start : start + size] if self.paged else list(self.items)
        headers = dict(JSON)
        count = {"whole": len(self.items), "page": len(page), "none": None}[self.total]
        body = [{"id": number} for number in page] or self.empty
        if self.wrapped:
            body = {"things": body} | ({"total_count": count} if count is not None else {})
        elif count is not None:
            headers["X-Total-Count"] = str(count)
        if self.link:
            headers["Link"] = '<http://localhost:1/api/v1/x?page=2>; rel="next"'
        first = max(self.items, default=0) + 1
        self.items[:0] = range(first, first + self.shift)
        return 200, headers, body


@settings(deadline=None, max_examples=200)
@given(
    count=st.sampled_from([0, 1, 49, 50, 51, 75, 100, 101]),
    total=st.sampled_from(["whole", "page", "none"]),
    empty=st.sampled_from([[], None]),
    paged=st.booleans(),
    max_items=st.sampled_from([7, 25, 50, 1000]),
    cap=st.sampled_from([7, 20, 50]),
    link=st.booleans(),
    wrapped=st.booleans(),
    shift=st.integers(0, 6),
)
def test_every_item_comes_once_whatever_the_habits(count, total, empty, paged, max_items, cap, link, wrapped, shift):
    server = Lists(
        total=total,
        empty=empty,
        paged=paged,
        cap=max_items if total == "page" else cap,
        link=link,
        wrapped=wrapped,
        shift=shift,
        ids=range(count, 0, -1),
    )
    got = asyncio.run(collect(Canned(answer=server, max_items=max_items), key="things" if wrapped else None))
    assert len(got) == len(set(got))
    assert set(got) >= set(range(1, count + 1))


@settings(deadline=None, max_examples=100)
@given(visible=st.lists(st.booleans(), max_size=160), empty=st.sampled_from([[], None]), paged=st.booleans())
def test_a_timeline_filtered_after_paging_is_whole_up_to_one_empty_page(visible, empty, paged):
    """The server pages first and hides afterwards; its total counts the page alone."""
    pages = [range(start, min(start + 50, len(visible))) for start in range(0, len(visible), 50)] if paged else [range(len(visible))]

    def answer(method, url):
        number = int(parse_qs(urlsplit(url).query)["page"][0]) if paged else 1
        shown = [{"id": index + 1} for index in (pages[number - 1] if number <= len(pages) else ()) if visible[index]]
        return 200, JSON | {"X-Total-Count": str(len(shown))}, shown or empty

    got = asyncio.run(collect(Canned(answer=answer), "/timeline"))
    hidden = [not any(visible[index] for index in page) for page in pages]
    two_empty = next((index for index in range(len(hidden) - 1) if hidden[index] and hidden[index + 1]), len(pages))
    assert got == [index + 1 for page in pages[:two_empty] for index in page if visible[index]]


async def test_a_timeline_may_begin_with_a_hidden_page():
    own_count = JSON | {"X-Total-Count": "1"}
    pages = [(200, JSON, None), (200, own_count, [{"id": 1}]), (200, own_count, [{"id": 2}]), (200, JSON, None)]
    api = Canned(*pages)
    assert await collect(api, "/timeline") == [1, 2]
    assert len(api.sent) == 6, "three pages are asked for at a time"


async def test_seventy_five_of_seventy_five_in_two_requests():
    server = Lists(total="whole", empty=None, paged=True, cap=50, link=False, wrapped=False, shift=0, ids=range(75))
    api = Canned(answer=server)
    assert sorted(await collect(api)) == list(range(75))
    assert [urlsplit(url).query for _, url in api.calls] == ["page=1&limit=50", "page=2&limit=50"]


async def test_a_short_page_is_no_end():
    total = JSON | {"X-Total-Count": "3"}
    api = Canned((200, total, [{"id": 1}]), (200, total, [{"id": 2}]), (200, total, [{"id": 3}]))
    assert await collect(api) == [1, 2, 3]


async def test_many_items_inserted_at_once_do_not_look_like_an_unpaged_list():
    first = [{"id": number} for number in (2, 1)]
    answers = [(200, JSON | {"X-Total-Count": str(total)}, page) for total, page in ((4, first), (6, first), (6, [{"id": 0}, {"id": -1}]))]
    api = Canned(*answers, (200, JSON | {"X-Total-Count": "6"}, []))
    assert await collect(api) == [2, 1, 0, -1]


async def test_items_without_an_id_are_told_apart_by_their_content():
    page = [{"user": {"id": 1}, "content": "eyes"}, {"user": {"id": 2}, "content": "eyes"}]
    api = Canned((200, JSON, page))
    assert [item async for item in api.getiter("/x")] == page
    assert len(api.sent) == 2


@pytest.mark.parametrize(("body", "key"), [({"id": 1}, None), ("x", None), ({"other": []}, "data"), ([], "data"), (3, None)])
async def test_what_is_no_list_is_a_bad_reply(body, key):
    with pytest.raises(errors.BadReply, match="list") as raised:
        await collect(Canned((200, JSON, body)), key=key)
    assert raised.value.route == "/x"


@pytest.mark.parametrize(
    ("reply", "limit"),
    [
        ((200, JSON, {"max_response_items": 20}), 20),
        ((200, JSON, {"max_response_items": 500}), 50),
        ((200, JSON, {"max_response_items": 0}), 50),
        ((200, JSON, {}), 50),
        ((200, JSON, None), 50),
        ((404, {}, b"404 page not found\n"), 50),
    ],
)
async def test_the_page_size_is_asked_once(reply, limit):
    api = Canned(answer=lambda _, url: reply if url.endswith("/settings/api") else (200, JSON, []), max_items=None)
    await collect(api)
    await collect(api)
    assert [urlsplit(url).path.rpartition("/")[2] for _, url in api.calls] == ["api", "x", "x"]
    assert api.calls[1][1].endswith(f"limit={limit}")


async def test_a_list_waits_for_a_server_that_is_down():
    with pytest.raises(errors.Unavailable):
        await collect(Canned(DOWN[0], max_items=None))


async def test_a_500_of_a_list_is_probed_before_it_is_tried_again():
    def answer(method, url):
        return (404, JSON, {"message": "not found"}) if url.endswith("/issues/9") else (500, JSON, {"message": ""})

    api = Canned(answer=answer)
    with pytest.raises(errors.NotFound):
        await collect(api, ISSUES + "/{index}/comments", probe=ISSUES + "/{index}", **HERE, index=9)
    assert (len(api.sent), api.slept) == (2, [])
    replies = iter([DOWN[0], OK, (200, JSON, [{"id": 3}]), (200, JSON, [])])
    api = Canned(answer=lambda *_: next(replies))
    assert await collect(api, ISSUES + "/{index}/comments", probe=ISSUES + "/{index}", **HERE, index=9) == [3]


# --- the adapter, against a small server


@pytest.fixture
async def server():
    """(base URL, requests seen): answers by the last part of the path."""
    seen = []

    async def answer(request):
        seen.append((request.method, request.raw_path, dict(request.headers), await request.read()))
        match request.path.rpartition("/")[2]:
            case "slow":
                await asyncio.sleep(0.5)
            case "cut":
                reply = web.StreamResponse(headers={"Content-Length": "1000", "Content-Type": "application/json"})
                await reply.prepare(request)
                await reply.write(b'[{"id":')
                request.transport.abort()
                return reply
            case "moved":
                raise web.HTTPFound("/api/v1/plain")
            case "big":
                return web.Response(body=b" " * (17 * 1024 * 1024), content_type="application/json")
            case "cookie":
                return web.json_response({}, headers={"Set-Cookie": "session=1"})
            case "gone":
                return web.Response(status=204)
        return web.json_response({"path": request.raw_path}, headers={"X-Total-Count": "1"})

    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}", seen
    await runner.cleanup()


async def test_the_adapter_sends_what_it_is_given(server, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    base, seen = server
    async with GiteaClient(base, Secret(TOKEN), user_agent="agent/1") as api:
        assert await api.getitem("/branches/{b}", b="dispatch/issue-7") == {"path": "/api/v1/branches/dispatch%2Fissue-7"}
        assert await api.post("/{x}", {"a": "é"}, x="post") == {"path": "/api/v1/post"}
        assert await api.delete("/gone", {"content": "eyes"}) is None
        assert await api.getitem("/moved") == {"path": "/api/v1/plain"}
        await api.getitem("/cookie")
        await api.getitem("/plain")
    assert [method for method, *_ in seen] == ["GET", "POST", "DELETE", "GET", "GET", "GET", "GET"]
    assert json.loads(seen[1][3]) == {"a": "é"}
    assert json.loads(seen[2][3]) == {"content": "eyes"}
    for _, _, headers, _ in seen:
        assert headers["Authorization"] == f"token {TOKEN}"
        assert headers["User-Agent"] == "agent/1"
        assert "Cookie" not in headers


async def test_a_closed_client_opens_again_and_closing_twice_is_fine(server):
    api = GiteaClient(server[0], Secret(TOKEN))
    await api.close()
    assert await api.getitem("/a")
    await api.close()
    await api.close()
    assert await api.getitem("/a")
    await api.close()


def no_waiting(**options):
    return {"jitter": lambda: 0.0} | options


async def test_a_refused_connection_never_left():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        async with GiteaClient(f"http://127.0.0.1:{unused.getsockname()[1]}", Secret(TOKEN), **no_waiting()) as api:
            with pytest.raises(errors.Unavailable) as raised:
                await api.post("/x", {})
    assert raised.value.sent is False
    assert "127.0.0.1" not in str(raised.value)
    assert "refused" in str(raised.value)


async def test_an_unknown_host_never_left():
    async with GiteaClient("http://no-such-host.invalid", Secret(TOKEN), **no_waiting()) as api:
        with pytest.raises(errors.NotSent):
            await api._request("POST", "http://no-such-host.invalid/x", {}, b"")


async def test_a_connection_that_does_not_open_in_time_never_left():
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        address = full.getsockname()
        waiting = [socket.socket() for _ in range(4)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(address)
        async with GiteaClient(f"http://127.0.0.1:{address[1]}", Secret(TOKEN), connect_seconds=0.2) as api:
            with pytest.raises(errors.NotSent, match="Timeout"):
                await api._request("POST", f"http://127.0.0.1:{address[1]}/x", {}, b"{}")
        for one in waiting:
            one.close()


@pytest.mark.parametrize("path", ["slow", "cut"])
async def test_an_answer_that_does_not_come_whole_is_lost(server, path):
    base, seen = server
    async with GiteaClient(base, Secret(TOKEN), total_seconds=0.2, **no_waiting()) as api:
        with pytest.raises(errors.OutcomeUnknown) as raised:
            await api.post("/{x}", {}, x=path)
        assert len(seen) == 1
        with pytest.raises(errors.Unavailable):
            await api.getitem("/{x}", x=path)
    assert len(seen) == 5
    shown = "".join(traceback.format_exception(raised.value))
    assert TOKEN not in shown
    assert base not in shown


async def test_a_reply_above_the_cap_is_refused(server):
    async with GiteaClient(server[0], Secret(TOKEN)) as api:
        with pytest.raises(errors.BadReply, match="exceeds"):
            await api.getitem("/big")


async def test_no_more_requests_at_once_than_allowed():
    running, most = 0, []

    async def answer(request):
        nonlocal running
        running += 1
        most.append(running)
        await asyncio.sleep(0.02)
        running -= 1
        return web.json_response({})

    app = web.Application()
    app.router.add_get("/{tail:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    async with GiteaClient(f"http://127.0.0.1:{runner.addresses[0][1]}", Secret(TOKEN), concurrency=2) as api:
        await asyncio.gather(*(api.getitem("/x") for _ in range(8)))
    await runner.cleanup()
    assert (len(most), max(most)) == (8, 2)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
async def test_certificates_are_verified(tmp_path):
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    request = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1"
    subprocess.run([*request.split(), "-keyout", key, "-out", cert], check=True, capture_output=True)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(cert, key)

    async def answer(request):
        return web.json_response({"id": 1})

    app = web.Application()
    app.router.add_get("/api/v1/x", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
    base = f"https://127.0.0.1:{runner.addresses[0][1]}"
    try:
        async with GiteaClient(base, Secret(TOKEN), **no_waiting()) as api:
            with pytest.raises(errors.Unavailable, match="certificate") as raised:
                await api.getitem("/x")
            assert raised.value.sent is False
        async with GiteaClient(base, Secret(TOKEN), ca_file=cert) as api:
            assert await api.getitem("/x") == {"id": 1}
    finally:
        await runner.cleanup()
