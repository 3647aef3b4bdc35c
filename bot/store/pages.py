"""What the web pages read: bounded in rows and in characters by the query itself, a fixed number of queries a page, never one a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from bot.models import IN_FLIGHT, Decision, Pause, PauseScope, Plan, SprintState, SprintView
from bot.store import breakers, intents, pauses, plans, sprints, steps

c = sprints.table.c

ARGUMENTS = 8_000
CALLS = 400
ROOM = 400_000
LEAST = 400
MOST = 6_000
TRAIL = 100


@dataclass(frozen=True, slots=True)
class Board:
    """The fleet at one moment. `queued` is in line order with each place (1 is next); `wait_ms` the usual wait, 0 without history.

    `pauses` are those of single repositories, open breakers among them, `plans` (plan, the issue's title) those that wait for a person.
    """

    running: tuple[SprintView, ...]
    queued: tuple[tuple[int, SprintView], ...]
    recent: tuple[SprintView, ...]
    in_flight: int
    waiting: int
    wait_ms: int
    pauses: tuple[Pause, ...]
    plans: tuple[tuple[Plan, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Step:
    """One model call. `reply` is the assistant message (chat-completions form), None while it has not come or never came; `usd` None: unknown."""

    attempt: int
    n: int
    reply: dict[str, Any] | None
    tokens: int
    usd: float | None
    provider: str
    model: str
    error: str
    started_ms: int
    done_ms: int | None


@dataclass(frozen=True, slots=True)
class Call:
    """One tool call; `arguments` and `result` are cut, `arguments_size` and `result_size` count the characters of the whole.

    `result` is None while it runs, or where its process died under it; `tail` are the last characters of a result that was cut.
    """

    attempt: int
    n: int
    i: int
    tool: str
    arguments: str
    arguments_size: int
    result: str | None
    tail: str
    result_size: int
    started_ms: int
    done_ms: int | None


@dataclass(frozen=True, slots=True)
class Transcript:
    """A window of a sprint's steps: `start` is the index of the first one, `total` how many there are, `calls_left_out` how many calls of it are not here."""

    start: int
    total: int
    steps: tuple[Step, ...]
    calls: tuple[Call, ...]
    calls_left_out: int


def board(conn: Connection, *, limit: int, recent: int, now_ms: int) -> Board:
    """At most `limit` running, `limit` queued and `recent` settled sprints."""
    running = conn.execute(sa.select(*sprints.VIEW_COLUMNS).where(c.state.in_(list(IN_FLIGHT))).order_by(c.admitted_ms, c.id).limit(limit))
    places = sprints.positions(conn, limit=limit)
    queued = [sprints.view(row) for row in conn.execute(sa.select(*sprints.VIEW_COLUMNS).where(c.id.in_(list(places))))]
    counts = sprints.counts(conn)
    held = (*pauses.current(conn, now_ms), *(breaker.as_pause() for breaker in breakers.opened(conn)))
    return Board(
        running=tuple(sprints.view(row) for row in running),
        queued=tuple(sorted(((places[view.id], view) for view in queued), key=lambda pair: pair[0])),
        recent=tuple(sprints.recent(conn, limit=recent)),
        in_flight=sum(counts.get(state, 0) for state in IN_FLIGHT),
        waiting=counts.get(SprintState.QUEUED, 0),
        wait_ms=sprints.queue_wait_ms(conn),
        pauses=tuple(pause for pause in held if pause.scope is PauseScope.REPO),
        plans=tuple(plans.waiting(conn, limit=limit)),
    )


def summary(conn: Connection, sprint_id: str) -> str:
    """What the agent said last."""
    return str(conn.execute(sa.select(c.summary).where(c.id == sprint_id)).scalar() or "")


def siblings(conn: Connection, view: SprintView, *, limit: int = 10) -> list[SprintView]:
    """The newest other sprints of the same issue."""
    statement = (
        sa.select(*sprints.VIEW_COLUMNS)
        .where(c.repo_id == view.repo_id, c.issue == view.issue.number, c.id != view.id)
        .order_by(c.queued_ms.desc(), c.id.desc())
        .limit(limit)
    )
    return [sprints.view(row) for row in conn.execute(statement)]


def trail(conn: Connection, view: SprintView) -> list[Decision]:
    """The newest TRAIL decisions about one sprint, oldest first."""
    columns = intents.decisions.c
    statement = (
        sa.select(columns.made_ms, columns.kind, columns.result, columns.reason, columns.actor, columns.sprint_id, columns.intent_key)
        .where(columns.repo_id == view.repo_id, columns.issue == view.issue.number, columns.sprint_id == view.id)
        .order_by(columns.id.desc())
        .limit(TRAIL)
    )
    return [Decision(*row) for row in reversed(conn.execute(statement).all())]


def transcript(conn: Connection, sprint_id: str, *, start: int | None, limit: int) -> Transcript:
    """`limit` steps from index `start` on (None: the newest), over all attempts, with at most CALLS of their tool calls and ROOM characters of results."""
    total = steps.count(conn, sprint_id)
    first = max(0, total - limit) if start is None else max(0, min(start, total))
    found = _steps(conn, sprint_id, first, limit)
    if not found:
        return Transcript(first, total, (), (), 0)
    columns = steps.tool_calls.c
    place = sa.tuple_(columns.attempt, columns.n)
    of_window = [
        columns.sprint_id == sprint_id,
        place >= sa.tuple_(sa.literal(found[0].attempt), sa.literal(found[0].n)),
        place <= sa.tuple_(sa.literal(found[-1].attempt), sa.literal(found[-1].n)),
    ]
    count = int(conn.execute(sa.select(sa.func.count()).where(*of_window)).scalar_one())
    shown = max(LEAST, min(MOST, ROOM // max(1, min(count, CALLS))))
    size = sa.func.length(columns.result)
    tail = shown // 3
    statement = (
        sa.select(
            columns.attempt,
            columns.n,
            columns.i,
            columns.tool,
            sa.func.substr(columns.arguments, 1, ARGUMENTS),
            sa.func.length(columns.arguments),
            sa.case((size <= shown, columns.result), else_=sa.func.substr(columns.result, 1, shown - tail)),
            sa.case((size <= shown, ""), else_=sa.func.substr(columns.result, size - tail + 1)),
            sa.func.coalesce(size, 0),
            columns.started_ms,
            columns.done_ms,
        )
        .where(*of_window)
        .order_by(columns.attempt, columns.n, columns.i)
        .limit(CALLS)
    )
    calls = tuple(Call(*row[:7], row[7] or "", *row[8:]) for row in conn.execute(statement))
    return Transcript(first, total, tuple(found), calls, count - len(calls))


def _steps(conn: Connection, sprint_id: str, start: int, limit: int) -> list[Step]:
    columns = steps.table.c
    statement = (
        sa.select(
            columns.attempt,
            columns.n,
            columns.reply,
            columns.input,
            columns.output,
            columns.cost_usd,
            columns.provider,
            columns.model,
            columns.error,
            columns.started_ms,
            columns.done_ms,
        )
        .where(columns.sprint_id == sprint_id)
        .order_by(columns.attempt, columns.n)
        .offset(start)
        .limit(limit)
    )
    return [
        Step(attempt, n, reply, (tokens_in or 0) + (tokens_out or 0), usd, provider or "", model or "", error or "", started, done)
        for attempt, n, reply, tokens_in, tokens_out, usd, provider, model, error, started, done in conn.execute(statement)
    ]


def revision(conn: Connection, sprint_id: str) -> tuple[SprintState, str] | None:
    """The state and a text that changes with everything the page of a sprint shows; None for an unknown id."""
    row = conn.execute(sa.select(c.state, c.updated_ms, c.rev).where(c.id == sprint_id)).first()
    if row is None:
        return None
    moved = [
        part
        for one in (steps.table.c, steps.tool_calls.c)
        for part in conn.execute(sa.select(sa.func.count(), sa.func.max(one.done_ms)).where(one.sprint_id == sprint_id)).one()
    ]
    return SprintState(row.state), "-".join(str(part or 0) for part in (row.updated_ms, row.rev, *moved))
