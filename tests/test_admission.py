"""Who goes next: never above a cap, priority first, repositories take turns, nobody starves, places are true, and the cost is flat."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import pytest
import sqlalchemy as sa
from fleet_support import Fleet, now_ms
from hypothesis import given, settings
from hypothesis import strategies as st

from bot.admission import Admit, Head, Policy, Wait, decide, order
from bot.models import Pause, PauseScope, SprintState, WaitingReason
from bot.store import Store, intents, pauses, sprints, steps, workers

FLEET_PAUSE = Pause(PauseScope.FLEET, 0, "", "alice", 1)
REPO_PAUSE = Pause(PauseScope.REPO, 1, "r", "bob", 1, 2**42, "moving house")
priorities = st.sampled_from([1, 5, 7, 9])
jobs = st.lists(st.tuples(st.integers(1, 5), priorities, st.integers(0, 30)), max_size=40)
policies = st.builds(
    Policy,
    capacity=st.integers(0, 6),
    max_running=st.integers(0, 5),
    caps=st.dictionaries(st.integers(1, 5), st.integers(1, 3)),
    default_cap=st.integers(1, 3),
    pr_caps=st.dictionaries(st.integers(1, 5), st.integers(0, 2)),
    open_prs=st.dictionaries(st.integers(1, 5), st.integers(0, 3)),
    pauses=st.sampled_from([(), (), (), (FLEET_PAUSE,), (REPO_PAUSE,)]),
    budget_usd=st.sampled_from([0.0, 10.0]),
    spent_usd=st.floats(0, 20),
)


class Queue:
    """The rows, in memory: what the store's skip scan gives."""

    def __init__(self, rows: list[tuple[int, int, int]]) -> None:
        self.rows = [Head(f"s{n}", repo, "r", n, priority, queued) for n, (repo, priority, queued) in enumerate(rows)]

    def heads(self) -> list[Head]:
        best: dict[int, Head] = {}
        for row in sorted(self.rows, key=lambda row: (row.priority, row.queued_ms, row.id)):
            best.setdefault(row.repo_id, row)
        return list(best.values())

    def fill(self, flight: Counter[int], policy: Policy) -> list[Head]:
        """Admits until nobody can go."""
        went = []
        while True:
            answers = decide(self.heads(), flight, policy)
            chosen = [answer.head for answer in answers if isinstance(answer, Admit)]
            assert len(chosen) <= 1
            if not chosen:
                assert {answer.head.repo_id for answer in answers} == {head.repo_id for head in self.heads()}, "whoever waits is told why"
                return went
            [head] = chosen
            self.rows.remove(head)
            flight[head.repo_id] += 1
            went.append(head)


@given(jobs, policies, st.lists(st.integers(1, 5), max_size=8))
@settings(deadline=None)
def test_never_above_a_cap_a_slot_or_a_budget(rows, policy: Policy, running: list[int]):
    flight = Counter(running)
    before = Counter(flight)
    went = Queue(rows).fill(flight, policy)
    if not went:
        return
    assert FLEET_PAUSE not in policy.pauses
    assert REPO_PAUSE not in policy.pauses or REPO_PAUSE.repo_id not in {head.repo_id for head in went}
    assert not policy.budget_usd or policy.spent_usd < policy.budget_usd
    assert sum(flight.values()) <= max(policy.capacity, sum(before.values()))
    assert not policy.max_running or sum(flight.values()) <= policy.max_running
    for head in went:
        repo = head.repo_id
        assert flight[repo] <= policy.caps.get(repo, policy.default_cap)
        cap = policy.pr_caps.get(repo, 0)
        assert not cap or policy.open_prs.get(repo, 0) < cap


@given(jobs, policies)
@settings(deadline=None)
def test_the_best_of_those_that_may_go_goes(rows, policy: Policy):
    heads = Queue(rows).heads()
    flight: Counter[int] = Counter()
    answers = decide(heads, flight, policy)
    admitted = [answer.head for answer in answers if isinstance(answer, Admit)]
    held = {answer.head for answer in answers if isinstance(answer, Wait)}
    for head in admitted:
        assert order(head, flight) == min(order(other, flight) for other in heads if other not in held)
    assert decide(heads, flight, policy) == answers, "the same rows give the same answer"


