"""Plans that wait for a person: at most one an issue; whatever ends one changes its row, its comment and its sprint's label in one transaction."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from bot.models import (
    FOLLOWS_PLAN,
    MODE,
    REVISES_PLAN,
    IssueRef,
    OutcomeKind,
    Plan,
    PlanState,
    Reply,
    RepoId,
    SprintId,
    SprintView,
)
from bot.store import intents, outbox, sprints
from bot.store._base import BIG, clean, insert, metadata

table = sa.Table(
    "plans",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("sprint_id", sa.Text, nullable=False),
    sa.Column("repo_id", BIG, nullable=False),
    sa.Column("repo", sa.Text, nullable=False),
    sa.Column("issue", sa.Integer, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("text", sa.Text, nullable=False),
    sa.Column("text_hash", sa.Text, nullable=False),
    sa.Column("told_hash", sa.Text, nullable=False, default=""),
    sa.Column("requester_id", BIG, nullable=False),
    sa.Column("requester", sa.Text, nullable=False),
    sa.Column("instructions", sa.Text, nullable=False),
    sa.Column("options", sa.JSON, nullable=False),
    sa.Column("made_ms", BIG, nullable=False),
    sa.Column("expires_ms", BIG, nullable=False),
    sa.Column("decided_by", sa.Text, nullable=False, default=""),
    sa.Column("decided_ms", BIG, nullable=False, default=0),
    sa.Column("reason", sa.Text, nullable=False, default=""),
    sa.Index(
        "uq_plans_waiting",
        "repo_id",
        "issue",
        unique=True,
        sqlite_where=sa.text("state = 'waiting'"),
        postgresql_where=sa.text("state = 'waiting'"),
    ),
    sa.Index("ix_plans_issue", "repo_id", "issue", "made_ms"),
    sa.Index("ix_plans_due", "expires_ms", sqlite_where=sa.text("state = 'waiting'"), postgresql_where=sa.text("state = 'waiting'")),
)
c = table.c
NAMES = (*Plan.__dataclass_fields__, "repo")
COLUMNS = tuple(c[name] for name in NAMES)
# Written out: a bound parameter would keep the database from using a partial index.
WAITING = sa.text("plans.state = 'waiting'")
OURS = (MODE, REVISES_PLAN, FOLLOWS_PLAN)


def _plan(row: Any) -> Plan:
    """From the first columns of a row, which are COLUMNS."""
    data: dict[str, Any] = dict(zip(NAMES, row, strict=False))
    data["id"], data["sprint_id"], data["repo_id"] = SprintId(data["id"]), SprintId(data["sprint_id"]), RepoId(data["repo_id"])
    data["issue"] = IssueRef.of(data.pop("repo"), data["issue"])
    data["state"] = PlanState(data["state"])
    return Plan(**data)


def get(conn: Connection, plan_id: str) -> Plan | None:
    """One plan, or None."""
    row = conn.execute(sa.select(*COLUMNS).where(c.id == plan_id)).first()
    return None if row is None else _plan(row)


def newest(conn: Connection, repo_id: int, issue: int, *, lock: bool = False) -> Plan | None:
    """The plan of an issue that waits, else its newest one, else None; with `lock` it stays as it is until this transaction ends."""
    waits = sa.case((c.state == PlanState.WAITING, 0), else_=1)
    statement = sa.select(*COLUMNS).where(c.repo_id == repo_id, c.issue == issue).order_by(waits, c.made_ms.desc(), c.id.desc()).limit(1)
    row = conn.execute(statement.with_for_update() if lock else statement).first()
    return None if row is None else _plan(row)


def waiting(conn: Connection, *, limit: int, repo_id: int | None = None) -> list[tuple[Plan, str]]:
    """(plan, the issue's title) of those that wait for a person, the one that ends first in front."""
    where = [] if repo_id is None else [c.repo_id == repo_id]
    joined = sa.join(table, sprints.table, sprints.table.c.id == c.id)
    statement = (
        sa.select(*COLUMNS, sprints.table.c.title).select_from(joined).where(WAITING, *where).order_by(c.expires_ms, c.id).limit(limit)
    )
    return [(_plan(row), row.title) for row in conn.execute(statement)]


def one_waits(conn: Connection, repo_id: int, issue: int) -> bool:
    """Whether a plan of this issue waits for a person."""
    return conn.execute(sa.select(c.id).where(WAITING, c.repo_id == repo_id, c.issue == issue)).first() is not None


def renamed(conn: Connection, repo_id: int, full_name: str) -> None:
    """The repository has another address now."""
    conn.execute(table.update().where(c.repo_id == repo_id, c.repo != full_name).values(repo=full_name))


def propose(conn: Connection, view: SprintView, *, text: str, expires_ms: int, now_ms: int) -> bool:
    """The plan of a planning sprint that settles in this transaction, with its comment; it takes the place of one that waited. Once a sprint."""
    before = newest(conn, view.repo_id, view.issue.number)
    if before is not None and before.state is PlanState.WAITING and before.id != view.id:
        end(conn, before, PlanState.SUPERSEDED, reason="a newer plan was made", now_ms=now_ms)
    revised = get(conn, view.options.get(REVISES_PLAN, ""))
    instructions = "\n".join(part for part in (revised.instructions if revised else "", view.instructions) if part)
    statement = insert(conn, table).values(
        id=view.id,
        sprint_id=view.id,
        repo_id=view.repo_id,
        repo=view.issue.full_name,
        issue=view.issue.number,
        state=PlanState.WAITING,
        text=clean(text),
        text_hash=view.text_hash,
        told_hash="",
        requester_id=view.requester_id,
        requester=view.requester,
        instructions=instructions,
        options={name: value for name, value in view.options.items() if name not in OURS},
        made_ms=now_ms,
        expires_ms=expires_ms,
        decided_by="",
        decided_ms=0,
        reason="",
    )
    if conn.execute(statement.on_conflict_do_nothing().returning(c.id)).first() is None:
        return False
    _show(conn, view.id, now_ms, follow_up=revised is not None)
    return True


def end(conn: Connection, plan: Plan, state: PlanState, *, by: str = "", reason: str = "", told: bool = True, now_ms: int) -> bool:
    """A plan that waits, waits no longer; False where somebody was first. `told` writes the decision, for what no intent tells of."""
    values = {"state": state, "decided_by": clean(by)[:200], "decided_ms": now_ms, "reason": clean(reason)[:1000]}
    if not conn.execute(table.update().where(c.id == plan.id, WAITING).values(**values)).rowcount:
        return False
    _mark(conn, plan, state, now_ms)
    _show(conn, plan.id, now_ms)
    if told:
        _decide(conn, plan, "plan_end", state, reason or state, now_ms)
    return True


def told(conn: Connection, plan_id: str, digest: str) -> None:
    """People were told that the issue's text is another one; that very text may be approved now."""
    conn.execute(table.update().where(c.id == plan_id, WAITING).values(told_hash=digest))


def reopen(conn: Connection, plan: Plan, *, sprint_id: SprintId, digest: str, expires_ms: int, now_ms: int) -> bool:
    """An approved plan waits again, because the issue was edited before the work began; `sprint_id` is the sprint that met it, and shows it now."""
    values = {
        "state": PlanState.WAITING,
        "sprint_id": sprint_id,
        "told_hash": digest,
        "expires_ms": expires_ms,
        "decided_by": "",
        "decided_ms": 0,
    }
    if not conn.execute(table.update().where(c.id == plan.id, c.state == PlanState.APPROVED).values(**values)).rowcount:
        return False
    _show(conn, plan.id, now_ms, edited=True)
    _say(conn, plan, f"plan:{plan.id}:again:{sprint_id}", Reply("plan_waits_again"), now_ms)
    _decide(conn, plan, "plan_again", PlanState.WAITING, "the issue was edited after the approval", now_ms)
    return True


def is_due(conn: Connection, now_ms: int) -> bool:
    """Whether there is anything for `expire`."""
    return conn.execute(sa.select(c.id).where(WAITING, c.expires_ms <= now_ms).limit(1)).first() is not None


def expire(conn: Connection, now_ms: int, *, limit: int = 100) -> int:
    """Lets go what nobody decided on in time; a plan that is just being revised is left alone. Returns how many."""
    s = sprints.table.c
    in_work = sa.exists().where(s.repo_id == c.repo_id, s.issue == c.issue, sa.text("sprints.state <> 'settled'"))
    due = sa.select(*COLUMNS).where(WAITING, c.expires_ms <= now_ms, ~in_work).order_by(c.expires_ms).limit(limit)
    found = [_plan(row) for row in conn.execute(due).all()]
    return sum(end(conn, plan, PlanState.EXPIRED, reason="nobody decided in time", now_ms=now_ms) for plan in found)


def _mark(conn: Connection, plan: Plan, state: PlanState, now_ms: int) -> None:
    """The sprint's comment follows what became of its plan, and the label, which the issue's newest sprint shows."""
    s = sprints.table.c
    behind = {"rev": s.rev + 1, "show_due_ms": 0}
    made = sprints.table.update().where(s.id == plan.sprint_id, s.outcome == OutcomeKind.PLANNED)
    conn.execute(made.values(reason=state, updated_ms=now_ms, **behind))
    newest_id = sprints.newest(conn, plan.repo_id, plan.issue.number)
    if newest_id not in (None, plan.sprint_id):
        conn.execute(sprints.table.update().where(s.id == newest_id).values(**behind))


def _show(conn: Connection, plan_id: str, now_ms: int, *, follow_up: bool | None = None, edited: bool = False) -> None:
    """The plan's own comment says what its row says."""
    plan = get(conn, plan_id)
    if plan is None:
        return
    if follow_up is None:
        sprint = sprints.get(conn, plan_id)
        follow_up = sprint is not None and REVISES_PLAN in sprint.options
    data = {
        "text": plan.text,
        "requester": plan.requester,
        "state": plan.state.value,
        "until_ms": plan.expires_ms,
        "by": plan.decided_by,
        "reason": plan.reason,
        "follow_up": follow_up,
        "edited": edited,
    }
    _say(conn, plan, f"plan:{plan.id}", Reply("plan", data), now_ms)


def _say(conn: Connection, plan: Plan, key: str, reply: Reply, now_ms: int) -> None:
    issue = plan.issue
    outbox.show(conn, key=key, repo_id=plan.repo_id, repo=issue.full_name, issue=issue.number, comment_id=0, reply=reply, now_ms=now_ms)


def _decide(conn: Connection, plan: Plan, kind: str, result: str, reason: str, now_ms: int) -> None:
    intents.decide(
        conn,
        repo_id=plan.repo_id,
        issue=plan.issue.number,
        kind=kind,
        result=result,
        reason=reason,
        sprint_id=plan.sprint_id,
        now_ms=now_ms,
    )
