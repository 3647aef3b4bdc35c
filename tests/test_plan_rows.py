"""The rows of plans on both back ends: one waits an issue, the first decision holds, and what people see follows in the same transaction."""

from __future__ import annotations

import io
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fleet_support import REPO, now_ms
from postgres_support import BACKENDS
from rich.console import Console

from bot.fleet.board import look, opened, plain, shown
from bot.models import (
    FOLLOWS_PLAN,
    MODE,
    MODE_PLAN,
    REVISES_PLAN,
    Actor,
    Ask,
    IssueRef,
    Limits,
    OutcomeKind,
    Plan,
    PlanState,
    Source,
    SprintId,
    SprintState,
    Stop,
    WaitingReason,
)
from bot.projector import label_of
from bot.store import Store, intents, plans, sprints
from bot.store.issue_queue import IssueQueue

LIMITS = Limits(steps=10, seconds=60, tokens=1000, usd=1.0)
PLANNING = {MODE: MODE_PLAN, "model": "m"}
pytestmark = pytest.mark.parametrize("database", BACKENDS, indirect=True)


def queue_of(conn: Any, sprint_id: str, issue: int = 1) -> IssueQueue:
    ask = Ask(f"test:{sprint_id}", REPO, IssueRef.of("alice/slug", issue), Actor(1, "alice"), Source.COMMAND, "run", 0)
    return IssueQueue(
        conn=conn,
        ask=ask,
        limits=LIMITS,
        base_branch="main",
        fresh_id=SprintId(sprint_id),
        now_ms=now_ms(),
        look=lambda _conn: None,
        caps=lambda _conn: None,
    )


def enqueue(queue: IssueQueue, **options: str) -> Any:
    return queue.enqueue(source=Source.COMMAND, priority=5, instructions="keep it", options=options, text_hash="h", title="slug")


def propose(store: Store, sprint_id: str, *, issue: int = 1, ends_in_ms: int = 60_000, **options: str) -> Plan:
    """A planning sprint that settles with a plan."""

    def write(conn: Any) -> Plan:
        assert enqueue(queue_of(conn, sprint_id, issue), **(PLANNING | options)) is not None
        values = {"state": SprintState.SETTLED, "outcome": OutcomeKind.PLANNED, "reason": PlanState.WAITING, "settled_ms": now_ms()}
        conn.execute(sprints.table.update().where(sprints.c.id == sprint_id).values(**values))
        view = sprints.get(conn, sprint_id)
        for made in (True, False):
            assert plans.propose(conn, view, text=f"plan {sprint_id}", expires_ms=now_ms() + ends_in_ms, now_ms=now_ms()) is made
        found = plans.newest(conn, REPO, issue)
        assert found is not None
        return found

    return store.write_sync(write)


def label(store: Store, sprint_id: str) -> str | None:
    view = store.read_sync(lambda conn: sprints.get(conn, sprint_id))
    return label_of(view)


def test_a_newer_plan_takes_the_place_of_the_one_that_waits(store: Store):
    first = propose(store, "a")
    assert (first.text, first.text_hash, first.options, first.instructions) == ("plan a", "h", {"model": "m"}, "keep it")
    assert label(store, "a") == "dispatch/blocked"
    second = propose(store, "b", **{REVISES_PLAN: "a"})
    assert (second.id, second.state, second.instructions) == ("b", "waiting", "keep it\nkeep it")
    assert store.read_sync(lambda conn: plans.get(conn, "a")).state == PlanState.SUPERSEDED
    assert label(store, "a") is None
    assert [plan.id for plan, title in store.read_sync(lambda conn: plans.waiting(conn, limit=9)) if title == "slug"] == ["b"]
    # Work without a plan takes its place too; a sprint that plans again does not, before it has one.
    store.write_sync(lambda conn: enqueue(queue_of(conn, "c"), **PLANNING))
    assert store.read_sync(lambda conn: plans.get(conn, "b")).state == PlanState.WAITING
    store.write_sync(lambda conn: sprints.cancel(conn, "c", by="alice", now_ms=now_ms()))
    store.write_sync(lambda conn: enqueue(queue_of(conn, "d")))
    assert store.read_sync(lambda conn: plans.get(conn, "b")).state == PlanState.SUPERSEDED
    assert store.read_sync(lambda conn: plans.waiting(conn, limit=9)) == []


def test_time_ends_each_plan_once_but_not_one_that_is_being_revised(store: Store):
    propose(store, "a", ends_in_ms=-1)
    propose(store, "b", issue=2, ends_in_ms=-1)
    propose(store, "c", issue=3)
    store.write_sync(lambda conn: enqueue(queue_of(conn, "d", 2), **PLANNING, **{REVISES_PLAN: "b"}))
    assert store.read_sync(lambda conn: plans.is_due(conn, now_ms()))
    assert [store.write_sync(lambda conn: plans.expire(conn, now_ms())) for _ in range(2)] == [1, 0]
    states = {name: store.read_sync(lambda conn, name=name: plans.get(conn, name)).state for name in "abc"}
    assert states == {"a": "expired", "b": "waiting", "c": "waiting"}
    trail = store.read_sync(lambda conn: intents.trail(conn, REPO, 1))
    assert [(row.kind, row.result) for row in trail] == [("plan_end", "expired")]


