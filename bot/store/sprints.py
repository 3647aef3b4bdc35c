"""Sprints: one active per issue by a unique index, every change guarded by the state and the owner it expects (engine.md)."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from bot.models import (
    IN_FLIGHT,
    RUNNING,
    CancelResult,
    IssueRef,
    Limits,
    Outcome,
    OutcomeKind,
    RepoId,
    Source,
    SprintId,
    SprintState,
    SprintView,
    Stop,
    Usage,
    WaitingReason,
)
from bot.queue_order import QUEUE_ORDER
from bot.store._base import BIG, clean, database_now_ms, insert, metadata

table = sa.Table(
    "sprints",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("repo_id", BIG, nullable=False),
    sa.Column("repo", sa.Text, nullable=False),
    sa.Column("issue", sa.Integer, nullable=False),
    sa.Column("title", sa.Text, nullable=False, default=""),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("outcome", sa.Text),
    sa.Column("reason", sa.Text, nullable=False, default=""),
    sa.Column("detail", sa.Text, nullable=False, default=""),
    sa.Column("waiting_reason", sa.Text),
    sa.Column("waiting_note", sa.Text, nullable=False, default=""),
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("source", sa.Text, nullable=False),
    sa.Column("trigger", sa.Text, nullable=False),
    sa.Column("requester_id", BIG, nullable=False),
    sa.Column("requester", sa.Text, nullable=False),
    sa.Column("instructions", sa.Text, nullable=False, default=""),
    sa.Column("options", sa.JSON, nullable=False),
    sa.Column("limits", sa.JSON, nullable=False),
    sa.Column("text_hash", sa.Text, nullable=False, default=""),
    sa.Column("admitted_n", sa.Integer, nullable=False, default=0),
    sa.Column("attempt", sa.Integer, nullable=False, default=1),
    sa.Column("aged", sa.Integer, nullable=False, default=0),
    sa.Column("crashes", sa.Integer, nullable=False, default=0),
    sa.Column("executor_id", sa.Text),
    sa.Column("node_id", sa.Text),
    sa.Column("queued_ms", BIG, nullable=False),
    sa.Column("not_before_ms", BIG, nullable=False, default=0),
    sa.Column("admitted_ms", BIG),
    sa.Column("started_ms", BIG),
    sa.Column("settled_ms", BIG),
    sa.Column("updated_ms", BIG, nullable=False),
    sa.Column("progress_ms", BIG),
    sa.Column("stop", sa.Text),
    sa.Column("stop_by", sa.Text, nullable=False, default=""),
    sa.Column("engine", sa.Text, nullable=False, default=""),
    sa.Column("provider", sa.Text, nullable=False, default=""),
    sa.Column("model", sa.Text, nullable=False, default=""),
    sa.Column("doing", sa.Text, nullable=False, default=""),
    sa.Column("branch", sa.Text, nullable=False, default=""),
    sa.Column("base_branch", sa.Text, nullable=False, default=""),
    sa.Column("base_sha", sa.Text, nullable=False, default=""),
    sa.Column("lease_sha", sa.Text, nullable=False, default=""),
    sa.Column("head_sha", sa.Text, nullable=False, default=""),
    sa.Column("tree", sa.Text, nullable=False, default=""),
    sa.Column("pr", sa.Integer, nullable=False, default=0),
    sa.Column("pr_state", sa.Text, nullable=False, default=""),
    sa.Column("files", sa.Integer, nullable=False, default=0),
    sa.Column("checks", sa.JSON, nullable=False),
    sa.Column("flagged", sa.JSON, nullable=False),
    sa.Column("config_faults", sa.JSON, nullable=False, default=list),
    sa.Column("sandbox", sa.Text, nullable=False, default=""),
    sa.Column("summary", sa.Text, nullable=False, default=""),
    sa.Column("agent_end", sa.Text, nullable=False, default=""),
    sa.Column("agent_reason", sa.Text, nullable=False, default=""),
    sa.Column("steps", sa.Integer, nullable=False, default=0),
    sa.Column("tokens", BIG, nullable=False, default=0),
    sa.Column("usd", sa.Float, nullable=False, default=0.0),
    sa.Column("comment_id", BIG),
    sa.Column("shown_label", sa.Text, nullable=False, default=""),
    sa.Column("rev", sa.Integer, nullable=False, default=1),
    sa.Column("projected_rev", sa.Integer, nullable=False, default=0),
    sa.Column("show_due_ms", BIG, nullable=False, default=0),
    sa.Column("show_tries", sa.Integer, nullable=False, default=0),
    sa.Column("show_error", sa.Text),
    sa.Index(
        "uq_sprints_active",
        "repo_id",
        "issue",
        unique=True,
        sqlite_where=sa.text("state <> 'settled'"),
        postgresql_where=sa.text("state <> 'settled'"),
    ),
    sa.Index(
        "ix_sprints_queue",
        "repo_id",
        "priority",
        "queued_ms",
        sqlite_where=sa.text("state = 'queued'"),
        postgresql_where=sa.text("state = 'queued'"),
    ),
    sa.Index(
        "ix_sprints_unnamed",
        "repo_id",
        "not_before_ms",
        sqlite_where=sa.text("state = 'queued' AND waiting_reason IS NULL"),
        postgresql_where=sa.text("state = 'queued' AND waiting_reason IS NULL"),
    ),
    sa.Index(
        "ix_sprints_flight",
        "repo_id",
        sqlite_where=sa.text("state NOT IN ('queued', 'settled')"),
        postgresql_where=sa.text("state NOT IN ('queued', 'settled')"),
    ),
    sa.Index(
        "ix_sprints_show",
        "show_due_ms",
        sqlite_where=sa.text("projected_rev < rev"),
        postgresql_where=sa.text("projected_rev < rev"),
    ),
    sa.Index("ix_sprints_issue", "repo_id", "issue", "queued_ms"),
    sa.Index(
        "ix_sprints_pull",
        "pr",
        "repo_id",
        sqlite_where=sa.text("pr_state = 'open'"),
        postgresql_where=sa.text("pr_state = 'open'"),
    ),
    sa.Index(
        "ix_sprints_head",
        "repo_id",
        "head_sha",
        sqlite_where=sa.text("pr_state = 'open'"),
        postgresql_where=sa.text("pr_state = 'open'"),
    ),
    sa.Index("ix_sprints_progress", "progress_ms"),
    sa.Index("ix_sprints_settled", "settled_ms"),
)
c = table.c

# Written out: a bound parameter would keep the database from using a partial index.
QUEUED = sa.text("sprints.state = 'queued'")
FLYING = sa.text("sprints.state NOT IN ('queued', 'settled')")
PULL_OPEN = sa.text("sprints.pr_state = 'open'")

AGED_TO = 2

VIEW = (
    "id repo_id repo issue state title outcome reason detail waiting_reason waiting_note stop stop_by source trigger requester_id requester "
    "priority attempt admitted_n queued_ms not_before_ms started_ms settled_ms updated_ms steps tokens usd limits engine provider model doing "
    "branch base_branch base_sha lease_sha head_sha pr pr_state files checks flagged sandbox instructions text_hash options "
    "config_faults"
).split()
VIEW_COLUMNS = tuple(c[name] for name in VIEW)


def view(row: Any) -> SprintView:
    """A row of VIEW_COLUMNS as people may see it."""
    data: dict[str, Any] = dict(zip(VIEW, row, strict=True))
    data["id"] = SprintId(data["id"])
    data["repo_id"] = RepoId(data["repo_id"])
    data["issue"] = IssueRef.of(data.pop("repo"), data["issue"])
    data["state"] = SprintState(data["state"])
    data["outcome"] = data["outcome"] and OutcomeKind(data["outcome"])
    reason = data.pop("waiting_reason")
    data["waiting"] = WaitingReason(reason) if reason else None
    data["stop"] = Stop(data["stop"]) if data["stop"] else None
    data["source"] = Source(data["source"])
    data["intent_key"] = data.pop("trigger")
    data["started_ms"] = data["started_ms"] or 0
    data["settled_ms"] = data["settled_ms"] or 0
    data["limits"] = Limits(**data["limits"])
    data["checks"] = tuple(data["checks"])
    data["flagged"] = tuple(data["flagged"])
    data["config_faults"] = tuple(data["config_faults"])
    return SprintView(**data)


def get(conn: Connection, sprint_id: str) -> SprintView | None:
    """The sprint, or None."""
    row = conn.execute(sa.select(*VIEW_COLUMNS).where(c.id == sprint_id)).first()
    return None if row is None else view(row)


def field(conn: Connection, sprint_id: str, *names: str) -> Any:
    """Named columns of one sprint as a row; raises NoResultFound for an unknown id."""
    return conn.execute(sa.select(*(c[name] for name in names)).where(c.id == sprint_id)).one()


def active(conn: Connection, repo_id: int, issue: int) -> SprintView | None:
    """The one sprint of this issue that is not settled."""
    row = conn.execute(sa.select(*VIEW_COLUMNS).where(c.repo_id == repo_id, c.issue == issue, c.state != SprintState.SETTLED)).first()
    return None if row is None else view(row)


def last(conn: Connection, repo_id: int, issue: int) -> SprintView | None:
    """The newest settled sprint of this issue."""
    statement = (
        sa.select(*VIEW_COLUMNS)
        .where(c.repo_id == repo_id, c.issue == issue, c.state == SprintState.SETTLED)
        .order_by(c.queued_ms.desc(), c.id.desc())
        .limit(1)
    )
    row = conn.execute(statement).first()
    return None if row is None else view(row)


def new(
    conn: Connection,
    *,
    sprint_id: str,
    repo_id: int,
    issue: IssueRef,
    title: str,
    source: Source,
    priority: int,
    trigger: str,
    requester_id: int,
    requester: str,
    instructions: str,
    options: Mapping[str, str],
    limits: Limits,
    text_hash: str,
    base_branch: str,
    now_ms: int,
) -> bool:
    """Queues a sprint; False where the issue has an active one (the unique index decides, whoever comes first)."""
    statement = (
        insert(conn, table)
        .values(
            id=sprint_id,
            repo_id=repo_id,
            repo=issue.full_name,
            issue=issue.number,
            title=clean(title)[:255],
            state=SprintState.QUEUED,
            priority=priority,
            source=source,
            trigger=trigger,
            requester_id=requester_id,
            requester=clean(requester),
            instructions=clean(instructions),
            options=dict(options),
            limits={"steps": limits.steps, "seconds": limits.seconds, "tokens": limits.tokens, "usd": limits.usd},
            text_hash=text_hash,
            base_branch=base_branch,
            queued_ms=now_ms,
            updated_ms=now_ms,
            checks=[],
            flagged=[],
            config_faults=[],
        )
        .on_conflict_do_nothing(index_elements=["repo_id", "issue"], index_where=sa.text("state <> 'settled'"))
        .returning(c.id)
    )
    return conn.execute(statement).first() is not None


def cancel(conn: Connection, sprint_id: str, *, by: str, now_ms: int, why: str = "") -> CancelResult:
    """In place while nobody runs it, by flag while somebody does, too late from publishing on; the first that changes a row answers.

    `why` is kept as the reason of the outcome to come.
    """
    if lock(conn, sprint_id) is None:
        return CancelResult.NOTHING
    values = {"stop": Stop.CANCEL, "stop_by": clean(by), "reason": why, "updated_ms": now_ms, "rev": c.rev + 1, "show_due_ms": 0}
    in_place = (
        table.update()
        .where(c.id == sprint_id, c.state.in_([SprintState.QUEUED, SprintState.ADMITTED]))
        .values(
            state=SprintState.SETTLED,
            outcome=OutcomeKind.CANCELLED,
            settled_ms=now_ms,
            executor_id=None,
            waiting_reason=None,
            waiting_note="",
            **values,
        )
    )
    if conn.execute(in_place).rowcount:
        return CancelResult.CANCELLED
    stoppable = [SprintState.PREPARING, SprintState.WORKING, SprintState.VETTING]
    if conn.execute(table.update().where(c.id == sprint_id, c.state.in_(stoppable)).values(**values)).rowcount:
        return CancelResult.STOPPING
    return CancelResult.TOO_LATE


def flag(conn: Connection, sprint_id: str, stop: Stop, *, by: str, now_ms: int) -> bool:
    """Asks a running sprint to requeue or drain; a stop that stands already wins."""
    statement = (
        table.update()
        .where(c.id == sprint_id, c.stop.is_(None), c.state.in_([SprintState.PREPARING, SprintState.WORKING, SprintState.VETTING]))
        .values(stop=stop, stop_by=clean(by), updated_ms=now_ms)
    )
    return conn.execute(statement).rowcount == 1


def revise(
    conn: Connection, sprint_id: str, *, by: str, instructions: str, options: Mapping[str, str], limits: Limits, now_ms: int
) -> bool:
    """A planning sprint is told what its plan should be like: in place while nobody runs it, by flag while somebody does. False: it ends already.

    What it did so far counts no more, so that the next steps are those of another attempt.
    """
    if lock(conn, sprint_id) is None:
        return False
    values = {
        "instructions": clean(instructions),
        "options": dict(options),
        "limits": {"steps": limits.steps, "seconds": limits.seconds, "tokens": limits.tokens, "usd": limits.usd},
        "updated_ms": now_ms,
        "rev": c.rev + 1,
        "show_due_ms": 0,
    }
    waits = table.update().where(c.id == sprint_id, c.state.in_([SprintState.QUEUED, SprintState.ADMITTED]))
    if conn.execute(waits.values(attempt=c.attempt + sa.case((c.steps > 0, 1), else_=0), **values)).rowcount:
        return True
    goes_on = sa.or_(c.stop.is_(None), c.stop.not_in([Stop.CANCEL, Stop.STALLED]))
    runs = table.update().where(c.id == sprint_id, c.state.in_([SprintState.PREPARING, SprintState.WORKING]), goes_on)
    return conn.execute(runs.values(stop=Stop.REVISE, stop_by=clean(by), **values)).rowcount == 1


def flags(conn: Connection, executor_id: str) -> dict[str, str]:
    """Sprint id -> stop flag, of the sprints this executor runs."""
    statement = sa.select(c.id, c.stop).where(c.executor_id == executor_id, c.stop.is_not(None), c.state.in_(list(RUNNING)))
    return {row[0]: row[1] for row in conn.execute(statement)}


def claim(conn: Connection, sprint_id: str, k: int, *, me: str, node_id: str, timeout_ms: int) -> bool:
    """Takes or keeps the sprint for this executor; False: somebody else's, or over (the workflow returns quietly)."""
    now = database_now_ms(conn)
    alive = "SELECT executor_id FROM workers WHERE reaped_ms IS NULL AND beat_ms > :alive_after"
    result = conn.execute(
        sa.text(
            "UPDATE sprints SET executor_id=:me, node_id=:node WHERE id=:id AND admitted_n=:k AND state NOT IN ('queued', 'settled') "
            f"AND (executor_id IS NULL OR executor_id=:me OR executor_id NOT IN ({alive}))"
        ),
        {"me": me, "node": node_id, "id": sprint_id, "k": k, "alive_after": now - timeout_ms},
    )
    return result.rowcount == 1


