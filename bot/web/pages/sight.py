"""What a page shows, shaped for people from rows: pure functions, every text cut to a size."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bot import replies
from bot.models import RUNNING, Decision, OutcomeKind, PlanState, Position, SprintState, SprintView, WaitingReason
from bot.redaction import encodable
from bot.store.pages import Call, Step, Transcript
from bot.workspace.secrets_scan import scan_text

TEXT = 6_000
VALUE = 4_000
DETAIL = 120
PATCH = 60_000
PATCH_LINE = 2_000
ALL_OF_IT = 1.0
NEAR = 0.85
_BAD = re.compile(r"exit (?!0\b)|killed|refused: |failed: |invalid arguments: |there is no |interrupted")
_TELLING = ("command", "path", "pattern", "query", "operation", "summary")
_ANSWERS = {"ok": "done", "denied": "refused", "invalid": "not possible", "rate_limited": "too many commands", "error": "it went wrong"}
_ENDS: dict[str, str] = {
    OutcomeKind.PULL_REQUEST: "a pull request stands",
    OutcomeKind.UPDATED: "its pull request is updated",
    OutcomeKind.NO_CHANGE: "nothing had to be changed",
    OutcomeKind.PLANNED: "a plan was made",
    OutcomeKind.BUDGET: "stopped at a limit",
}
_KEY_BEGINS, _KEY_ENDS = "PRIVATE KEY", "-----END "


@dataclass(frozen=True, slots=True)
class Bar:
    """A limit and how much of it is used; `share` from 0 to 1, None where there is no limit."""

    name: str
    used: str
    limit: str
    share: float | None

    @property
    def tone(self) -> str:
        """`full`, `near` or `well`."""
        share = self.share or 0.0
        return "full" if share >= ALL_OF_IT else "near" if share >= NEAR else "well"


@dataclass(frozen=True, slots=True)
class ShownCall:
    """A tool call as it is read: `detail` in its first line, `arguments` as (name, text) pairs, `status` running, cut_off, bad or good."""

    id: str
    tool: str
    detail: str
    arguments: tuple[tuple[str, str], ...]
    result: str
    tail: str
    left_out: int
    status: str
    seconds: float | None


@dataclass(frozen=True, slots=True)
class ShownStep:
    """A model call with its tool calls; `number` counts over all attempts from 1, `opens_attempt` where the attempt before was another one.

    `model` is told where it is another one than a step before; `forgotten` is what the retention has taken away.
    """

    id: str
    number: int
    attempt: int
    opens_attempt: bool
    text: str
    calls: tuple[ShownCall, ...]
    tokens: int
    usd: float | None
    model: str
    error: str
    thinking: bool
    forgotten: bool
    seconds: float | None


def state_word(view: SprintView) -> str:
    """One word for the badge, also its colour."""
    if view.state is SprintState.QUEUED:
        return "waiting" if view.waiting else "queued"
    if view.state is not SprintState.SETTLED:
        return "stopping" if view.stop else view.state.value
    match view.outcome:
        case OutcomeKind.PULL_REQUEST | OutcomeKind.UPDATED:
            return view.pr_state if view.pr_state in ("merged", "closed", "reverted") else "done"
        case OutcomeKind.NO_CHANGE:
            return "no change"
        case OutcomeKind.BUDGET:
            return "limit"
        case OutcomeKind.PLANNED:
            return "plan waits" if view.reason == PlanState.WAITING else "planned"
        case None:
            return "failed"
        case _:
            return view.outcome.value


def sentence(view: SprintView, place: int | None = None) -> str:
    """Where it is, as a sentence. The note of a queued one is shown beside it."""
    position = Position(place, place - 1) if place else None
    said = replies.sprint_in_words({**replies.sprint_data(view, position), "note": ""})
    return said[:1].upper() + said[1:]


def why_it_waits(view: SprintView) -> str:
    """Half a sentence, or ""."""
    if view.waiting is None:
        return ""
    return replies.waiting_in_words(view.waiting)


def advice(view: SprintView) -> str:
    """What to do after a failure, or ""."""
    return replies.failure_in_words(view.reason)[1] if view.outcome is OutcomeKind.FAILED else ""


def bars(view: SprintView, used_ms: int) -> list[Bar]:
    """Steps, working time, tokens and money, each with its limit."""
    limits = view.limits
    rows: list[tuple[str, float, str, float, str]] = [
        ("Steps", view.steps, f"{view.steps:,}", limits.steps if limits else 0, f"{limits.steps:,}" if limits else ""),
        (
            "Working time",
            used_ms / 1000,
            replies.duration(used_ms),
            limits.seconds if limits else 0,
            replies.duration(limits.seconds * 1000) if limits else "",
        ),
        ("Tokens", view.tokens, f"{view.tokens:,}", limits.tokens if limits else 0, f"{limits.tokens:,}" if limits else ""),
        ("Money", view.usd, replies.money(view.usd), limits.usd if limits else 0, replies.money(limits.usd) if limits else ""),
    ]
    return [
        Bar(name, shown, limit if most else "", min(ALL_OF_IT, used / most) if most else None) for name, used, shown, most, limit in rows
    ]


def elapsed_ms(view: SprintView, now_ms: int) -> int:
    """From the start to the end or to now; 0 before it started."""
    return max(0, (view.settled_ms or now_ms) - view.started_ms) if view.started_ms else 0


def since_last_call(transcript: Transcript, view: SprintView, now_ms: int) -> int:
    """How long the model or tool call in flight has taken, which the sum of the ended ones does not hold."""
    if view.state not in RUNNING:
        return 0
    last: list[Step | Call] = [*transcript.steps[-1:], *transcript.calls[-1:]]
    open_since = [one.started_ms for one in last if one.done_ms is None]
    return max(0, now_ms - max(open_since)) if open_since else 0


def shown_steps(transcript: Transcript, view: SprintView) -> list[ShownStep]:
    """The window of the transcript, call by call."""
    by_step: dict[tuple[int, int], list[Call]] = {}
    for call in transcript.calls:
        by_step.setdefault((call.attempt, call.n), []).append(call)
    alive = view.state in RUNNING
    shown: list[ShownStep] = []
    model = ""
    for offset, step in enumerate(transcript.steps):
        latest = transcript.start + offset + 1 == transcript.total
        model_before, model = model, "/".join(part for part in (step.provider, step.model) if part) or model
        before = transcript.steps[offset - 1].attempt if offset else (step.attempt if transcript.start else 1)
        shown.append(
            ShownStep(
                id=f"step-{step.attempt}-{step.n}",
                number=transcript.start + offset + 1,
                attempt=step.attempt,
                opens_attempt=step.attempt != before,
                text=_cut(_text(step.reply), TEXT),
                calls=tuple(_call(call, alive=alive and latest) for call in by_step.get((step.attempt, step.n), ())),
                tokens=step.tokens,
                usd=step.usd,
                model=model if model != model_before else "",
                error=step.error,
                thinking=alive and latest and step.done_ms is None,
                forgotten=step.reply is None and step.done_ms is not None and not step.error,
                seconds=_seconds(step),
            )
        )
    return shown


def _cut(text: str, most: int, *, whole: int = 0) -> str:
    """At most `most` characters, head and tail, with what is left out between them; `whole` is the size of a text that is cut already."""
    left_out = max(whole, len(text)) - most
    if left_out <= 0:
        return text
    head = most * 2 // 3
    tail = text[-(most - head) :] if whole <= len(text) else ""
    return f"{text[:head]}\n[... {max(whole, len(text)) - head - len(tail):,} characters left out ...]\n{tail}"


def _text(reply: Mapping[str, Any] | None) -> str:
    content = (reply or {}).get("content")
    return content.strip() if isinstance(content, str) else ""


def _seconds(one: Step | Call) -> float | None:
    return None if one.done_ms is None else max(0, one.done_ms - one.started_ms) / 1000


def _call(call: Call, *, alive: bool) -> ShownCall:
    arguments = tuple(_arguments(call.arguments, call.arguments_size))
    detail = _detail(arguments)
    if call.result is None:
        status = "running" if alive else "cut_off"
    else:
        status = "bad" if _BAD.match(call.result) else "good"
    return ShownCall(
        id=f"call-{call.attempt}-{call.n}-{call.i}",
        tool=call.tool,
        detail=detail,
        arguments=tuple((name, value) for name, value in arguments if value != detail),
        result=call.result or "",
        tail=call.tail,
        left_out=call.result_size - len(call.result or "") - len(call.tail),
        status=status,
        seconds=_seconds(call),
    )


def _arguments(text: str, size: int) -> Iterator[tuple[str, str]]:
    """(name, value) of the JSON object that a model wrote; what is none, or was cut, as it is."""
    try:
        values = json.loads(text) if len(text) == size else None
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        if text.strip():
            yield "arguments", _cut(text, VALUE, whole=size)
        return
    for name, value in values.items():
        plain = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        yield encodable(name[:60]), _cut(encodable(plain), VALUE)


def _detail(arguments: Sequence[tuple[str, str]]) -> str:
    known = dict(arguments)
    told = next((known[name] for name in _TELLING if known.get(name)), "")
    line = " ".join(told.split())
    return line if len(line) <= DETAIL else line[: DETAIL - 1] + "…"


def patch_lines(patch: str) -> list[tuple[str, str]]:
    """(tone, line) of a unified diff, cut at PATCH characters; a line that looks like a credential is told, not shown."""
    shown: list[tuple[str, str]] = []
    in_key = False
    for raw in _cut(patch, PATCH).split("\n"):
        line = raw[:PATCH_LINE]
        kind = scan_text(line)
        begins = bool(kind) and _KEY_BEGINS in line
        if kind or in_key:
            in_key = (in_key or begins) and _KEY_ENDS not in line
            shown.append(("hidden", f"{line[:1]} (a line that looks like a {kind or 'private key'} is not shown)"))
            continue
        tone = {"+": "added", "-": "removed", "@": "place"}.get(line[:1], "")
        shown.append(("place" if line.startswith(("+++ ", "--- ", "diff ", "index ")) else tone, line))
    return shown


def decision_in_words(decision: Decision) -> str:
    """One row of the trail as a sentence."""
    reason = decision.reason.strip().rstrip(".")
    match decision.kind:
        case "admit":
            times = re.fullmatch(r"admitted, time ([0-9]+)", reason)
            again = f", for the {replies.ordinal(int(times[1]))} time" if times and int(times[1]) > 1 else ""
            return f"A slot was free: it was let in{again}."
        case "wait":
            return f"It waits because {_reason(decision.result)}" + (f" ({reason})" if reason else "") + "."
        case "requeue":
            return f"It went back into the queue because {_reason(decision.result)}" + (f" ({reason})" if reason else "") + "."
        case "settle":
            ended = _ENDS.get(decision.result, decision.result.replace("_", " "))
            return f"It ended: {ended}" + (f" ({reason})" if reason and reason != decision.result else "") + "."
        case kind if kind.startswith("watchdog "):
            return f"{decision.actor or 'The watchdog'} acted on it ({decision.result}): {reason}."
        case _:
            said = _ANSWERS.get(decision.result, decision.result)
            told = reason if decision.result == "ok" and reason else f"{said} ({reason})" if reason else said
            return f"{decision.actor or 'Somebody'} asked to {decision.kind}: {told}."


def _reason(result: str) -> str:
    try:
        return replies.waiting_in_words(WaitingReason(result))
    except ValueError:
        return result.replace("_", " ")
