"""The chain against a server that goes wrong in every way of the error table."""

from __future__ import annotations

import asyncio
import contextlib
import json

import pytest
from aiohttp import web

from bot.config import PriceSettings
from bot.providers.chain import AllCoolingError, ContextOverflowError, DeadlineError, ProviderChain, ProviderFailedError
from bot.providers.entries import Entry
from bot.providers.health import EntryHealth, EntryState, MemoryHealth
from bot.providers.nous import LoggedOutError
from bot.redaction import Secret

KEY = "sk-canary-0123456789abcdef"
USER = [{"role": "user", "content": "do it"}]
TOOLS = [{"type": "function", "function": {"name": "ping", "description": "", "parameters": {"type": "object", "properties": {}}}}]


def sse(*chunks, done=True):
    body = "".join(f"data: {c if isinstance(c, str) else json.dumps(c)}\n\n" for c in chunks)
    return body + ("data: [DONE]\n\n" if done else "")


def delta(finish=None, **fields):
    return {
        "id": "c",
        "object": "chat.completion.chunk",
        "created": 0,
        "model": "m",
        "choices": [{"index": 0, "delta": fields, "finish_reason": finish}],
    }


USAGE = {"id": "c", "choices": [], "usage": {"prompt_tokens": 100, "completion_tokens": 10, "prompt_tokens_details": {"cached_tokens": 40}}}
GOOD = sse(delta(role="assistant", content="Hel"), delta(content="lo"), delta("stop"), USAGE)
CALL = sse(
    delta(tool_calls=[{"index": 0, "id": "a", "type": "function", "function": {"name": "ping", "arguments": ""}}]),
    delta(tool_calls=[{"index": 0, "function": {"arguments": "{}"}}]),
    delta("tool_calls"),
    USAGE,
)