def advance(
    conn: Connection,
    sprint_id: str,
    k: int,
    *,
    me: str,
    to: SprintState,
    before: Sequence[SprintState],
    now_ms: int,
    unless_stopped: bool = False,
    **values: Any,
) -> bool:
    """Moves an owned sprint to `to`, accepting the state before or after the change, so that a repeated step passes.

    `unless_stopped` makes this the point of no return: a stop flag then keeps the row where it is.
    """
    moved = now_ms if to in (SprintState.VETTING, SprintState.PUBLISHING) else _first_time(now_ms)
    guard: sa.ColumnElement[bool] = c.state.in_([*before, to])
    if unless_stopped:
        guard = sa.or_(c.state == to, sa.and_(c.state.in_(list(before)), c.stop.is_(None)))
    statement = (
        table.update()
        .where(c.id == sprint_id, c.admitted_n == k, c.executor_id == me, guard)
        .values(state=to, updated_ms=now_ms, progress_ms=moved, rev=c.rev + sa.case((c.state == to, 0), else_=1), show_due_ms=0, **values)
    )
    return conn.execute(statement).rowcount == 1


def _first_time(now_ms: int | sa.BindParameter[int]) -> Any:
    """Progress counts in the first run only: a sprint that is admitted again and again because a provider is down moves nothing."""
    return sa.case((c.admitted_n <= 1, now_ms), else_=c.progress_ms)


