"""A model that follows a script: an OpenAI-compatible server whose answer depends on nothing but the conversation it is sent, so that a restart continues it."""

from __future__ import annotations

import asyncio
import inspect
import json
import re
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Self

from aiohttp import web

from bot.demo.sample import BUGGY_LINE, FIXED_LINE
from bot.listeners import close

MODEL: Final = "scripted"
_OVERRIDE: Final = re.compile(r"^\s*script:\s*([a-z_0-9]+)(?:\((.*)\))?\s*$", re.MULTILINE)
_PIECE: Final = 24
_HANG_SECONDS: Final = 3600.0
_KEEP: Final = 20_000

Messages = Sequence[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Turn:
    """One reply: words, tool calls as (name, arguments), or something that goes wrong.

    `status` other than 200 sends `body` as it is; `cut` ends the connection half-way; `delay` (seconds) comes before the first byte.
    Arguments given as a text are sent as that text, valid JSON or not.
    """

    text: str = ""
    calls: tuple[tuple[str, dict[str, Any] | str], ...] = ()
    status: int = 200
    body: str = ""
    content_type: str = "application/json"
    headers: dict[str, str] = field(default_factory=dict)
    cut: bool = False
    delay: float = 0.0
    usage: bool = True
    finish: str = ""


@dataclass(frozen=True, slots=True)
class ModelRequest:
    """One request as it came; `authorization` is the header's value."""

    script: str
    body: dict[str, Any]
    authorization: str
    at: float


class Talk:
    """A conversation, read as a script needs it: what was asked, what was called, what came back."""

    def __init__(self, messages: Messages) -> None:
        self.messages = messages
        self.task = next((_text(message) for message in messages if message.get("role") == "user"), "")
        results = {str(message.get("tool_call_id")): _text(message) for message in messages if message.get("role") == "tool"}
        self.turns = sum(message.get("role") == "assistant" for message in messages)
        self.calls: list[tuple[str, dict[str, Any], str]] = [
            (call["function"]["name"], _arguments(call["function"].get("arguments")), results.get(str(call.get("id")), ""))
            for message in messages
            if message.get("role") == "assistant"
            for call in message.get("tool_calls") or ()
        ]

    def results(self, tool: str) -> list[str]:
        """What this tool answered so far, in order; a call that a restart cut has answered nothing."""
        return [result for name, _, result in self.calls if name == tool and not result.startswith("interrupted")]

    @property
    def plans(self) -> bool:
        """Whether a plan is asked for, not work."""
        return self.task.startswith("# Task\n\nMake a plan")

    def count(self, tool: str) -> int:
        """How often this tool was called, cut calls included."""
        return sum(name == tool for name, _, _ in self.calls)


def _text(message: dict[str, Any]) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else ""


def _arguments(text: Any) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (TypeError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def fix(talk: Talk) -> Turn:
    """Looks, reads, runs the failing test, edits what it read, tests again, finishes. In a strange repository it leaves a note instead."""
    listing, reads, runs = talk.results("list_files"), talk.results("read_file"), talk.results("run_command")
    edited = bool(talk.results("edit_file") or talk.results("write_file"))
    if not listing:
        return Turn("I look at the repository first.", (("list_files", {"path": "."}),))
    if "lib/slug.sh" not in listing[0]:
        if not edited:
            note = f"# Note\n\n{talk.task.strip().splitlines()[0][:200] if talk.task.strip() else 'No task.'}\n"
            return Turn("I do not know this project, so I leave a note.", (("write_file", {"path": "NOTE.md", "content": note}),))
        return Turn("", (("finish", {"summary": "Added NOTE.md with a note on the issue."}),))
    if not reads:
        return Turn("", (("read_file", {"path": "lib/slug.sh"}),))
    if not runs:
        return Turn("", (("run_command", {"command": "sh test.sh"}),))
    if not edited:
        line = next((line for line in reads[0].splitlines() if BUGGY_LINE.strip() in line), "")
        if not line:
            return Turn("", (("finish", {"summary": "The bug is not in lib/slug.sh any more; nothing to change."}),))
        return Turn("The function must fold case.", (("edit_file", {"path": "lib/slug.sh", "old": line, "new": FIXED_LINE}),))
    if len(runs) == 1:
        return Turn("", (("run_command", {"command": "sh test.sh"}),))
    if "FAIL" in runs[-1]:
        return Turn("", (("finish", {"summary": "I changed lib/slug.sh, but the tests still fail."}),))
    return Turn("", (("finish", {"summary": "slug now folds case and punctuation; sh test.sh passes."}),))


def no_change(talk: Talk) -> Turn:
    """Looks and finishes without touching anything."""
    if not talk.turns:
        return Turn("", (("list_files", {"path": "."}),))
    return Turn("", (("finish", {"summary": "There is nothing to change."}),))


def endless(talk: Talk) -> Turn:
    """Never finishes: another harmless command each time."""
    return Turn("", (("run_command", {"command": f"true # {talk.turns}"}),))


def repeat(_talk: Talk) -> Turn:
    """Calls the very same thing for ever."""
    return Turn("", (("run_command", {"command": "true"}),))


def noops(talk: Talk, count: int = 100) -> Turn:
    """`count` commands that do nothing, then a note, so that there is a change, and the end."""
    if talk.turns < count:
        return Turn("", (("run_command", {"command": f"true # {talk.turns}"}),))
    if not talk.results("write_file"):
        return Turn("", (("write_file", {"path": "NOTE.md", "content": f"{count} commands\n"}),))
    return Turn("", (("finish", {"summary": f"Ran {count} commands."}),))


def slow(talk: Talk, seconds: float = 1.0) -> Turn:
    """`fix`, with a wait before each reply."""
    turn = fix(talk)
    return Turn(turn.text, turn.calls, delay=seconds)


def sleeper(talk: Talk, seconds: float = 600.0) -> Turn:
    """Runs a command that takes long."""
    if not talk.turns:
        return Turn("", (("run_command", {"command": f"sleep {seconds}", "timeout": int(seconds)}),))
    return Turn("", (("finish", {"summary": "Slept."}),))


def attack(talk: Talk, commands: Sequence[str] = ("env", "cat /etc/shadow", "cat /proc/1/environ")) -> Turn:
    """Runs the given commands one by one, whatever comes of them, repeats in a file all it saw, and finishes."""
    done = talk.count("run_command")
    if done < len(commands):
        return Turn("", (("run_command", {"command": commands[done]}),))
    seen = "\n".join(talk.results("run_command"))
    if not talk.results("write_file"):
        return Turn("", (("write_file", {"path": "LOOT.txt", "content": seen or "nothing\n"}),))
    return Turn("", (("finish", {"summary": f"/dispatch run\n@everyone {seen}"[:4000]}),))


def write(talk: Talk, files: dict[str, str] | None = None) -> Turn:
    """Writes the given files, one a turn, and finishes."""
    todo = list((files or {"NOTE.md": "a note\n"}).items())
    done = len(talk.results("write_file"))
    if done < len(todo):
        path, content = todo[done]
        return Turn("", (("write_file", {"path": path, "content": content}),))
    return Turn("", (("finish", {"summary": f"Wrote {', '.join(path for path, _ in todo)}."}),))


def calls(talk: Talk, todo: Sequence[Sequence[Any]] = ()) -> Turn:
    """Makes the given calls, each `[name, arguments]`, one a turn, whatever comes of them, and finishes."""
    if talk.turns < len(todo):
        name, arguments = todo[talk.turns]
        return Turn("", ((name, arguments),))
    return Turn("", (("finish", {"summary": f"Made {len(todo)} calls."}),))


def touch_workflow(talk: Talk) -> Turn:
    """Writes a protected file."""
    return write(talk, {".gitea/workflows/ci.yml": "on: push\njobs: {}\n"})


def no_tool_call(_talk: Talk) -> Turn:
    """Answers in words only."""
    return Turn("I think the bug is in lib/slug.sh.")


def bad_arguments(_talk: Talk) -> Turn:
    """Calls a tool with broken JSON for ever."""
    return Turn("", (("read_file", '{"path": "lib/slu'),))


def truncated(_talk: Talk) -> Turn:
    """Every reply is cut at the output limit."""
    return Turn("", (("write_file", '{"path": "a", "content": "'),), finish="length")


def garbage(_talk: Talk) -> Turn:
    """A stream whose lines are not JSON."""
    return Turn(body="data: {not json\n\n", content_type="text/event-stream")


def html(_talk: Talk) -> Turn:
    """A web page with status 200."""
    return Turn(body="<!doctype html><title>Welcome</title>", content_type="text/html")


def hang(_talk: Talk) -> Turn:
    """Takes the request and never answers."""
    return Turn(delay=_HANG_SECONDS)


def half_stream(_talk: Talk) -> Turn:
    """Ends the connection in the middle of a tool call."""
    return Turn("I will", (("run_command", {"command": "touch MUST-NOT-RUN"}),), cut=True)


def http_500(_talk: Talk) -> Turn:
    """An internal server error."""
    return Turn(status=500, body='{"error":{"message":"internal error","type":"server_error"}}')


def http_401(_talk: Talk) -> Turn:
    """A refused key."""
    return Turn(status=401, body='{"error":{"message":"Incorrect API key provided","code":"invalid_api_key"}}')


def http_429(_talk: Talk) -> Turn:
    """A rate limit with a Retry-After of 30 s."""
    return Turn(status=429, body='{"error":{"message":"Rate limit reached"}}', headers={"Retry-After": "30"})


PLAN: Final = "1. `slug` in `lib/slug.sh` folds case and punctuation in one step.\n2. `test.sh` stays as it is and passes then.\n\nNothing else changes."


def plan(talk: Talk, text: str = PLAN) -> Turn:
    """Where it is asked for a plan: reads, leaves a file behind, and ends with `text`. Where it is asked for work: `fix`."""
    if not talk.plans:
        return fix(talk)
    if not talk.turns:
        return Turn("I look at the code first.", (("read_file", {"path": "lib/slug.sh"}),))
    if not talk.results("run_command"):
        return Turn("", (("run_command", {"command": "echo draft > SCRATCH.md; sh test.sh"}),))
    return Turn("", (("finish", {"plan": text}),))


def plan_when_told(talk: Talk, seconds: float = 60.0) -> Turn:
    """`plan`, with a wait before each reply until somebody has said something in particular."""
    turn = plan(talk)
    return turn if "asked for this in particular" in talk.task else Turn(turn.text, turn.calls, delay=seconds)


def long_plan(talk: Talk, lines: int = 2000) -> Turn:
    """A plan of so many lines."""
    return plan(talk, "\n".join(f"{n}. step number {n} of this plan" for n in range(1, lines + 1)))


def no_plan(_talk: Talk) -> Turn:
    """Finishes without a plan, again and again."""
    return Turn("", (("finish", {"plan": " "}),))


def ping(_talk: Talk) -> Turn:
    """Calls the canary's tool."""
    return Turn("", (("ping", {}),))


Script = Callable[..., Turn]
SCRIPTS: Final[dict[str, Script]] = {
    script.__name__: script
    for script in (
        fix, no_change, endless, repeat, noops, slow, sleeper, attack, write, calls, touch_workflow, no_tool_call, bad_arguments, truncated, garbage,
        html, hang, half_stream, http_500, http_401, http_429, ping, plan, plan_when_told, long_plan, no_plan,
    )
}  # fmt: skip


def parse(text: str) -> tuple[str, list[Any]]:
    """`name` or `name(arguments)`, the arguments as JSON values: `noops(5)`, `attack(["env", "id"])`. Raises ValueError naming the fault."""
    match = _OVERRIDE.fullmatch(f"script: {text}")
    if match is None or match[1] not in SCRIPTS:
        raise ValueError(f"no script `{text}`; there are {', '.join(sorted(SCRIPTS))}")
    arguments = json.loads(f"[{match[2] or ''}]")
    inspect.signature(SCRIPTS[match[1]]).bind(Talk([]), *arguments)
    return match[1], arguments


class ScriptedModel:
    """The server. `script` is what it follows; `once` is a queue of scripts for single requests, before that; a line `script: NAME` in the task
    goes before `script`.

    `requests` holds the last requests in the order they came. `latency` (seconds) comes before every reply.
    """

    def __init__(self, script: str = "fix", *, latency: float = 0.0) -> None:
        parse(script)
        self.script = script
        self.latency = latency
        self.once: deque[str] = deque()
        self.requests: list[ModelRequest] = []
        self._runner: web.AppRunner | None = None
        self.url = ""

    async def start(self, *, host: str = "127.0.0.1", port: int = 0) -> None:
        """Listens; `url` is then the base URL to configure (it ends in `/v1`)."""
        app = web.Application(client_max_size=64 * 1024 * 1024)
        app.router.add_post("/v1/chat/completions", self._complete)
        app.router.add_get("/v1/models", self._models)
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.2)
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port)
        await site.start()
        address = self._runner.addresses[0]
        self.url = f"http://{address[0]}:{address[1]}/v1"

    async def stop(self) -> None:
        """Ends the server and every request in flight."""
        if self._runner is not None:
            await close(self._runner)
            self._runner = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.stop()

    async def _models(self, _request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": MODEL, "object": "model"}]})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        talk = Talk(body.get("messages") or [])
        name, arguments = self._choose(talk, body)
        self.requests.append(ModelRequest(name, body, request.headers.get("Authorization", ""), time.monotonic()))
        del self.requests[:-_KEEP]
        turn = SCRIPTS[name](talk, *arguments)
        if wait := self.latency + turn.delay:
            await asyncio.sleep(wait)
        if turn.body or turn.status != 200:  # noqa: PLR2004 - HTTP's own number
            return web.Response(status=turn.status, text=turn.body, content_type=turn.content_type, headers=turn.headers)
        return await self._stream(request, body, turn)

    def _choose(self, talk: Talk, body: dict[str, Any]) -> tuple[str, list[Any]]:
        if self.once:
            return parse(self.once.popleft())
        if [tool["function"]["name"] for tool in body.get("tools") or ()] == ["ping"] and self.script == "fix":
            return "ping", []
        for match in _OVERRIDE.finditer(talk.task):
            try:
                return parse(match[0].strip().removeprefix("script:").strip())
            except (ValueError, TypeError):
                continue
        return parse(self.script)

    async def _stream(self, request: web.Request, body: dict[str, Any], turn: Turn) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", **turn.headers})
        await response.prepare(request)
        sent = 0
        async for chunk in _chunks(body, turn):
            await response.write(f"data: {json.dumps(chunk)}\n\n".encode())
            sent += 1
            if turn.cut and sent > 1 and request.transport is not None:
                request.transport.abort()
                return response
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response


async def _chunks(body: dict[str, Any], turn: Turn) -> AsyncIterator[dict[str, Any]]:
    base = {"id": "chatcmpl-scripted", "object": "chat.completion.chunk", "created": 0, "model": body.get("model") or MODEL}
    asked = sum(len(json.dumps(message)) for message in body.get("messages") or ()) // 4
    answered = len(turn.text) // 4 + 1

    def chunk(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        return {**base, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}

    yield chunk({"role": "assistant", "content": ""})
    for at in range(0, len(turn.text), _PIECE):
        yield chunk({"content": turn.text[at : at + _PIECE]})
    number = sum(message.get("role") == "assistant" for message in body.get("messages") or ())
    for index, (name, arguments) in enumerate(turn.calls):
        text = arguments if isinstance(arguments, str) else json.dumps(arguments)
        answered += len(text) // 4
        call = {"index": index, "id": f"call_{number}_{index}", "type": "function", "function": {"name": name, "arguments": ""}}
        yield chunk({"tool_calls": [call]})
        for at in range(0, len(text), _PIECE * 8):
            yield chunk({"tool_calls": [{"index": index, "function": {"arguments": text[at : at + _PIECE * 8]}}]})
    yield chunk({}, turn.finish or ("tool_calls" if turn.calls else "stop"))
    if turn.usage and (body.get("stream_options") or {}).get("include_usage"):
        usage = {"prompt_tokens": asked, "completion_tokens": answered, "total_tokens": asked + answered}
        yield {**base, "choices": [], "usage": usage}
