"""Workers beside a `serve`: one queue, one leader, the same workflows everywhere; who is killed is taken over, who is drained finishes."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import sqlalchemy as sa
from fleet_support import Fleet, launched
from postgres_support import BACKENDS
from served import ROOT, ServedWorld
from world import World, make_world, until

from bot.models import EventKind, IssueRef, Limits, SprintEvent, SprintId
from bot.service import Service
from bot.store import cursors, sprints, workers
from bot.worker import Narrator, Worker

QUICK = {"timing": {"beat_seconds": 0.1, "lease_seconds": 1.0}}


# who leads


@pytest.fixture
def fleet_of(database: str, base: Path) -> Iterator[Callable[..., Fleet]]:
    """Processes of one fleet (in this one), by node and kind."""
    made: list[Fleet] = []

    def make(node: str = "n1", folder: str = "state", **changes: Any) -> Fleet:
        made.append(Fleet(database, base / folder, node=node, **{**QUICK, **changes}))
        made[-1].lease._pending_owners = lambda conn: []
        made[-1].engine.recover = lambda executors: None
        made[-1].lease.take()
        made[-1].lease.start()
        return made[-1]

    yield make
    for one in made:
        if one.lease.slot >= 0 and one.lease._slot_fd >= 0:
            one.lease.leave()
        one.lease.stop()
        one.store.close()


def killed(fleet: Fleet) -> None:
    """As after kill -9: no beat, no lock, and the lease stands."""
    fleet.lease.stop()
    for fd in (fleet.lease._slot_fd, fleet.lease._leader_fd):
        if fd >= 0:
            os.close(fd)
    fleet.lease._slot_fd = fleet.lease._leader_fd = -1
    fleet.lease.leader = fleet.lease.keeper = False


async def leads(*fleets: Fleet, among: tuple[Fleet, ...]) -> None:
    await until(lambda: [one for one in among if one.lease.leader] == list(fleets), 20)


async def test_a_worker_leads_while_nobody_serves_and_steps_back(fleet_of):
    """What only `serve` does, reconciliation, would else be done by nobody."""
    worker = fleet_of(serves=False)
    assert worker.lease.leader
    other = fleet_of(serves=False)
    serve = fleet_of()
    everybody = (worker, other, serve)
    await leads(serve, among=everybody)
    killed(serve)
    await until(lambda: worker.lease.leader or other.lease.leader, 20)
    await until(
        lambda: serve.lease.executor_id in [dead for one in (worker, other) for some in one.dead for dead in some] or _reaped(worker, serve)
    )
    again = fleet_of()
    await leads(again, among=(*everybody, again))
    again.lease.leave()
    await until(lambda: worker.lease.leader or other.lease.leader, 20)


def _reaped(witness: Fleet, dead: Fleet) -> bool:
    rows = {row.executor_id: row for row in witness.store.read_sync(workers.every)}
    return rows[dead.lease.executor_id].reaped_ms is not None


@pytest.mark.postgres
async def test_one_leads_over_hosts(base: Path, postgres_server: Any):
    """Each host keeps its folder; one of them admits and reconciles for all."""
    url = postgres_server.database()
    made = [Fleet(url, base / name, node=name, serves=serves, **QUICK) for name, serves in (("one", False), ("two", True), ("three", True))]
    for one in made:
        one.lease._pending_owners = lambda conn: []
        one.engine.recover = lambda executors: None
    worker, first, second = made
    try:
        worker.lease.take()
        worker.lease.start()
        assert (worker.lease.leader, worker.lease.keeper) == (True, True)
        for one in (first, second):
            one.lease.take()
            one.lease.start()
        await leads(first, among=(worker, first, second))
        assert all(one.lease.keeper for one in made), "each looks after its own folder"
        first.lease.leave()
        await leads(second, among=(worker, first, second))
        killed(second)
        await leads(worker, among=(worker, second))
        named = worker.store.read_sync(lambda conn: cursors.get(conn, "leader"))
        assert named == {"executor": worker.lease.executor_id, "serves": False}
    finally:
        for one in made:
            if one.lease._slot_fd >= 0:
                one.lease.leave()
            one.lease.stop()
            one.store.close()


def test_a_state_folder_has_one_name_whoever_begins(base: Path):
    code = "import sys; from pathlib import Path; from bot.lease import node_name; print(node_name(Path(sys.argv[1])))"
    started = [subprocess.Popen([sys.executable, "-c", code, str(base)], cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    names = {process.communicate()[0].strip() for process in started}
    assert len(names) == 1
    assert re.fullmatch("[0-9a-f]{8}", names.pop())
    assert [path.name for path in base.iterdir()] == ["node"]


# schedules and workflows


TICKER = """
import asyncio, sys
sys.path.insert(0, "tests")
from pathlib import Path
from fleet_support import Fleet, launched
from test_worker import ticking