def update(
    conn: Connection,
    sprint_id: str,
    k: int,
    *,
    me: str,
    now_ms: int,
    show_in_ms: int | None = None,
    moved: bool | None = None,
    **values: Any,
) -> bool:
    """Writes facts of an owned, running sprint; `show_in_ms` raises the revision, to be shown at the earliest then.

    `moved` says whether this is progress of the fleet: True, False, or only in the first run of the sprint. False: not ours any more.
    """
    statement = _updating(tuple(values), moved=moved, shown=show_in_ms is not None)
    given = {f"new_{key}": clean(v) if isinstance(v, str) else v for key, v in values.items()}
    guard = {"of_sprint": sprint_id, "of_k": k, "of_me": me}
    return conn.execute(statement, {"now": now_ms, "due": now_ms + (show_in_ms or 0), **guard, **given}).rowcount == 1


@functools.lru_cache(256)
def _updating(names: tuple[str, ...], *, moved: bool | None, shown: bool) -> sa.Update:
    """The statement of `update`, kept: an agent's steps make it often, and putting it together takes longer than running it."""
    now, due = sa.bindparam("now", type_=BIG), sa.bindparam("due", type_=BIG)
    changes: dict[str, Any] = {"updated_ms": now, **{name: sa.bindparam(f"new_{name}", type_=c[name].type) for name in names}}
    if moved is not False:
        changes["progress_ms"] = now if moved else _first_time(now)
    if shown:
        waiting = sa.and_(c.projected_rev < c.rev, c.show_due_ms < due)
        changes |= {"rev": c.rev + 1, "show_due_ms": sa.case((waiting, c.show_due_ms), else_=due)}
    return (
        table.update()
        .where(
            c.id == sa.bindparam("of_sprint"),
            c.admitted_n == sa.bindparam("of_k"),
            c.executor_id == sa.bindparam("of_me"),
            c.state.not_in([SprintState.QUEUED, SprintState.SETTLED]),
        )
        .values(**changes)
    )


