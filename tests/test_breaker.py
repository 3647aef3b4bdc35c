"""The breaker: opens after failures in a row that are the fleet's own, lets one try go at a time, closes on what works, and never touches a person's pause."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fleet_support import Fleet, queue_sprint
from hypothesis import given
from hypothesis import strategies as st
from talk import answered, issue_with, state_is
from world import make_world, until

from bot import admission
from bot.fleet import breaker as rules
from bot.fleet import report
from bot.fleet.health import Thresholds, judge
from bot.fleet.holds import Holds
from bot.leader import Leader
from bot.models import Breaker, FailureReason, Outcome, OutcomeKind, Pause, PauseScope, SprintState, Usage, WaitingReason
from bot.settings import BreakerSettings
from bot.snapshot import Fault, HealthVerdict
from bot.store import breakers, fleet, intents, outages, pauses, sprints
from bot.store.breakers import FLEET, End

POLICY = BreakerSettings(failures=3, first_probe_seconds=10, max_probe_seconds=35)
START = 1_800_000_000_000


def end(repo: int, outcome: str, at: int, reason: str = "", provider: str = "nous") -> End:
    return End(f"s{at}", repo, f"acme/{repo}", provider, outcome, reason, at)


def failed(repo: int, at: int, reason: str = "sandbox") -> End:
    return end(repo, "failed", at, reason)


ends_of = st.lists(
    st.tuples(st.integers(1, 3), st.sampled_from(["sandbox", "llm", "checks", "tool", "ok"]), st.sampled_from(["nous", "other"])),
    max_size=30,
)


@given(ends_of, st.integers(1, 5))
def test_it_opens_exactly_after_so_many_in_a_row(rows: list[tuple[int, str, str]], failures: int) -> None:
    policy = BreakerSettings(failures=failures, scopes=("fleet", "repository", "provider"))
    ends = [
        end(repo, "pull_request" if kind == "ok" else "failed", at, "" if kind == "ok" else kind, provider)
        for at, (repo, kind, provider) in enumerate(rows, 1)
    ]
    opened = {(one.scope, one.repo_id, one.provider) for one in rules.to_open(ends[::-1], policy, {}, START)}

    def tail(mine: list[End]) -> list[End]:
        row = []
        for one in reversed(mine):
            if one.reason not in ("sandbox", "llm"):
                break
            row.append(one)
        return row

    for repo in (1, 2, 3):
        assert ((PauseScope.REPO, repo, "") in opened) == (len(tail([one for one in ends if one.repo_id == repo])) >= failures)
    for provider in ("nous", "other"):
        assert ((PauseScope.PROVIDER, 0, provider) in opened) == (len(tail([one for one in ends if one.provider == provider])) >= failures)
    last = tail(ends)[:failures]
    assert (FLEET in opened) == (len(last) == failures and len({one.repo_id for one in last}) > 1)


def test_the_distance_doubles_up_to_the_cap() -> None:
    assert [rules.distance_ms(POLICY, probes) // 1000 for probes in (0, 1, 2, 3, 500)] == [10, 20, 35, 35, 35]


def test_which_failures_are_the_fleets() -> None:
    theirs = {FailureReason.CHECKS, FailureReason.TOOL, FailureReason.MODEL_OUTPUT}
    assert set(FailureReason) - rules.OURS == theirs
    assert not rules.is_ours("budget", "steps")
    only_fleet = BreakerSettings(failures=2, scopes=("fleet",))
    assert [one.scope for one in rules.to_open([failed(1, 2), failed(1, 1)], only_fleet, {}, START)] == [PauseScope.FLEET]
    assert rules.to_open([failed(1, 2), failed(1, 1)], BreakerSettings(failures=0), {}, START) == []
    assert rules.to_open([failed(1, 2), failed(1, 1)], BreakerSettings(failures=2), {(PauseScope.REPO, 1, ""): 1}, START) == []


OPEN = Breaker(PauseScope.REPO, 7, "acme/7", "", START, START + 10_000, 3, "sandbox")


@pytest.mark.parametrize(
    ("probe", "told", "probes", "due_s"),
    [
        ((SprintState.SETTLED, "failed", "llm"), "failed", 1, 20),
        ((SprintState.SETTLED, "cancelled", ""), "inconclusive", 0, 10),
        ((SprintState.QUEUED, "", ""), "inconclusive", 0, 10),
        (None, "inconclusive", 0, 0),
        ((SprintState.WORKING, "", ""), "", 0, 0),
    ],
)
def test_what_becomes_of_a_try(probe, told: str, probes: int, due_s: int) -> None:
    found = rules.after_probe(replace(OPEN, probe="s1"), probe, POLICY, START)
    if not told:
        assert found is None
        return
    after, said = found
    assert (said, after.probe, after.probes, after.due_ms) == (told, "", probes, START + due_s * 1000)


def test_a_provider_is_tried_by_whoever_calls_it_again() -> None:
    breaker = replace(OPEN, scope=PauseScope.PROVIDER, repo_id=0, repo="", provider="nous")
    early, late = failed(1, OPEN.due_ms - 1), failed(1, OPEN.due_ms + 1)
    assert rules.after_use(breaker, [early], POLICY, START) is None
    after, said = rules.after_use(breaker, [late, early], POLICY, START)
    assert (said, after.probes, after.due_ms) == ("failed", 1, START + 20_000)
    assert rules.after_use(OPEN, [late], POLICY, START) is None
    assert rules.works_again(breaker, [end(1, "no_change", START + 1)]) is not None
    assert rules.works_again(breaker, [end(1, "no_change", START + 1, provider="other")]) is None
    assert not rules.is_watched(breaker, POLICY), "its scope is not among those of the configuration"


def test_admission_lets_one_try_go_and_a_pause_wins() -> None:
    head = admission.Head("s1", 7, "acme/7", 1, 5, START)
    other = admission.Head("s2", 8, "acme/8", 1, 5, START)

    def reasons(**policy) -> list[str]:
        found = admission.decide([head, other], {}, admission.Policy(capacity=4, **policy))
        return [one.reason if isinstance(one, admission.Wait) else f"go {one.head.id}" for one in found]

    assert reasons(breakers=[OPEN], now_ms=START) == [WaitingReason.BREAKER, "go s2"]
    assert reasons(breakers=[OPEN], now_ms=OPEN.due_ms) == ["go s1"]
    assert reasons(breakers=[replace(OPEN, probe="s0")], now_ms=OPEN.due_ms) == [WaitingReason.BREAKER, "go s2"]
    paused = Pause(PauseScope.REPO, 7, "acme/7", "alice", START)
    assert reasons(breakers=[OPEN], now_ms=OPEN.due_ms, pauses=[paused]) == [WaitingReason.PAUSED, "go s2"]
    everywhere = replace(OPEN, scope=PauseScope.FLEET, repo_id=0, repo="")
    assert reasons(breakers=[everywhere, OPEN], now_ms=START) == [WaitingReason.BREAKER, WaitingReason.BREAKER]
    assert WaitingReason.BREAKER.runnable, "hung work must not hide behind it"
    note = admission.breaker_note(OPEN)
    assert note.startswith("3 in a row in this repository, the last for sandbox; one is tried at")


# Nobody beats here: a worker is there all the time.
PATIENT = {"lease_seconds": 3600.0}


class Queue:
    """Takes what admission gives."""

    def __init__(self) -> None:
        self.taken: list[str] = []

    def enqueue(self, _conn, sprint_id: str, _k: int, *, priority: int) -> None:
        assert priority
        self.taken.append(sprint_id)

    def kick(self) -> None:
        pass


class Room:
    """Store, leader and holds of one process, by a clock of its own."""

    def __init__(self, made: Fleet, **policy) -> None:
        made.lease.take()
        self.store, self.made, self.now, self.queue = made.store, made, START, Queue()
        settings = made.settings.model_copy(update={"breaker": POLICY.model_copy(update=policy)})
        options = {"settings": settings, "is_leader": lambda: True, "now_ms": lambda: self.now}
        self.leader = Leader(
            self.store,
            self.queue,
            observe=lambda _event: None,
            kick_projector=lambda: None,
            repo_ids=dict,
            failpoint=lambda _name: None,
            **options,
        )
        self.holds = Holds(self.store, repositories=dict, kick_queue=lambda: None, **options)

    async def tick(self, seconds: float = 1.0) -> None:
        self.now += int(seconds * 1000)
        await self.holds.round()
        while await self.store.write(self.leader._admit):
            pass

    def running(self) -> list[str]:
        return self.queue.taken

    def settle(self, sprint: str, kind: OutcomeKind = OutcomeKind.FAILED, reason: str = "sandbox") -> None:
        self.now += 1
        ended = Outcome(kind, reason if kind is OutcomeKind.FAILED else "", "as the test wanted")

        def write(conn) -> None:
            k = sprints.field(conn, sprint, "admitted_n").admitted_n
            assert sprints.settle(conn, sprint, k, me=None, outcome=ended, spent=Usage(), steps=0, now_ms=self.now)

        self.store.write_sync(write)
        self.queue.taken.remove(sprint)

    def open(self) -> list[Breaker]:
        return list(self.store.read_sync(breakers.opened))

    def told(self) -> list[str]:
        table = intents.decisions
        rows = self.store.read_sync(lambda conn: conn.execute(table.select().where(table.c.kind == "breaker").order_by(table.c.id)).all())
        return [row.result for row in rows]

    def waiting(self, sprint: str) -> str | None:
        return self.store.read_sync(lambda conn: sprints.field(conn, sprint, "waiting_reason")).waiting_reason


@pytest.fixture
def room(database: str, base: Path) -> Iterator[Room]:
    made = Room(Fleet(database, base / "state", queue={"slots": 2, "max_per_repository": 2}, timing=PATIENT))
    yield made
    made.made.lease.leave()
    made.store.close()


async def test_it_opens_tries_with_growing_distance_and_closes_by_itself(room: Room, database: str, base: Path) -> None:
    for issue in range(1, 12):
        queue_sprint(room.store, issue, sprint_id=f"s{issue:02}", queued_ms=START)
    await room.tick()
    room.settle("s01")
    room.settle("s02", OutcomeKind.CANCELLED)
    await room.tick()
    room.settle("s03")
    assert room.open() == []
    await room.tick()
    room.settle("s04")
    await room.tick()
    [breaker] = room.open()
    assert (breaker.scope, breaker.repo_id, breaker.failures, breaker.reason) == (PauseScope.REPO, 7, 3, "sandbox")
    assert room.told() == ["opened"]
    # What runs is finished, and says nothing as long as it fails.
    room.settle("s05")
    await room.tick()
    assert (room.running(), room.waiting("s06")) == ([], "breaker")
    await room.tick(10)
    assert room.running() == ["s06"], "one try, though two slots are free"
    await room.tick(60)
    assert room.running() == ["s06"]
    assert room.open()[0].probe == "s06"
    room.settle("s06")
    await room.tick()
    assert (room.running(), room.open()[0].probes, room.told()[-2:]) == ([], 1, ["probe", "failed"])
    await room.tick(15)
    assert room.running() == [], "the distance doubled"

    # An operator's pause wins, and the breaker neither tries nor ends it.
    pause = Pause(PauseScope.REPO, 7, "alice/slug", "alice", room.now)
    room.store.write_sync(lambda conn: pauses.put(conn, pause))
    await room.tick(60)
    assert (room.running(), room.waiting("s07")) == ([], "paused")
    room.store.write_sync(lambda conn: pauses.lift(conn, PauseScope.REPO, 7, room.now))

    # Another process, after a restart, goes on where this one stood.
    second = Room(Fleet(database, base / "other", node="n2", timing=PATIENT))
    second.now, second.queue = room.now, room.queue
    second.leader._engine = room.queue
    await second.tick()
    assert room.running() == ["s07"]
    await room.tick()
    assert room.running() == ["s07"], "two leaders, one try"
    room.settle("s07", OutcomeKind.PULL_REQUEST)
    second.now = room.now
    await second.tick()
    await room.tick()
    assert room.open() == []
    assert room.told() == ["opened", "probe", "failed", "probe", "closed"]
    assert room.running() == ["s08", "s09", "s10", "s11"], "held work goes on"
    for sprint in ("s08", "s09"):
        room.settle(sprint)
    await room.tick()
    assert room.open() == [], "what failed before it closed counts no more"
    second.made.lease.leave()
    second.store.close()


async def test_the_fleets_own_opens_where_several_repositories_fail_and_an_operator_may_close_it(room: Room) -> None:
    for issue, repo in enumerate((7, 8, 9, 7, 8), 1):
        queue_sprint(room.store, issue, sprint_id=f"s{issue}", repo_id=repo, queued_ms=START + issue)
    await room.tick()
    for sprint in ("s1", "s2"):
        room.settle(sprint, reason="llm")
    await room.tick()
    room.settle("s3", reason="llm")
    await room.tick()
    [breaker] = room.open()
    assert (breaker.scope, breaker.reason) == (PauseScope.FLEET, "llm")
    room.store.write_sync(lambda conn: pauses.put(conn, Pause(PauseScope.PROVIDER, 0, "", "root", room.now, None, "", "nous")))
    look = room.store.read_sync(lambda conn: fleet.snapshot(conn, worker_timeout_ms=10**12, available=lambda _health, _now: True))
    found = judge(replace(look, now_ms=room.now, last_progress_ms=room.now), Thresholds())
    assert (found.verdict, found.has(Fault.BREAKER_OPEN), look.paused) == (HealthVerdict.DEGRADED, True, False)
    assert "the breaker of the fleet (llm) is open after 3 failures in a row" in [reason.detail for reason in found.reasons]
    assert "the provider nous is paused by root" in [reason.detail for reason in found.reasons]
    closed = room.store.write_sync(lambda conn: breakers.close(conn, FLEET, now_ms=room.now, why="mended", actor="root"))
    assert closed == breaker
    assert room.store.write_sync(lambda conn: breakers.close(conn, FLEET, now_ms=room.now, why="again")) is None
    await room.tick()
    assert (room.open(), room.told()) == ([], ["opened", "closed"])
    room.store.write_sync(lambda conn: breakers.save(conn, replace(OPEN, scope=PauseScope.PROVIDER, repo_id=0, repo="", provider="nous")))
    await room.tick()
    assert (room.open(), room.told()[-1]) == ([], "closed"), "one that the configuration does not want is closed"


async def test_a_try_that_goes_back_to_the_queue_says_nothing(room: Room) -> None:
    queue_sprint(room.store, 1, sprint_id="s1", queued_ms=START)
    room.store.write_sync(lambda conn: breakers.save(conn, replace(OPEN, repo="alice/slug", due_ms=START)))
    await room.tick()
    assert room.running() == ["s1"]
    back = {"me": None, "reason": WaitingReason.PROVIDER, "note": "", "not_before_ms": 0, "now_ms": room.now}
    room.store.write_sync(lambda conn: sprints.requeue(conn, "s1", 1, **back))
    await room.tick()
    [breaker] = room.open()
    assert (breaker.probe, breaker.probes, breaker.due_ms) == ("", 0, room.now + 10_000)
    assert room.waiting("s1") == "breaker"


def test_outages_are_history(room: Room) -> None:
    def write(conn) -> None:
        outages.began(conn, "nous/h", reason="rate_limit", until_ms=2_000, now_ms=1_000)
        outages.began(conn, "nous/h", reason="server: away", until_ms=5_000, now_ms=3_000)
        outages.ended(conn, "nous/h", 9_000)
        outages.ended(conn, "nous/h", 9_500)
        outages.began(conn, "nous/h", reason="auth", until_ms=None, now_ms=20_000)
        outages.began(conn, "other/m", reason="timeout", until_ms=90_000, now_ms=21_000)

    room.store.write_sync(write)

    def between(since: int, until: int, now: int = 30_000):
        found = room.store.read_sync(lambda conn: outages.between(conn, since_ms=since, until_ms=until, now_ms=now))
        return [(one.name, one.count, one.total_ms, one.longest_ms, one.reason) for one in found]

    assert between(0, 30_000) == [("nous/h", 2, 14_000, 10_000, "auth"), ("other/m", 1, 9_000, 9_000, "timeout")]
    assert between(2_000, 4_000) == [("nous/h", 1, 2_000, 2_000, "server: away")]
    assert between(5_000, 20_000) == []
    found = room.store.read_sync(lambda conn: report.collect(conn, length_ms=30_000, now_ms=30_000))
    assert [(one.name, one.count) for one in found.downtimes] == [("nous/h", 2), ("other/m", 1)]
    assert "`nous/h`: 2 outages, 14 s together, the longest 10 s (auth)" in report.as_markdown(replace(found, calls=1))
    assert ("Provider outages", "nous/h 2 in 14 s (auth); other/m 1 in 9 s (timeout)") in report.sums(found)
    here = room.store.read_sync(lambda conn: report.collect(conn, length_ms=30_000, now_ms=30_000, repo_id=7))
    assert here.downtimes == (), "a repository's report tells nothing of the fleet's providers"


@pytest.mark.timeout(180)
async def test_a_fleet_that_only_fails_holds_itself_and_a_person_lets_it_go(base: Path):
    """Seen by people: the status comment, health, resume; with a provider that is paused meanwhile."""
    settings = {"breaker": {"failures": 2, "first_probe_seconds": 3600}}
    async with make_world(base, operators=["alice"], **settings) as world:
        operators = [world.alice.login]
        await world.stop()
        await world.start(operators=operators)
        world.service.sandbox_error = "no sandbox can be made here"
        for n in range(2):
            issue = await issue_with(world, title=f"broken {n}")
            await world.alice.comment(issue, "/dispatch")
            assert (await world.settled(issue)).reason == "sandbox"
        await until(lambda: world.store.read(breakers.opened))
        issue = await issue_with(world, title="waits")
        await world.alice.comment(issue, "/dispatch")

        async def held():
            return "too many sprints failed in a row" in await world.status_comment(issue)

        await until(held)
        world.service.sandbox_error = ""
        await answered(world, issue, "/dispatch pause provider scripted 2h the bill")
        await answered(world, issue, "/dispatch resume")
        view = await world.sprint(issue)
        await until(lambda: world.store.read(lambda conn: sprints.field(conn, view.id, "waiting_reason").waiting_reason == "paused"))
        await world.shown(issue)
        said = "\n".join(await world.by_bot(issue))
        assert "This repository is held by the breaker" in said or "this repository was held" in said
        assert "The provider `scripted` is paused by" in said
        await answered(world, issue, "/dispatch resume provider scripted")
        await state_is(world, issue, "settled")
        assert (await world.sprint(issue)).outcome == "pull_request"
        assert [row.result for row in await world.trail(issue) if row.kind == "breaker"] == []
