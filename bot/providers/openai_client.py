"""One streamed chat-completions call: it gives a whole reply or says exactly how it failed, and it never retries, redirects or reads the environment."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from bot.models import DispatchError
from bot.providers.classify import Failure, Seen
from bot.providers.entries import Entry
from bot.redaction import MINIMUM_LENGTH, Redactor, Secret, encodable, terminal

if TYPE_CHECKING:
    from openai import AsyncOpenAI, DefaultAsyncHttpxClient

CONNECT_SECONDS: Final = 10.0
_TEXT_CAP: Final = 600
_BODY_CAP: Final = 1_048_576
_REPLY_CAP: Final = 8_388_608


@dataclass(frozen=True, slots=True)
class RawUsage:
    """Token counts as the server sent them."""

    input: int
    output: int
    cached: int


@dataclass(frozen=True, slots=True)
class Reply:
    """A complete reply: the assistant message in plain chat form, why it ended, and the counts, if any were sent."""

    message: dict[str, Any]
    finish_reason: str
    usage: RawUsage | None


class CallFailedError(DispatchError):
    """The call gave no reply; `failure` says what was seen."""

    def __init__(self, failure: Failure) -> None:
        self.failure = failure
        super().__init__(f"{failure.seen.value} {failure.status or ''} {failure.text}".strip())


class OpenAIClient:
    """All calls of one process share one connection pool; it belongs to the event loop of the first call."""

    def __init__(self) -> None:
        self._http: DefaultAsyncHttpxClient | None = None
        # A new SDK object asks for the platform in a thread at its first call, so one is kept for each entry.
        self._clients: dict[str, tuple[tuple[str, ...], AsyncOpenAI]] = {}

    async def aclose(self) -> None:
        """Closes the connections."""
        if self._http is not None:
            await self._http.aclose()
            self._http = None
            self._clients.clear()

    async def call(
        self,
        entry: Entry,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        *,
        key: Secret,
        max_tokens: int,
        seconds: float,
        changed: Collection[str] = (),
        on_text: Callable[[str], None] | None = None,
    ) -> Reply:
        """One request. Raises CallFailedError; cancellation passes.

        `seconds` bounds the whole call, `entry.idle_seconds` the silence within it. `changed` names request parameters this server does not know:
        `max_tokens` is then sent as `max_completion_tokens`, `stream_options` not at all. `on_text` gets each piece of text, or "" for any
        other sign of life.
        """
        import openai

        arrived = _Arrived(on_text or (lambda _piece: None))
        try:
            async with asyncio.timeout(seconds):
                return await self._stream(entry, messages, tools, key=key, max_tokens=max_tokens, changed=changed, arrived=arrived)
        except TimeoutError:
            failure = arrived.failure(Seen.TIMEOUT, f"no complete reply within {seconds:.0f} s")
        except openai.APIStatusError as error:
            failure = _status(error)
        except openai.APITimeoutError:
            failure = arrived.failure(Seen.TIMEOUT, f"no answer for {entry.idle_seconds:.0f} s")
        except openai.APIConnectionError as error:
            failure = arrived.failure(
                Seen.TLS if _is_tls(error) else Seen.CUT if arrived.started else Seen.CONNECT, str(error.__cause__ or error)
            )
        except openai.APIError as error:
            failure = arrived.failure(Seen.ERROR_IN_STREAM, error.message, code=_code(error.body))
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
            failure = arrived.failure(Seen.GARBAGE, "the reply is not JSON")
        except _OddError as error:
            failure = arrived.failure(error.seen, str(error), code=error.code)
        raise CallFailedError(_shown(failure, [*entry.secrets(), key])) from None

    async def _stream(
        self,
        entry: Entry,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        *,
        key: Secret,
        max_tokens: int,
        changed: Collection[str],
        arrived: _Arrived,
    ) -> Reply:
        from openai import AsyncStream

        body: dict[str, Any] = {"model": entry.model, "stream": True, "messages": list(messages)}
        body["max_completion_tokens" if "max_tokens" in changed else "max_tokens"] = max_tokens
        if "stream_options" not in changed:
            body["stream_options"] = {"include_usage": True}
        if tools:
            body["tools"] = list(tools)
        # The SDK's typed call walks arguments and chunks type by type, on the event loop: 60 ms for a conversation of 100 steps. This one takes JSON as it is.
        stream = await self._client(entry, key).post(
            "/chat/completions", body={**body, **entry.extra_body}, cast_to=object, stream=True, stream_cls=AsyncStream[object]
        )
        try:
            arrived.started = True
            arrived.headers = stream.response.headers
            kind = stream.response.headers.get("content-type", "").lower()
            if "json" in kind and "stream" not in kind:
                return _whole(await _read(stream.response.aiter_bytes()))
            async for chunk in stream:
                arrived.take(chunk)
        finally:
            await stream.close()
        return arrived.reply(html="html" in kind)

    def _client(self, entry: Entry, key: Secret) -> AsyncOpenAI:
        import openai

        if self._http is None:
            self._http = openai.DefaultAsyncHttpxClient(follow_redirects=False, trust_env=False)
        headers = {name: value.reveal() for name, value in entry.headers.items()}
        made_of = (entry.base_url, str(entry.idle_seconds), key.reveal(), *headers, *headers.values())
        kept = self._clients.get(entry.name)
        if kept is not None and kept[0] == made_of:
            return kept[1]
        client = openai.AsyncOpenAI(
            api_key=key.reveal(),
            base_url=entry.base_url,
            max_retries=0,
            timeout=openai.Timeout(entry.idle_seconds, connect=min(CONNECT_SECONDS, entry.idle_seconds)),
            default_headers=headers,
            http_client=self._http,
        )
        # The SDK takes these from the environment where they are not given.
        client.organization = client.project = None
        self._clients[entry.name] = (made_of, client)
        return client


class _OddError(Exception):
    """A 200 that is no reply."""

    def __init__(self, seen: Seen, text: str, code: str = "") -> None:
        self.seen = seen
        self.code = code
        super().__init__(text)


@dataclass(slots=True)
class _Call:
    id: str = ""
    name: str = ""
    arguments: list[str] = field(default_factory=list)


class _Arrived:
    """What has come of a reply so far. Nothing of it is used before a finish_reason has come."""

    def __init__(self, on_text: Callable[[str], None]) -> None:
        self.started = False
        self.headers: Mapping[str, str] = {}
        self._on_text = on_text
        self._chunks = 0
        self._size = 0
        self._text: list[str] = []
        self._calls: list[_Call] = []
        self._by_index: dict[int, _Call] = {}
        self._finish = ""
        self._usage: RawUsage | None = None

    def failure(self, seen: Seen, text: str, *, code: str = "") -> Failure:
        return Failure(seen, text=text, code=code, headers=self.headers, started=self.started, received=self._size)

    def take(self, chunk: object) -> None:
        """Adds one chunk. Servers leave fields out or send null, so nothing is taken for granted."""
        self._usage = _usage(_field(chunk, "usage")) or self._usage
        choices = _field(chunk, "choices")
        piece = ""
        if isinstance(choices, list) and choices:
            self._chunks += 1
            choice = choices[0]
            delta = _field(choice, "delta")
            content = _field(delta, "content")
            if isinstance(content, str) and content:
                piece = content
                self._grow(len(content))
                self._text.append(content)
            calls = _field(delta, "tool_calls")
            for call in calls if isinstance(calls, list) else ():
                self._take_call(call)
            reason = _field(choice, "finish_reason")
            self._finish = reason if isinstance(reason, str) and reason else self._finish
        self._on_text(piece)

    def _take_call(self, delta: Any) -> None:
        index, given = _field(delta, "index"), _field(delta, "id")
        function = _field(delta, "function")
        name, arguments = _field(function, "name"), _field(function, "arguments")
        number = index if isinstance(index, int) else len(self._by_index) - (0 if name else 1)
        call = self._by_index.get(number)
        # Some servers number every call 0: another id with a name begins a new one.
        if call is None or (given and call.id and given != call.id and name):
            call = _Call()
            self._by_index[number] = call
            self._calls.append(call)
        if isinstance(given, str) and given:
            call.id = given
        if isinstance(name, str) and name:
            call.name = name
        if isinstance(arguments, str) and arguments:
            self._grow(len(arguments))
            call.arguments.append(arguments)

    def _grow(self, size: int) -> None:
        self._size += size
        if self._size > _REPLY_CAP:
            raise _OddError(Seen.GARBAGE, f"the reply is longer than {_REPLY_CAP} characters")

    def reply(self, *, html: bool) -> Reply:
        if not self._chunks:
            raise _OddError(Seen.GARBAGE, "a web page came instead of a reply" if html else "the reply is empty")
        if not self._finish:
            raise _OddError(Seen.CUT, "the reply ended without finish_reason")
        return _reply(
            "".join(self._text), [(call.id, call.name, "".join(call.arguments)) for call in self._calls], self._finish, self._usage
        )


def _reply(text: str, calls: Sequence[tuple[str, str, str]], finish_reason: str, usage: RawUsage | None) -> Reply:
    if finish_reason == "content_filter":
        raise _OddError(Seen.ERROR_BODY, "the provider's content filter ended the reply", "content_filter")
    # A stream may part a character between two pieces.
    calls = [(encodable(call), encodable(name), encodable(arguments)) for call, name, arguments in calls]
    message: dict[str, Any] = {"role": "assistant", "content": encodable(text)}
    if calls:
        seen: set[str] = set()
        message["tool_calls"] = []
        for number, (given, name, arguments) in enumerate(calls):
            # A missing or repeated id would leave a result unpaired in the next request.
            call_id = given if given and given not in seen else f"call_{number}_{len(seen)}"
            seen.add(call_id)
            message["tool_calls"].append({"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}})
    return Reply(message, finish_reason, usage)


async def _read(pieces: AsyncIterator[bytes]) -> bytes:
    body = bytearray()
    async for piece in pieces:
        body += piece
        if len(body) > _BODY_CAP:
            raise _OddError(Seen.GARBAGE, f"the reply is larger than {_BODY_CAP} bytes")
    return bytes(body)


def _whole(body: bytes) -> Reply:
    """A server that does not stream: its reply is taken as it is."""
    data = json.loads(body)
    if isinstance(data, dict) and data.get("error"):
        error = data["error"]
        text = error.get("message") if isinstance(error, dict) else error
        raise _OddError(Seen.ERROR_BODY, str(text), _code(error))
    try:
        choice = data["choices"][0]
        message = choice["message"]
        calls = [
            (str(call.get("id") or ""), str(call["function"]["name"]), _arguments(call["function"].get("arguments")))
            for call in message.get("tool_calls") or ()
        ]
        finish = choice.get("finish_reason")
        text = message.get("content") or ""
    except (TypeError, KeyError, IndexError, AttributeError):
        raise _OddError(Seen.GARBAGE, "the reply has no choices") from None
    if not isinstance(finish, str) or not isinstance(text, str):
        raise _OddError(Seen.CUT, "the reply has no finish_reason")
    return _reply(text, calls, finish, _usage(data.get("usage")))


def _arguments(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value or {})


def _field(value: object, name: str) -> Any:
    """A field of a JSON object; None where there is none, or no object."""
    return value.get(name) if isinstance(value, dict) else None


def _usage(data: object) -> RawUsage | None:
    counts = (
        _field(data, "prompt_tokens"),
        _field(data, "completion_tokens"),
        _field(_field(data, "prompt_tokens_details"), "cached_tokens"),
    )
    sent, got, cached = (value if isinstance(value, int) and value >= 0 else 0 for value in counts)
    return RawUsage(sent, got, cached) if sent or got else None


def _status(error: Any) -> Failure:
    """An openai.APIStatusError."""
    body = error.body
    text = body.get("message") if isinstance(body, dict) else None
    if not isinstance(text, str):
        text = error.response.text if not isinstance(body, dict) else json.dumps(body)
    return Failure(Seen.STATUS, status=error.status_code, text=text, code=_code(body), headers=error.response.headers)


def _code(body: Any) -> str:
    """The error's code or, where there is none, its type."""
    if not isinstance(body, dict):
        return ""
    code = body.get("code")
    return str(code if code is not None and not isinstance(code, dict) else body.get("type") or "")


def _is_tls(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ssl.SSLError) or "certificate_verify_failed" in str(error).lower():
            return True
        error = error.__cause__ or error.__context__
    return False


def _shown(failure: Failure, secrets: Sequence[Secret]) -> Failure:
    redactor = Redactor(secret for secret in secrets if len(secret.reveal()) >= MINIMUM_LENGTH)
    text = terminal(redactor.scrub(failure.text)).strip()
    headers = {name.lower(): value for name, value in failure.headers.items() if name.lower().startswith(("retry-after", "x-ratelimit-"))}
    return Failure(
        failure.seen, failure.status, " ".join(text.split())[:_TEXT_CAP], failure.code[:60], headers, failure.started, failure.received
    )
