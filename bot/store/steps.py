"""Steps and tool calls of sprints, written before and after they happen; spend is their sum, reserves counted where no cost is known."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from bot.models import LogLine, StoredStep, StoredToolCall, Usage
from bot.store._base import BIG, clean, insert, metadata

table = sa.Table(
    "steps",
    metadata,
    sa.Column("sprint_id", sa.Text, primary_key=True),
    sa.Column("attempt", sa.Integer, primary_key=True),
    sa.Column("n", sa.Integer, primary_key=True),
    sa.Column("reserved_usd", sa.Float, nullable=False),
    sa.Column("reserved_tokens", sa.Integer, nullable=False),
    sa.Column("cost_usd", sa.Float),
    sa.Column("input", sa.Integer),
    sa.Column("output", sa.Integer),
    sa.Column("cached", sa.Integer),
    sa.Column("source", sa.Text),
    sa.Column("provider", sa.Text),
    sa.Column("model", sa.Text),
    sa.Column("reply", sa.JSON),
    sa.Column("error", sa.Text),
    sa.Column("started_ms", BIG, nullable=False),
    sa.Column("done_ms", BIG),
)

tool_calls = sa.Table(
    "tool_calls",
    metadata,
    sa.Column("sprint_id", sa.Text, primary_key=True),
    sa.Column("attempt", sa.Integer, primary_key=True),
    sa.Column("n", sa.Integer, primary_key=True),
    sa.Column("i", sa.Integer, primary_key=True),
    sa.Column("call_id", sa.Text, nullable=False),
    sa.Column("tool", sa.Text, nullable=False),
    sa.Column("arguments", sa.Text, nullable=False),
    sa.Column("result", sa.Text),
    sa.Column("started_ms", BIG, nullable=False),
    sa.Column("done_ms", BIG),
)


def of_attempt(conn: Connection, sprint_id: str, attempt: int) -> list[StoredStep]:
    """The steps of one attempt, in order."""
    columns = table.c
    statement = (
        sa.select(
            columns.n,
            columns.reply,
            columns.input,
            columns.output,
            columns.cached,
            columns.cost_usd,
            columns.source,
            columns.reserved_tokens,
            columns.reserved_usd,
        )
        .where(columns.sprint_id == sprint_id, columns.attempt == attempt)
        .order_by(columns.n)
    )
    return [StoredStep(n, reply, _usage(*rest)) for n, reply, *rest in conn.execute(statement)]


def calls_of_attempt(conn: Connection, sprint_id: str, attempt: int) -> list[StoredToolCall]:
    """The tool calls of one attempt, in order."""
    columns = tool_calls.c
    statement = (
        sa.select(columns.n, columns.i, columns.call_id, columns.result)
        .where(columns.sprint_id == sprint_id, columns.attempt == attempt)
        .order_by(columns.n, columns.i)
    )
    return [StoredToolCall(*row) for row in conn.execute(statement)]


def journal(conn: Connection, sprint_id: str) -> list[Any]:
    """Every tool call that has ended, of all attempts, in order, as people read it: rows of attempt, n, i, tool, arguments, result."""
    columns = tool_calls.c
    statement = (
        sa.select(columns.attempt, columns.n, columns.i, columns.tool, columns.arguments, columns.result)
        .where(columns.sprint_id == sprint_id, columns.result.is_not(None))
        .order_by(columns.attempt, columns.n, columns.i)
    )
    return list(conn.execute(statement))


def latest(conn: Connection, sprint_id: str, *, limit: int) -> list[LogLine]:
    """The last things a sprint did, oldest first: tool calls, and model calls that failed."""
    calls, made = tool_calls.c, table.c
    done = (
        sa.select(calls.attempt, calls.n, calls.i, calls.tool, calls.arguments, calls.result)
        .where(calls.sprint_id == sprint_id)
        .order_by(calls.attempt.desc(), calls.n.desc(), calls.i.desc())
        .limit(limit)
    )
    failures = (
        sa.select(made.attempt, made.n, sa.literal(-1), sa.literal(""), sa.literal(""), made.error)
        .where(made.sprint_id == sprint_id, made.error.is_not(None))
        .order_by(made.attempt.desc(), made.n.desc())
        .limit(limit)
    )
    rows = sorted((*conn.execute(done), *conn.execute(failures)), key=lambda row: (row[0], row[1], row[2]))
    return [LogLine(attempt, n, tool, arguments, result) for attempt, n, _, tool, arguments, result in rows[-limit:]]


def _usage(
    tokens_in: int | None,
    tokens_out: int | None,
    cached: int | None,
    usd: float | None,
    source: str | None,
    reserved_tokens: int,
    reserved_usd: float,
) -> Usage:
    if tokens_in is None and tokens_out is None:
        return Usage(input=reserved_tokens, usd=reserved_usd, source="estimated")
    return Usage(tokens_in or 0, tokens_out or 0, cached or 0, usd or 0.0, source or "reported")


def reserve(conn: Connection, sprint_id: str, attempt: int, n: int, *, usd: float, tokens: int, now_ms: int) -> None:
    """Books a model call before it is made."""
    conn.execute(
        insert(conn, table)
        .values(sprint_id=sprint_id, attempt=attempt, n=n, reserved_usd=usd, reserved_tokens=tokens, started_ms=now_ms)
        .on_conflict_do_nothing()
    )


def replied(
    conn: Connection,
    sprint_id: str,
    attempt: int,
    n: int,
    *,
    message: dict[str, Any],
    usage: Usage,
    provider: str,
    model: str,
    now_ms: int,
) -> None:
    """The reply and the true cost of a step."""
    conn.execute(
        table.update()
        .where(table.c.sprint_id == sprint_id, table.c.attempt == attempt, table.c.n == n)
        .values(
            reply=_scrub(message),
            cost_usd=usage.usd,
            input=usage.input,
            output=usage.output,
            cached=usage.cached,
            source=usage.source,
            provider=provider,
            model=model,
            done_ms=now_ms,
        )
    )


def _scrub(value: Any) -> Any:
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, dict):
        return {clean(str(key)): _scrub(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_scrub(item) for item in value]
    return value


def failed(conn: Connection, sprint_id: str, attempt: int, n: int, *, error: str, billed: bool, now_ms: int) -> None:
    """No reply came. What was certainly not billed costs nothing; otherwise the reserve stays booked."""
    values: dict[str, Any] = {"error": clean(error)[:2000], "done_ms": now_ms}
    if not billed:
        values |= {"cost_usd": 0.0, "input": 0, "output": 0, "cached": 0}
    conn.execute(table.update().where(table.c.sprint_id == sprint_id, table.c.attempt == attempt, table.c.n == n).values(**values))


def tool_started(
    conn: Connection, sprint_id: str, attempt: int, n: int, i: int, *, call_id: str, tool: str, arguments: str, now_ms: int
) -> None:
    """A row before the tool runs: after a crash it answers "interrupted" and is not run again."""
    conn.execute(
        insert(conn, tool_calls)
        .values(
            sprint_id=sprint_id,
            attempt=attempt,
            n=n,
            i=i,
            call_id=clean(call_id),
            tool=clean(tool),
            arguments=clean(arguments),
            started_ms=now_ms,
        )
        .on_conflict_do_nothing()
    )


def tool_ended(conn: Connection, sprint_id: str, attempt: int, n: int, i: int, *, result: str, now_ms: int) -> None:
    """What the tool answered."""
    columns = tool_calls.c
    conn.execute(
        tool_calls.update()
        .where(columns.sprint_id == sprint_id, columns.attempt == attempt, columns.n == n, columns.i == i)
        .values(result=clean(result), done_ms=now_ms)
    )


def spent(conn: Connection, sprint_id: str) -> Usage:
    """All attempts of a sprint together."""
    columns = table.c
    known = columns.input.is_not(None)
    row = conn.execute(
        sa.select(
            sa.func.coalesce(sa.func.sum(sa.case((known, columns.input), else_=columns.reserved_tokens)), 0),
            sa.func.coalesce(sa.func.sum(columns.output), 0),
            sa.func.coalesce(sa.func.sum(columns.cached), 0),
            sa.func.coalesce(sa.func.sum(sa.case((known, columns.cost_usd), else_=columns.reserved_usd)), 0.0),
            sa.func.count(),
            sa.func.sum(sa.case((sa.or_(~known, columns.source == "estimated"), 1), else_=0)),
        ).where(columns.sprint_id == sprint_id)
    ).one()
    return Usage(int(row[0]), int(row[1]), int(row[2]), float(row[3]), "estimated" if row[5] else "reported")


def count(conn: Connection, sprint_id: str) -> int:
    """Model calls of all attempts."""
    return int(conn.execute(sa.select(sa.func.count()).where(table.c.sprint_id == sprint_id)).scalar_one())


def used_ms(conn: Connection, sprint_id: str) -> int:
    """What the model calls and tool calls of all attempts took together; one that a crash cut short counts nothing."""
    columns = [(one.c.sprint_id, one.c.done_ms - one.c.started_ms) for one in (table, tool_calls)]
    return sum(
        int(conn.execute(sa.select(sa.func.coalesce(sa.func.sum(took), 0)).where(of == sprint_id)).scalar_one()) for of, took in columns
    )


def spent_since(conn: Connection, since_ms: int) -> float:
    """USD of all sprints since then, reserves included."""
    columns = table.c
    statement = sa.select(sa.func.coalesce(sa.func.sum(sa.func.coalesce(columns.cost_usd, columns.reserved_usd)), 0.0))
    return float(conn.execute(statement.where(columns.started_ms >= since_ms)).scalar_one())


def models_of(conn: Connection, sprint_id: str) -> list[str]:
    """`provider/model` of every entry that answered, in order of first use."""
    columns = table.c
    statement = (
        sa.select(columns.provider, columns.model)
        .where(columns.sprint_id == sprint_id, columns.provider.is_not(None))
        .group_by(columns.provider, columns.model)
        .order_by(sa.func.min(columns.started_ms))
    )
    return [f"{provider}/{model}" for provider, model in conn.execute(statement)]