def test_repositories_take_turns_within_a_priority():
    queue = Queue([(1, 5, n) for n in range(6)] + [(2, 5, 100), (3, 5, 101)])
    flight: Counter[int] = Counter()
    went = queue.fill(flight, Policy(capacity=5, default_cap=9))
    assert [head.repo_id for head in went] == [1, 2, 3, 1, 1]


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        (Policy(capacity=1, pauses=(FLEET_PAUSE,)), WaitingReason.PAUSED),
        (Policy(capacity=1, pauses=(REPO_PAUSE,)), WaitingReason.PAUSED),
        (Policy(capacity=1, budget_usd=5, spent_usd=5), WaitingReason.BUDGET),
        (Policy(capacity=1, pr_caps={1: 2}, open_prs={1: 2}), WaitingReason.OPEN_PRS),
        (Policy(capacity=9, default_cap=1), WaitingReason.CAP),
        (Policy(capacity=1, default_cap=9), WaitingReason.SLOT),
        (Policy(capacity=0, default_cap=9), WaitingReason.NO_WORKER),
        (Policy(capacity=9, max_running=1, default_cap=9), WaitingReason.CAP),
    ],
)
def test_each_reason_has_its_name(policy: Policy, reason: WaitingReason):
    [answer] = decide([Head("s", 1, "r", 1, 5, 0)], {1: 1}, policy)
    assert isinstance(answer, Wait)
    assert answer.reason is reason
    assert answer.note


ROW = {
    "repo": "alice/slug", "source": "command", "trigger": "", "requester_id": 1, "requester": "a", "options": {}, "limits": {"steps": 1, "seconds": 1, "tokens": 1, "usd": 1.0},
    "updated_ms": 0, "checks": [], "flagged": [],
}  # fmt: skip


def fill(store: Store, rows: list[tuple[int, int, int]], *, state: SprintState = SprintState.QUEUED, first: int = 0) -> None:
    values = [
        {**ROW, "id": f"s{n:06}", "repo_id": repo, "issue": n, "state": state, "priority": priority, "queued_ms": queued}
        for n, (repo, priority, queued) in enumerate(rows, first)
    ]
    store.write_sync(lambda conn: conn.execute(sprints.table.insert(), values))


def empty(store: Store) -> None:
    store.write_sync(lambda conn: conn.execute(sprints.table.delete()))


def test_a_place_is_one_more_than_those_admitted_before(store: Store):
    @given(jobs, st.lists(st.integers(1, 5), max_size=5))
    @settings(max_examples=60 if store.sqlite else 25, deadline=None)
    def check(rows: list[tuple[int, int, int]], running: list[int]) -> None:
        empty(store)
        if rows:
            fill(store, rows)
        if running:
            fill(store, [(repo, 5, 0) for repo in running], state=SprintState.WORKING, first=1000)
        places = store.read_sync(lambda conn: sprints.positions(conn, limit=1000))
        queue, flight, went = {f"s{n:06}" for n in range(len(rows))}, store.read_sync(sprints.in_flight), []
        while queue:
            heads = [Head(*row[:6]) for row in store.read_sync(lambda conn: sprints.heads(conn, 100))]
            [head] = [
                answer.head for answer in decide(heads, flight, Policy(capacity=10**6, default_cap=10**6)) if isinstance(answer, Admit)
            ]
            assert store.write_sync(lambda conn, head=head: sprints.admit(conn, head.id, 100)) == 1
            flight = store.read_sync(sprints.in_flight)
            queue.remove(head.id)
            went.append(head.id)
        assert places == {name: n for n, name in enumerate(went, 1)}

    check()


def test_ageing_lets_nobody_starve(store: Store):
    """A backlog pick against a stream of fresh requests by people: it goes after a bounded number of waits."""
    wait = 1_000
    fill(store, [(1, 9, 0)])
    for moment in range(1, 20):
        fill(store, [(1, 5, moment * wait)], first=moment)
        store.write_sync(lambda conn, moment=moment: sprints.age(conn, wait_ms=wait, now_ms=moment * wait + 1))
        [row] = store.read_sync(lambda conn, moment=moment: sprints.heads(conn, moment * wait + 1))
        store.write_sync(lambda conn, row=row: sprints.admit(conn, row[0], 10**9))
        if row[0] == "s000000":
            break
    assert moment <= 9 - 4 + 1
    store.write_sync(lambda conn: conn.execute(sprints.table.delete()))
    fill(store, [(1, 9, 0)])
    for _ in range(50):
        store.write_sync(lambda conn: sprints.age(conn, wait_ms=1, now_ms=10**12))
    assert store.read_sync(lambda conn: sprints.field(conn, "s000000", "priority")).priority == sprints.AGED_TO


