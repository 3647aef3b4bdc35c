"""How a step can end, what a sprint works with, and what a tree with changes comes to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bot import replies
from bot.agents import AgentEnd, Engine
from bot.config import Settings
from bot.decide import Decider
from bot.failpoints import Failpoints
from bot.gitea.forge import Forge
from bot.lease import Lease
from bot.models import FailureReason, Json, OutcomeKind, SprintEvent, WaitingReason
from bot.repositories import Repositories
from bot.sandbox import Sandbox
from bot.store import Store
from bot.workspace import Workspaces

ROUND_SUMMARY = 600
NEXT: Json = {"go": "next"}
GONE: Json = {"go": "gone"}
ANEW = "the plan is made anew, with what was said about it"


class Stopped(Exception):
    """The sprint ends here, in settle or requeue; carries what the workflow returns."""

    def __init__(self, end: Json) -> None:
        self.end = end
        super().__init__(str(end))


def end_with(kind: OutcomeKind, detail: str, reason: FailureReason | str = "") -> Stopped:
    """Ends in settle(outcome)."""
    return Stopped({"go": "settle", "kind": kind, "reason": reason, "detail": detail})


def requeue(reason: WaitingReason, note: str, *, not_before_ms: int = 0, new_attempt: bool = False) -> Stopped:
    """The end that goes back to the queue."""
    return Stopped({"go": "requeue", "reason": reason, "note": note, "not_before_ms": not_before_ms, "new_attempt": new_attempt})


@dataclass(frozen=True, slots=True)
class Kit:
    """What a sprint works with, made by the composition root."""

    store: Store
    forge: Forge
    repositories: Repositories
    decider: Decider
    workspaces: Workspaces
    sandbox: Sandbox
    engines: Mapping[str, Engine]
    settings: Settings
    lease: Lease
    links: replies.Links
    scrub: Callable[[str], str]
    observe: Callable[[SprintEvent], None]
    kick_queue: Callable[[], None]
    kick_projector: Callable[[], None]
    failpoint: Failpoints
    now_ms: Callable[[], int]
    login: str
    salt: str
    sandbox_refusal: Callable[[], str]


def verdict_of(agent_end: str, agent_reason: str, checks: Iterable[Mapping[str, Any]]) -> tuple[OutcomeKind, str]:
    """The outcome of a tree that has changes and may be published (DESIGN section 4)."""
    if agent_end == AgentEnd.LIMIT:
        return OutcomeKind.BUDGET, agent_reason
    if agent_end != AgentEnd.FINISHED:
        return OutcomeKind.FAILED, agent_reason or FailureReason.INTERNAL
    if any(check["exit_code"] != 0 for check in checks):
        return OutcomeKind.FAILED, FailureReason.CHECKS
    return OutcomeKind.PULL_REQUEST, ""


def _without_changes(agent_end: str, agent_reason: str, summary: str) -> Stopped:
    if agent_end == AgentEnd.LIMIT:
        return end_with(OutcomeKind.BUDGET, _why(agent_end, agent_reason), agent_reason)
    if agent_end in (AgentEnd.FINISHED, AgentEnd.REFUSED):
        return end_with(OutcomeKind.NO_CHANGE, summary[:1000])
    return end_with(OutcomeKind.FAILED, summary[:1000], agent_reason or FailureReason.INTERNAL)


def _in_brief(summary: str) -> str:
    """The first paragraph of what the agent says it did."""
    return summary.strip().partition("\n\n")[0][:ROUND_SUMMARY]


def _why(agent_end: str, agent_reason: str) -> str:
    if agent_end == AgentEnd.LIMIT:
        return f"the limit of {agent_reason or 'the sprint'} was reached"
    return ""
