"""The hours in which nothing new starts, as a pure function of the configuration and the moment."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import date, datetime, time, timedelta
from zoneinfo import ZoneInfo

from bot.models import Pause, PauseKind, PauseScope
from bot.settings import MINUTES_A_DAY, PauseHoursSettings, Settings, split_hours

BY = "the configured hours"
DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


def pauses_of(settings: Settings, repositories: Mapping[int, str], now_ms: int) -> list[Pause]:
    """The pauses that the configuration wants at this moment; `repositories` is id -> configured name."""
    found = [_pause(PauseScope.FLEET, settings.pause_hours, now_ms)]
    for repo_id, name in sorted(repositories.items()):
        repository = settings.repository(name)
        found.append(_pause(PauseScope.REPO, repository.pause_hours if repository else (), now_ms, repo_id=repo_id, repo=name))
    named = [provider for provider in settings.providers if provider.name]
    found += [_pause(PauseScope.PROVIDER, provider.pause_hours, now_ms, provider=provider.name) for provider in named]
    return [pause for pause in found if pause is not None]


def _pause(
    scope: PauseScope, policies: Iterable[PauseHoursSettings], now_ms: int, *, repo_id: int = 0, repo: str = "", provider: str = ""
) -> Pause | None:
    """The one that lasts longest of those that hold."""
    held = [(span, policy) for policy in policies if (span := span_of(policy, now_ms)) is not None]
    if not held:
        return None
    (since, until), policy = max(held, key=lambda one: (one[0][1], -one[0][0]))
    return Pause(scope, repo_id, repo, BY, since, until, policy.reason, provider, PauseKind.HOURS)


def span_of(policy: PauseHoursSettings, now_ms: int) -> tuple[int, int] | None:
    """(begin, end) in Unix ms of the span that holds at this moment, by the clocks of its zone; the end is not part of it."""
    zone = ZoneInfo(policy.timezone)
    first, last = split_hours(policy.hours)
    today = datetime.fromtimestamp(now_ms / 1000, zone).date()
    for day in (today - timedelta(days=1), today):
        if policy.days and DAYS[day.weekday()] not in policy.days:
            continue
        since = _at(day, first, zone)
        until = _at(day if last > first else day + timedelta(days=1), last, zone)
        if since <= now_ms < until:
            return since, until
    return None


def _at(day: date, minute: int, zone: ZoneInfo) -> int:
    days, left = divmod(minute, MINUTES_A_DAY)
    when = datetime.combine(day + timedelta(days=days), time(left // 60, left % 60), zone)
    return int(when.timestamp() * 1000)