def renew_progress(conn: Connection, sprint_id: str, me: str, now_ms: int) -> None:
    """A long call inside its deadline counts as progress."""
    conn.execute(table.update().where(c.id == sprint_id, c.executor_id == me).values(progress_ms=now_ms))


def settle(conn: Connection, sprint_id: str, k: int, *, me: str | None, outcome: Outcome, spent: Usage, steps: int, now_ms: int) -> bool:
    """The end: outcome, spend and what is to be shown, in one change; `me` None is the orphan sweep. Repeating it changes nothing."""
    owner = [] if me is None else [c.executor_id == me]
    statement = (
        table.update()
        .where(c.id == sprint_id, c.admitted_n == k, c.state.not_in([SprintState.QUEUED, SprintState.SETTLED]), *owner)
        .values(
            state=SprintState.SETTLED,
            outcome=outcome.kind,
            reason=outcome.reason,
            detail=clean(outcome.detail)[:4000],
            settled_ms=now_ms,
            updated_ms=now_ms,
            progress_ms=now_ms,
            executor_id=None,
            waiting_reason=None,
            waiting_note="",
            doing="",
            steps=steps,
            tokens=spent.tokens,
            usd=spent.usd,
            rev=c.rev + 1,
            show_due_ms=0,
        )
    )
    return conn.execute(statement).rowcount == 1


