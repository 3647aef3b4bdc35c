"""The fleet at a glance for a terminal: plain SQL, so that a start needs no more than the database's own driver, and one read transaction."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bot.models import IN_FLIGHT, SprintState, UserError
from bot.queue_order import QUEUE_ORDER
from bot.redaction import terminal

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

Rows = Callable[..., list[tuple[Any, ...]]]

DAY_MS = 86_400_000
LISTED = 15
BAR_WIDTH = 12
TITLE = 50
GOOD = ("pull_request", "updated")


@dataclass(frozen=True, slots=True)
class Running:
    """A sprint in flight; `most` is its limit of steps, `since_ms` when it began (0: not yet)."""

    ref: str
    title: str
    state: str
    doing: str
    steps: int
    most: int
    since_ms: int
    usd: float
    model: str
    stop: str


@dataclass(frozen=True, slots=True)
class Waiting:
    """A queued sprint with its place; `why` is the reason and the note of what holds it, or ""."""

    place: int
    ref: str
    title: str
    priority: int
    since_ms: int
    why: str


@dataclass(frozen=True, slots=True)
class Worker:
    """A process that runs sprints; `state` is idle, busy, draining or lost."""

    name: str
    host: str
    state: str
    busy: int
    slots: int
    beat_ms: int


@dataclass(frozen=True, slots=True)
class WaitingPlan:
    """A plan that waits for a person until `until_ms`."""

    ref: str
    title: str
    by: str
    until_ms: int


@dataclass(frozen=True, slots=True)
class Board:
    """Everything shown, as of `now_ms`. `day` counts the sprints that settled in the last 24 hours, `usd` is what was spent in them."""

    now_ms: int
    counts: Mapping[str, int]
    running: tuple[Running, ...]
    waiting: tuple[Waiting, ...]
    workers: tuple[Worker, ...]
    pauses: tuple[str, ...]
    day: Mapping[str, int]
    usd: float
    moved_ms: int
    ended: tuple[tuple[str, str, int, float, int], ...]
    plans: tuple[WaitingPlan, ...] = ()

    @property
    def in_flight(self) -> int:
        """Sprints admitted or running."""
        return sum(self.counts.get(state, 0) for state in IN_FLIGHT)

    @property
    def queued(self) -> int:
        """Sprints that wait."""
        return self.counts.get(SprintState.QUEUED, 0)


@contextlib.contextmanager
def opened(url: str, state_dir: Path) -> Iterator[Rows]:
    """A way to ask the database, read-only; raises UserError where there is none."""
    if not url.startswith("sqlite:"):
        with _on_server(url) as rows:
            yield rows
        return
    path = Path(url.removeprefix("sqlite:///"))
    if not path.exists():
        raise UserError(f"there is no state in {state_dir}: start the service once (`timmy-dispatch serve`)")
    connection = sqlite3.connect(path, timeout=5.0, isolation_level=None)
    try:
        connection.execute("PRAGMA query_only=ON")
        yield lambda sql, **values: connection.execute(sql, values).fetchall()
    except sqlite3.OperationalError as error:
        raise UserError(f"the database {path} cannot be read: {error}") from error
    finally:
        connection.close()


@contextlib.contextmanager
def _on_server(url: str) -> Iterator[Rows]:
    import sqlalchemy as sa

    engine = sa.create_engine(sa.make_url(url).set(drivername="postgresql+psycopg"), poolclass=sa.NullPool)
    connection = engine.connect().execution_options(isolation_level="AUTOCOMMIT")
    try:

        def rows(sql: str, **values: Any) -> list[tuple[Any, ...]]:
            result = connection.execute(sa.text(sql), values)
            return [tuple(row) for row in result] if result.returns_rows else []

        yield rows
    except sa.exc.SQLAlchemyError as error:
        raise UserError(f"the database cannot be read: {str(error).splitlines()[0]}") from error
    finally:
        connection.close()


def look(rows: Rows, *, now_ms: int, lease_ms: int) -> Board:
    """The fleet now."""
    rows("BEGIN")
    try:
        return _look(rows, now_ms=now_ms, lease_ms=lease_ms)
    finally:
        rows("ROLLBACK")


def _look(rows: Rows, *, now_ms: int, lease_ms: int) -> Board:
    counts: dict[str, int] = dict(rows("SELECT state, count(*) FROM sprints WHERE state <> 'settled' GROUP BY state"))
    day = now_ms - DAY_MS
    running = rows(
        "SELECT repo, issue, title, state, doing, steps, limits, coalesce(started_ms, 0), usd, model, coalesce(stop, '') FROM sprints "
        "WHERE state NOT IN ('queued', 'settled') ORDER BY admitted_ms, id LIMIT :n",
        n=LISTED,
    )
    waiting = rows(
        "SELECT o.place, s.repo, s.issue, s.title, s.priority, s.queued_ms, coalesce(s.waiting_reason, ''), s.waiting_note "
        "FROM (" + QUEUE_ORDER + ") o JOIN sprints s ON s.id = o.id ORDER BY o.place LIMIT :n",
        n=LISTED,
    )
    spent = rows(
        "SELECT coalesce(sum(coalesce(cost_usd, reserved_usd)), 0.0) FROM steps WHERE started_ms >= :day AND sprint_id IN "
        "(SELECT id FROM sprints WHERE state <> 'settled' UNION SELECT id FROM sprints WHERE settled_ms >= :day)",
        day=day,
    )
    pauses = [
        *rows(
            'SELECT scope, repo, "by", until_ms, reason FROM pauses WHERE until_ms IS NULL OR until_ms > :now ORDER BY repo_id', now=now_ms
        ),
        *rows(
            'SELECT scope, repo || provider, "by", until_ms, reason FROM holds WHERE lifted_ms IS NULL AND (until_ms IS NULL OR until_ms > :now) '
            "ORDER BY repo_id, provider",
            now=now_ms,
        ),
    ]
    opened = rows("SELECT scope, repo || provider, failures, reason, due_ms, probe FROM breakers WHERE open ORDER BY repo_id, provider")
    moved = rows("SELECT coalesce(max(progress_ms), 0) FROM sprints")
    ended = rows(
        "SELECT repo, issue, outcome, pr, usd, settled_ms FROM sprints WHERE settled_ms >= :day AND state = 'settled' "
        "ORDER BY settled_ms DESC, id LIMIT 5",
        day=day,
    )
    waiting_plans = rows(
        "SELECT p.repo, p.issue, s.title, p.requester, p.expires_ms FROM plans p JOIN sprints s ON s.id = p.id WHERE p.state = 'waiting' "
        "ORDER BY p.expires_ms, p.id LIMIT :n",
        n=LISTED,
    )
    return Board(
        now_ms=now_ms,
        counts=counts,
        running=tuple(_running(row) for row in running),
        waiting=tuple(
            Waiting(place, f"{repo}#{issue}", title, priority, since, f"{reason}: {note}".strip(": "))
            for place, repo, issue, title, priority, since, reason, note in waiting
        ),
        workers=tuple(_workers(rows, now_ms=now_ms, lease_ms=lease_ms)),
        pauses=(*(_pause(*row) for row in pauses), *(_breaker(*row) for row in opened)),
        day=dict(rows("SELECT outcome, count(*) FROM sprints WHERE settled_ms >= :day AND state = 'settled' GROUP BY outcome", day=day)),
        usd=float(spent[0][0]),
        moved_ms=int(moved[0][0]),
        ended=tuple((f"{repo}#{issue}", outcome, pr, usd, at) for repo, issue, outcome, pr, usd, at in ended),
        plans=tuple(WaitingPlan(f"{repo}#{issue}", title, by, until) for repo, issue, title, by, until in waiting_plans),
    )


def _running(row: Sequence[Any]) -> Running:
    repo, issue, title, state, doing, steps, limits, since, usd, model, stop = row
    known = json.loads(limits) if isinstance(limits, str) else limits
    most = int(known.get("steps", 0)) if isinstance(known, dict) else 0
    return Running(f"{repo}#{issue}", title, state, doing, steps, most, since, usd, model, stop)


def _workers(rows: Rows, *, now_ms: int, lease_ms: int) -> Iterator[Worker]:
    """The newest of each slot."""
    claimed = "SELECT executor_id, count(*) FROM sprints WHERE state NOT IN ('queued', 'settled') AND executor_id IS NOT NULL GROUP BY executor_id"
    busy: dict[str, int] = dict(rows(claimed))
    latest: dict[tuple[str, int], Sequence[Any]] = {}
    for row in rows(
        "SELECT node_id, slot, host, executor_id, capacity, draining, beat_ms, reaped_ms FROM workers WHERE slot >= 0 ORDER BY started_ms"
    ):
        latest[row[0], row[1]] = row
    for (node, slot), (_, _, host, executor, capacity, draining, beat_ms, reaped_ms) in sorted(latest.items()):
        runs = int(busy.get(executor, 0))
        if reaped_ms is not None or beat_ms <= now_ms - lease_ms:
            state = "lost"
        else:
            state = "draining" if draining else "busy" if runs else "idle"
        yield Worker(f"{node}-{slot}", host, state, runs, capacity, beat_ms)


def _breaker(scope: str, name: str, failures: int, reason: str, due_ms: int, probe: str) -> str:
    from bot.replies import moment

    what = "the fleet" if scope == "fleet" else name
    tried = "one is tried now" if probe else f"one is tried at {moment(due_ms)}"
    return f"{what} is held by the breaker: {failures} in a row failed ({reason}); {tried}"


def _pause(scope: str, name: str, by: str, until_ms: int | None, reason: str) -> str:
    from bot.replies import moment

    what = "the fleet is paused" if scope == "fleet" else f"{name} is paused"
    return f"{what} by {by}" + (f" until {moment(until_ms)}" if until_ms else "") + (f": {reason}" if reason else "")


def plain(board: Board) -> str:
    """One line, for a log or a pipe."""
    busy, slots = _slots(board)
    paused = f", {len(board.pauses)} paused" if board.pauses else ""
    plans = f", {len(board.plans)} plan{'s' if len(board.plans) > 1 else ''} to approve" if board.plans else ""
    done = sum(board.day.values())
    good = sum(board.day.get(outcome, 0) for outcome in GOOD)
    return (
        f"running {board.in_flight}, queued {board.queued}, slots {busy}/{slots}, "
        f"24 h: {done} ended, {good} good, ${board.usd:.2f}{paused}{plans}, moved {_ago(board, board.moved_ms)}"
    )


def _slots(board: Board) -> tuple[int, int]:
    live = [worker for worker in board.workers if worker.state != "lost"]
    return sum(worker.busy for worker in live), sum(worker.slots for worker in live)


def _ago(board: Board, at_ms: int) -> str:
    return f"{_span(board.now_ms - at_ms)} ago" if at_ms else "never"


def _span(ms: int) -> str:
    seconds = max(0, ms) // 1000
    if seconds < 60:  # noqa: PLR2004 - a minute
        return f"{seconds}s"
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"


def shown(board: Board) -> RenderableType:
    """The tables, as one thing that can be drawn again and again."""
    from rich.console import Group
    from rich.text import Text

    busy, slots = _slots(board)
    done, good = sum(board.day.values()), sum(board.day.get(outcome, 0) for outcome in GOOD)
    head = Text.assemble(
        (f"{board.in_flight} running", "bold green" if board.in_flight else "bold"),
        f"   {board.queued} queued   {busy}/{slots} slots   moved {_ago(board, board.moved_ms)}   24 h: {done} ended, {good} good, ${board.usd:.2f}",
    )
    parts: list[RenderableType] = [head, *(Text(f"|| {terminal(pause)}", "yellow") for pause in board.pauses)]
    if not board.workers:
        parts.append(Text("no worker: the service does not run", "red"))
    for part in (_running_table(board), _waiting_table(board), _plans_table(board), _workers_table(board), _ended_table(board)):
        if part is not None:
            parts += [Text(""), part]
    return Group(*parts)


def _running_table(board: Board) -> RenderableType | None:
    from rich.progress_bar import ProgressBar
    from rich.text import Text

    if not board.running:
        return None
    table = _table("running", "", "steps", "state", "for", "cost", "model", "title")
    for sprint in board.running:
        bar = ProgressBar(total=max(1, sprint.most), completed=min(sprint.steps, sprint.most), width=BAR_WIDTH)
        doing = f"{sprint.state} {sprint.doing}".strip() + (f" ({sprint.stop})" if sprint.stop else "")
        table.add_row(
            Text(terminal(sprint.ref)),
            bar,
            f"{sprint.steps}/{sprint.most or '-'}",
            _cut(doing),
            _span(board.now_ms - sprint.since_ms) if sprint.since_ms else "-",
            f"${sprint.usd:.2f}",
            _cut(sprint.model),
            _cut(sprint.title),
        )
    return table


def _waiting_table(board: Board) -> RenderableType | None:
    from rich.text import Text

    if not board.waiting:
        return None
    more = f" (first {len(board.waiting)} of {board.queued})" if board.queued > len(board.waiting) else ""
    table = _table(f"queued{more}", "place", "priority", "for", "why", "title")
    for sprint in board.waiting:
        place, since = str(sprint.place), _span(board.now_ms - sprint.since_ms)
        table.add_row(Text(terminal(sprint.ref)), place, str(sprint.priority), since, _cut(sprint.why, "yellow"), _cut(sprint.title))
    return table


def _plans_table(board: Board) -> RenderableType | None:
    from rich.text import Text

    if not board.plans:
        return None
    table = _table("plans to approve", "for", "ends in", "title")
    for plan in board.plans:
        left = _span(plan.until_ms - board.now_ms)
        table.add_row(Text(terminal(plan.ref)), _cut(plan.by), left, _cut(plan.title))
    return table


def _workers_table(board: Board) -> RenderableType | None:
    from rich.text import Text

    if not board.workers:
        return None
    styles = {"lost": "bold red", "busy": "green", "draining": "yellow"}
    table = _table("workers", "host", "state", "busy", "last beat")
    for worker in board.workers:
        state = Text(worker.state, styles.get(worker.state, ""))
        table.add_row(
            Text(terminal(worker.name)), Text(terminal(worker.host)), state, f"{worker.busy}/{worker.slots}", _ago(board, worker.beat_ms)
        )
    return table


def _ended_table(board: Board) -> RenderableType | None:
    from rich.text import Text

    if not board.ended:
        return None
    table = _table("ended", "as", "pull request", "cost", "when")
    for ref, outcome, pr, usd, at_ms in board.ended:
        style = "green" if outcome in GOOD else "yellow"
        table.add_row(Text(terminal(ref)), Text(outcome, style), f"#{pr}" if pr else "-", f"${usd:.2f}", _ago(board, at_ms))
    return table


def _table(*titles: str) -> Table:
    from rich.table import Table as Made

    table = Made(box=None, pad_edge=False, header_style="dim")
    for title in titles:
        # What may be cut gives way first where the terminal is narrow.
        table.add_column(title, no_wrap=title not in ("title", "why", "state", "model"), overflow="ellipsis")
    return table


def _cut(text: str, style: str = "") -> Text:
    from rich.text import Text as Made

    return Made(terminal(" ".join(text.split()))[:TITLE], style, no_wrap=True, overflow="ellipsis")
