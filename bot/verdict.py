"""The one transaction that decides: intent, decision, sprint and answer are written together, once, whoever asked."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from sqlalchemy.engine import Connection

from bot import chatops
from bot.chatops import Command, Context
from bot.config import RepositorySettings, Settings
from bot.models import Ask, Permission, Reaction, Reply, Source, SprintId, UserError, Verdict
from bot.providers.health import available
from bot.snapshot import FleetSnapshot
from bot.store import fleet, intents, outbox, waits
from bot.store.issue_queue import IssueQueue

REFUSED_AGAIN_MS = 3_600_000
# Where a fleet-wide verb of the terminal stands: in no repository.
NOWHERE = RepositorySettings.model_construct(name="")


def write(
    conn: Connection, ask: Ask, repository: RepositorySettings, prepared: Verdict | Context, settings: Settings, now_ms: int
) -> Verdict | None:
    """Decides `ask` if nobody did; None where its intent is known. `prepared` is a verdict that stands already, or what the command needs."""
    if not intents.claim(conn, ask.key, now_ms):
        return None
    if isinstance(prepared, Verdict):
        verdict = prepared
    elif _too_many(conn, ask, settings, now_ms):
        verdict = Verdict("rate_limited", "too many commands", _rate_limited(ask, settings))
    else:
        queue = IssueQueue(
            conn=conn,
            ask=ask,
            limits=settings.limits.limits(),
            base_branch=repository.base_branch,
            fresh_id=SprintId(secrets.token_hex(6)),
            now_ms=now_ms,
            look=partial(_look, settings=settings),
            caps=waits.caps(settings, repository.name),
        )
        verdict = chatops.decide(replace(prepared, queue=queue, now_ms=now_ms))
    # A pick that comes to nothing is no news for the people of the issue; `explain` and the next round's ranking tell it.
    reply = Reply() if ask.source is Source.SCHEDULE else _once(conn, ask, verdict, now_ms)
    intents.answer(conn, ask, result=verdict.result, reason=verdict.reason, sprint_id=verdict.sprint_id, now_ms=now_ms)
    unseen = ask.actor.is_terminal and ask.source not in (Source.REVIEW, Source.CHECKS)
    # Where there is no comment to react to, a refusal without words is seen on the issue itself.
    if not unseen and (reply.name or (reply.reaction and (ask.comment_id or verdict.result == "denied"))):
        outbox.show(
            conn,
            key=outbox.reply_key(ask.key),
            repo_id=ask.repo_id,
            repo=ask.issue.full_name,
            issue=ask.place,
            comment_id=ask.comment_id,
            reply=reply,
            now_ms=now_ms,
        )
    return verdict


def write_without_forge(conn: Connection, ask: Ask, *, settings: Settings, commands: Mapping[str, Command], now_ms: int) -> Verdict:
    """A verb of the terminal that needs no word of the forge; `ask.repo_id` is 0 where it is about the fleet."""
    repository = settings.repository(ask.issue.full_name) if ask.repo_id else NOWHERE
    if repository is None:
        raise UserError(f"{ask.issue.full_name} is not in the configuration")
    queue = IssueQueue(
        conn=conn,
        ask=ask,
        limits=settings.limits.limits(),
        base_branch=repository.base_branch,
        fresh_id=SprintId(""),
        now_ms=now_ms,
        look=partial(_look, settings=settings),
        caps=waits.caps(settings, repository.name),
    )
    context = Context(
        ask=ask,
        facts=None,
        permission=Permission.OPERATOR,
        queue=queue,
        settings=settings,
        repository=repository,
        now_ms=now_ms,
        commands=commands,
    )
    verdict = write(conn, ask, repository, context, settings, now_ms)
    return verdict if verdict is not None else Verdict("error", "this was decided before", Reply())


def _look(conn: Connection, settings: Settings) -> FleetSnapshot:
    return fleet.snapshot(conn, worker_timeout_ms=int(settings.timing.lease_seconds * 1000), available=available)


def _once(conn: Connection, ask: Ask, verdict: Verdict, now_ms: int) -> Reply:
    """A refusal is said once an hour to the same person for the same thing; after that the reaction says it.

    Too many commands are too many whatever they ask for.
    """
    if verdict.result not in ("denied", "rate_limited") or not verdict.reply.name:
        return verdict.reply
    again = intents.refused_before(
        conn,
        repo_id=ask.repo_id,
        issue=ask.issue.number,
        actor_id=ask.actor.id,
        kind=(ask.verb or "unreadable") if verdict.result == "denied" else None,
        result=verdict.result,
        reason=verdict.reason,
        since_ms=now_ms - REFUSED_AGAIN_MS,
    )
    return Reply(reaction=verdict.reply.reaction) if again else verdict.reply


def _too_many(conn: Connection, ask: Ask, settings: Settings, now_ms: int) -> bool:
    if ask.actor.is_terminal or not ask.comment_id:
        return False
    since = now_ms - settings.commands_window_minutes * 60_000
    return intents.asked_by(conn, ask.actor.id, ask.repo_id, ask.issue.number, since) >= settings.commands_per_person


def _rate_limited(ask: Ask, settings: Settings) -> Reply:
    data = {"login": ask.actor.login, "limit": settings.commands_per_person, "minutes": settings.commands_window_minutes}
    return Reply("rate_limited", data, Reaction.CONFUSED)