def test_an_approval_that_met_another_text_waits_again(store: Store):
    propose(store, "a")

    def approve(conn: Any) -> None:
        queue = queue_of(conn, "b")
        plan = queue.plan()
        assert enqueue(queue, **{FOLLOWS_PLAN: plan.id}) is not None
        assert queue.end_plan(plan, PlanState.APPROVED, by="alice")
        assert not queue.end_plan(plan, PlanState.DENIED, by="bob")

    store.write_sync(approve)
    plan = store.read_sync(lambda conn: plans.get(conn, "a"))
    assert (plan.state, plan.decided_by) == (PlanState.APPROVED, "alice")
    for again in (True, False):
        reopened = store.write_sync(
            lambda conn: plans.reopen(conn, plan, sprint_id=SprintId("b"), digest="other", expires_ms=now_ms() + 1000, now_ms=now_ms())
        )
        assert reopened is again
    plan = store.read_sync(lambda conn: plans.newest(conn, REPO, 1))
    assert (plan.state, plan.sprint_id, plan.told_hash, plan.decided_by) == (PlanState.WAITING, "b", "other", "")


def test_of_many_who_decide_at_once_one_is_first(store: Store):
    propose(store, "a")
    start = threading.Barrier(6)

    def decide(n: int) -> str:
        def write(conn: Any) -> str:
            queue = queue_of(conn, f"s{n}")
            plan = queue.plan()
            if plan.state is not PlanState.WAITING or queue.active() is not None:
                return "late"
            if n % 2:
                return "deny" if queue.end_plan(plan, PlanState.DENIED, by=str(n)) else "late"
            made = enqueue(queue, **{FOLLOWS_PLAN: plan.id})
            return "approve" if made and queue.end_plan(plan, PlanState.APPROVED, by=str(n)) else "late"

        start.wait()
        return store.write_sync(write)

    with ThreadPoolExecutor(6) as pool:
        answers = sorted(pool.map(decide, range(6)))
    assert answers.count("late") == 5, answers
    first = next(answer for answer in answers if answer != "late")
    plan = store.read_sync(lambda conn: plans.get(conn, "a"))
    begun = store.read_sync(lambda conn: sprints.active(conn, REPO, 1))
    assert (plan.state, begun is not None) == ((PlanState.APPROVED, True) if first == "approve" else (PlanState.DENIED, False))


def test_words_for_a_plan_in_the_making(store: Store):
    """In place while nobody runs it, by flag while somebody does, and not where it ends already; what was done counts no more."""
    running = (SprintState.PREPARING, SprintState.WORKING)
    cases = [(state, stop, made) for state in SprintState for stop in ((None, *Stop) if state in running else (None,)) for made in (0, 3)]
    for issue, (state, stop, made) in enumerate(cases, 1):
        waits = state in (SprintState.QUEUED, SprintState.ADMITTED)
        name, case = f"s{issue}", (state, stop, made)
        values = {"state": state, "stop": stop, "stop_by": "eve", "steps": made, "admitted_n": 1}
        options = PLANNING | {"steps": "7"}

        def revise(conn: Any, name: str = name, issue: int = issue, values: Any = values, options: Any = options) -> tuple[bool, Any]:
            queue = queue_of(conn, name, issue)
            enqueue(queue, **PLANNING)
            conn.execute(sprints.table.update().where(sprints.c.id == name).values(**values))
            return queue.revise(SprintId(name), "bob", instructions="keep it\nmore", options=options), sprints.get(conn, name)

        def requeue(conn: Any, name: str = name) -> Any:
            again = {"reason": WaitingReason.REQUEUED, "note": "", "not_before_ms": 0, "now_ms": now_ms()}
            return sprints.get(conn, name) if sprints.requeue(conn, name, 1, me=None, **again) else None

        taken, after = store.write_sync(revise)
        assert taken is (waits or (state in running and stop not in (Stop.CANCEL, Stop.STALLED))), case
        assert (after.instructions, after.limits.steps) == (("keep it\nmore", 7) if taken else ("keep it", 10)), case
        assert (after.state, after.attempt) == (state, 2 if waits and made else 1), case
        assert (after.stop, after.stop_by) == ((Stop.REVISE, "bob") if taken and not waits else (stop, "eve")), case
        # Whoever sends it back to the queue then: the next attempt begins afresh, once.
        back = store.write_sync(requeue)
        assert (back is None) is (state in (SprintState.QUEUED, SprintState.SETTLED) or stop is Stop.CANCEL), case
        if back is not None:
            assert (back.stop, back.attempt) == (None, 2 if taken and (made or not waits) else 1), case


def test_the_board_lists_what_waits_for_a_person(store: Store):
    propose(store, "a", ends_in_ms=3_600_000)
    with opened(store.url.render_as_string(hide_password=False), Path("/nowhere")) as rows:
        board = look(rows, now_ms=now_ms(), lease_ms=30_000)
    assert [(plan.ref, plan.title, plan.by) for plan in board.plans] == [("alice/slug#1", "slug", "alice")]
    assert ", 1 plan to approve" in plain(board)
    console = Console(width=160, record=True, file=io.StringIO(), highlight=False)
    console.print(shown(board))
    assert "plans to approve" in console.export_text()
