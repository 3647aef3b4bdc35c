"""The conversation of a run: rebuilt from the stored steps, kept below the context window, watched for going in circles."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from bot import prompt
from bot.agents._tools import Call, history_form
from bot.providers.entries import estimate_tokens

FULL: Final = 0.8
KEEP_LAST: Final = 6
CIRCLE: Final = 6
HINT_AT: Final = 3
_PERIODS: Final = (1, 2, 3)
_SMALL: Final = 400
_LINE: Final = 160


@dataclass(slots=True)
class _Step:
    """One reply with its results, and what was said to the model afterwards."""

    message: dict[str, Any]
    calls: Sequence[Call]
    results: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def messages(self, *, elide: bool) -> list[dict[str, Any]]:
        shown = [prompt.elided(len(text)) if elide and len(text) > _SMALL else text for text in self.results]
        tools = [{"role": "tool", "tool_call_id": call.id, "content": text} for call, text in zip(self.calls, shown, strict=True)]
        return [self.message, *tools, *({"role": "user", "content": text} for text in self.said)]

    def line(self) -> list[str]:
        if not self.calls:
            return [f"(words) {' '.join(str(self.message.get('content') or '').split())[:_LINE]}"]
        return [
            f"{call.name} {' '.join(call.raw.split())[:_LINE]}: {text.strip().partition(chr(10))[0][:_LINE]}"
            for call, text in zip(self.calls, self.results, strict=True)
        ]


class History:
    """Linear: system, task, then steps. Only complete steps are sent, so every call has its result."""

    def __init__(self, system: str, task: str) -> None:
        self._head = [{"role": "system", "content": system}, {"role": "user", "content": task}]
        self._steps: list[_Step] = []
        self._signatures: list[bytes] = []
        self._dropped = 0
        self._elided = 0

    def add(self, message: dict[str, Any], calls: Sequence[Call], results: Sequence[str]) -> None:
        """A reply and what its calls answered."""
        self._steps.append(_Step(history_form(message), calls, list(results)))
        parts = [part for call, result in zip(calls, results, strict=True) for part in (call.name, call.raw, result)]
        parts = parts or [str(message.get("content") or "")]
        self._signatures.append(hashlib.blake2b("\0".join(parts).encode("utf-8", "surrogatepass"), digest_size=16).digest())

    def say(self, text: str) -> None:
        """A word to the model after the last step (before the first, it goes to the end of the task)."""
        if self._steps:
            self._steps[-1].said.append(text)
        else:
            self._head[1] = {"role": "user", "content": f"{self._head[1]['content']}\n\n{text}"}

    def circles(self) -> int:
        """How many times the last one, two or three steps have come back without any change in calls and results (1: not yet)."""
        return max(self._turns(period) for period in _PERIODS)

    def _turns(self, period: int) -> int:
        seen = self._signatures
        last, turns = seen[-period:], 1
        while len(seen) >= period * (turns + 1) and seen[-period * (turns + 1) : -period * turns] == last:
            turns += 1
        return turns

    def messages(self) -> list[dict[str, Any]]:
        """What is sent now."""
        shown: list[dict[str, Any]] = list(self._head)
        if self._dropped:
            lines = [line for step in self._steps[: self._dropped] for line in step.line()]
            shown[1] = {"role": "user", "content": f"{shown[1]['content']}\n\n{prompt.digest(lines[-200:])}"}
        for number, step in enumerate(self._steps[self._dropped :], self._dropped):
            shown += step.messages(elide=number < self._elided)
        return shown

    def fit(self, tokens: int, tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """What is sent now, shortened until it takes at most `tokens` by our estimate: first older results go, then older steps become a digest."""
        shown = self.messages()
        while estimate_tokens(shown, tools) > tokens and self.shorten():
            shown = self.messages()
        return shown

    def shorten(self) -> bool:
        """Takes one more piece out; False when nothing is left to take."""
        older = len(self._steps) - KEEP_LAST
        if self._elided < older:
            self._elided = older
            return True
        if self._dropped < older:
            self._dropped = older
            return True
        if self._elided < len(self._steps):
            self._elided = len(self._steps)
            return True
        if self._dropped < len(self._steps) - 1:
            self._dropped = len(self._steps) - 1
            return True
        return False