def requeue(
    conn: Connection,
    sprint_id: str,
    k: int,
    *,
    me: str | None,
    reason: WaitingReason,
    note: str,
    not_before_ms: int,
    now_ms: int,
    new_attempt: bool = False,
) -> bool:
    """Back to the queue with its first enqueued time kept; a cancel that came meanwhile wins (then nothing changes).

    What is to be planned anew begins another attempt, whoever sends it back.
    """
    owner = [] if me is None else [c.executor_id == me]
    not_cancelled = sa.or_(c.stop.is_(None), c.stop != Stop.CANCEL)
    statement = (
        table.update()
        .where(c.id == sprint_id, c.admitted_n == k, c.state.not_in([SprintState.QUEUED, SprintState.SETTLED]), not_cancelled, *owner)
        .values(
            state=SprintState.QUEUED,
            waiting_reason=reason,
            waiting_note=clean(note)[:500],
            not_before_ms=not_before_ms,
            stop=None,
            stop_by="",
            executor_id=None,
            doing="",
            attempt=c.attempt + (1 if new_attempt else sa.case((c.stop == Stop.REVISE, 1), else_=0)),
            updated_ms=now_ms,
            rev=c.rev + 1,
            show_due_ms=0,
        )
    )
    return conn.execute(statement).rowcount == 1


def admit(conn: Connection, sprint_id: str, now_ms: int) -> int | None:
    """QUEUED -> ADMITTED; returns k, the times it was admitted, or None if it is not queued any more."""
    statement = (
        table.update()
        .where(c.id == sprint_id, c.state == SprintState.QUEUED, c.not_before_ms <= now_ms)
        .values(
            state=SprintState.ADMITTED,
            admitted_n=c.admitted_n + 1,
            admitted_ms=now_ms,
            updated_ms=now_ms,
            progress_ms=sa.case((c.admitted_n == 0, now_ms), else_=c.progress_ms),
            waiting_reason=None,
            waiting_note="",
            executor_id=None,
            rev=c.rev + 1,
            show_due_ms=now_ms + 250,
        )
        .returning(c.admitted_n)
    )
    row = conn.execute(statement).first()
    return None if row is None else int(row[0])


def wait(conn: Connection, sprint_id: str, reason: WaitingReason, note: str, now_ms: int, *, not_before_ms: int = 0) -> bool:
    """Names why a queued sprint waits; True if that changed (then it is worth a decision row)."""
    statement = (
        table.update()
        .where(
            c.id == sprint_id,
            c.state == SprintState.QUEUED,
            sa.or_(c.waiting_reason.is_(None), c.waiting_reason != reason, c.waiting_note != note),
        )
        .values(
            waiting_reason=reason,
            waiting_note=note,
            not_before_ms=sa.case((c.not_before_ms > not_before_ms, c.not_before_ms), else_=sa.literal(not_before_ms, BIG)),
            updated_ms=now_ms,
            rev=c.rev + 1,
            show_due_ms=now_ms + 1000,
        )
    )
    return conn.execute(statement).rowcount == 1


def hold(conn: Connection, head_id: str, repo_id: int, reason: WaitingReason, note: str, *, now_ms: int, renamed: bool) -> None:
    """A policy holds every ready sprint of a repository behind its ready head (which `wait` names, for its comment).

    `renamed` also takes those that wait for another reason, which is a look at each of them; without it only those with none, by their index:
    newcomers, whose comments are behind then.
    """
    unnamed = sa.text("sprints.waiting_reason IS NULL")
    which = sa.or_(unnamed, c.waiting_reason != reason) if renamed else unnamed
    conn.execute(
        table.update()
        .where(QUEUED, c.repo_id == repo_id, c.not_before_ms <= now_ms, which, c.id != head_id)
        .values(waiting_reason=reason, waiting_note=note, **({} if renamed else {"rev": c.rev + 1, "show_due_ms": now_ms + 1000}))
    )


def show_first(conn: Connection, repo_id: int, *, limit: int, now_ms: int) -> None:
    """The comments of a repository's next `limit` queued sprints are behind: something holds them now, or holds them no longer."""
    first = sa.select(c.id).where(QUEUED, c.repo_id == repo_id).order_by(c.priority, c.queued_ms, c.id).limit(limit)
    ids = list(conn.execute(first).scalars())
    raise_positions(conn, ids, now_ms + 1000)


def prioritise(conn: Connection, sprint_id: str, priority: int, now_ms: int) -> bool:
    """Another priority for a sprint that waits, from which it ages anew; False where it waits no longer."""
    statement = table.update().where(c.id == sprint_id, c.state == SprintState.QUEUED)
    values = {"priority": priority, "aged": 0, "updated_ms": now_ms, "rev": c.rev + 1, "show_due_ms": 0}
    return conn.execute(statement.values(**values)).rowcount == 1


