"""Steps and tool calls of sprints, written before and after they happen; spend is their sum, reserves counted where no cost is known."""

from __future__ import annotations

import functools
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection

from bot.models import LogLine, StoredStep, StoredToolCall, Usage
from bot.store._base import BIG, clean, metadata

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


# Made once: a step of an agent waits for these, and putting a statement together takes longer than running it.
_STEP = table.update().where(
    table.c.sprint_id == sa.bindparam("of_sprint"), table.c.attempt == sa.bindparam("of_attempt"), table.c.n == sa.bindparam("of_n")
)
_CALL = tool_calls.update().where(
    tool_calls.c.sprint_id == sa.bindparam("of_sprint"),
    tool_calls.c.attempt == sa.bindparam("of_attempt"),
    tool_calls.c.n == sa.bindparam("of_n"),
    tool_calls.c.i == sa.bindparam("of_i"),
)
_KNOWN = table.c.input.is_not(None)
_TOTALS = sa.select(
    sa.func.coalesce(sa.func.sum(sa.case((_KNOWN, table.c.input), else_=table.c.reserved_tokens)), 0),
    sa.func.coalesce(sa.func.sum(table.c.output), 0),
    sa.func.coalesce(sa.func.sum(table.c.cached), 0),
    sa.func.coalesce(sa.func.sum(sa.case((_KNOWN, table.c.cost_usd), else_=table.c.reserved_usd)), 0.0),
    sa.func.count(),
    sa.func.sum(sa.case((sa.or_(~_KNOWN, table.c.source == "estimated"), 1), else_=0)),
).where(table.c.sprint_id == sa.bindparam("of_sprint"))


@functools.cache
def _unless_there(dialect: str, into: sa.Table) -> Any:
    return (sqlite if dialect == "sqlite" else postgresql).insert(into).on_conflict_do_nothing()


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
    values = {"sprint_id": sprint_id, "attempt": attempt, "n": n, "reserved_usd": usd, "reserved_tokens": tokens, "started_ms": now_ms}
    conn.execute(_unless_there(conn.dialect.name, table), values)


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
    values = {
        "reply": _scrub(message),
        "cost_usd": usage.usd,
        "input": usage.input,
        "output": usage.output,
        "cached": usage.cached,
        "source": usage.source,
        "provider": provider,
        "model": model,
        "done_ms": now_ms,
    }
    conn.execute(_STEP, {"of_sprint": sprint_id, "of_attempt": attempt, "of_n": n, **values})


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
    conn.execute(_STEP, {"of_sprint": sprint_id, "of_attempt": attempt, "of_n": n, **values})


def tool_started(
    conn: Connection, sprint_id: str, attempt: int, n: int, i: int, *, call_id: str, tool: str, arguments: str, now_ms: int
) -> None:
    """A row before the tool runs: after a crash it answers "interrupted" and is not run again."""
    values = {
        "sprint_id": sprint_id,
        "attempt": attempt,
        "n": n,
        "i": i,
        "call_id": clean(call_id),
        "tool": clean(tool),
        "arguments": clean(arguments),
        "started_ms": now_ms,
    }
    conn.execute(_unless_there(conn.dialect.name, tool_calls), values)


def tool_ended(conn: Connection, sprint_id: str, attempt: int, n: int, i: int, *, result: str, now_ms: int) -> None:
    """What the tool answered."""
    values = {"result": clean(result), "done_ms": now_ms}
    conn.execute(_CALL, {"of_sprint": sprint_id, "of_attempt": attempt, "of_n": n, "of_i": i, **values})


def totals(conn: Connection, sprint_id: str) -> tuple[Usage, int]:
    """All attempts of a sprint together: what they cost, and how many model calls they made."""
    row = conn.execute(_TOTALS, {"of_sprint": sprint_id}).one()
    return Usage(int(row[0]), int(row[1]), int(row[2]), float(row[3]), "estimated" if row[5] else "reported"), int(row[4])


def spent(conn: Connection, sprint_id: str) -> Usage:
    """What all attempts of a sprint cost together."""
    return totals(conn, sprint_id)[0]


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