async def main():
    async with ticking(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])):
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)

asyncio.run(main())
"""


def ticking(url: str, folder: Path, ticks: Path):
    async def tick() -> None:
        with ticks.open("a") as file:
            file.write(f"{os.getpid()}\n")

    class Ticking(Fleet):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.engine.schedule("tick", "*/2 * * * * *", tick)

    return launched(url, folder, kind=Ticking)


async def test_a_schedule_runs_once_a_tick_with_two_processes(database: str, base: Path):
    ticks = base / "ticks"
    ticks.touch()
    async with ticking(database, base / "state", ticks) as fleet:
        other = await asyncio.create_subprocess_exec(
            sys.executable, "-c", TICKER, database, str(base / "state"), str(ticks),
            cwd=ROOT, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        try:
            assert (await other.stdout.readline()).strip() == b"ready"
            begun = len(ticks.read_text().splitlines())
            await until(lambda: len(ticks.read_text().splitlines()) >= begun + 5, 60)
        finally:
            other.stdin.close()
            assert await asyncio.wait_for(other.wait(), 30) == 0
        sql = f"SELECT workflow_uuid FROM {fleet.engine._table} WHERE workflow_uuid LIKE 'sched-tick%' AND status='SUCCESS'"

        async def quiet() -> bool:
            done = fleet.store.read_sync(lambda conn: conn.execute(sa.text(sql)).scalars().all())
            return len(done) == len(set(done)) == len(ticks.read_text().splitlines())

        await until(quiet, 20)


async def test_every_process_knows_the_same_workflows(world: World):
    """A process that lacks one would take its row and never run it."""
    issue = f"{world.stage.repo}#1"
    more = {"launcher": {"enabled": True}, "report": {"issue": issue}, "metrics": {"listen": "127.0.0.1:0"}}
    await world.stop()
    service = await world.start(**more)
    known = {name: cron for name, (cron, _) in service.engine._scheduled.items()}
    await world.stop()
    worker = Worker(
        world.settings(**more), world.stage.secrets(), environ={}, home=world.state_dir, fast_shutdown=True, metrics="127.0.0.1:0"
    )
    await worker.start()
    try:
        assert {name: cron for name, (cron, _) in worker.engine._scheduled.items()} == known
        assert {"retention", "report"} < set(known)
        assert (Service.serves, Worker.serves) == (True, False)
        base = f"http://127.0.0.1:{worker.metrics_port}"
        async with aiohttp.ClientSession() as session:
            async with session.get(f"{base}/metrics") as reply:
                text = await reply.text()
            assert "dispatch_build_info" in text
            assert "dispatch_workers{" not in text, "what the store says is told by serve"
            async with session.get(f"{base}/readyz") as reply:
                assert reply.status == 200
        assert len(worker._doors) == 1, "its own figures, and no deliveries"
    finally:
        await worker.stop()


# what it says


class Rows:
    """A store of one sprint."""

    async def read(self, fn: Any) -> Any:
        return (str(IssueRef.of("alice/slug", 7)), Limits(steps=60, seconds=1, tokens=1000, usd=0.0).steps)


async def test_the_log_says_what_a_person_wants_to_know(capsys: pytest.CaptureFixture[str]):
    narrator = Narrator(Rows())
    telling = asyncio.create_task(narrator.run())

    def happened(kind: EventKind, **data: Any) -> None:
        narrator.observe(SprintEvent(kind, SprintId("ab12"), 1, data))

    await asyncio.to_thread(happened, EventKind.STARTED, source="label")
    happened(EventKind.HEARTBEAT)
    happened(EventKind.STEP_ENDED, step=3, provider="p", model="m1", result="ok", seconds=1.23456, usd=0.01)
    happened(EventKind.TOOL_ENDED, step=3, tool="run_command", result="error", seconds=0.5)
    happened(EventKind.PULL_REQUEST, event="opened", number=12, model="m1")
    happened(EventKind.SETTLED, outcome="pull_request", reason="", steps=3, usd=0.01)
    await asyncio.sleep(0)
    await narrator.said()
    telling.cancel()
    said = re.sub(r"\x1b\[[0-9;]*m", "", "".join(capsys.readouterr()))
    lines = [line for line in said.splitlines() if "sprint." in line]
    assert [re.search(r"sprint\.\w+", line)[0].removeprefix("sprint.") for line in lines] == [
        "started",
        "step",
        "tool",
        "pull_request",
        "settled",
    ]
    assert all("ab12" in line and "alice/slug#7" in line for line in lines)
    assert "3/60" in lines[1]
    assert "1.235" in lines[1]
    assert "run_command" in lines[2]
    assert "12" in lines[3]
    assert "pull_request" in lines[4]


# real processes


class Crew(ServedWorld):
    """`serve` and workers beside it; on PostgreSQL each worker as if on another host."""

    def __init__(self, *args: Any, **changes: Any) -> None:
        super().__init__(*args, **changes)
        self.crew: list[asyncio.subprocess.Process] = []

    async def work(self, *words: str) -> asyncio.subprocess.Process:
        number, home = len(self.crew), self.state_dir
        if not self.store.sqlite:
            self.state_dir = home.parent / f"host{number}"
        config = self.write_config()
        self.state_dir = home
        environ = {"PATH": os.environ["PATH"], "HOME": str(home.parent), "PYTHONPATH": str(ROOT)}
        with (home.parent / f"worker{number}.log").open("ab") as out:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", "-m", "bot", "--config", str(config), "worker", *words, cwd="/", env=environ, stdout=out, stderr=out
            )
        self.crew.append(process)
        try:
            await until(lambda: self.worker_id(number) or process.returncode is not None, 90)
        finally:
            assert self.worker_id(number), self.said(number)
        return process

    def said(self, number: int) -> str:
        return (self.state_dir.parent / f"worker{number}.log").read_text()

    def worker_id(self, number: int) -> str:
        found = re.search(r"worker\.started.*executor=(\S+)", self.said(number))
        return found[1] if found else ""

    async def owners(self) -> dict[int, str]:
        """issue -> executor, of the sprints under way."""
        c = sprints.table.c
        statement = sa.select(c.issue, c.executor_id).where(c.executor_id.is_not(None), c.state == "working")
        return {row[0]: row[1] for row in await self.store.read(lambda conn: conn.execute(statement).all())}

    async def ask(self, count: int, script: str) -> list[int]:
        issues = [await self.alice.open_issue(f"slug {n}", f"script: {script}\n\nPlease mend `lib/slug.sh`.") for n in range(count)]
        for issue in issues:
            await self.alice.label(issue, "dispatch")
        return issues

    async def split(self, issues: list[int], executor: str) -> int:
        """Waits until all of them run and one of them there; returns that one."""

        async def found():
            owners = await self.owners()
            mine = [issue for issue, owner in owners.items() if owner == executor]
            return mine[0] if mine and set(issues) <= set(owners) else None

        return await until(found, 60)

    async def stop(self) -> None:
        for process in self.crew:
            if process.returncode is None:
                process.kill()
            await process.wait()
        await super().stop()


@pytest.fixture(params=BACKENDS)
async def crew(request: pytest.FixtureRequest, base: Path) -> AsyncIterator[Crew]:
    changes: dict[str, Any] = {
        "timing": {"beat_seconds": 0.5, "lease_seconds": 4.0},
        "queue": {"slots": 1, "max_per_repository": 9},
        "reconcile": {"every_seconds": 2, "leave_to_webhook_seconds": 1},
    }
    if request.param == "postgres":
        changes["database"] = request.getfixturevalue("postgres_server").database()
    async with make_world(base, kind=Crew, start=False, **changes) as made:
        made.changes["repositories"] = [{"name": made.stage.repo, "max_running": 9}]
        yield made


async def each_once(crew: Crew, issues: list[int]) -> None:
    """One pull request and one status comment for each."""
    pulls = await crew.pulls()
    assert sorted(pull["head"]["ref"] for pull in pulls) == sorted(f"dispatch/issue-{issue}" for issue in issues)
    for issue in issues:
        said = await crew.by_bot(issue)
        assert len(said) == 1, said


@pytest.mark.slow
async def test_a_killed_worker_is_taken_over_exactly_once(crew: Crew):
    """The capacity of both counts; kill -9 in the middle of a sprint; the other goes on where it stood."""
    serve = await crew.serve()
    await crew.listening()
    worker = await crew.work()
    issues = await crew.ask(2, "slow(0.8)")
    mine = await crew.split(issues, crew.worker_id(0))
    worker.kill()
    for issue in issues:
        assert (await crew.settled(issue, 90)).outcome == "pull_request", crew.log()[-3000:]
    view = await crew.sprint(mine)
    assert view.admitted_n == 1
    assert crew.store.read_sync(lambda conn: sprints.field(conn, view.id, "crashes")).crashes == 1
    assert serve.returncode is None
    assert "lease.take_over" in crew.log()
    await each_once(crew, issues)


@pytest.mark.slow
async def test_a_killed_serve_is_taken_over_by_a_worker(crew: Crew):
    """Nothing new comes in, and what is under way goes on."""
    serve = await crew.serve()
    await crew.listening()
    worker = await crew.work()
    issues = await crew.ask(2, "slow(0.8)")
    await crew.split(issues, crew.worker_id(0))
    serve.kill()
    await serve.wait()
    for issue in issues:
        assert (await crew.settled(issue, 90)).outcome == "pull_request", crew.said(0)[-3000:]
    assert worker.returncode is None
    await each_once(crew, issues)


@pytest.mark.slow
async def test_a_drained_worker_finishes_what_it_began(crew: Crew):
    serve = await crew.serve()
    await crew.listening()
    worker = await crew.work()
    issues = await crew.ask(2, "slow(0.8)")
    mine = await crew.split(issues, crew.worker_id(0))
    worker.terminate()
    view = await crew.sprint(mine)
    late = await crew.ask(1, "fix")
    assert await asyncio.wait_for(worker.wait(), 90) == 0, crew.said(0)[-3000:]
    said = crew.said(0)
    assert "worker.drained" in said
    assert [line for line in said.splitlines() if "sprint.settled" in line and view.id in line], said[-3000:]
    for issue in (*issues, *late):
        assert (await crew.settled(issue, 60)).outcome == "pull_request"
    assert (await crew.sprint(late[0])).id not in said, "nothing was taken any more"
    assert "lease.take_over" not in crew.log()
    assert serve.returncode is None
    await each_once(crew, [*issues, *late])


@pytest.mark.slow
async def test_a_second_signal_ends_a_worker_now(crew: Crew):
    """What it ran goes on in the other, and that is no crash."""
    await crew.serve()
    await crew.listening()
    worker = await crew.work()
    issues = await crew.ask(2, "slow(1)")
    mine = await crew.split(issues, crew.worker_id(0))
    worker.terminate()
    await until(lambda: "worker.draining" in crew.said(0))
    worker.send_signal(signal.SIGINT)
    assert await asyncio.wait_for(worker.wait(), 60) == 0
    assert "worker.drained" not in crew.said(0)
    for issue in issues:
        assert (await crew.settled(issue, 60)).outcome == "pull_request"
    taken = await crew.sprint(mine)
    assert crew.store.read_sync(lambda conn: sprints.field(conn, taken.id, "crashes")).crashes == 0
    await each_once(crew, issues)
