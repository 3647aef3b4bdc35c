"""The rows as data for others: what each column means, its unit, and CSV cells that no spreadsheet takes for a formula."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from bot.models import SprintState
from bot.store import intents, pulls, spells, sprints, steps

FORMULA = ("=", "+", "-", "@", "\t", "\r")
BATCH = 1000

Value = str | int | float | bool | None

c = sprints.table.c
s = steps.table.c
t = steps.tool_calls.c
d = intents.decisions.c
f = pulls.table.c
v = spells.c


@dataclass(frozen=True, slots=True)
class Column:
    """One column: its type is text, integer, number, boolean or time (ISO 8601, UTC); `of` reads it from a row."""

    name: str
    type: str
    unit: str
    meaning: str
    of: Callable[[Any], Value]


@dataclass(frozen=True, slots=True)
class Dataset:
    """One table of the export. `rows` yields what happened from `since_ms` on, in order of time; `columns` read them."""

    name: str
    meaning: str
    columns: tuple[Column, ...]
    rows: Callable[[Connection, int], Iterator[Any]]

    def records(self, conn: Connection, since_ms: int) -> Iterator[dict[str, Value]]:
        """Every row by column name."""
        for row in self.rows(conn, since_ms):
            yield {column.name: column.of(row) for column in self.columns}


def time_text(ms: int | None) -> str | None:
    """`2026-11-25T01:02:03.456Z`; None stays None."""
    if not ms:
        return None
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def time_ms(text: str) -> int:
    """The other way; raises ValueError."""
    return round(datetime.fromisoformat(text).timestamp() * 1000)


def cell(value: Value) -> str:
    """One CSV cell on one line; text that a spreadsheet would run gets an apostrophe in front."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, str):
        return repr(value) if isinstance(value, float) else str(value)
    # The sign is looked for before the line is folded: a tab or a carriage return in front is one as well.
    guard = "'" if value.startswith(FORMULA) or value.lstrip().startswith(FORMULA) else ""
    return guard + " ".join(value.split())


