"""Our own agent loop: each step is booked before the model is called and stored before its tools run, so that a crash resumes at the step in flight."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from bot import prompt
from bot.agents import AgentEnd, AgentJob, AgentResult, Backend, Emit
from bot.agents._history import CIRCLE, FULL, HINT_AT, History
from bot.agents._toolbox import Toolbox
from bot.agents._tools import FINISH, Call, Tools, parse_calls, schemas
from bot.models import EventKind, FailureReason, StoredStep, StoredToolCall, Usage
from bot.providers.chain import (
    AllCoolingError,
    Completion,
    ContextOverflowError,
    DeadlineError,
    ProviderError,
    ProviderFailedError,
)
from bot.sandbox.contract import SandboxUnavailable

BAD_TURNS: Final = 3
SILENT_TURNS: Final = 2
WARN_STEPS: Final = 3
WARN_SHARE: Final = 0.15
WARN_SECONDS: Final = 120.0
HEARTBEAT_SECONDS: Final = 2.0
TEXT_CAP: Final = 8_000
PLAN_CAP: Final = 40_000
LEAST_TOKENS: Final = 256
NO_PLAN: Final = "the model ended without a plan"
_OVERFLOWS: Final = 3
# Stored beside the reply, because what a resumed run does next depends on it.
_FINISH_REASON: Final = "finish_reason"


class _EndError(Exception):
    """The run is over."""

    def __init__(self, result: AgentResult) -> None:
        self.result = result


class Loop:
    """The engine `loop`. One object serves any number of runs at once; it keeps nothing between them."""

    def __init__(self, toolbox: Toolbox) -> None:
        self._toolbox = toolbox

    async def run(self, job: AgentJob, emit: Emit) -> AgentResult:
        """See Engine."""
        return await _Run(self._toolbox, job, emit).run()


plugin = Backend(build=Loop, summary="The service's own loop: every step is stored, sandboxed and resumed after a restart.")


@dataclass(frozen=True, slots=True)
class _Left:
    """What the limits leave at this moment."""

    steps: int
    seconds: float
    tokens: int
    usd: float | None

    def exceeded(self) -> str:
        if self.steps <= 0:
            return "steps"
        if self.seconds <= 0:
            return "seconds"
        if self.tokens <= 0:
            return "tokens"
        return "usd" if self.usd is not None and self.usd <= 0 else ""


class _Run:
    def __init__(self, toolbox: Toolbox, job: AgentJob, emit: Emit) -> None:
        self._box = toolbox
        self._job = job
        self._emit = emit
        forge = toolbox.forge_reader(job.repo, job.issue) if toolbox.forge_reader else None
        self._schemas = schemas(forge=forge is not None, planning=job.planning)
        self._tools = Tools(
            sandbox=toolbox.sandbox,
            files=toolbox.files(job.workdir),
            forge=forge,
            workdir=job.workdir,
            scrub=toolbox.scrub,
            command_seconds=toolbox.command_seconds,
        )
        self._history = History(job.system, job.task)
        self._prefer = toolbox.chain.named(job.model, job.provider)
        self._models: dict[str, None] = {}
        self._n = 0
        self._bad_turns = 0
        self._silent_turns = 0
        self._warned = False
        self._hinted = False
        self._overflows = 0
        self._beat = toolbox.loop_time()
        self._words = ""

    async def run(self) -> AgentResult:
        try:
            result = await self._to_the_end()
            await self._job.trajectory.flush()
        finally:
            self._box.sandbox.dismiss(self._job.workdir)
        return result

    async def _to_the_end(self) -> AgentResult:
        try:
            await self._resume()
            while True:
                self._stop_if_told()
                await self._step()
        except _EndError as end:
            return end.result
        except SandboxUnavailable as error:
            return self._result(AgentEnd.FAILED, reason=FailureReason.SANDBOX, text=str(error))

    def _result(
        self, end: AgentEnd, *, text: str = "", reason: FailureReason | None = None, limit: str = "", until_ms: int = 0
    ) -> AgentResult:
        words = self._box.scrub(text or self._words)[: PLAN_CAP if self._job.planning else TEXT_CAP]
        return AgentResult(end, reason=reason, text=words, limit=limit, until_ms=until_ms, models=tuple(self._models))

    def _stop_if_told(self) -> None:
        if flag := self._job.stopping():
            raise _EndError(self._result(AgentEnd.STOPPED, text=f"stopped: {flag}"))

    async def _resume(self) -> None:
        """Rebuilds the conversation; the last reply's calls that have no row yet are run now, those that were running are not run again."""
        steps = sorted(await self._job.trajectory.steps(), key=lambda step: step.n)
        if not steps:
            return
        stored: dict[int, dict[int, StoredToolCall]] = {}
        for row in await self._job.trajectory.tool_calls():
            stored.setdefault(row.n, {})[row.i] = row
        self._n = steps[-1].n
        for step in steps:
            if step.reply is not None:
                await self._replay(step, stored.get(step.n, {}))

    async def _replay(self, step: StoredStep, rows: Mapping[int, StoredToolCall]) -> None:
        reply = dict(step.reply or {})
        await self._take(step.n, reply, str(reply.pop(_FINISH_REASON, "stop")), rows)

    async def _step(self) -> None:
        left = await self._left()
        if limit := left.exceeded():
            raise _EndError(self._result(AgentEnd.LIMIT, limit=limit))
        self._warn(left)
        self._n += 1
        completion = await self._call(self._n, left)
        if completion is None:
            return
        self._prefer = (completion.provider, completion.model)
        self._models[f"{completion.provider}/{completion.model}"] = None
        await self._take(self._n, completion.message, completion.finish_reason, {})

    async def _left(self) -> _Left:
        limits, trajectory = self._job.limits, self._job.trajectory
        spent, count = await trajectory.totals()
        return _Left(
            steps=limits.steps - count,
            seconds=self._job.deadline - self._box.loop_time(),
            tokens=limits.tokens - spent.tokens,
            usd=limits.usd - spent.usd if limits.usd else None,
        )

    def _warn(self, left: _Left) -> None:
        if self._warned:
            return
        limits = self._job.limits
        near = ""
        if left.steps <= min(WARN_STEPS, limits.steps // 2):
            near = f"{left.steps} step{'s' if left.steps > 1 else ''}"
        elif left.seconds <= min(WARN_SECONDS, limits.seconds * WARN_SHARE):
            near = f"{left.seconds:.0f} seconds"
        elif left.tokens <= limits.tokens * WARN_SHARE:
            near = f"{left.tokens} tokens"
        elif left.usd is not None and left.usd <= limits.usd * WARN_SHARE:
            near = f"{left.usd:.2f} USD"
        if near:
            self._warned = True
            self._history.say(prompt.warning(near, planning=self._job.planning))

    async def _call(self, n: int, left: _Left) -> Completion | None:
        """One model call, booked before and corrected after; None when the conversation was too long and has been shortened."""
        chain, trajectory = self._box.chain, self._job.trajectory
        window, longest = chain.window(self._prefer), chain.max_output(self._prefer)
        messages = self._history.fit(max(int(window * FULL) - longest, int(window * FULL) // 2), self._schemas)
        most = max(LEAST_TOKENS, min(longest, left.tokens))
        usd, tokens = chain.worst_cost(messages, most, self._schemas)
        await trajectory.reserve(n, usd=usd, tokens=tokens)
        self._emit(EventKind.STEP_STARTED, {"step": n})
        # Most replies ask for a command: its sandbox starts while the model thinks.
        self._box.sandbox.expect(self._job.workdir)
        try:
            completion = await chain.complete(
                messages, self._schemas, max_tokens=most, deadline=self._job.deadline, prefer=self._prefer, on_text=self._alive
            )
        except ProviderError as error:
            billed = "maybe billed" if error.maybe_billed else "not billed"
            await trajectory.failed(n, error=f"{billed}: {self._box.scrub(error.text)}")
            self._shorter_or_end(error)
            return None
        self._overflows = 0
        # A secret that the model has got hold of goes no further: not into a row, a file or the next request.
        completion = replace(completion, message=_scrubbed(completion.message, self._box.scrub))
        stored = {**completion.message, _FINISH_REASON: completion.finish_reason}
        trajectory.reply(n, message=stored, usage=completion.usage, provider=completion.provider, model=completion.model)
        self._tell(n, completion)
        return completion

    def _shorter_or_end(self, error: ProviderError) -> None:
        match error:
            case ContextOverflowError():
                self._overflows += 1
                wider = self._box.chain.wider(error.window) if self._overflows > 1 else None
                self._prefer = wider or self._prefer
                # The same messages never go to the same entry again.
                if self._overflows > _OVERFLOWS or not (self._history.shorten() or wider):
                    raise _EndError(self._result(AgentEnd.FAILED, reason=FailureReason.LLM, text=error.text))
            case AllCoolingError():
                raise _EndError(self._result(AgentEnd.PROVIDER, text=error.reason, until_ms=error.until_ms))
            case DeadlineError():
                raise _EndError(self._result(AgentEnd.LIMIT, limit="seconds"))
            case ProviderFailedError(refused=True):
                raise _EndError(self._result(AgentEnd.REFUSED, reason=FailureReason.LLM, text=error.text))
            case _:
                raise _EndError(self._result(AgentEnd.FAILED, reason=FailureReason.LLM, text=error.text))

    def _alive(self, _piece: str) -> None:
        now = self._box.loop_time()
        if now - self._beat >= HEARTBEAT_SECONDS:
            self._beat = now
            self._emit(EventKind.HEARTBEAT, {})
            self._box.sandbox.expect(self._job.workdir)

    def _tell(self, n: int, completion: Completion) -> None:
        usage: Usage = completion.usage
        counts = {"input": usage.input, "output": usage.output, "cached": usage.cached, "usd": usage.usd}
        where = {"step": n, "provider": completion.provider, "model": completion.model}
        self._emit(EventKind.STEP_ENDED, {**where, "result": "ok", "seconds": completion.seconds, **counts})
        if text := self._box.scrub(str(completion.message.get("content") or "")).strip():
            self._emit(EventKind.TEXT, {"step": n, "text": text[:TEXT_CAP]})

    async def _take(self, n: int, message: dict[str, Any], finish_reason: str, rows: Mapping[int, StoredToolCall]) -> None:
        """Acts on a complete reply: runs its calls, or says what to do instead. `rows` are the calls a former life has begun."""
        calls = parse_calls(message, planning=self._job.planning)
        self._words = str(message.get("content") or "").strip() or self._words
        if finish_reason == "length":
            # The end of the reply is missing, so its arguments cannot be trusted, even where they parse.
            self._history.add(message, calls, [prompt.cutoff()] * len(calls))
            self._count_bad(bad=True)
            if not calls:
                self._history.say(prompt.cutoff())
            return
        if not calls:
            self._history.add(message, [], [])
            self._silent_turns += 1
            if self._silent_turns >= SILENT_TURNS and self._job.planning:
                raise _EndError(self._result(AgentEnd.FAILED, reason=FailureReason.MODEL_OUTPUT, text=NO_PLAN))
            if self._silent_turns >= SILENT_TURNS:
                raise _EndError(self._result(AgentEnd.FINISHED))
            self._history.say(prompt.nudge(planning=self._job.planning))
            return
        self._silent_turns = 0
        results = await self._run_calls(n, calls, rows)
        self._history.add(message, calls, results)
        self._count_bad(bad=all(call.fault for call in calls))
        self._check_circles()

    async def _run_calls(self, n: int, calls: Sequence[Call], rows: Mapping[int, StoredToolCall]) -> list[str]:
        results: list[str] = []
        for i, call in enumerate(calls):
            row = rows.get(i)
            if row is None:
                results.append(await self._run_call(n, i, call))
            elif row.result is None:
                results.append(prompt.interrupted())
                self._job.trajectory.tool_ended(n, i, result=results[-1])
            else:
                results.append(row.result)
            if call.name == FINISH and not call.fault:
                raise _EndError(self._finished(call))
        return results

    def _finished(self, call: Call) -> AgentResult:
        if not self._job.planning:
            return self._result(AgentEnd.FINISHED, text=str(call.arguments.get("summary") or ""))
        plan = str(call.arguments.get("plan") or "").strip()
        if not plan:
            return self._result(AgentEnd.FAILED, reason=FailureReason.MODEL_OUTPUT, text=NO_PLAN)
        return self._result(AgentEnd.FINISHED, text=plan)

    async def _run_call(self, n: int, i: int, call: Call) -> str:
        trajectory, began = self._job.trajectory, self._box.loop_time()
        await trajectory.tool_started(n, i, call_id=call.id, tool=call.name, arguments=self._box.scrub(call.raw))
        if call.name == FINISH and not call.fault:
            text, status = "finished", "ok"
        else:
            outcome = await self._tools.call(call, seconds=self._job.deadline - began)
            text, status = outcome.text, outcome.status
        trajectory.tool_ended(n, i, result=text)
        self._beat = self._box.loop_time()
        # A name that the model made up must not become a metric label.
        name = "unknown" if call.fault.startswith("invalid arguments: there is no tool") else call.name
        self._emit(EventKind.TOOL_ENDED, {"step": n, "tool": name, "result": status, "seconds": self._beat - began})
        return text

    def _count_bad(self, *, bad: bool) -> None:
        self._bad_turns = self._bad_turns + 1 if bad else 0
        if self._bad_turns >= BAD_TURNS:
            text = f"the model sent unusable tool calls {BAD_TURNS} times in a row"
            raise _EndError(self._result(AgentEnd.FAILED, reason=FailureReason.MODEL_OUTPUT, text=text))

    def _check_circles(self) -> None:
        turns = self._history.circles()
        if turns >= CIRCLE:
            text = f"the model made the same calls with the same results {turns} times in a row"
            raise _EndError(self._result(AgentEnd.FAILED, reason=FailureReason.MODEL_OUTPUT, text=text))
        if turns >= HINT_AT and not self._hinted:
            self._history.say(prompt.repeating())
        self._hinted = turns >= HINT_AT


def _scrubbed(value: Any, scrub: Callable[[str], str]) -> Any:
    """The same JSON with every text in it passed through `scrub`."""
    if isinstance(value, str):
        return scrub(value)
    if isinstance(value, Mapping):
        return {key: _scrubbed(item, scrub) for key, item in value.items()}
    if isinstance(value, list):
        return [_scrubbed(item, scrub) for item in value]
    return value
