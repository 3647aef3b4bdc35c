"""The rows: one active sprint per issue, guarded changes only along TRANSITIONS, intents once, deliveries once, reserves booked."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa
from fleet_support import REPO, now_ms, queue_sprint, state
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from bot.models import (
    IN_FLIGHT,
    RUNNING,
    TRANSITIONS,
    CancelResult,
    Outcome,
    OutcomeKind,
    Reply,
    SprintState,
    Stop,
    Usage,
    WaitingReason,
)
from bot.store import Store, StoreError, _sqlite, cursors, deliveries, intents, is_away, outbox, pulls, sprints, steps, workers

S = SprintState


def beat_in(store: Store, *names: str) -> None:
    for slot, name in enumerate(names):
        store.write_sync(
            lambda conn, name=name, slot=slot: workers.enter(
                conn, executor_id=name, node_id="n", slot=slot, host="h", pid=1, app_version="sprint-1", capacity=2
            )
        )


def test_without_the_listener_an_old_sqlite_is_refused_with_the_remedy(base: Path, monkeypatch):
    monkeypatch.setattr(_sqlite, "_unixepoch", lambda *_: None)
    monkeypatch.setattr(_sqlite, "SUBSEC_SINCE", (99,))
    _sqlite.install_listener()
    with pytest.raises(_sqlite.UnusableSQLite, match=r"Remedy: SQLite 3\.42 or newer, or PostgreSQL"):
        _sqlite.assert_usable(base / "timmy.db")


def test_a_later_schema_is_refused(store: Store, database: str):
    store.write_sync(lambda conn: cursors.put(conn, "schema_version", 99))
    again = Store(database)
    with pytest.raises(StoreError, match="Remedy"):
        again.open()
    again.close()


def test_processes_that_start_at_once_create_the_schema_once(database: str):
    stores = [Store(database) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda one: one.open(), stores))
    for one in stores:
        one.close()


def test_one_active_sprint_per_issue_whoever_comes_first(store: Store):
    with ThreadPoolExecutor(16) as pool:
        made = [name for name in pool.map(lambda _: queue_sprint(store, 1), range(50)) if name]
    assert len(made) == 1
    store.write_sync(lambda conn: sprints.cancel(conn, made[0], by="alice", now_ms=now_ms()))
    assert queue_sprint(store, 1) is not None


def test_an_intent_is_claimed_once(store: Store):
    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(lambda _: store.write_sync(lambda conn: intents.claim(conn, "label:1", 1)), range(50)))
    assert won.count(True) == 1


def test_a_delivery_is_stored_once_and_taken_once(store: Store):
    def add(n: int) -> bool:
        return store.write_sync(
            lambda conn: deliveries.add(conn, digest="d", event_type="issues", delivery=str(n), body=b"\0\xff", now_ms=1)
        )

    def take(_: int) -> bool:
        return store.write_sync(lambda conn: deliveries.take(conn, "d", 10)) is not None

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(add, range(20))).count(True) == 1
        assert list(pool.map(take, range(20))).count(True) == 1
    assert store.read_sync(lambda conn: deliveries.due(conn, 10)) == []
    assert store.read_sync(lambda conn: deliveries.due(conn, 10 + deliveries.LEASE_MS)) == ["d"]


def test_text_from_outside_is_stored_as_every_back_end_can(store: Store):
    bad = "a\0b\ud800c"
    store.write_sync(lambda conn: deliveries.add(conn, digest="d", event_type="issues", delivery=bad, body=b"", now_ms=1))
    store.write_sync(lambda conn: deliveries.dead(conn, "d", error=bad, now_ms=2))
    sprint = queue_sprint(store, 1)
    store.write_sync(lambda conn: steps.reserve(conn, sprint, 1, 1, usd=0.5, tokens=10, now_ms=1))
    message = {"role": "assistant", "content": bad, "deep": [{"x\0": bad}]}
    store.write_sync(lambda conn: steps.replied(conn, sprint, 1, 1, message=message, usage=Usage(), provider="p", model="m", now_ms=2))
    store.write_sync(lambda conn: steps.tool_started(conn, sprint, 1, 1, 0, call_id=bad, tool=bad, arguments=bad, now_ms=3))
    store.write_sync(lambda conn: steps.tool_ended(conn, sprint, 1, 1, 0, result=bad, now_ms=4))
    [step] = store.read_sync(lambda conn: steps.of_attempt(conn, sprint, 1))
    assert step.reply == {"role": "assistant", "content": "ab?c", "deep": [{"x": "ab?c"}]}
    [call] = store.read_sync(lambda conn: steps.calls_of_attempt(conn, sprint, 1))
    assert call.result == "ab?c"
    assert store.read_sync(deliveries.dead_letters)[0][2] == "ab?c"


def test_a_call_in_flight_keeps_its_reserve_and_time_used_is_the_sum(store: Store):
    sprint = queue_sprint(store, 1)

    def fill(conn: sa.Connection) -> None:
        for n in (1, 2, 3):
            steps.reserve(conn, sprint, 1, n, usd=0.5, tokens=100, now_ms=n * 10_000)
        usage = Usage(input=10, output=5, usd=0.125)
        steps.replied(conn, sprint, 1, 1, message={}, usage=usage, provider="p", model="m", now_ms=12_000)
        steps.failed(conn, sprint, 1, 2, error="not billed: 400", billed=False, now_ms=21_000)
        steps.tool_started(conn, sprint, 1, 1, 0, call_id="c", tool="t", arguments="{}", now_ms=12_000)
        steps.tool_ended(conn, sprint, 1, 1, 0, result="", now_ms=15_000)

    store.write_sync(fill)
    spent = store.read_sync(lambda conn: steps.spent(conn, sprint))
    assert (spent.usd, spent.input, spent.output, spent.source) == (0.625, 110, 5, "estimated")
    assert store.read_sync(lambda conn: steps.used_ms(conn, sprint)) == 2_000 + 1_000 + 3_000
    assert store.read_sync(lambda conn: steps.used_ms(conn, "none")) == 0


def test_a_repeated_reserve_changes_nothing(store: Store):
    sprint = queue_sprint(store, 1)
    for usd in (0.5, 9.0):
        store.write_sync(lambda conn, usd=usd: steps.reserve(conn, sprint, 1, 1, usd=usd, tokens=1, now_ms=1))
    assert store.read_sync(lambda conn: steps.spent(conn, sprint)).usd == 0.5


def test_what_changed_while_it_was_shown_is_shown_again(store: Store):
    sprint = queue_sprint(store, 1)
    [(view, rev, *_)] = store.write_sync(lambda conn: sprints.show_take(conn, REPO, 1, now_ms=now_ms(), lease_ms=1000))
    assert view.id == sprint
    assert store.write_sync(lambda conn: sprints.show_take(conn, REPO, 1, now_ms=now_ms(), lease_ms=1000)) == []
    store.write_sync(lambda conn: sprints.wait(conn, sprint, WaitingReason.CAP, "1 of 1", now_ms()))
    store.write_sync(lambda conn: sprints.shown(conn, sprint, rev, label="dispatch/queued"))
    assert store.read_sync(lambda conn: sprints.show_work(conn, now_ms() + 10_000)) == [(REPO, 1)]


def test_a_reply_goes_through_the_same_gate(store: Store):
    def show(name: str) -> None:
        store.write_sync(
            lambda conn: outbox.show(
                conn, key="reply:k", repo_id=REPO, repo="alice/slug", issue=1, comment_id=5, reply=Reply(name), now_ms=1
            )
        )

    show("queued")
    [entry] = store.write_sync(lambda conn: outbox.take(conn, REPO, 1, now_ms=2, lease_ms=1000))
    show("settled")
    store.write_sync(lambda conn: outbox.shown(conn, "reply:k", entry.rev))
    assert store.read_sync(lambda conn: outbox.work(conn, 2)) == [(REPO, 1)]
    [entry] = store.write_sync(lambda conn: outbox.take(conn, REPO, 1, now_ms=2, lease_ms=1000))
    assert entry.reply["name"] == "settled"
    store.write_sync(lambda conn: outbox.shown(conn, "reply:k", entry.rev))
    assert store.read_sync(lambda conn: outbox.work(conn, 10**9)) == []


def claimed(store: Store, me: str = "w1", issue: int = 1) -> str:
    beat_in(store, *([me] if me not in {row.executor_id for row in store.read_sync(workers.every)} else []))
    sprint = queue_sprint(store, issue)
    assert store.write_sync(lambda conn: sprints.admit(conn, sprint, now_ms())) == 1
    assert store.write_sync(lambda conn: sprints.claim(conn, sprint, 1, me=me, node_id="n", timeout_ms=5000))
    return sprint


def test_a_claim_is_taken_from_the_dead_only(store: Store):
    beat_in(store, "w1", "w2")
    sprint = claimed(store)

    def claim(me: str, k: int = 1) -> bool:
        return store.write_sync(lambda conn: sprints.claim(conn, sprint, k, me=me, node_id="n", timeout_ms=5000))

    assert claim("w1")
    assert not claim("w2")
    assert not claim("w1", 2)
    store.write_sync(lambda conn: workers.reap(conn, "w1"))
    assert not store.write_sync(lambda conn: workers.beat(conn, "w1"))
    assert claim("w2")
    assert not claim("w1")
    assert not store.write_sync(lambda conn: sprints.update(conn, sprint, 1, me="w1", now_ms=1, doing="zombie"))


def test_a_crash_is_counted_once_and_leaving_is_none(store: Store):
    beat_in(store, "w2")
    crashed, left = claimed(store, "w1", 1), claimed(store, "w2", 2)
    for sprint in (crashed, left):
        store.write_sync(
            lambda conn, sprint=sprint: conn.execute(sprints.table.update().where(sprints.table.c.id == sprint).values(state=S.WORKING))
        )
    store.write_sync(lambda conn: workers.leave(conn, "w2"))
    from bot.lease import _reap

    for _ in range(3):
        assert store.read_sync(lambda conn: workers.without_lease(conn, ["w2"])) == {"w2"}
        store.write_sync(lambda conn: _reap(conn, ["w1", "w2"]))
    crashes = {name: store.read_sync(lambda conn, name=name: sprints.field(conn, name, "crashes")).crashes for name in (crashed, left)}
    assert crashes == {crashed: 1, left: 0}


@pytest.mark.parametrize("where", [S.QUEUED, *IN_FLIGHT, S.SETTLED])
def test_cancel_answers_by_state(store: Store, where: SprintState):
    sprint = queue_sprint(store, 1)
    store.write_sync(lambda conn: conn.execute(sprints.table.update().values(state=where, executor_id="w1", admitted_n=1)))
    answer = store.write_sync(lambda conn: sprints.cancel(conn, sprint, by="alice", now_ms=5))
    now = store.read_sync(lambda conn: sprints.get(conn, sprint))
    if where in (S.QUEUED, S.ADMITTED):
        assert (answer, now.state, now.outcome) == (CancelResult.CANCELLED, S.SETTLED, OutcomeKind.CANCELLED)
        assert queue_sprint(store, 1) is not None
    elif where in (S.PREPARING, S.WORKING, S.VETTING):
        assert (answer, now.state, now.stop) == (CancelResult.STOPPING, where, Stop.CANCEL)
        assert store.read_sync(lambda conn: sprints.flags(conn, "w1")) == {sprint: "cancel"}
    else:
        assert (answer, now.state, now.stop) == (CancelResult.TOO_LATE, where, None)
    assert store.write_sync(lambda conn: sprints.cancel(conn, "nobody", by="alice", now_ms=5)) is CancelResult.NOTHING


def test_the_point_of_no_return(store: Store):
    sprint = claimed(store)
    store.write_sync(lambda conn: conn.execute(sprints.table.update().values(state=S.VETTING)))
    store.write_sync(lambda conn: sprints.cancel(conn, sprint, by="alice", now_ms=5))

    def publish() -> bool:
        return store.write_sync(
            lambda conn: sprints.advance(conn, sprint, 1, me="w1", to=S.PUBLISHING, before=[S.VETTING], now_ms=6, unless_stopped=True)
        )

    assert not publish()
    store.write_sync(lambda conn: conn.execute(sprints.table.update().values(stop=None)))
    assert publish()
    assert publish(), "a repeated step passes"
    assert store.write_sync(lambda conn: sprints.cancel(conn, sprint, by="alice", now_ms=7)) is CancelResult.TOO_LATE


def test_a_cancel_wins_over_a_requeue(store: Store):
    sprint = claimed(store)
    store.write_sync(lambda conn: conn.execute(sprints.table.update().values(state=S.WORKING)))
    store.write_sync(lambda conn: sprints.cancel(conn, sprint, by="alice", now_ms=5))
    assert not store.write_sync(
        lambda conn: sprints.requeue(conn, sprint, 1, me="w1", reason=WaitingReason.REQUEUED, note="", not_before_ms=0, now_ms=6)
    )
    assert not store.write_sync(lambda conn: sprints.flag(conn, sprint, Stop.REQUEUE, by="x", now_ms=6)), "cancel is not replaced"


@pytest.mark.parametrize("reason", [WaitingReason.PAUSED, WaitingReason.BUDGET])
def test_a_policy_holds_the_whole_repository_and_lets_it_go(store: Store, reason: WaitingReason):
    now = now_ms()
    later, head, behind = (queue_sprint(store, n, queued_ms=now - 100 + n) for n in (1, 2, 3))
    columns = sprints.table.c

    def put(sprint: str, **values: object) -> None:
        store.write_sync(lambda conn: conn.execute(sprints.table.update().where(columns.id == sprint).values(**values)))

    put(later, not_before_ms=now + 60_000, waiting_reason=WaitingReason.PROVIDER)
    put(behind, not_before_ms=now - 5, waiting_reason=WaitingReason.REQUEUED)
    [row] = store.read_sync(lambda conn: sprints.heads(conn, now))
    assert row[0] == head
    store.write_sync(lambda conn: sprints.hold(conn, head, REPO, reason, "held", now_ms=now, renamed=True))
    assert store.write_sync(lambda conn: sprints.wait(conn, head, reason, "held", now)), "the head's comment must tell it"

    def reasons() -> list[str | None]:
        return [store.read_sync(lambda conn, name=name: sprints.field(conn, name, "waiting_reason"))[0] for name in (later, head, behind)]

    assert reasons() == [WaitingReason.PROVIDER, reason, reason]
    store.write_sync(lambda conn: sprints.release(conn, REPO, [reason], now))
    assert reasons() == [WaitingReason.PROVIDER, None, None]


def test_fifty_writers_lose_no_update(store: Store):
    store.write_sync(lambda conn: cursors.put(conn, "n", 0))

    def count(_: int) -> float:
        started = time.monotonic()

        def write(conn: sa.Connection) -> None:
            # PostgreSQL has many writers at once; whoever reads and writes takes the row.
            conn.execute(sa.select(cursors.table).where(cursors.table.c.name == "n").with_for_update())
            cursors.put(conn, "n", cursors.get(conn, "n") + 1)

        store.write_sync(write)
        return time.monotonic() - started

    with ThreadPoolExecutor(50) as pool:
        times = sorted(pool.map(count, range(400)))
    assert store.read_sync(lambda conn: cursors.get(conn, "n")) == 400
    assert times[-4] < 6, times[-4]


def test_a_reader_does_not_wait_for_a_writer(store: Store):
    entered, leave = threading.Event(), threading.Event()

    def slow(conn: sa.Connection) -> None:
        cursors.put(conn, "n", 1)
        entered.set()
        leave.wait(10)

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(store.write_sync, slow)
        entered.wait(10)
        started = time.monotonic()
        assert store.read_sync(lambda conn: cursors.get(conn, "n")) is None
        assert time.monotonic() - started < 1
        leave.set()
        writing.result(10)


def test_a_lease_is_beaten_while_everybody_writes(store: Store):
    beat_in(store, "w1")
    entered, leave = threading.Barrier(2 if store.sqlite else 9), threading.Event()

    def slow(conn: sa.Connection) -> None:
        entered.wait(10)
        if not store.sqlite:
            leave.wait(10)

    with ThreadPoolExecutor(8) as pool:
        busy = [pool.submit(store.write_sync, slow) for _ in range(1 if store.sqlite else 8)]
        entered.wait(10)
        started = time.monotonic()
        assert store.write_sync(lambda conn: workers.beat(conn, "w1"))
        assert time.monotonic() - started < 3
        leave.set()
        for one in busy:
            one.result(10)


def test_what_counts_as_a_database_that_is_away():
    def broken(name: str) -> sa.exc.OperationalError:
        import sqlite3

        error = sqlite3.OperationalError("x")
        error.sqlite_errorname = name
        return sa.exc.OperationalError("select 1", {}, error)

    assert is_away(broken("SQLITE_BUSY"))
    assert is_away(broken("SQLITE_IOERR_WRITE"))
    assert not is_away(broken("SQLITE_ERROR"))
    assert is_away(sa.exc.OperationalError("select 1", {}, Exception("the server closed the connection")))
    assert not is_away(ValueError())


class Life(RuleBasedStateMachine):
    """Whatever order the guarded updates come in, from whomever, a sprint moves only along TRANSITIONS and only its owner moves it."""

    url = ""

    def __init__(self) -> None:
        super().__init__()
        self.store = LIVES[0]
        self.now = 1_000
        self.sprint = queue_sprint(self.store, next(ISSUES), queued_ms=self.now)
        self.before = S.QUEUED
        self.k = 0
        self.cancelled = False

    def row(self):
        return self.store.read_sync(
            lambda conn: sprints.field(conn, self.sprint, "state", "executor_id", "admitted_n", "stop", "outcome", "rev")
        )

    def tick(self) -> int:
        self.now += 1
        return self.now

    @rule()
    def admit(self) -> None:
        before = self.row().state
        k = self.store.write_sync(lambda conn: sprints.admit(conn, self.sprint, self.tick()))
        assert (k is not None) == (before == S.QUEUED)
        self.k = k or self.k

    @rule(me=st.sampled_from(["a", "b"]), stale=st.booleans())
    def claim(self, me: str, stale: bool) -> None:
        row = self.row()
        k = self.k - stale
        got = self.store.write_sync(lambda conn: sprints.claim(conn, self.sprint, k, me=me, node_id="n", timeout_ms=10**9))
        assert got == (not stale and row.state in IN_FLIGHT and row.executor_id in (None, me)), (row, me, k)

    @rule(
        me=st.sampled_from(["a", "b"]), step=st.sampled_from(list(zip((S.ADMITTED, *RUNNING), RUNNING, strict=False))), stale=st.booleans()
    )
    def advance(self, me: str, step: tuple[SprintState, SprintState], stale: bool) -> None:
        row = self.row()
        before, to = step
        final = to is S.PUBLISHING
        moved = self.store.write_sync(
            lambda conn: sprints.advance(
                conn, self.sprint, self.k - stale, me=me, to=to, before=[before], now_ms=self.tick(), unless_stopped=final
            )
        )
        allowed = row.executor_id == me and not stale and (row.state == to or (row.state == before and not (final and row.stop)))
        assert moved == allowed, (row, step)

    @rule()
    def cancel(self) -> None:
        row = self.row()
        answer = self.store.write_sync(lambda conn: sprints.cancel(conn, self.sprint, by="alice", now_ms=self.tick()))
        self.cancelled |= answer is CancelResult.CANCELLED
        assert (answer is CancelResult.TOO_LATE) == (row.state in (S.PUBLISHING, S.SETTLED))

    @rule(me=st.sampled_from(["a", "b"]))
    def requeue(self, me: str) -> None:
        row = self.row()
        moved = self.store.write_sync(
            lambda conn: sprints.requeue(
                conn, self.sprint, self.k, me=me, reason=WaitingReason.REQUEUED, note="", not_before_ms=0, now_ms=self.tick()
            )
        )
        assert moved == (row.state in IN_FLIGHT and row.executor_id == me and row.stop != Stop.CANCEL)

    @rule(stop=st.sampled_from([Stop.REQUEUE, Stop.DRAIN]))
    def flag(self, stop: Stop) -> None:
        row = self.row()
        set_now = self.store.write_sync(lambda conn: sprints.flag(conn, self.sprint, stop, by="x", now_ms=self.tick()))
        assert set_now == (row.stop is None and row.state in (S.PREPARING, S.WORKING, S.VETTING))

    @rule(me=st.sampled_from(["a", "b", None]))
    def settle(self, me: str | None) -> None:
        row = self.row()
        moved = self.store.write_sync(
            lambda conn: sprints.settle(
                conn, self.sprint, self.k, me=me, outcome=Outcome(OutcomeKind.FAILED), spent=Usage(), steps=0, now_ms=self.tick()
            )
        )
        assert moved == (row.state in IN_FLIGHT and me in (None, row.executor_id))

    @precondition(lambda self: self.before is S.SETTLED)
    @rule()
    def afresh(self) -> None:
        self.sprint, self.before, self.k, self.cancelled = queue_sprint(self.store, next(ISSUES), queued_ms=self.now), S.QUEUED, 0, False

    @invariant()
    def moves_along_transitions(self) -> None:
        row = self.row()
        now = S(row.state)
        assert now is self.before or now in TRANSITIONS[self.before], (self.before, now)
        assert (row.outcome is not None) == (now is S.SETTLED)
        assert row.executor_id is None or now in IN_FLIGHT
        assert not self.cancelled or row.outcome == OutcomeKind.CANCELLED
        self.before = now


LIVES: list[Store] = []
ISSUES = iter(range(1, 10**9))


def test_a_sprint_moves_only_along_transitions(store: Store):
    beat_in(store, "a", "b")
    LIVES[:] = [store]
    Life.TestCase.settings = settings(
        max_examples=40 if store.sqlite else 20, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
    )
    Life.TestCase("runTest").runTest()


def test_a_settled_sprint_frees_its_issue(store: Store):
    sprint = claimed(store)
    store.write_sync(
        lambda conn: sprints.settle(conn, sprint, 1, me="w1", outcome=Outcome(OutcomeKind.NO_CHANGE), spent=Usage(), steps=0, now_ms=9)
    )
    assert state(store, sprint) == S.SETTLED
    again = queue_sprint(store, 1)
    assert store.read_sync(lambda conn: sprints.active(conn, REPO, 1)).id == again
    assert store.read_sync(lambda conn: sprints.last(conn, REPO, 1)).id == sprint


def test_within_a_second_the_fate_heard_last_counts_and_an_older_one_never(store: Store):
    """The forge tells whole seconds, we look at moments between them: a pull request closed and opened again within one is open."""
    sprint = queue_sprint(store, 1)

    def heard(state: str, *, at_ms: int, now_ms: int) -> bool:
        return store.write_sync(lambda conn: pulls.fate(conn, REPO, 2, state=state, at_ms=at_ms, now_ms=now_ms))

    table = sprints.table
    store.write_sync(lambda conn: conn.execute(table.update().where(table.c.id == sprint).values(pr=2, pr_state="open")))
    assert heard("closed", at_ms=0, now_ms=5_350)
    assert heard("open", at_ms=5_000, now_ms=5_600)
    assert not heard("closed", at_ms=4_000, now_ms=5_700)
    assert store.read_sync(lambda conn: sprints.pull_states(conn, REPO, 2)) == {"open"}
    assert heard("merged", at_ms=6_000, now_ms=6_100)
    assert not heard("open", at_ms=7_000, now_ms=7_100)
