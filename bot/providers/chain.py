"""The provider chain owns every retry: it tries entries in order, remembers who is ill where all workers see it, and never calls an entry known to be down."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Final, Protocol

from bot.models import DispatchError, FailureReason, Usage
from bot.providers.classify import After, Diagnosis, ErrorClass, Failure, Seen, classify, diagnose
from bot.providers.condition import Condition, Conditions
from bot.providers.entries import Entries, Entry, estimate_tokens
from bot.providers.health import EntryState, HealthStore
from bot.providers.nous import LoggedOutError, RefreshPendingError
from bot.providers.openai_client import CallFailedError, OpenAIClient, RawUsage, Reply
from bot.redaction import Secret

# With every entry down, only a person or a changed key helps; the sprint looks again after this.
ALL_DOWN_MS: Final = 600_000
PROBING_MS: Final = 15_000
PING_TOKENS: Final = 64
PING_SECONDS: Final = 20.0
SMALLEST_REPLY: Final = 64
_JITTER: Final = 0.1
_AGREEING: Final = 2

Messages = list[dict[str, Any]]


class ProviderError(DispatchError):
    """No reply. `maybe_billed` says that some call had begun to answer, so that it may cost money though nothing came of it."""

    def __init__(self, text: str, *, maybe_billed: bool = False) -> None:
        self.text = text
        self.maybe_billed = maybe_billed
        super().__init__(text)


class AllCoolingError(ProviderError):
    """No entry may be called before `until_ms` (Unix milliseconds); 0 where pauses alone keep all of them."""

    def __init__(self, until_ms: int, reason: str, *, maybe_billed: bool = False) -> None:
        self.until_ms = until_ms
        self.reason = reason
        super().__init__(reason, maybe_billed=maybe_billed)


class ContextOverflowError(ProviderError):
    """The messages are too long for the entry; the same messages must not be sent to it again. `entry` is its name, `window` its size in tokens."""

    def __init__(self, text: str, *, entry: str, window: int) -> None:
        self.entry = entry
        self.window = window
        super().__init__(text)


class ProviderFailedError(ProviderError):
    """No entry can do this at all. `refused` says that content filters did it."""

    def __init__(self, reason: FailureReason, text: str, *, refused: bool = False, maybe_billed: bool = False) -> None:
        self.reason = reason
        self.refused = refused
        super().__init__(text, maybe_billed=maybe_billed)


class DeadlineError(ProviderError):
    """The caller's deadline came before a reply."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A complete reply. `message` is the assistant message in plain chat form; `usage` includes an estimate for calls that were cut on the way.

    `seconds` is the time of the call that answered.
    """

    message: dict[str, Any]
    finish_reason: str
    usage: Usage
    provider: str
    model: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Canary:
    """Whether an entry answered a small request with a well-formed tool call."""

    ok: bool
    text: str
    seconds: float


class Login(Protocol):
    """The owner of a short-lived key (`bot/providers/nous.py`)."""

    async def fresh(self, *, rejected: Secret | None = None) -> Secret: ...


class Caller(Protocol):
    """Makes one request (`OpenAIClient.call`)."""

    async def call(
        self,
        entry: Entry,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        *,
        key: Secret,
        max_tokens: int,
        seconds: float,
        changed: frozenset[str] = frozenset(),
        on_text: Callable[[str], None] | None = None,
    ) -> Reply: ...

    async def aclose(self) -> None: ...


class Requester:
    """Makes single requests with the right key, and repairs those whose parameters a server does not know (once per server, remembered)."""

    def __init__(self, client: Caller, logins: Mapping[str, Login]) -> None:
        self._client = client
        self._logins = logins
        self._changed: dict[tuple[str, str], frozenset[str]] = {}

    async def aclose(self) -> None:
        """Closes the connections."""
        await self._client.aclose()

    def renews(self, entry: Entry) -> bool:
        """Whether a refused key of this entry can be renewed."""
        return entry.login in self._logins

    async def key(self, entry: Entry, rejected: Secret | None = None) -> Secret:
        """The key to send now. Raises LoggedOutError, RefreshPendingError."""
        login = self._logins.get(entry.login)
        return await login.fresh(rejected=rejected) if login else entry.key

    async def request(
        self,
        entry: Entry,
        messages: Messages,
        tools: list[dict[str, Any]],
        *,
        key: Secret,
        max_tokens: int,
        seconds: float,
        on_text: Callable[[str], None] | None = None,
    ) -> Reply:
        """One reply, or CallFailedError."""
        place = (entry.base_url, entry.model)
        while True:
            changed = self._changed.get(place, frozenset())
            try:
                return await self._client.call(
                    entry, messages, tools, key=key, max_tokens=max_tokens, seconds=seconds, changed=changed, on_text=on_text
                )
            except CallFailedError as error:
                repair = diagnose(error.failure, nous=False, failures=0, now_ms=0).repair
                if not repair or repair in changed:
                    raise
                self._changed[place] = changed | {repair}


@dataclass(frozen=True, slots=True)
class _Means:
    requester: Requester
    conditions: Conditions
    now_ms: Callable[[], int]
    sleep: Callable[[float], Awaitable[None]]
    random: Callable[[], float]
    on_call: Callable[..., None]
    on_fallback: Callable[..., None]
    in_flight: Callable[[str], AbstractContextManager[None]]


class ProviderChain:
    """`entries` is asked at every call, so that a changed configuration holds from the next one.

    `now_ms` is Unix time; `random` gives 0 to 1; `logins` by name (`nous`). `on_call(provider=, model=, result=, seconds=)` is told of every call
    (`result` is `ok` or an ErrorClass), `on_fallback(from_provider=, to_provider=)` of every change of entry; `in_flight(provider)` is entered
    around every call.
    """

    def __init__(
        self,
        entries: Entries,
        *,
        health: HealthStore,
        now_ms: Callable[[], int],
        sleep: Callable[[float], Awaitable[None]],
        random: Callable[[], float],
        on_call: Callable[..., None] | None = None,
        on_fallback: Callable[..., None] | None = None,
        in_flight: Callable[[str], AbstractContextManager[None]] | None = None,
        logins: Mapping[str, Login] | None = None,
        client: Caller | None = None,
    ) -> None:
        self._entries = entries
        self._means = _Means(
            requester=Requester(client or OpenAIClient(), logins or {}),
            conditions=Conditions(health, now_ms=now_ms, random=random),
            now_ms=now_ms,
            sleep=sleep,
            random=random,
            on_call=on_call or _ignore,
            on_fallback=on_fallback or _ignore,
            in_flight=in_flight or _uncounted,
        )

    async def aclose(self) -> None:
        """Closes the connections."""
        await self._means.requester.aclose()

    async def complete(
        self,
        messages: Messages,
        tools: list[dict[str, Any]],
        *,
        max_tokens: int,
        deadline: float,
        prefer: tuple[str, str] | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> Completion:
        """The first whole reply of the chain. `deadline` is event-loop time; `prefer` names the (provider, model) to try first.

        `on_text` gets each piece of text as it comes, or "" for any other sign of life. Raises AllCoolingError, ContextOverflowError,
        ProviderFailedError, DeadlineError; cancellation passes.
        """
        run = _Run(self._means, messages, tools, max_tokens=max_tokens, deadline=deadline, on_text=on_text)
        return await run.complete(self._ordered(prefer))

    def _ordered(self, prefer: tuple[str, str] | None) -> list[Entry]:
        return sorted(self._entries(), key=lambda entry: (entry.provider, entry.model) != prefer)

    def named(self, *names: str) -> tuple[str, str] | None:
        """The entry to try first: the first that goes by one of `names` (its provider or its model), names in their order; None for none."""
        found = (entry for name in names if name for entry in self._entries() if name in (entry.provider, entry.model))
        return next(((entry.provider, entry.model) for entry in found), None)

    def worst_cost(self, messages: Messages, max_tokens: int, tools: Sequence[Mapping[str, Any]] = ()) -> tuple[float, int]:
        """The most one call with these messages can cost at any entry, (USD, tokens): for the reserve."""
        sent = estimate_tokens(messages, tools)
        usd = max((entry.usage(input_tokens=sent, output_tokens=max_tokens).usd for entry in self._entries()), default=0.0)
        return usd, sent + max_tokens

    def window(self, prefer: tuple[str, str] | None = None) -> int:
        """Context window, in tokens, of the entry tried first; 0 without entries."""
        return next((entry.context_window for entry in self._ordered(prefer)), 0)

    def max_output(self, prefer: tuple[str, str] | None = None) -> int:
        """Longest reply, in tokens, of the entry tried first."""
        return next((entry.max_output_tokens for entry in self._ordered(prefer)), SMALLEST_REPLY)

    def wider(self, window: int) -> tuple[str, str] | None:
        """The entry with the largest context window, if that is above `window`, as a preference."""
        entry = max(self._entries(), key=lambda one: one.context_window, default=None)
        return (entry.provider, entry.model) if entry and entry.context_window > window else None

    async def availability(self) -> list[tuple[str, str, EntryState, int, str]]:
        """(provider, model, state, until_ms, reason) of each entry, in order."""
        entries = list(self._entries())
        found = await self._means.conditions.of_all(entries)
        return [(entry.provider, entry.model, one.state, one.until_ms, one.reason) for entry, one in zip(entries, found, strict=True)]

    async def ping(self, entry: Entry) -> Canary:
        """One request with a single tool `ping`; passes only with a well-formed call of it, and then lifts whatever held the entry."""
        means, loop = self._means, asyncio.get_running_loop()
        began = loop.time()
        try:
            key = await means.requester.key(entry)
            reply = await means.requester.request(
                entry, _PING_MESSAGES, [_PING_TOOL], key=key, max_tokens=PING_TOKENS, seconds=PING_SECONDS
            )
        except (CallFailedError, LoggedOutError, RefreshPendingError) as error:
            return Canary(ok=False, text=str(error), seconds=loop.time() - began)
        calls = reply.message.get("tool_calls") or [{}]
        ok = (calls[0].get("function") or {}).get("name") == "ping"
        if ok:
            await means.conditions.recovered(await means.conditions.of(entry))
        text = "ok" if ok else "it answered, but did not call the tool: this model cannot work here"
        return Canary(ok=ok, text=text, seconds=loop.time() - began)


def _ignore(**_facts: object) -> None:
    return None


def _uncounted(_provider: str) -> AbstractContextManager[None]:
    return nullcontext()


_PING_MESSAGES: Final[Messages] = [{"role": "user", "content": "Call the tool `ping` now, with no arguments. Do not answer in words."}]
_PING_TOOL: Final[dict[str, Any]] = {
    "type": "function",
    "function": {"name": "ping", "description": "Shows that you can call a tool.", "parameters": {"type": "object", "properties": {}}},
}


class _Run:
    """One `complete`: walks the entries and remembers what each said, to tell at the end why there is no reply."""

    def __init__(
        self,
        means: _Means,
        messages: Messages,
        tools: list[dict[str, Any]],
        *,
        max_tokens: int,
        deadline: float,
        on_text: Callable[[str], None] | None,
    ) -> None:
        self._means = means
        self._messages = messages
        self._tools = tools
        self._max_tokens = max_tokens
        self._deadline = deadline
        self._on_text = on_text
        self._sent = estimate_tokens(messages, tools, bytes_per_token=4.0)
        self._wasted = Usage()
        self._said: list[tuple[ErrorClass, str]] = []
        self._down: list[str] = []
        self._paused: list[str] = []
        self._untils: list[tuple[int, str]] = []
        self._too_small: Entry | None = None

    async def complete(self, entries: Sequence[Entry]) -> Completion:
        last: Entry | None = None
        for entry in entries:
            condition = await self._means.conditions.of(entry)
            if not await self._may_call(entry, condition):
                continue
            if last is not None:
                self._means.on_fallback(from_provider=last.provider, to_provider=entry.provider)
            last = entry
            try:
                completion = await self._try(entry, condition)
            finally:
                if condition.state is EntryState.HALF_OPEN:
                    await self._means.conditions.end_probe(condition)
            if completion is not None:
                return completion
        raise self._verdict(entries)

    async def _may_call(self, entry: Entry, condition: Condition) -> bool:
        match condition.state:
            case EntryState.PAUSED:
                self._paused.append(f"{entry.provider} is {condition.reason}")
                return False
            case EntryState.DOWN:
                self._down.append(f"{entry.name} is down, {condition.reason}")
                return False
            case EntryState.COOLING:
                self._untils.append((condition.until_ms, f"{entry.name}: {condition.reason}"))
                return False
            case EntryState.HALF_OPEN | EntryState.HEALTHY:
                pass
        if self._sent >= entry.context_window:
            self._too_small = self._too_small or entry
            return False
        if condition.state is EntryState.HALF_OPEN and not await self._means.conditions.take_probe(condition):
            self._untils.append((self._means.now_ms() + PROBING_MS, f"{entry.name} is being probed after {condition.reason}"))
            return False
        return True

    async def _try(self, entry: Entry, condition: Condition) -> Completion | None:
        """A reply, or None when the next entry is to be tried."""
        means = self._means
        rejected: Secret | None = None
        tries = 0
        while True:
            try:
                key = await means.requester.key(entry, rejected)
            except LoggedOutError as error:
                await self._give_up(entry, Diagnosis(ErrorClass.AUTH, after=After.DOWN), str(error), condition)
                return None
            except RefreshPendingError as error:
                await self._give_up(entry, Diagnosis(ErrorClass.AUTH, after=After.COOL, cool_ms=PROBING_MS), str(error), condition)
                return None
            reply, seconds = await self._call(entry, key)
            if isinstance(reply, Reply):
                await means.conditions.recovered(condition)
                return self._completion(entry, reply, seconds)
            diagnosis = diagnose(reply, nous=_is_nous(entry), failures=condition.failures, now_ms=means.now_ms())
            if diagnosis.error is ErrorClass.CONTEXT_OVERFLOW:
                raise ContextOverflowError(reply.text, entry=entry.name, window=entry.context_window)
            if diagnosis.error is ErrorClass.AUTH and means.requester.renews(entry) and rejected is None:
                rejected = key
                continue
            if tries >= len(diagnosis.delays):
                await self._give_up(entry, diagnosis, reply.text, condition)
                return None
            await self._wait(diagnosis.delays[tries] * (1 + _JITTER * means.random()))
            tries += 1

    async def _wait(self, delay: float) -> None:
        if asyncio.get_running_loop().time() + delay >= self._deadline:
            raise DeadlineError("the time is up", maybe_billed=self._wasted.tokens > 0)
        if delay:
            await self._means.sleep(delay)

    async def _give_up(self, entry: Entry, diagnosis: Diagnosis, text: str, condition: Condition) -> None:
        until = await self._means.conditions.fell_ill(entry, diagnosis, text, failures=condition.failures)
        if diagnosis.after is After.DOWN:
            self._down.append(f"{entry.name} is down, {diagnosis.error.value}: {text}")
        elif until:
            self._untils.append((until, f"{entry.name}: {diagnosis.error.value}: {text}"))
        else:
            self._said.append((diagnosis.error, text))

    async def _call(self, entry: Entry, key: Secret) -> tuple[Reply | Failure, float]:
        means, loop = self._means, asyncio.get_running_loop()
        began = loop.time()
        left = self._deadline - began
        if left <= 0:
            raise DeadlineError("the time is up", maybe_billed=self._wasted.tokens > 0)
        most = max(SMALLEST_REPLY, min(self._max_tokens, entry.max_output_tokens, entry.context_window - self._sent))
        try:
            with means.in_flight(entry.provider):
                reply = await means.requester.request(
                    entry,
                    self._messages,
                    self._tools,
                    key=key,
                    max_tokens=most,
                    seconds=min(entry.call_seconds, left),
                    on_text=self._on_text,
                )
        except CallFailedError as error:
            failure, seconds = error.failure, loop.time() - began
            if failure.started:
                self._wasted += entry.usage(input_tokens=self._sent, output_tokens=failure.received // 4, source="estimated")
            means.on_call(provider=entry.provider, model=entry.model, result=classify(failure).value, seconds=seconds)
            if failure.seen is Seen.TIMEOUT and loop.time() >= self._deadline:
                raise DeadlineError("the time is up", maybe_billed=True) from None
            return failure, seconds
        seconds = loop.time() - began
        means.on_call(provider=entry.provider, model=entry.model, result="ok", seconds=seconds)
        return reply, seconds

    def _completion(self, entry: Entry, reply: Reply, seconds: float) -> Completion:
        usage = _counted(entry, reply, self._sent)
        return Completion(
            message=reply.message,
            finish_reason=reply.finish_reason,
            usage=usage + self._wasted if self._wasted.tokens else usage,
            provider=entry.provider,
            model=entry.model,
            seconds=seconds,
        )

    def _verdict(self, entries: Sequence[Entry]) -> ProviderError:
        billed = self._wasted.tokens > 0
        if not entries:
            return ProviderFailedError(FailureReason.LLM, "no model provider is configured")
        if self._too_small and not self._untils and not self._said:
            small = self._too_small
            return ContextOverflowError("the conversation is longer than the context window", entry=small.name, window=small.context_window)
        for error in (ErrorClass.BAD_REQUEST, ErrorClass.REFUSED):
            same = [text for said, text in self._said if said is error]
            # One entry's no may be its own fault; two that agree, or the only one that could answer, mean the request.
            if len(same) >= _AGREEING or (same and not self._untils):
                refused = error is ErrorClass.REFUSED
                return ProviderFailedError(FailureReason.LLM, f"{error.value}: {same[0]}", refused=refused, maybe_billed=billed)
        if self._untils:
            until, reason = min(self._untils)
            return AllCoolingError(until, reason, maybe_billed=billed)
        if self._paused and not self._down:
            return AllCoolingError(0, "; ".join(dict.fromkeys(self._paused)), maybe_billed=billed)
        why = "; ".join([*self._down[:3], *dict.fromkeys(self._paused)])
        return AllCoolingError(self._means.now_ms() + ALL_DOWN_MS, why, maybe_billed=billed)


def _is_nous(entry: Entry) -> bool:
    return entry.login == "nous" or entry.provider == "nous"


def _counted(entry: Entry, reply: Reply, sent: int) -> Usage:
    usage: RawUsage | None = reply.usage
    if usage is not None:
        return entry.usage(input_tokens=usage.input, output_tokens=usage.output, cached=usage.cached)
    got = estimate_tokens([reply.message], bytes_per_token=4.0)
    return entry.usage(input_tokens=sent, output_tokens=got, source="estimated")
