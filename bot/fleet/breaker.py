"""The breaker as pure rules: it opens after failures in a row that are the fleet's own, tries with doubling distance, and closes on what works."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from bot.models import Breaker, FailureReason, OutcomeKind, PauseScope, SprintState
from bot.settings import BreakerSettings
from bot.store.breakers import FLEET, End, Key

# What is the task's own fault (its checks, its model's words) shows that the fleet works.
OURS = frozenset(
    {
        FailureReason.CLONE,
        FailureReason.SANDBOX,
        FailureReason.SETUP,
        FailureReason.LLM,
        FailureReason.PUSH,
        FailureReason.PR,
        FailureReason.AUTH,
        FailureReason.LEASE_LOST,
        FailureReason.INTERNAL,
        FailureReason.DIED,
        FailureReason.STALLED,
        FailureReason.PROTOCOL,
    }
)
# These say nothing about the fleet, in either direction.
NEUTRAL = frozenset({OutcomeKind.CANCELLED, OutcomeKind.REFUSED})
SCOPES = {"fleet": PauseScope.FLEET, "repository": PauseScope.REPO, "provider": PauseScope.PROVIDER}


def is_ours(outcome: str, reason: str) -> bool:
    """Whether a sprint that ended so failed for no fault of its task."""
    return outcome == OutcomeKind.FAILED and reason in OURS


def keys_of(end: End, scopes: Iterable[str]) -> list[Key]:
    """The breakers that watch this sprint."""
    keys: dict[str, Key] = {"fleet": FLEET, "repository": (PauseScope.REPO, end.repo_id, "")}
    if end.provider:
        keys["provider"] = (PauseScope.PROVIDER, 0, end.provider)
    return [keys[scope] for scope in scopes if scope in keys]


def streaks(ends: Sequence[End], scopes: Sequence[str], since: dict[Key, int]) -> dict[Key, list[End]]:
    """Of each breaker the failures in a row up to now, newest first; `ends` are newest first, `since` says from when they count."""
    rows: dict[Key, list[End]] = {}
    over: set[Key] = set()
    for end in ends:
        for key in keys_of(end, scopes):
            if key in over or end.at_ms <= since.get(key, 0):
                over.add(key)
            elif is_ours(end.outcome, end.reason):
                rows.setdefault(key, []).append(end)
            else:
                over.add(key)
    return rows


def to_open(ends: Sequence[End], policy: BreakerSettings, since: dict[Key, int], now_ms: int) -> list[Breaker]:
    """The breakers that open now; `since` holds those that were open before, and the caller leaves out what is open."""
    made = []
    for key, row in streaks(ends, policy.scopes, since).items():
        if not 0 < policy.failures <= len(row):
            continue
        failed = row[: policy.failures]
        # One broken repository holds only itself, where it has a breaker of its own.
        if key == FLEET and "repository" in policy.scopes and len({end.repo_id for end in failed}) == 1:
            continue
        scope, repo_id, provider = key
        made.append(
            Breaker(
                scope,
                repo_id,
                failed[0].repo if scope is PauseScope.REPO else "",
                provider,
                since_ms=now_ms,
                due_ms=now_ms + distance_ms(policy, 0),
                failures=len(failed),
                reason=failed[0].reason,
            )
        )
    return made


def works_again(breaker: Breaker, ends: Sequence[End]) -> End | None:
    """The newest sprint in its scope that ended well since it opened."""
    for end in ends:
        if end.at_ms <= breaker.since_ms:
            return None
        mine = (breaker.scope, breaker.repo_id, breaker.provider) in keys_of(end, SCOPES)
        if mine and not is_ours(end.outcome, end.reason):
            return end
    return None


def after_probe(
    breaker: Breaker, probe: tuple[SprintState, str, str] | None, policy: BreakerSettings, now_ms: int
) -> tuple[Breaker, str] | None:
    """(the breaker, what is told) once its try is over without success; None while it runs."""
    if probe is None:
        return replace(breaker, probe="", due_ms=now_ms), "inconclusive"
    state, outcome, reason = probe
    if state is SprintState.SETTLED and is_ours(outcome, reason):
        failed = breaker.probes + 1
        due = now_ms + distance_ms(policy, failed)
        return replace(breaker, probe="", probes=failed, due_ms=due, reason=reason), "failed"
    if state is SprintState.SETTLED or state is SprintState.QUEUED:
        return replace(breaker, probe="", due_ms=now_ms + distance_ms(policy, breaker.probes)), "inconclusive"
    return None


def after_use(breaker: Breaker, ends: Sequence[End], policy: BreakerSettings, now_ms: int) -> tuple[Breaker, str] | None:
    """The same for a provider, which no sprint is held for: whatever fails with it once it is called again is the try."""
    if breaker.scope is not PauseScope.PROVIDER:
        return None
    used = next((end for end in ends if end.provider == breaker.provider and end.at_ms > breaker.due_ms), None)
    if used is None:
        return None
    return after_probe(breaker, (SprintState.SETTLED, used.outcome, used.reason), policy, now_ms)


def is_watched(breaker: Breaker, policy: BreakerSettings) -> bool:
    """Whether the configuration still wants this breaker."""
    return policy.failures > 0 and any(SCOPES[name] is breaker.scope for name in policy.scopes)


def distance_ms(policy: BreakerSettings, probes: int) -> int:
    """From one try to the next after so many that failed: it doubles, up to the cap."""
    return int(min(policy.max_probe_seconds, policy.first_probe_seconds * 2.0 ** min(probes, 40)) * 1000)
