"""Counts what a report tells, all of it in the caller's one transaction, so that no two numbers of it disagree."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from bot.figures import BUCKETS, EXAMPLES, GOOD, Bucket, Example, Failure, Figures, Group, Outage, Spread
from bot.models import IN_FLIGHT, FailureReason, OutcomeKind, SprintState
from bot.store import deliveries, intents, providers, pulls, spells, sprints, steps
from bot.store import outages as provider_outages

c = sprints.table.c
d = intents.decisions.c
s = steps.table.c
f = pulls.table.c

ACTS = ("watchdog", "breaker")
UNNAMED = "none"


def consistent(conn: Connection) -> None:
    """Makes every statement of this transaction see the same rows; the first thing in it, and what SQLite does anyway."""
    if conn.dialect.name == "postgresql":
        conn.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")


Outages = Callable[[Mapping[str, Mapping[str, Any]], int], tuple[Outage, ...]]


def figures(
    conn: Connection, *, since_ms: int, until_ms: int, now_ms: int, repo_id: int | None = None, outages: Outages | None = None
) -> Figures:
    """The figures of a window, of the fleet or of one repository; `outages` reads the providers' health records at `now_ms`, for the fleet."""
    here = [] if repo_id is None else [c.repo_id == repo_id]
    decided = [d.made_ms >= since_ms, d.made_ms < until_ms, *([] if repo_id is None else [d.repo_id == repo_id])]
    columns = (
        c.id,
        c.repo_id,
        c.repo,
        c.issue,
        c.outcome,
        c.reason,
        c.detail,
        c.provider,
        c.model,
        c.steps,
        c.tokens,
        c.usd,
        c.settled_ms,
        c.admitted_n,
        c.crashes,
    )
    ended = conn.execute(
        sa.select(*columns)
        .where(c.state == SprintState.SETTLED, c.settled_ms >= since_ms, c.settled_ms < until_ms, *here)
        .order_by(c.settled_ms, c.id)
    ).all()
    opened, merged, closed, reverted, waits_to_pull, merged_of = _pulls(conn, since_ms, until_ms, repo_id)
    calls, failed_calls, calls_usd = _calls(conn, since_ms, until_ms, repo_id)
    verdicts, troubled, unwatched_ms = spells.between(conn, since_ms=since_ms, until_ms=until_ms, now_ms=now_ms)
    started = sa.select(c.started_ms - c.queued_ms).where(c.started_ms >= since_ms, c.started_ms < until_ms, *here)
    live = {row[0]: int(row[1]) for row in conn.execute(_by(c.state).where(c.state != SprintState.SETTLED, *here))}
    return Figures(
        since_ms=since_ms,
        until_ms=until_ms,
        repo=_name(conn, repo_id),
        asked=_counts(conn, _by(c.source).where(c.queued_ms >= since_ms, c.queued_ms < until_ms, *here)),
        outcomes=_sorted(Counter(row.outcome for row in ended)),
        repositories=_groups(((row, row.repo) for row in ended), Counter(repo for repo, _ in merged_of)),
        models=_groups(((row, _model(row)) for row in ended), Counter(model for _, model in merged_of)),
        opened=opened,
        merged=merged,
        closed=closed,
        reverted=reverted,
        to_pull=Spread.of(waits_to_pull),
        queue_wait=Spread.of(row[0] for row in conn.execute(started)),
        steps=sum(row.steps for row in ended),
        tokens=sum(row.tokens for row in ended),
        usd=sum(row.usd for row in ended),
        calls=calls,
        failed_calls=failed_calls,
        calls_usd=calls_usd,
        failures=_failures(ended),
        waits=_counts(conn, _by(d.result).where(*decided, d.kind == "wait")),
        crashes=sum(row.crashes for row in ended),
        requeues=sum(max(0, row.admitted_n - 1) for row in ended),
        stalled=sum(row.reason == FailureReason.STALLED for row in ended),
        acts=_acts(conn, decided),
        outages=outages(providers.load(conn), now_ms) if outages and repo_id is None else (),
        downtimes=provider_outages.between(conn, since_ms=since_ms, until_ms=until_ms, now_ms=now_ms) if repo_id is None else (),
        verdicts=verdicts,
        spells=troubled,
        unwatched_ms=unwatched_ms,
        commands=_commands(conn, decided),
        deliveries=_deliveries(conn, since_ms, until_ms) if repo_id is None else {},
        buckets=_buckets(ended, since_ms, until_ms),
        running=sum(live.get(state, 0) for state in IN_FLIGHT),
        queued=live.get(SprintState.QUEUED, 0),
    )


def _by(column: Any) -> sa.Select[Any]:
    return sa.select(column, sa.func.count()).group_by(column)


def _counts(conn: Connection, statement: sa.Select[Any]) -> dict[str, int]:
    return _sorted({str(row[0]): int(row[1]) for row in conn.execute(statement)})


def _sorted(counts: Mapping[str, int]) -> dict[str, int]:
    """The largest first."""
    return dict(sorted(((str(name), count) for name, count in counts.items()), key=lambda pair: (-pair[1], pair[0])))


def _name(conn: Connection, repo_id: int | None) -> str:
    if repo_id is None:
        return ""
    newest = sa.select(c.repo).where(c.repo_id == repo_id).order_by(c.queued_ms.desc()).limit(1)
    return str(conn.execute(newest).scalar() or "")


def _model(row: Any) -> str:
    return "/".join(part for part in (row.provider, row.model) if part) or UNNAMED