async def test_the_cost_does_not_depend_on_the_length_of_the_queue(database: str, base: Path):
    """One look at the queue with 50 repositories, all waiting: 30,000 rows against 100, as a ratio of one run."""
    fleet = Fleet(database, base / "state")
    store = fleet.store

    def costs() -> tuple[float, float]:
        waiting = cost()
        store.write_sync(lambda conn: pauses.put(conn, FLEET_PAUSE))
        held = cost()
        store.write_sync(lambda conn: pauses.lift(conn, PauseScope.FLEET, 0, now_ms()))
        return waiting, held

    def cost() -> float:
        store.write_sync(fleet.leader._admit)
        if not store.sqlite:
            with store._write_engine.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
                conn.execute(sa.text("VACUUM ANALYZE sprints"))
        times = []
        for _ in range(9):
            started = time.perf_counter()
            store.write_sync(fleet.leader._admit)
            times.append(time.perf_counter() - started)
        return min(times)  # whatever else the machine does meanwhile

    fill(store, [(n % 50, 5, n) for n in range(100)])
    few = costs()
    for start in range(100, 30_000, 9_990):
        fill(store, [(n % 50, 5, n) for n in range(start, start + 9_990)], first=start)
    many = costs()
    store.close()
    assert all(much <= 3 * little + 0.002 for little, much in zip(few, many, strict=True)), (few, many)


async def test_a_changed_reason_is_a_row_once(database: str, base: Path):
    fleet = Fleet(database, base / "state")
    fill(fleet.store, [(7, 5, 1), (7, 5, 2)])

    def trail() -> list[tuple[str, str]]:
        return [(one.result, one.reason) for one in fleet.store.read_sync(lambda conn: intents.trail(conn, 7, 0))]

    for _ in range(3):
        assert not fleet.store.write_sync(fleet.leader._admit)
    assert trail() == [("no_worker", "no worker is alive")]
    fleet.store.write_sync(lambda conn: pauses.put(conn, FLEET_PAUSE))
    for _ in range(3):
        assert not fleet.store.write_sync(fleet.leader._admit)
    assert trail()[1:] == [("paused", "the whole fleet, by alice")]
    assert fleet.store.read_sync(lambda conn: sprints.get(conn, "s000001")).waiting is WaitingReason.PAUSED
    fleet.store.write_sync(lambda conn: pauses.lift(conn, PauseScope.FLEET, 0, now_ms()))
    fleet.store.write_sync(fleet.leader._admit)
    assert fleet.store.read_sync(lambda conn: sprints.get(conn, "s000001")).waiting is None
    fleet.store.close()


async def test_a_draining_or_dead_worker_gives_no_slot(database: str, base: Path):
    fleet = Fleet(database, base / "state")

    def capacity() -> int:
        return fleet.store.read_sync(lambda conn: fleet.leader._policy(conn, now_ms())).capacity

    assert capacity() == 0
    fleet.lease.take()
    assert capacity() == 4
    fleet.lease.drain()
    assert capacity() == 0
    fleet.store.write_sync(lambda conn: conn.execute(workers.table.update().values(draining=False, beat_ms=1)))
    assert capacity() == 0
    fleet.lease.leave()
    fleet.store.close()


async def test_the_budget_of_the_day_counts_reserves(database: str, base: Path):
    fleet = Fleet(database, base / "state", queue={"usd_per_day": 1.0, "slots": 4})
    fill(fleet.store, [(7, 5, 1)])
    fleet.lease.take()
    fleet.store.write_sync(lambda conn: steps.reserve(conn, "s000000", 1, 1, usd=1.5, tokens=1, now_ms=now_ms()))
    assert not fleet.store.write_sync(fleet.leader._admit)
    view = fleet.store.read_sync(lambda conn: sprints.get(conn, "s000000"))
    assert (view.waiting, view.waiting_note) == (WaitingReason.BUDGET, "$1.50 of today's $1.00 are spent")
    fleet.lease.leave()
    fleet.store.close()