def release(conn: Connection, repo_id: int, reasons: Sequence[WaitingReason], now_ms: int) -> None:
    """The policy holds this repository no longer."""
    conn.execute(
        table.update()
        .where(QUEUED, c.repo_id == repo_id, c.waiting_reason.in_(list(reasons)))
        .values(waiting_reason=None, waiting_note="", updated_ms=now_ms)
    )


def held_repositories(conn: Connection, reasons: Sequence[WaitingReason]) -> set[int]:
    """Repositories with queued sprints that one of these reasons holds."""
    statement = sa.select(c.repo_id).where(QUEUED, c.waiting_reason.in_(list(reasons))).distinct()
    return set(conn.execute(statement).scalars())


_HEADS = """
WITH RECURSIVE repos(repo_id) AS (
  SELECT min(repo_id) FROM sprints WHERE state = 'queued'
  UNION ALL
  SELECT (SELECT min(repo_id) FROM sprints WHERE state = 'queued' AND repo_id > repos.repo_id) FROM repos WHERE repos.repo_id IS NOT NULL
)
SELECT h.id, h.repo_id, h.repo, h.issue, h.priority, h.queued_ms, h.waiting_reason, h.pr
FROM repos JOIN sprints h ON h.id = (
  SELECT q.id FROM sprints q WHERE q.repo_id = repos.repo_id AND q.state = 'queued' AND q.not_before_ms <= :now
  ORDER BY q.priority, q.queued_ms, q.id LIMIT 1)
"""


def heads(conn: Connection, now_ms: int) -> list[Any]:
    """The first ready sprint of every repository: (id, repo_id, repo, issue, priority, queued_ms, waiting_reason); flat in queue length."""
    return list(conn.execute(sa.text(_HEADS), {"now": now_ms}))


def in_flight(conn: Connection) -> dict[int, int]:
    """repo_id -> sprints admitted or running."""
    statement = sa.select(c.repo_id, sa.func.count()).where(FLYING).group_by(c.repo_id)
    return {row[0]: int(row[1]) for row in conn.execute(statement)}


def open_prs(conn: Connection) -> dict[int, int]:
    """repo_id -> open pull requests of ours."""
    statement = sa.select(c.repo_id, sa.func.count(sa.distinct(c.pr))).where(c.pr > 0, c.pr_state == "open").group_by(c.repo_id)
    return {row[0]: int(row[1]) for row in conn.execute(statement)}


def pull_of_another(conn: Connection, repo_id: int, number: int, besides: str) -> bool:
    """Whether an earlier sprint opened this pull request."""
    return conn.execute(sa.select(c.id).where(c.repo_id == repo_id, c.pr == number, c.id != besides).limit(1)).first() is not None


def open_pulls_of(conn: Connection, repo_id: int) -> list[int]:
    """Numbers of our open pull requests in one repository."""
    statement = sa.select(c.pr).where(c.repo_id == repo_id, c.pr > 0, c.pr_state == "open").distinct().order_by(c.pr)
    return list(conn.execute(statement).scalars())


def positions(conn: Connection, *, limit: int = 200) -> dict[str, int]:
    """Sprint id -> place in the queue (1 is next), for the first `limit`; equal to admitting head by head (engine.md, "Position")."""
    return {
        row[0]: int(row[1])
        for row in conn.execute(sa.text(f"SELECT id, place FROM ({QUEUE_ORDER}) o ORDER BY place LIMIT :n"), {"n": limit})
    }


def position(conn: Connection, sprint_id: str) -> int | None:
    """Place of one queued sprint, or None."""
    row = conn.execute(sa.text(f"SELECT place FROM ({QUEUE_ORDER}) o WHERE id = :id"), {"id": sprint_id}).first()
    return None if row is None else int(row[0])


def listing(conn: Connection, *, limit: int, repo_id: int | None = None) -> list[SprintView]:
    """What runs, then what waits in its order."""
    where = [] if repo_id is None else [c.repo_id == repo_id]
    running = [
        view(row)
        for row in conn.execute(sa.select(*VIEW_COLUMNS).where(c.state.in_(list(IN_FLIGHT)), *where).order_by(c.admitted_ms).limit(limit))
    ]
    places = positions(conn, limit=max(limit * 4, 200))
    rows = conn.execute(sa.select(*VIEW_COLUMNS).where(c.id.in_(list(places)), *where)).all()
    queued = sorted((view(row) for row in rows), key=lambda sprint: places[sprint.id])
    return [*running, *queued][:limit]


def recent(conn: Connection, *, limit: int) -> list[SprintView]:
    """The last settled sprints, newest first."""
    statement = sa.select(*VIEW_COLUMNS).where(c.state == SprintState.SETTLED).order_by(c.settled_ms.desc()).limit(limit)
    return [view(row) for row in conn.execute(statement)]


def counts(conn: Connection, *, repo_id: int | None = None) -> dict[SprintState, int]:
    """Live sprints by state."""
    where = [] if repo_id is None else [c.repo_id == repo_id]
    statement = sa.select(c.state, sa.func.count()).where(c.state != SprintState.SETTLED, *where).group_by(c.state)
    return {SprintState(row[0]): int(row[1]) for row in conn.execute(statement)}