def _groups(rows: Iterable[tuple[Any, str]], merged: Mapping[str, int]) -> tuple[Group, ...]:
    parts: dict[str, list[Any]] = defaultdict(list)
    for row, name in rows:
        parts[name].append(row)
    for name in merged:
        parts.setdefault(name, [])
    made = [
        Group(
            name=name,
            outcomes=_sorted(Counter(row.outcome for row in part)),
            steps=sum(row.steps for row in part),
            tokens=sum(row.tokens for row in part),
            usd=sum(row.usd for row in part),
            merged=merged.get(name, 0),
        )
        for name, part in parts.items()
    ]
    return tuple(sorted(made, key=lambda group: (-group.sprints, group.name)))


def _pulls(
    conn: Connection, since_ms: int, until_ms: int, repo_id: int | None
) -> tuple[int, int, int, int, list[int], list[tuple[str, str]]]:
    """(opened, merged, closed, reverted, trigger to pull request in ms of those opened, (repository, model) of the sprint behind each one merged)."""
    here = [] if repo_id is None else [c.repo_id == repo_id]
    order = sa.func.row_number().over(partition_by=(c.repo_id, c.pr), order_by=(c.settled_ms, c.id)).label("nth")
    columns = (c.repo_id, c.pr, c.repo, c.provider, c.model, c.queued_ms, c.settled_ms)
    ranked = sa.select(*columns, order).where(c.pr > 0, c.settled_ms.is_not(None), *here).subquery()
    first = sa.select(ranked).where(ranked.c.nth == 1).subquery()
    opened = conn.execute(
        sa.select(first.c.queued_ms, first.c.settled_ms).where(first.c.settled_ms >= since_ms, first.c.settled_ms < until_ms)
    )
    waits = [row.settled_ms - row.queued_ms for row in opened]
    fates = [f.at_ms >= since_ms, f.at_ms < until_ms, *([] if repo_id is None else [f.repo_id == repo_id])]
    states = {row[0]: int(row[1]) for row in conn.execute(_by(f.state).where(*fates))}
    joined = sa.select(first.c.repo, first.c.provider, first.c.model).join(
        pulls.table, sa.and_(f.repo_id == first.c.repo_id, f.number == first.c.pr)
    )
    merged_of = [(row.repo, _model(row)) for row in conn.execute(joined.where(f.state == "merged", *fates))]
    return len(waits), states.get("merged", 0), states.get("closed", 0), states.get("reverted", 0), waits, merged_of


def _calls(conn: Connection, since_ms: int, until_ms: int, repo_id: int | None) -> tuple[int, int, float]:
    statement = sa.select(
        sa.func.count(),
        sa.func.coalesce(sa.func.sum(sa.case((s.error.is_not(None), 1), else_=0)), 0),
        sa.func.coalesce(sa.func.sum(sa.func.coalesce(s.cost_usd, s.reserved_usd)), 0.0),
    ).where(s.started_ms >= since_ms, s.started_ms < until_ms)
    if repo_id is not None:
        statement = statement.where(s.sprint_id.in_(sa.select(c.id).where(c.repo_id == repo_id)))
    row = conn.execute(statement).one()
    return int(row[0]), int(row[1]), float(row[2])


def _failures(ended: Iterable[Any]) -> tuple[Failure, ...]:
    parts: dict[tuple[str, str], list[Any]] = defaultdict(list)
    for row in ended:
        if row.outcome not in GOOD and row.outcome not in (OutcomeKind.CANCELLED, OutcomeKind.PLANNED):
            parts[row.outcome, row.reason].append(row)
    made = [
        Failure(outcome, reason, len(part), tuple(Example(f"{row.repo}#{row.issue}", row.detail) for row in part[: -EXAMPLES - 1 : -1]))
        for (outcome, reason), part in parts.items()
    ]
    return tuple(sorted(made, key=lambda failure: (-failure.count, failure.outcome, failure.reason)))


def _acts(conn: Connection, decided: list[Any]) -> dict[str, int]:
    statement = sa.select(d.kind, d.result, sa.func.count()).where(*decided, sa.or_(*(d.kind.startswith(kind) for kind in ACTS)))
    return _sorted({f"{row[0]}: {row[1]}": int(row[2]) for row in conn.execute(statement.group_by(d.kind, d.result))})


def _commands(conn: Connection, decided: list[Any]) -> dict[str, int]:
    statement = sa.select(d.kind, d.result, sa.func.count()).where(*decided, d.intent_key.startswith("command:"))
    return _sorted({f"{row[0]}: {row[1]}": int(row[2]) for row in conn.execute(statement.group_by(d.kind, d.result))})


def _deliveries(conn: Connection, since_ms: int, until_ms: int) -> dict[str, int]:
    columns = deliveries.table.c
    return _counts(conn, _by(columns.event_type).where(columns.received_ms >= since_ms, columns.received_ms < until_ms))


def _buckets(ended: Iterable[Any], since_ms: int, until_ms: int) -> tuple[Bucket, ...]:
    """The window in equal slices."""
    width = max(1, -(-(until_ms - since_ms) // BUCKETS))
    good, other, usd = Counter[int](), Counter[int](), defaultdict[int, float](float)
    for row in ended:
        place = (row.settled_ms - since_ms) // width
        (good if row.outcome in GOOD else other)[place] += 1
        usd[place] += row.usd
    count = -(-(until_ms - since_ms) // width)
    return tuple(Bucket(since_ms + place * width, good[place], other[place], usd[place]) for place in range(count))
