"""Who lives and who is dead: slots, beats, the reaper and the fence; a zombie starts no effect, a take-over repeats none, a stop leaves all to the next."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from fleet_support import Fleet, launched, now_ms, queue_sprint
from postgres_support import BACKENDS
from served import ServedWorld
from test_kill import one_of_each
from world import free_port, make_world, until

from bot.engine import workflow_id
from bot.lease import _try_lock
from bot.models import SprintState
from bot.rooms import EX_TEMPFAIL
from bot.store import deliveries, sprints, steps, workers

QUICK = {"timing": {"beat_seconds": 0.1, "lease_seconds": 1.0}}


@pytest.fixture
def fleet_of(database: str, base: Path) -> Iterator[Callable[..., Fleet]]:
    """Processes of one fleet (in this one), by node."""
    made: list[Fleet] = []

    def make(node: str = "n1", folder: str = "state", **changes: object) -> Fleet:
        made.append(Fleet(database, base / folder, node=node, **{**QUICK, **changes}))
        made[-1].engine.pending_owners = lambda conn: []
        made[-1].lease._pending_owners = made[-1].engine.pending_owners
        made[-1].engine.recover = lambda executors: None
        return made[-1]

    yield make
    for one in made:
        if one.lease.slot >= 0:
            one.lease.leave()
        one.store.close()


def rows(fleet: Fleet) -> dict[str, workers.Worker]:
    return {row.executor_id: row for row in fleet.store.read_sync(workers.every)}


def owns(fleet: Fleet, executor: str, issue: int = 1) -> str:
    """A sprint that `executor` works on."""
    sprint = queue_sprint(fleet.store, issue)
    values = {"state": SprintState.WORKING, "executor_id": executor, "admitted_n": 1}
    fleet.store.write_sync(lambda conn: conn.execute(sprints.table.update().where(sprints.table.c.id == sprint).values(**values)))
    return sprint


def test_each_process_has_its_slot_and_one_leads(fleet_of):
    first, second = fleet_of(), fleet_of()
    assert first.lease.take() == second.lease.take() == []
    assert (first.lease.slot, second.lease.slot) == (0, 1)
    assert (first.lease.leader, second.lease.leader) == (True, False)
    second.lease.start()
    first.lease.leave()
    deadline = time.monotonic() + 5
    while not second.lease.leader:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_free_slot_is_a_dead_process_at_once(fleet_of):
    first, second = fleet_of(), fleet_of()
    first.lease.take()
    second.lease.take()
    sprint = owns(second, second.lease.executor_id)
    os.close(second.lease._slot_fd)
    second.lease._slot_fd = -1
    first.lease._lead()
    assert first.dead == [[second.lease.executor_id]]
    assert rows(first)[second.lease.executor_id].reaped_ms is not None
    assert first.store.read_sync(lambda conn: sprints.field(conn, sprint, "crashes")).crashes == 1


def test_whoever_takes_the_slot_takes_over(fleet_of):
    first = fleet_of()
    first.lease.take()
    os.close(first.lease._slot_fd)
    os.close(first.lease._leader_fd)
    first.lease._slot_fd = first.lease._leader_fd = -1
    second = fleet_of()
    assert second.lease.take() == [first.lease.executor_id]
    assert second.lease.slot == 0


def test_a_slot_is_free_after_a_kill_though_a_child_lives(base: Path):
    script = (
        "import asyncio, sys\nfrom pathlib import Path\nfrom bot.lease import _try_lock\n"
        "async def main():\n    assert _try_lock(Path(sys.argv[1])) is not None\n"
        "    child = await asyncio.create_subprocess_exec('sleep', '60')\n    print(child.pid, flush=True)\n    await child.wait()\n"
        "asyncio.run(main())\n"
    )
    lock = base / "slot-0.lock"
    holder = subprocess.Popen([sys.executable, "-c", script, lock], stdout=subprocess.PIPE, cwd=Path(__file__).parents[1])
    child = int(holder.stdout.readline())
    try:
        assert _try_lock(lock) is None
        holder.kill()
        holder.wait()
        fd = _try_lock(lock)
        assert fd is not None
        os.close(fd)
        os.kill(child, 0)
    finally:
        os.kill(child, signal.SIGKILL)
        holder.stdout.close()


def test_silence_counts_only_after_ones_own_good_time(fleet_of):
    """A leader that was kept from beating itself gives the others one timeout."""
    leader, silent = fleet_of("n1", "one"), fleet_of("n2", "two")
    leader.lease.take()
    silent.lease.take()
    owns(leader, silent.lease.executor_id)
    time.sleep(1.2)
    leader.lease._good_since += 1.2
    leader.lease._lead()
    assert leader.dead == []
    leader.lease._good_since -= 1.2
    leader.lease._lead()
    assert leader.dead == [[silent.lease.executor_id]]
    silent.lease.start()
    deadline = time.monotonic() + 3
    while not silent.reaped:
        assert time.monotonic() < deadline, "told at its next beat"
        time.sleep(0.02)


def test_an_outage_of_the_leader_starts_its_good_time_anew(fleet_of):
    leader = fleet_of()
    leader.lease.take()
    before = leader.lease._good_since
    write = leader.store.write_sync

    def away(_fn):
        raise sa.exc.OperationalError("beat", {}, Exception("away"))

    leader.store.write_sync = away
    leader.lease.start()
    time.sleep(0.5)
    assert leader.lease.held()
    time.sleep(0.6)
    assert not leader.lease.held(), "no effect starts"
    leader.store.write_sync = write
    deadline = time.monotonic() + 3
    while not leader.lease.held():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert leader.lease._good_since > before
    assert leader.reaped == 0


def test_who_left_politely_is_taken_over_at_once_and_did_not_crash(fleet_of):
    gone, leader = fleet_of(), fleet_of()
    gone.lease.take()
    sprint = owns(gone, gone.lease.executor_id)
    gone.lease.leave()
    leader.lease.take()
    assert leader.lease.left_behind() == [gone.lease.executor_id]
    leader.lease._try_lead()
    leader.lease._lead()
    assert leader.dead == [[gone.lease.executor_id]]
    assert leader.store.read_sync(lambda conn: sprints.field(conn, sprint, "crashes")).crashes == 0


def test_a_blocked_event_loop_is_no_death(fleet_of):
    blocked, other = fleet_of("n1", "one"), fleet_of("n2", "two")
    for one in (blocked, other):
        one.lease.take()
        one.lease.start()
    owns(blocked, blocked.lease.executor_id)

    async def block() -> None:
        time.sleep(3.0)

    asyncio.run(block())
    assert blocked.reaped == 0
    assert other.dead == blocked.dead == []
    assert blocked.lease.held()


async def test_two_reapers_recover_each_sprint_once(database: str, base: Path):
    async with launched(database, base / "state", beat=False) as fleet:
        names = [queue_sprint(fleet.store, n) for n in range(1, 7)]

        def of_the_dead(conn: sa.Connection) -> None:
            for name in names:
                fleet.engine.enqueue(conn, name, sprints.admit(conn, name, now_ms()), priority=5)
            conn.execute(sprints.table.update().values(executor_id="dead"))
            conn.execute(sa.text(f"UPDATE {fleet.engine._table} SET status='PENDING', executor_id='dead', started_at_epoch_ms=1"))

        fleet.store.write_sync(of_the_dead)
        fleet.lease.leader = True

        def reap() -> None:
            for _ in range(5):
                fleet.lease._lead()

        threads = [threading.Thread(target=reap) for _ in range(2)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            await asyncio.sleep(0.02)
        for name in names:
            await fleet.settled(name)
        assert sorted(fleet.notes.ran) == sorted(
            (step, name, 1) for name in names for step in ("prepare", "work", "vet", "publish", "settle")
        )


async def test_two_leaders_admit_each_sprint_once(database: str, base: Path):
    async with launched(database, base / "state") as fleet:
        names = [queue_sprint(fleet.store, n) for n in range(1, 13)]
        fleet.lease._capacity = 12
        fleet.store.write_sync(lambda conn: conn.execute(workers.table.update().values(capacity=5)))
        fleet.notes.hold = "prepare"

        def admit() -> None:
            # Who meets the other's lock admits nobody that time; a machine under load meets it often.
            for _ in range(60):
                fleet.store.write_sync(fleet.leader._admit)
                time.sleep(0.02)

        await asyncio.gather(*(asyncio.to_thread(admit) for _ in range(2)))
        admitted = fleet.store.read_sync(lambda conn: list(conn.execute(sa.select(sprints.table.c.admitted_n)).scalars()))
        assert sorted(admitted) == [0] * 7 + [1] * 5, "never above the slots"
        fleet.store.write_sync(lambda conn: conn.execute(workers.table.update().values(capacity=12)))
        fleet.notes.go.set()
        for name in names:
            await fleet.settled(name)
        assert {k for _, _, k in fleet.notes.ran} == {1}
        assert workflow_id(names[0], 1)


# with real processes


@pytest.fixture(params=BACKENDS)
async def served(request: pytest.FixtureRequest, base: Path) -> AsyncIterator[ServedWorld]:
    changes = {"timing": {"beat_seconds": 0.5, "lease_seconds": 4.0}, "reconcile": {"every_seconds": 2, "leave_to_webhook_seconds": 1}}
    if request.param == "postgres":
        changes["database"] = request.getfixturevalue("postgres_server").database()
    async with make_world(base, kind=ServedWorld, start=False, **changes) as world:
        yield world


async def started(world: ServedWorld, script: str) -> int:
    issue = await world.alice.open_issue("slug keeps capitals", f"script: {script}\n\nPlease mend `lib/slug.sh`.")
    await world.alice.comment(issue, "/dispatch")
    return issue


async def another(world: ServedWorld, *, host: bool) -> asyncio.subprocess.Process:
    """A second `serve`; on PostgreSQL as if on another host, with a state folder of its own, on SQLite in the next slot."""
    world.port = free_port()
    if host:
        world.state_dir = world.state_dir.parent / "state2"
    process = await world.serve()
    await world.listening()
    return process


@pytest.mark.slow
async def test_a_zombie_starts_nothing_and_exits(served: ServedWorld):
    """SIGSTOP in a model call past the lease, take-over by a second process, SIGCONT."""
    owner = await served.serve()
    await served.listening()
    issue = await started(served, "slow(1)")
    await until(lambda: len(served.model.requests) >= 3)
    store = served.store
    owner.send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    heir = await another(served, host=not store.sqlite)
    try:
        sprint = await served.settled(issue, 60)
        took = time.monotonic() - stopped
    finally:
        owner.send_signal(signal.SIGCONT)
    assert await asyncio.wait_for(owner.wait(), 10) == EX_TEMPFAIL
    assert sprint.outcome == "pull_request", (sprint, served.log()[-3000:])
    assert took < 30
    await asyncio.sleep(1.5)
    assert heir.returncode is None
    await one_of_each(served, issue)
    view = await served.sprint(issue)
    assert (view.state, view.outcome, view.admitted_n) == ("settled", "pull_request", 1)


async def test_a_worker_reaped_by_hand_exits_within_two_beats(served: ServedWorld):
    process = await served.serve()
    await served.listening()
    issue = await started(served, "slow(1)")
    await until(lambda: served.model.requests)
    [row] = [row for row in served.store.read_sync(workers.every) if row.reaped_ms is None]
    served.store.write_sync(lambda conn: workers.reap(conn, row.executor_id))
    began = time.monotonic()
    assert await asyncio.wait_for(process.wait(), 5) == EX_TEMPFAIL
    assert time.monotonic() - began < 3
    await served.serve()
    await served.listening()
    assert (await served.settled(issue)).outcome == "pull_request"
    await one_of_each(served, issue)


@pytest.mark.parametrize(
    ("stage", "script", "checks"),
    [("preparing", "fix", ()), ("working", "slow(2)", ()), ("tool", 'calls([["run_command", {"command": "sleep 6"}], ["write_file", {"path": "N.md", "content": "n"}]])', ()), ("vetting", "fix", ("sleep 4",)), ("publishing", "fix", ())],
)  # fmt: skip
@pytest.mark.slow
async def test_sigterm_leaves_the_sprint_to_the_next(served: ServedWorld, stage: str, script: str, checks: tuple[str, ...]):
    repository = {"name": served.stage.repo, "checks": list(checks)}
    served.changes["repositories"] = [repository]
    process = await served.serve()
    await served.listening()
    if stage in ("preparing", "publishing"):
        served.forge.fail_next(status=200, match="POST .*/pulls$" if stage == "publishing" else "info/refs", delay=3.0)
    issue = await started(served, script)
    state = "working" if stage == "tool" else stage

    async def there():
        view = await served.sprint(issue)
        return (
            view is not None
            and view.state == state
            and (stage != "tool" or await served.store.read(lambda conn: steps.calls_of_attempt(conn, view.id, 1)))
        )

    await until(there, 30, every=0.01)
    await asyncio.sleep(0.3)
    process.terminate()
    began = time.monotonic()
    assert await asyncio.wait_for(process.wait(), 20) == 0, served.log()[-3000:]
    assert time.monotonic() - began < 15
    view = await served.sprint(issue)
    if view.state != "settled":
        assert view.state in ("preparing", "working", "vetting", "publishing"), view.state
    asked = len(served.model.requests)
    again = await served.serve()
    await served.listening()
    assert (await served.settled(issue)).outcome == "pull_request", (
        [(one.kind, one.reason) for one in await served.trail(issue)],
        served.log(),
    )
    assert again.returncode is None
    await one_of_each(served, issue)
    if stage in ("vetting", "publishing"):
        assert len(served.model.requests) == asked, "no stored step was asked again"
    assert served.store.read_sync(lambda conn: sprints.field(conn, view.id, "crashes")).crashes == 0


async def test_a_sprint_that_kills_its_process_again_and_again_fails(served: ServedWorld):
    served.changes["queue"] = {"max_attempts": 2}
    issue = 0
    for _ in range(2):
        process = await served.serve(failpoint="work.step_reserved")
        await served.listening()
        issue = issue or await started(served, "fix")
        assert await asyncio.wait_for(process.wait(), 30) == -signal.SIGKILL, served.log()[-3000:]
        (served.state_dir / "failpoint").unlink()
    await served.serve(failpoint="work.step_reserved")
    await served.listening()
    sprint = await served.settled(issue)
    assert (sprint.outcome, sprint.reason, sprint.steps) == ("failed", "died", 2)
    assert served.process.returncode is None
    assert await served.labels(issue) == {"dispatch/failed"}


async def test_a_cancel_during_a_crash_holds(served: ServedWorld):
    process = await served.serve()
    await served.listening()
    issue = await started(served, "slow(30)")
    await until(lambda: served.model.requests)
    process.kill()
    await process.wait()
    view = await served.sprint(issue)
    served.store.write_sync(lambda conn: sprints.cancel(conn, view.id, by="alice", now_ms=now_ms()))
    asked = len(served.model.requests)
    await served.serve()
    await served.listening()
    sprint = await served.settled(issue, 20)
    assert (sprint.outcome, len(served.model.requests)) == ("cancelled", asked)
    assert await served.labels(issue) == set()


@pytest.mark.slow
async def test_two_serve_on_one_database(served: ServedWorld):
    """Eight sprints at once over two processes; the first dies on the way, the second leads on."""
    served.changes["queue"] = {"max_per_repository": 20, "slots": 6}
    served.changes["repositories"] = [{"name": served.stage.repo, "max_running": 20}]
    first = await served.serve()
    await served.listening()
    issues = [await served.alice.open_issue(f"issue {n}", "script: slow(0.2)") for n in range(8)]
    for issue in issues:
        await served.alice.label(issue, "dispatch")
    second = await another(served, host=not served.store.sqlite)
    await until(lambda: len(served.model.requests) >= 8)
    first.kill()
    await first.wait()
    for issue in issues:
        sprint = await served.settled(issue, 80)
        assert sprint.outcome == "pull_request", (sprint, served.log()[-3000:])
    assert second.returncode is None
    assert len(await served.pulls()) == 8
    assert "database is locked" not in served.log()


@pytest.mark.slow
async def test_fifty_triggers_by_four_ways_are_one_sprint(served: ServedWorld):
    await served.serve()
    await served.listening()
    issue = await served.alice.open_issue("slug keeps capitals", "script: slow(1)")
    people = [served.alice, served.bob] * 4
    await asyncio.gather(served.alice.label(issue, "dispatch"), *(person.comment(issue, "/dispatch") for person in people))
    await until(lambda: _stored(served, 9))
    bodies = await served.stored()
    answers = await asyncio.gather(*(served.send(kind, body) for kind, body in bodies * 5))
    assert {status for status, _ in answers} <= {200, 202}
    sprint = await served.settled(issue)
    assert sprint.outcome == "pull_request"

    async def caught_up():
        def read(conn: sa.Connection) -> bool:
            return conn.execute(sa.select(sa.func.count()).where(deliveries.table.c.done_ms.is_(None))).scalar() == 0

        return await served.store.read(read)

    await until(caught_up)
    await served.store.write(lambda conn: conn.execute(deliveries.table.delete()))
    for kind, body in bodies:
        assert (await served.send(kind, body))[0] == 202
    await until(caught_up)
    await asyncio.sleep(3)
    assert await served.store.read(lambda conn: conn.execute(sa.select(sa.func.count()).select_from(sprints.table)).scalar()) == 1
    assert len(await served.pulls()) == 1


async def _stored(world: ServedWorld, count: int) -> bool:
    return len(await world.stored()) >= count


async def test_the_same_delivery_five_times_at_once_is_one_row(served: ServedWorld):
    await served.serve()
    await served.listening()
    await served.alice.open_issue("slug keeps capitals", "nothing is asked")
    await until(lambda: _stored(served, 1))
    [(kind, body)] = await served.stored()
    await served.store.write(lambda conn: conn.execute(deliveries.table.delete()))
    answers = await asyncio.gather(*(served.send(kind, body) for _ in range(5)))
    assert sorted(status for status, _ in answers) == [200] * 4 + [202]
    assert len(await served.stored()) == 1


async def test_killed_between_the_publication_and_the_end(served: ServedWorld):
    """What was published is settled as that by whoever takes over."""
    process = await served.serve()
    await served.listening()
    columns = sprints.table.c
    issue = await started(served, "fix")

    def published() -> bool:
        return bool(served.store.read_sync(lambda conn: conn.execute(sa.select(columns.id).where(columns.pr > 0)).scalar()))

    await until(published, 30, every=0.001)
    process.kill()
    await process.wait()
    await served.serve()
    await served.listening()
    assert (await served.settled(issue)).outcome == "pull_request"
    await one_of_each(served, issue)