def line(values: Iterable[Value]) -> str:
    """One line of CSV with its end."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerow([cell(value) for value in values])
    return out.getvalue()


def as_csv(dataset: Dataset, records: Iterable[Mapping[str, Value]]) -> Iterator[str]:
    """Header and lines."""
    names = [column.name for column in dataset.columns]
    yield line(names)
    for record in records:
        yield line(record[name] for name in names)


def as_jsonl(records: Iterable[Mapping[str, Value]]) -> Iterator[str]:
    """One object a line."""
    for record in records:
        yield json.dumps(record, ensure_ascii=False) + "\n"


def dictionary() -> str:
    """The data dictionary, Markdown: every table, every column."""
    parts = [
        "# Data dictionary\n\nTimes are ISO 8601 in UTC. An empty cell, or null, means: not known or not yet. No names of people and no texts are exported.\n"
    ]
    for dataset in DATASETS.values():
        rows = [f"| `{column.name}` | {column.type} | {column.unit or '-'} | {column.meaning} |" for column in dataset.columns]
        table = "\n".join(["| column | type | unit | meaning |", "|---|---|---|---|", *rows])
        parts.append(f"## {dataset.name}\n\n{dataset.meaning}\n\n{table}\n")
    return "\n".join(parts)


def _get(name: str) -> Callable[[Any], Value]:
    return lambda row: getattr(row, name)


def _time(name: str) -> Callable[[Any], Value]:
    return lambda row: time_text(getattr(row, name))


def _seconds(first: str, last: str) -> Callable[[Any], Value]:
    def of(row: Any) -> Value:
        begin, end = getattr(row, first), getattr(row, last)
        return None if begin is None or end is None else round(max(0, end - begin) / 1000, 3)

    return of


def _stream(conn: Connection, statement: sa.Select[Any]) -> Iterator[Any]:
    result = conn.execute(statement.execution_options(yield_per=BATCH))
    for part in result.partitions(BATCH):
        yield from part


def settled(conn: Connection, since_ms: int) -> Iterator[Any]:
    """Settled sprints in order of their end, with when their pull request was merged."""
    merged = sa.and_(f.repo_id == c.repo_id, f.number == c.pr, f.state == "merged")
    statement = sa.select(sprints.table, f.at_ms.label("merged_ms")).outerjoin(pulls.table, merged)
    return _stream(conn, statement.where(c.state == SprintState.SETTLED, c.settled_ms >= since_ms).order_by(c.settled_ms, c.id))


def _steps(conn: Connection, since_ms: int) -> Iterator[Any]:
    return _stream(conn, sa.select(steps.table).where(s.started_ms >= since_ms).order_by(s.started_ms, s.sprint_id, s.attempt, s.n))


def _tools(conn: Connection, since_ms: int) -> Iterator[Any]:
    sizes = (sa.func.length(t.arguments).label("arguments_size"), sa.func.length(t.result).label("result_size"))
    columns = (t.sprint_id, t.attempt, t.n, t.i, t.tool, t.started_ms, t.done_ms, *sizes)
    return _stream(conn, sa.select(*columns).where(t.started_ms >= since_ms).order_by(t.started_ms, t.sprint_id, t.attempt, t.n, t.i))


def _decisions(conn: Connection, since_ms: int) -> Iterator[Any]:
    columns = (d.made_ms, d.repo_id, d.issue, d.sprint_id, d.kind, d.result)
    return _stream(conn, sa.select(*columns).where(d.made_ms >= since_ms).order_by(d.made_ms, d.id))


def _pulls(conn: Connection, since_ms: int) -> Iterator[Any]:
    return _stream(conn, sa.select(pulls.table).where(f.at_ms >= since_ms).order_by(f.at_ms, f.repo_id, f.number))


def _verdicts(conn: Connection, since_ms: int) -> Iterator[Any]:
    return _stream(conn, sa.select(spells.table).where(v.seen_ms >= since_ms).order_by(v.from_ms, v.id))


RESULTS = (
    Column("time", "time", "", "when the sprint settled", _time("settled_ms")),
    Column("repository", "text", "", "OWNER/NAME as it was called last", _get("repo")),
    Column("issue", "integer", "", "number of the issue", _get("issue")),
    Column("sprint", "text", "", "id of the sprint", _get("id")),
    Column("engine", "text", "", "agent engine", _get("engine")),
    Column("provider", "text", "", "provider that answered last", _get("provider")),
    Column("model", "text", "", "model that answered last", _get("model")),
    Column("outcome", "text", "", "pull_request, updated, no_change, refused, budget, cancelled, planned or failed", _get("outcome")),
    Column("pr", "integer", "", "number of the pull request, 0 for none", _get("pr")),
    Column("steps", "integer", "calls", "model calls of all attempts", _get("steps")),
    Column("tokens", "integer", "tokens", "input and output of all attempts", _get("tokens")),
    Column("cost", "number", "USD", "by the price table; reserves where a cost never became known", _get("usd")),
    Column("seconds", "number", "s", "from the first start to the end; empty where it never started", _seconds("started_ms", "settled_ms")),
)

DATASETS: Mapping[str, Dataset] = {
    dataset.name: dataset
    for dataset in (
        Dataset(
            "sprints",
            "One row for each sprint that settled.",
            (
                *RESULTS,
                Column("reason", "text", "", "for `failed` and `refused`: why", _get("reason")),
                Column(
                    "source", "text", "", "what asked for it: label, command, schedule, retry, review, checks, reconcile", _get("source")
                ),
                Column("priority", "integer", "", "1 (first) to 9, as it was at the end", _get("priority")),
                Column("attempts", "integer", "", "attempts with a tree of their own", _get("attempt")),
                Column("admissions", "integer", "", "times it was given a slot; more than one means it was requeued", _get("admitted_n")),
                Column("crashes", "integer", "", "deaths of the process that ran it", _get("crashes")),
                Column("queued", "time", "", "when it was asked for", _time("queued_ms")),
                Column("started", "time", "", "when it began to prepare first", _time("started_ms")),
                Column("queue_seconds", "number", "s", "from asked for to started", _seconds("queued_ms", "started_ms")),
                Column("files", "integer", "files", "files changed", _get("files")),
                Column("pr_state", "text", "", "open, merged, closed or reverted, at the time of the export", _get("pr_state")),
                Column("merged", "time", "", "when its pull request was merged", _time("merged_ms")),
                Column("sandbox", "text", "", "how the model's commands were walled in", _get("sandbox")),
            ),
            settled,
        ),
        Dataset(
            "steps",
            "One row for each model call.",
            (
                Column("time", "time", "", "when the call began", _time("started_ms")),
                Column("sprint", "text", "", "id of the sprint", _get("sprint_id")),
                Column("attempt", "integer", "", "attempt of the sprint, from 1", _get("attempt")),
                Column("step", "integer", "", "number of the call in its attempt", _get("n")),
                Column("provider", "text", "", "who answered; empty where nobody did", _get("provider")),
                Column("model", "text", "", "which model answered", _get("model")),
                Column("seconds", "number", "s", "length of the call, waits and fallbacks included", _seconds("started_ms", "done_ms")),
                Column("input", "integer", "tokens", "input", _get("input")),
                Column("output", "integer", "tokens", "output", _get("output")),
                Column("cached", "integer", "tokens", "input read from the provider's cache", _get("cached")),
                Column("cost", "number", "USD", "empty where it never became known", _get("cost_usd")),
                Column("reserved", "number", "USD", "booked before the call; counts where the cost is empty", _get("reserved_usd")),
                Column("source", "text", "", "reported by the provider, or estimated", _get("source")),
                Column("failed", "boolean", "", "no answer came", lambda row: row.error is not None),
            ),
            _steps,
        ),
        Dataset(
            "tools",
            "One row for each tool call.",
            (
                Column("time", "time", "", "when the call began", _time("started_ms")),
                Column("sprint", "text", "", "id of the sprint", _get("sprint_id")),
                Column("attempt", "integer", "", "attempt of the sprint, from 1", _get("attempt")),
                Column("step", "integer", "", "model call that asked for it", _get("n")),
                Column("call", "integer", "", "its place among the calls of that step, from 0", _get("i")),
                Column("tool", "text", "", "name of the tool", _get("tool")),
                Column("seconds", "number", "s", "how long it ran; empty where a crash cut it short", _seconds("started_ms", "done_ms")),
                Column("arguments_size", "integer", "characters", "length of its arguments", _get("arguments_size")),
                Column("result_size", "integer", "characters", "length of its answer", _get("result_size")),
            ),
            _tools,
        ),
        Dataset(
            "decisions",
            "One row for each decision: a command, an admission, a wait, an end.",
            (
                Column("time", "time", "", "when it was made", _time("made_ms")),
                Column("repository_id", "integer", "", "the forge's number of the repository", _get("repo_id")),
                Column("issue", "integer", "", "number of the issue", _get("issue")),
                Column("sprint", "text", "", "id of the sprint it is about", _get("sprint_id")),
                Column("kind", "text", "", "the verb, or admit, wait, settle, give_up, `watchdog PROBE`", _get("kind")),
                Column("result", "text", "", "ok, denied, invalid, ..., or the reason of a wait, or the outcome of an end", _get("result")),
            ),
            _decisions,
        ),
        Dataset(
            "pulls",
            "One row for each end, and each reopening, of a pull request of the bot's.",
            (
                Column("time", "time", "", "when it happened", _time("at_ms")),
                Column("repository_id", "integer", "", "the forge's number of the repository", _get("repo_id")),
                Column("pr", "integer", "", "number of the pull request", _get("number")),
                Column("state", "text", "", "merged, closed (without a merge) or open (again)", _get("state")),
            ),
            _pulls,
        ),
        Dataset(
            "verdicts",
            "One row for each time in which a verdict on the fleet held.",
            (
                Column("time", "time", "", "when it was first seen", _time("from_ms")),
                Column("until", "time", "", "when it was seen last", _time("seen_ms")),
                Column("seconds", "number", "s", "between the two", _seconds("from_ms", "seen_ms")),
                Column("verdict", "text", "", "working, idle, paused, degraded or stalled", _get("verdict")),
                Column("causes", "text", "", "codes of the faults that were seen in it, with commas between them", _get("causes")),
                Column("over", "boolean", "", "another verdict came after it, or nobody looked any more", _get("over")),
            ),
            _verdicts,
        ),
    )
}


def names(columns: Sequence[Column]) -> list[str]:
    """Their names in order."""
    return [column.name for column in columns]