class Server:
    """Answers with the next of `answers`, the last one for ever. An answer is a text (SSE), a (status, body, headers) or a coroutine function."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.requests = []

    async def handle(self, request):
        self.requests.append((await request.json(), {k.title(): v for k, v in request.headers.items()}))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if callable(answer):
            return await answer(request)
        if isinstance(answer, str):
            return web.Response(text=answer, content_type="text/event-stream")
        status, body, headers = answer
        return web.Response(status=status, text=body, content_type=headers.pop("type", "application/json"), headers=headers)


@pytest.fixture
async def serve():
    runners = []

    async def start(*answers):
        server = Server(*answers)
        app = web.Application()
        app.router.add_post("/v1/chat/completions", server.handle)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        runners.append(runner)
        server.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        return server

    yield start
    for runner in runners:
        await runner.cleanup()


class Bench:
    def __init__(self, *entries, logins=None, health=None, clock=None):
        self.now = clock or [1_800_000_000_000]
        self.slept = []
        self.calls = []
        self.falls = []
        self.in_flight = {}
        self.entries = list(entries)
        self.health = health or MemoryHealth(lambda: self.now[0])
        self.chain = ProviderChain(
            lambda: self.entries,
            health=self.health,
            now_ms=lambda: self.now[0],
            sleep=self.sleep,
            random=lambda: 0.0,
            on_call=lambda **facts: self.calls.append((facts["provider"], facts["result"])),
            on_fallback=lambda **facts: self.falls.append((facts["from_provider"], facts["to_provider"])),
            in_flight=self.flight,
            logins=logins,
        )

    @contextlib.contextmanager
    def flight(self, provider):
        self.in_flight[provider] = self.in_flight.get(provider, 0) + 1
        try:
            yield
        finally:
            self.in_flight[provider] -= 1

    async def sleep(self, seconds):
        self.slept.append(seconds)

    async def complete(self, messages=USER, *, seconds=20.0, **more):
        deadline = asyncio.get_running_loop().time() + seconds
        return await self.chain.complete(messages, TOOLS, max_tokens=500, deadline=deadline, **more)

    async def state(self, number=0):
        return (await self.chain.availability())[number][2:4]


@pytest.fixture
async def bench():
    made = []

    def make(*entries, **more):
        made.append(Bench(*entries, **more))
        return made[-1]

    yield make
    for one in made:
        await one.chain.aclose()


def entry(server, name="a", **more):
    url = server if isinstance(server, str) else server.url
    return Entry(**{"provider": name, "model": "m", "base_url": url, "key": Secret(KEY), "idle_seconds": 2.0, **more})


def error(message="x", code=None):
    return json.dumps({"error": {"message": message, "code": code}})


async def test_streams_a_reply_with_usage_and_price(serve, bench):
    server = await serve(GOOD)
    pieces = []
    one = bench(
        entry(
            server, headers={"X-Org": Secret("secret-header")}, extra_body={"seed": 7}, price=PriceSettings(input=1, output=2, cached=0.5)
        )
    )
    done = await one.complete(on_text=pieces.append)
    assert done.message == {"role": "assistant", "content": "Hello"}
    assert (done.finish_reason, done.provider, done.model) == ("stop", "a", "m")
    assert (done.usage.input, done.usage.output, done.usage.cached, done.usage.source) == (100, 10, 40, "reported")
    assert done.usage.usd == pytest.approx((60 * 1 + 40 * 0.5 + 10 * 2) / 1e6)
    assert "".join(pieces) == "Hello"
    body, headers = server.requests[0]
    assert body["max_tokens"] == 500
    assert body["stream_options"] == {"include_usage": True}
    assert body["seed"] == 7
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert headers["X-Org"] == "secret-header"


async def test_tool_calls_are_put_together_and_paired(serve, bench):
    odd = sse(
        delta(tool_calls=[{"index": 0, "id": "x", "function": {"name": "one", "arguments": '{"a"'}}]),
        delta(tool_calls=[{"index": 0, "function": {"arguments": ":1}"}}]),
        delta(tool_calls=[{"index": 0, "id": "y", "function": {"name": "two", "arguments": "{}"}}]),
        delta(tool_calls=[{"index": 3, "function": {"name": "three", "arguments": "{}"}}]),
        delta(tool_calls=None, content=None, reasoning_content="hm"),
        delta("tool_calls"),
    )
    done = await bench(entry(await serve(odd))).complete()
    calls = done.message["tool_calls"]
    assert [(c["function"]["name"], c["function"]["arguments"]) for c in calls] == [("one", '{"a":1}'), ("two", "{}"), ("three", "{}")]
    assert len({c["id"] for c in calls}) == 3
    assert all(c["id"] for c in calls)
    assert done.usage.source == "estimated"
    assert set(done.message) == {"role", "content", "tool_calls"}


async def test_a_server_that_does_not_stream_is_understood(serve, bench):
    body = {
        "choices": [
            {
                "message": {"content": "hi", "tool_calls": [{"id": "1", "function": {"name": "ping", "arguments": {}}}]},
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 5, "completion_tokens": 6},
    }
    done = await bench(entry(await serve((200, json.dumps(body), {})))).complete()
    assert done.message["tool_calls"][0]["function"] == {"name": "ping", "arguments": "{}"}
    assert (done.usage.input, done.usage.output) == (5, 6)


async def cut(request):
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    await response.write(
        sse(delta(tool_calls=[{"index": 0, "id": "a", "function": {"name": "rm", "arguments": "{}"}}]), done=False).encode()
    )
    request.transport.abort()
    return response


async def silent(request):
    await asyncio.sleep(30)


async def stalls(request):
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    await response.write(sse(delta(content="a"), done=False).encode())
    await asyncio.sleep(30)


ROWS = {
    # name: answer, result, calls of the bad entry, state afterwards, cool-down ms
    "401": ((401, error(), {}), "auth", 1, EntryState.DOWN, 0),
    "403": ((403, error(), {}), "auth", 1, EntryState.DOWN, 0),
    "403 credit": ((403, error("insufficient credits"), {}), "billing", 1, EntryState.COOLING, 3_600_000),
    "402": ((402, error("Payment required"), {}), "billing", 1, EntryState.COOLING, 3_600_000),
    "402 resets": ((402, error("usage limit; try again later"), {}), "rate_limit", 1, EntryState.COOLING, 60_000),
    "404 model": ((404, error("model not found"), {}), "model_gone", 1, EntryState.DOWN, 0),
    "404": ((404, "nothing here", {"type": "text/plain"}), "bad_endpoint", 1, EntryState.DOWN, 0),
    "408": ((408, error(), {}), "timeout", 2, EntryState.COOLING, 30_000),
    "429": ((429, error(), {"Retry-After": "17"}), "rate_limit", 1, EntryState.COOLING, 17_000),
    "429 bare": ((429, error(), {}), "rate_limit", 1, EntryState.COOLING, 60_000),
    "429 overloaded": ((429, error("overloaded"), {}), "overloaded", 1, EntryState.COOLING, 60_000),
    "400": ((400, error("bad messages"), {}), "bad_request", 1, EntryState.HEALTHY, 0),
    "422": ((422, error(), {}), "bad_request", 1, EntryState.HEALTHY, 0),
    "policy": ((400, error("content policy"), {}), "refused", 1, EntryState.HEALTHY, 0),
    "content_filter": (sse(delta(content="x"), delta("content_filter")), "refused", 1, EntryState.HEALTHY, 0),
    "500": ((500, error(), {}), "server", 4, EntryState.COOLING, 30_000),
    "502": ((502, "<html>", {"type": "text/html"}), "server", 4, EntryState.COOLING, 30_000),
    "503": ((503, error(), {}), "overloaded", 4, EntryState.COOLING, 30_000),
    "503 later": ((503, error(), {"Retry-After": "120"}), "overloaded", 1, EntryState.COOLING, 120_000),
    "529": ((529, error(), {}), "overloaded", 4, EntryState.COOLING, 30_000),
    "html": ((200, "<html></html>", {"type": "text/html"}), "garbage", 2, EntryState.COOLING, 30_000),
    "empty": ("", "garbage", 2, EntryState.COOLING, 30_000),
    "broken json": ((200, "{nope", {}), "garbage", 2, EntryState.COOLING, 30_000),
    "broken line": ("data: {nope\n\n", "garbage", 2, EntryState.COOLING, 30_000),
    "error body": ((200, error("x"), {}), "garbage", 2, EntryState.COOLING, 30_000),
    "error body with code": ((200, error("x", 429), {}), "rate_limit", 1, EntryState.COOLING, 60_000),
    "choices null": ((200, '{"choices": null}', {}), "garbage", 2, EntryState.COOLING, 30_000),
    "choices empty": ((200, '{"choices": []}', {}), "garbage", 2, EntryState.COOLING, 30_000),
    "cut": (cut, "cut", 2, EntryState.COOLING, 30_000),
    "no finish_reason": (sse(delta(content="half")), "cut", 2, EntryState.COOLING, 30_000),
    "error in stream": (sse(delta(content="half"), error("insufficient credits")), "billing", 1, EntryState.COOLING, 3_600_000),
    "no answer": (silent, "timeout", 2, EntryState.COOLING, 30_000),
    "stalls": (stalls, "timeout", 2, EntryState.COOLING, 30_000),
}


@pytest.mark.parametrize("row", ROWS)
async def test_error_row(row, serve, bench):
    answer, result, count, state, cool_ms = ROWS[row]
    if isinstance(answer, tuple):
        status, body, headers = answer
        bad = await serve(*[(status, body, dict(headers)) for _ in range(6)])
    else:
        bad = await serve(answer)
    good = await serve(GOOD)
    one = bench(entry(bad, idle_seconds=0.3), entry(good, "b"))
    done = await one.complete()
    assert (done.message["content"], done.provider) == ("Hello", "b")
    assert one.calls == [*[("a", result)] * count, ("b", "ok")]
    assert one.in_flight == {"a": 0, "b": 0}, "entered and left around every call"
    assert len(bad.requests) == count
    assert one.falls == [("a", "b")]
    assert await one.state() == (state, one.now[0] + cool_ms if cool_ms else 0)
    if result in ("server", "overloaded") and count > 1:
        assert one.slept == [1, 2, 4]
    # An entry known to be ill gets nothing more; one that merely could not take this request does.
    before = len(bad.requests)
    again = await one.complete()
    assert again.provider == "b"
    assert (len(bad.requests) > before) == (state is EntryState.HEALTHY)


async def test_redirect_is_never_followed(serve, bench):
    other = await serve(GOOD)
    bad = await serve((307, "", {"Location": other.url + "/chat/completions"}))
    one = bench(entry(bad))
    with pytest.raises(AllCoolingError, match="bad_endpoint"):
        await one.complete()
    assert other.requests == []
    assert (await one.state())[0] is EntryState.DOWN


async def test_nobody_listens(bench):
    one = bench(entry("http://127.0.0.1:9/v1"))
    with pytest.raises(AllCoolingError) as caught:
        await one.complete()
    assert one.calls == [("a", "timeout")] * 2
    assert caught.value.until_ms == one.now[0] + 30_000
    assert not caught.value.maybe_billed


async def test_context_overflow_cools_nothing_and_goes_to_the_caller(serve, bench):
    bad = await serve((400, error("maximum context length is 10"), {}))
    other = await serve(GOOD)
    one = bench(entry(bad), entry(other, "b", context_window=500_000))
    with pytest.raises(ContextOverflowError) as caught:
        await one.complete()
    assert (caught.value.entry, other.requests, await one.state()) == ("a/m", [], (EntryState.HEALTHY, 0))
    assert one.chain.wider(caught.value.window) == ("b", "m")


async def test_too_long_for_every_window_is_not_sent(serve, bench):
    server = await serve(GOOD)
    with pytest.raises(ContextOverflowError):
        await bench(entry(server, context_window=1024)).complete([{"role": "user", "content": "x" * 9000}])
    assert server.requests == []


async def test_unsupported_max_tokens_is_repaired_once_and_remembered(serve, bench):
    text = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens'."
    server = await serve((400, error(text), {}), GOOD)
    one = bench(entry(server))
    await one.complete()
    await one.complete()
    bodies = [body for body, _ in server.requests]
    assert ["max_tokens" in body for body in bodies] == [True, False, False]
    assert [body.get("max_completion_tokens") for body in bodies] == [None, 500, 500]
    stubborn = await serve(*[(400, error(text), {})] * 5)
    two = bench(entry(stubborn))
    with pytest.raises(ProviderFailedError, match="bad_request"):
        await two.complete()
    assert len(stubborn.requests) == 2


async def test_two_bad_requests_agree(serve, bench):
    servers = [await serve(*[(400, error(f"bad {n}"), {}) for _ in range(2)]) for n in range(2)]
    cooling = await serve(*[(429, error(), {}) for _ in range(2)])
    one = bench(entry(servers[0]), entry(servers[1], "b"), entry(cooling, "c"))
    with pytest.raises(ProviderFailedError, match="bad 0"):
        await one.complete()
    # A single one, while another could say yes later, is not the end.
    two = bench(entry(servers[0]), entry(cooling, "c"))
    with pytest.raises(AllCoolingError):
        await two.complete()


async def test_refused_by_all(serve, bench):
    server = await serve((400, error("content policy"), {}))
    with pytest.raises(ProviderFailedError) as caught:
        await bench(entry(server)).complete()
    assert caught.value.refused


async def test_a_cut_call_is_counted(serve, bench):
    server = await serve(cut, GOOD)
    done = await bench(entry(server)).complete()
    assert done.usage.input > 100
    assert done.usage.source == "estimated"


async def test_half_open_lets_one_probe_through(serve, bench):
    gate = asyncio.Event()

    async def slow(request):
        await gate.wait()
        return web.Response(text=GOOD, content_type="text/event-stream")

    server = await serve((429, error(), {}), slow)
    clock = [1_800_000_000_000]
    health = MemoryHealth(lambda: clock[0])
    workers = [bench(entry(server), health=health, clock=clock) for _ in range(8)]
    with pytest.raises(AllCoolingError) as caught:
        await workers[0].complete()
    assert caught.value.until_ms == clock[0] + 60_000
    results = await asyncio.gather(*(w.complete() for w in workers), return_exceptions=True)
    assert all(isinstance(r, AllCoolingError) for r in results)
    assert len(server.requests) == 1

    clock[0] += 60_001
    assert (await workers[3].state())[0] is EntryState.HALF_OPEN
    tasks = [asyncio.create_task(w.complete()) for w in workers]
    await asyncio.sleep(0.3)
    assert len(server.requests) == 2
    gate.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert sum(not isinstance(r, Exception) for r in results) == 1
    assert (await workers[5].state())[0] is EntryState.HEALTHY
    await asyncio.gather(*(w.complete() for w in workers))


async def test_failed_probe_cools_longer_and_frees_the_lease(serve, bench):
    server = await serve(*[(500, error(), {}) for _ in range(8)], GOOD)
    one = bench(entry(server))
    for cool in (30_000, 60_000):
        with pytest.raises(AllCoolingError):
            await one.complete()
        assert await one.state() == (EntryState.COOLING, one.now[0] + cool)
        one.now[0] += cool + 1
    assert (await one.complete()).message["content"] == "Hello"
    assert (await one.health.load())["a/m"] == EntryHealth()


async def test_cancelled_probe_frees_the_lease(serve, bench):
    server = await serve((429, error(), {}), silent, GOOD)
    one = bench(entry(server))
    with pytest.raises(AllCoolingError):
        await one.complete()
    one.now[0] += 60_001
    task = asyncio.create_task(one.complete())
    await asyncio.sleep(0.2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await one.complete()).message["content"] == "Hello"


async def test_down_is_left_by_a_changed_key_or_config(serve, bench):
    server = await serve((401, error(), {}), (404, error(), {}), GOOD)
    one = bench(entry(server))
    with pytest.raises(AllCoolingError, match="down"):
        await one.complete()
    one.entries = [entry(server, key=Secret("sk-another-key-0123"))]
    with pytest.raises(AllCoolingError, match="bad_endpoint"):
        await one.complete()
    one.entries = [entry(server, key=Secret("sk-a-third-key-0123"))]
    assert (await one.state())[0] is EntryState.DOWN
    one.entries = [entry(server, key=Secret("sk-a-third-key-0123"), extra_body={"x": 1})]
    assert (await one.complete()).provider == "a"


async def test_provider_wide_cool_down(serve, bench):
    limited = (429, error(), {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "600"})
    server, spare = await serve(limited), await serve(GOOD)
    one = bench(entry(server, "nous"), entry(spare, "nous", model="n"), entry(spare, "b"))
    done = await one.complete()
    assert (done.provider, len(spare.requests)) == ("b", 1)
    assert await one.state(1) == (EntryState.COOLING, one.now[0] + 600_000)


async def test_hint_of_another_program_is_obeyed(serve, bench):
    server = await serve(GOOD)
    one = bench(entry(server, hint_until_ms=1_800_000_050_000))
    with pytest.raises(AllCoolingError) as caught:
        await one.complete()
    assert caught.value.until_ms == 1_800_000_050_000
    assert server.requests == []


async def test_prefer_goes_first(serve, bench):
    first, second = await serve(GOOD), await serve(GOOD)
    done = await bench(entry(first), entry(second, "b")).complete(prefer=("b", "m"))
    assert (done.provider, first.requests) == ("b", [])


async def test_deadline(serve, bench):
    server = await serve(silent)
    one = bench(entry(server))
    with pytest.raises(DeadlineError):
        await one.complete(seconds=0.3)
    with pytest.raises(DeadlineError):
        await one.complete(seconds=0)
    assert (await one.state())[0] is EntryState.HEALTHY


async def test_the_key_is_in_no_error(serve, bench, monkeypatch):
    monkeypatch.setenv("OPENAI_ORG_ID", "org-from-environment")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    server = await serve((401, error(f"Incorrect API key {KEY} and {KEY[:-3]} \x1b[31m"), {}))
    with pytest.raises(AllCoolingError) as caught:
        await bench(entry(server)).complete()
    assert KEY[:-3] not in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert not any(name.lower() == "openai-organization" for name in server.requests[0][1])


class OneLogin:
    def __init__(self, *keys):
        self.keys = list(keys)
        self.asked = []

    async def fresh(self, *, rejected=None):
        self.asked.append(rejected and rejected.reveal())
        key = self.keys.pop(0)
        if isinstance(key, Exception):
            raise key
        return Secret(key)


async def test_login_renews_once_after_a_401(serve, bench):
    server = await serve((401, error(), {}), GOOD)
    login = OneLogin("old-key-000000", "new-key-111111")
    done = await bench(entry(server, "nous", login="nous"), logins={"nous": login}).complete()
    assert done.message["content"] == "Hello"
    assert login.asked == [None, "old-key-000000"]
    assert [h["Authorization"] for _, h in server.requests] == ["Bearer old-key-000000", "Bearer new-key-111111"]


async def test_logged_out_is_down(serve, bench):
    server = await serve(GOOD)
    one = bench(entry(server, "nous", login="nous"), logins={"nous": OneLogin(LoggedOutError("run `hermes auth add nous`"))})
    with pytest.raises(AllCoolingError, match="hermes auth add nous"):
        await one.complete()
    assert server.requests == []
    assert (await one.state())[0] is EntryState.DOWN


async def test_ping(serve, bench):
    server = await serve(CALL)
    one = bench(entry(server))
    await one.health.save("a/m", EntryHealth(EntryState.DOWN, reason="x", fingerprint=one.entries[0].fingerprint(with_key=False)))
    assert (await one.chain.ping(one.entries[0])).ok
    assert (await one.state())[0] is EntryState.HEALTHY
    body, _ = server.requests[0]
    assert (body["max_tokens"], [t["function"]["name"] for t in body["tools"]]) == (64, ["ping"])
    words = bench(entry(await serve(GOOD)))
    assert not (await words.chain.ping(words.entries[0])).ok
    broken = bench(entry(await serve((500, error("boom"), {}))))
    canary = await broken.chain.ping(broken.entries[0])
    assert not canary.ok
    assert "boom" in canary.text


async def test_worst_cost_is_an_upper_bound(bench):
    one = bench(
        entry("http://x/v1", price=PriceSettings(input=1, output=10)), entry("http://y/v1", "b", price=PriceSettings(input=3, output=3))
    )
    usd, tokens = one.chain.worst_cost([{"role": "user", "content": "x" * 3000}], 1000)
    assert tokens >= 2000
    assert usd >= 0.011


async def test_no_entries(bench):
    with pytest.raises(ProviderFailedError, match="no model provider"):
        await bench().complete()


def test_health_survives_json():
    health = EntryHealth(EntryState.COOLING, 5, "r", 2, "f")
    assert EntryHealth.from_json(json.loads(json.dumps(health.to_json()))) == health
    assert EntryHealth.from_json({}) == EntryHealth()