def queue_wait_ms(conn: Connection, *, sample: int = 20) -> int:
    """Median of the last waits from enqueued to started: what `status` says of the time to wait; 0 without history."""
    statement = sa.select(c.started_ms - c.queued_ms).where(c.started_ms.is_not(None)).order_by(c.started_ms.desc()).limit(sample)
    waits = sorted(int(row[0]) for row in conn.execute(statement))
    return waits[len(waits) // 2] if waits else 0


def age(conn: Connection, *, wait_ms: int, now_ms: int) -> int:
    """Raises the priority once per `wait_ms` waited, so that a low class cannot starve; never above AGED_TO."""
    due = c.queued_ms + sa.literal(wait_ms, BIG) * (c.aged + 1)
    statement = table.update().where(QUEUED, c.priority > AGED_TO, due < now_ms)
    return conn.execute(statement.values(priority=c.priority - 1, aged=c.aged + 1)).rowcount


def owners(conn: Connection) -> list[str]:
    """Executors with a claim on a live sprint."""
    statement = sa.select(c.executor_id).where(c.executor_id.is_not(None), c.state != SprintState.SETTLED).distinct()
    return list(conn.execute(statement).scalars())


def claimed_by(conn: Connection, executor_id: str) -> int:
    """How many live sprints this executor works on."""
    return int(conn.execute(sa.select(sa.func.count()).where(c.executor_id == executor_id, c.state != SprintState.SETTLED)).scalar_one())


def untouched(conn: Connection, *, before_ms: int) -> list[tuple[str, int, str | None, str]]:
    """(id, k, stop, state) of sprints in flight that nobody wrote to since then: candidates of the orphan sweep."""
    statement = sa.select(c.id, c.admitted_n, c.stop, c.state).where(FLYING, c.updated_ms < before_ms)
    return [(row[0], row[1], row[2], row[3]) for row in conn.execute(statement)]


def heads_recorded(conn: Connection, repo_id: int, issue: int) -> dict[str, str]:
    """sha -> branch of every head that our rows recorded for this issue: what else stands there is a person's."""
    statement = sa.select(c.head_sha, c.branch).where(c.repo_id == repo_id, c.issue == issue, c.head_sha != "")
    return {row[0]: row[1] for row in conn.execute(statement)}


def text_edited(conn: Connection, repo_id: int, issue: int, *, digest: str, now_ms: int) -> bool:
    """Freezes the issue's text anew for its live sprint: someone with write edited it (DESIGN, "Settled questions")."""
    statement = (
        table.update()
        .where(c.repo_id == repo_id, c.issue == issue, c.state.in_([SprintState.QUEUED, SprintState.ADMITTED, SprintState.PREPARING]))
        .values(text_hash=digest, updated_ms=now_ms)
    )
    return conn.execute(statement).rowcount == 1


def follow(conn: Connection, sprint_id: str, pull: int) -> None:
    """This sprint goes on with an open pull request of ours."""
    conn.execute(table.update().where(c.id == sprint_id).values(pr=pull, pr_state="open"))


def follow_ups_due(conn: Connection, now_ms: int) -> list[Any]:
    """The first ready sprint of every repository that goes on with an open pull request of ours, as a row of `heads`; such are few."""
    statement = (
        sa.select(c.id, c.repo_id, c.repo, c.issue, c.priority, c.queued_ms, c.waiting_reason, c.pr)
        .where(PULL_OPEN, c.pr > 0, c.state == SprintState.QUEUED, c.not_before_ms <= now_ms)
        .order_by(c.priority.desc(), c.queued_ms.desc(), c.id.desc())
    )
    return list({row.repo_id: row for row in conn.execute(statement)}.values())


def pull_states(conn: Connection, repo_id: int, number: int) -> set[str]:
    """The states that the sprints of a pull request know it in; empty where it is none of ours."""
    return set(conn.execute(sa.select(c.pr_state).where(c.repo_id == repo_id, c.pr == number).distinct()).scalars())


def pulls_on(conn: Connection, repo_id: int, branch: str) -> list[int]:
    """Our pull requests from one branch."""
    statement = sa.select(c.pr).where(c.repo_id == repo_id, c.branch == branch, c.pr > 0).distinct().order_by(c.pr)
    return list(conn.execute(statement).scalars())


def newest_of_pull(conn: Connection, repo_id: int, number: int) -> str | None:
    """The newest sprint that worked on a pull request."""
    statement = sa.select(c.id).where(c.repo_id == repo_id, c.pr == number, c.head_sha != "").order_by(c.queued_ms.desc(), c.id.desc())
    return conn.execute(statement.limit(1)).scalar()


def open_pulls_at(conn: Connection, repo_id: int, head_sha: str) -> list[int]:
    """Our open pull requests whose head, as we pushed it, is this commit."""
    statement = sa.select(c.pr).where(PULL_OPEN, c.repo_id == repo_id, c.pr > 0, c.head_sha == head_sha).distinct().order_by(c.pr)
    return list(conn.execute(statement).scalars())


def is_open_pull(conn: Connection, repo_id: int, number: int) -> bool:
    """Whether this is an open pull request of ours."""
    return conn.execute(sa.select(c.id).where(PULL_OPEN, c.repo_id == repo_id, c.pr == number).limit(1)).first() is not None


def pull_fate(conn: Connection, repo_id: int, number: int, *, state: str, now_ms: int) -> int:
    """Records what became of our pull request: open, merged or closed."""
    statement = table.update().where(c.repo_id == repo_id, c.pr == number, c.pr_state != state)
    return conn.execute(statement.values(pr_state=state, updated_ms=now_ms, rev=c.rev + 1, show_due_ms=0)).rowcount


def renamed(conn: Connection, repo_id: int, full_name: str) -> int:
    """The repository has another address now; state stays, it is keyed on the id."""
    return conn.execute(table.update().where(c.repo_id == repo_id, c.repo != full_name).values(repo=full_name)).rowcount


def count_crash(conn: Connection, executor_id: str) -> int:
    """The process that ran them died: one more crash for each of its sprints; returns how many they are."""
    return conn.execute(
        table.update().where(c.executor_id == executor_id, c.state.in_(list(RUNNING))).values(crashes=c.crashes + 1)
    ).rowcount


def lock(conn: Connection, sprint_id: str) -> SprintState | None:
    """The state, which stays as it is until this transaction ends (SQLite has one writer anyway); None for an unknown id."""
    state = conn.execute(sa.select(c.state).where(c.id == sprint_id).with_for_update()).scalar()
    return None if state is None else SprintState(state)


def show_work(conn: Connection, now_ms: int, *, limit: int = 200) -> list[tuple[int, int]]:
    """(repo_id, issue) of sprints whose comment or label is behind their row."""
    statement = (
        sa.select(c.repo_id, c.issue)
        .where(c.projected_rev < c.rev, c.show_due_ms <= now_ms)
        .group_by(c.repo_id, c.issue)
        .order_by(sa.func.min(c.show_due_ms))
        .limit(limit)
    )
    return [(row[0], row[1]) for row in conn.execute(statement)]


def show_take(
    conn: Connection, repo_id: int, issue: int, *, now_ms: int, lease_ms: int
) -> list[tuple[SprintView, int, int | None, str, int]]:
    """Claims what is behind on one issue: (sprint, rev, comment id, label shown, tries), oldest first; `tries` counts this one."""
    statement = (
        table.update()
        .where(c.repo_id == repo_id, c.issue == issue, c.projected_rev < c.rev, c.show_due_ms <= now_ms)
        .values(show_due_ms=now_ms + lease_ms, show_tries=c.show_tries + 1)
        .returning(*VIEW_COLUMNS, c.rev, c.comment_id, c.shown_label, c.show_tries)
    )
    taken = [(view(row[:-4]), row[-4], row[-3], row[-2], row[-1]) for row in conn.execute(statement)]
    return sorted(taken, key=lambda item: item[0].queued_ms)


def show_as_now(conn: Connection, sprint_id: str) -> tuple[SprintView, int, int | None, str]:
    """(sprint, rev, comment id, label shown) as the row is at this moment: what is rendered is never older than the row."""
    row = conn.execute(sa.select(*VIEW_COLUMNS, c.rev, c.comment_id, c.shown_label).where(c.id == sprint_id)).one()
    return view(row[:-3]), row[-3], row[-2], row[-1]


def commented(conn: Connection, sprint_id: str, comment_id: int | None) -> None:
    """The status comment is this comment of the forge."""
    conn.execute(table.update().where(c.id == sprint_id).values(comment_id=comment_id))


def shown(conn: Connection, sprint_id: str, rev: int, *, label: str) -> None:
    """Revision `rev` is what people see."""
    conn.execute(
        table.update()
        .where(c.id == sprint_id, c.projected_rev < rev)
        .values(projected_rev=rev, shown_label=label, show_tries=0, show_error=None, show_due_ms=0)
    )


def show_failed(conn: Connection, sprint_id: str, *, error: str, due_ms: int) -> None:
    """Not shown; tried again at `due_ms`."""
    values = {"show_error": clean(error)[:2000], "show_due_ms": due_ms}
    conn.execute(table.update().where(c.id == sprint_id).values(**values))


def raise_positions(conn: Connection, ids: Sequence[str], now_ms: int) -> None:
    """The place of these queued sprints changed: their comments are behind."""
    if ids:
        conn.execute(table.update().where(c.id.in_(list(ids)), c.state == SprintState.QUEUED).values(rev=c.rev + 1, show_due_ms=now_ms))


def newest(conn: Connection, repo_id: int, issue: int) -> str | None:
    """The id of the newest sprint of an issue: the one its label follows."""
    statement = sa.select(c.id).where(c.repo_id == repo_id, c.issue == issue).order_by(c.queued_ms.desc(), c.id.desc()).limit(1)
    return conn.execute(statement).scalar()
