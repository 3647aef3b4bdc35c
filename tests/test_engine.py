"""The engine: admission and enqueue are one, what DBOS ends is settled, versions come and go, pickle is never read, results equal their replay."""

from __future__ import annotations

import asyncio
import base64
import inspect
import json
import pickle
import sqlite3
import string
from datetime import UTC, datetime, timedelta
from pathlib import Path

import dbos
import pytest
import sqlalchemy as sa
from dbos import DBOS, DBOSPortableJSONSerializer
from dbos._serialization import DefaultSerializer
from fleet_support import Fleet, launched, now_ms, queue_sprint, state
from hypothesis import given
from hypothesis import strategies as st
from world import until

from bot import engine as engine_module
from bot.engine import VERSION, UnsafePayload, _plain, workflow_id
from bot.models import OutcomeKind, SprintState
from bot.store import deliveries, sprints


class Boom(Exception):
    pass


async def test_a_sprint_runs_its_five_steps_once(database: str, base: Path):
    async with launched(database, base / "state") as fleet:
        sprint = queue_sprint(fleet.store, 1)
        await fleet.settled(sprint)
        await until(lambda: fleet.over(sprint))
        assert [(name, k) for name, _, k in fleet.notes.ran] == [(name, 1) for name in ("prepare", "work", "vet", "publish", "settle")]


async def test_flip_and_enqueue_are_one(database: str, base: Path):
    def fault(name: str) -> None:
        if name == "admit.before_commit":
            raise Boom

    async with launched(database, base / "state", failpoint=fault) as fleet:
        sprint = queue_sprint(fleet.store, 1)
        with pytest.raises(Boom):
            await fleet.leader.round()
        row = fleet.store.read_sync(lambda conn: sprints.field(conn, sprint, "state", "admitted_n"))
        assert tuple(row) == (SprintState.QUEUED, 0)
        assert fleet.store.read_sync(lambda conn: fleet.engine.statuses(conn, [workflow_id(sprint, 1)])) == {}
        await asyncio.sleep(0.3)
        assert fleet.notes.ran == []


async def test_a_fault_after_the_enqueue_leaves_neither(database: str, base: Path):
    async with launched(database, base / "state") as fleet:
        sprint = queue_sprint(fleet.store, 1)

        def both(conn: sa.Connection) -> None:
            fleet.engine.enqueue(conn, sprint, sprints.admit(conn, sprint, now_ms()), priority=5)
            raise Boom

        with pytest.raises(Boom):
            fleet.store.write_sync(both)
        assert state(fleet.store, sprint) == SprintState.QUEUED
        assert fleet.store.read_sync(lambda conn: fleet.engine.statuses(conn, [workflow_id(sprint, 1)])) == {}


async def test_a_workflow_that_fails_is_settled_by_the_sweep(database: str, base: Path):
    async with launched(database, base / "state") as fleet:
        fleet.notes.answer = {}
        sprint = queue_sprint(fleet.store, 1)
        await fleet.settled(sprint)
        view = fleet.store.read_sync(lambda conn: sprints.get(conn, sprint))
        assert (view.outcome, view.reason) == ("failed", "internal")
        assert "ERROR" in view.detail
        assert queue_sprint(fleet.store, 1) is not None


@pytest.mark.parametrize("how", ["cancelled", "deleted"])
@pytest.mark.parametrize("stopped", [False, True])
async def test_what_an_operator_ends_in_the_engine_is_settled_by_the_sweep(database: str, base: Path, how: str, stopped: bool):
    async with launched(database, base / "state") as fleet:
        fleet.notes.hold = "prepare"
        sprint = queue_sprint(fleet.store, 1)
        await fleet.running(sprint, "prepare")
        columns = sprints.table.c
        with_state = sprints.table.update().where(columns.id == sprint).values(state=SprintState.PREPARING)
        fleet.store.write_sync(lambda conn: conn.execute(with_state))
        if stopped:
            fleet.store.write_sync(lambda conn: sprints.cancel(conn, sprint, by="alice", now_ms=now_ms()))
        if how == "cancelled":
            await fleet.engine.cancel(sprint, 1)
        else:
            await DBOS.delete_workflows_async([workflow_id(sprint, 1)])
        await fleet.settled(sprint)
        view = fleet.store.read_sync(lambda conn: sprints.get(conn, sprint))
        assert view.outcome == (OutcomeKind.CANCELLED if stopped else OutcomeKind.FAILED)


@pytest.mark.parametrize("status", ["ENQUEUED", "PENDING"])
async def test_work_of_another_version_is_queued_again(database: str, base: Path, status: str):
    """A row that an older program left: nobody alive runs its version."""
    async with launched(database, base / "state") as fleet:
        sprint = queue_sprint(fleet.store, 1, queued_ms=1000)

        def of_another(conn: sa.Connection) -> None:
            k = sprints.admit(conn, sprint, now_ms())
            fleet.engine.enqueue(conn, sprint, k, priority=5)
            conn.execute(
                sa.text(
                    f"UPDATE {fleet.engine._table} SET application_version='sprint-0', status=:s, executor_id='old' WHERE workflow_uuid=:w"
                ),
                {"s": status, "w": workflow_id(sprint, k)},
            )

        fleet.store.write_sync(of_another)
        await fleet.settled(sprint)
        assert {k for _, _, k in fleet.notes.ran} == {2}
        assert fleet.store.read_sync(lambda conn: sprints.field(conn, sprint, "queued_ms")).queued_ms == 1000
        assert fleet.store.read_sync(fleet.engine.foreign) == []


@pytest.mark.parametrize("cancelled", [False, True], ids=["goes-on", "cancelled"])
async def test_a_run_that_the_engine_let_go_of_does_not_hold_its_repository(database: str, base: Path, cancelled: bool):
    """A step that could not be recorded (the disk was full) ends the run in this process; its row still says that this process has it."""
    async with launched(database, base / "state") as fleet:
        sprint = queue_sprint(fleet.store, 1)

        def let_go(conn: sa.Connection) -> None:
            k = sprints.admit(conn, sprint, now_ms())
            fleet.engine.enqueue(conn, sprint, k, priority=5)
            conn.execute(
                sa.text(f"UPDATE {fleet.engine._table} SET status='PENDING', executor_id=:me WHERE workflow_uuid=:w"),
                {"me": fleet.engine._executor_id, "w": workflow_id(sprint, k)},
            )
            if cancelled:
                conn.execute(sprints.table.update().where(sprints.table.c.id == sprint).values(stop="cancel"))

        fleet.store.write_sync(let_go)
        await picked_up(fleet, sprint)
        assert {k for _, _, k in fleet.notes.ran} == (set() if cancelled else {2})
        view = fleet.store.read_sync(lambda conn: sprints.get(conn, sprint))
        assert (view.outcome == OutcomeKind.CANCELLED) == cancelled
        assert not fleet.engine._running


async def test_a_step_that_finds_the_disk_full_is_recorded_when_there_is_room(base: Path):
    async with launched(f"sqlite:///{base / 'timmy.db'}", base / "state") as fleet:
        engine, refused = dbos._dbos._get_dbos_instance()._sys_db, []
        record = engine._record_operation_result_txn

        def full(*args: object, **options: object) -> object:
            if not refused:
                refused.append(args)
                raise sa.exc.OperationalError("INSERT", {}, sqlite3.OperationalError("database or disk is full"))
            return record(*args, **options)

        engine._record_operation_result_txn = full
        sprint = queue_sprint(fleet.store, 1)
        await picked_up(fleet, sprint)
        assert refused
        assert [name for name, _, _ in fleet.notes.ran] == ["prepare", "work", "vet", "publish", "settle"]


async def picked_up(fleet: Fleet, sprint: str) -> None:
    """Until it is settled, as the leader's loop does it."""

    async def over():
        await fleet.leader._requeue_lost()
        await fleet.leader.round()
        return fleet.over(sprint)

    await until(over, 40)


async def test_a_live_worker_of_another_version_keeps_its_work(database: str, base: Path):
    async with launched(database, base / "state") as fleet:
        sprint = queue_sprint(fleet.store, 1)

        def of_another(conn: sa.Connection) -> None:
            fleet.engine.enqueue(conn, sprint, sprints.admit(conn, sprint, now_ms()), priority=5)
            conn.execute(sa.text(f"UPDATE {fleet.engine._table} SET application_version='sprint-0', executor_id='other'"))
            enter = "INSERT INTO workers (executor_id, node_id, slot, host, pid, app_version, capacity, draining, started_ms, beat_ms)"
            conn.execute(sa.text(f"{enter} VALUES ('other', 'n2', 0, 'h', 1, 'sprint-0', 1, false, 0, :far)"), {"far": now_ms() + 10**9})

        fleet.store.write_sync(of_another)
        await fleet.leader._sweep()
        assert state(fleet.store, sprint) == SprintState.ADMITTED


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


async def test_a_pickle_executes_nothing_and_ends_as_an_error(database: str, base: Path):
    payload = base64.b64encode(pickle.dumps(Hostile(base / "executed"))).decode()
    async with launched(database, base / "state") as fleet:
        sprint = queue_sprint(fleet.store, 1)

        def hostile(conn: sa.Connection) -> None:
            fleet.engine.enqueue(conn, sprint, sprints.admit(conn, sprint, now_ms()), priority=5)
            statement = f"UPDATE {fleet.engine._table} SET inputs=:p, serialization='py_pickle'"
            conn.execute(sa.text(statement), {"p": payload})

        fleet.store.write_sync(hostile)

        def status():
            return fleet.store.read_sync(lambda conn: fleet.engine.statuses(conn, [workflow_id(sprint, 1)]))[workflow_id(sprint, 1)]

        await until(lambda: status() == "ERROR", 15)
        other = queue_sprint(fleet.store, 2)
        await fleet.settled(other)
        assert not (base / "executed").exists()
        assert all(name[1] == other for name in fleet.notes.ran)


def test_pickle_is_refused_in_this_process():
    engine_module._refuse_pickle()
    with pytest.raises(UnsafePayload):
        DefaultSerializer().deserialize(base64.b64encode(pickle.dumps(1)).decode())


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=()))
    | st.sampled_from(["\0", "\ud800", "a\udcffb"]),
    lambda inner: st.lists(inner, max_size=4) | st.tuples(inner, inner) | st.dictionaries(st.text(string.printable), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(st.characters(exclude_categories=()), max_size=5), json_values, max_size=4))
def test_a_step_result_equals_its_replay(value: dict):
    live = _plain(value)
    serializer = DBOSPortableJSONSerializer()
    assert serializer.deserialize(serializer.serialize(live)) == live
    assert "\0" not in json.dumps(live, ensure_ascii=False)
    assert _plain(live) == live


def test_a_large_result_equals_its_replay():
    live = _plain({"text": "x\0\ud800ä" * 250_000})
    serializer = DBOSPortableJSONSerializer()
    assert serializer.deserialize(serializer.serialize(live)) == live
    assert len(live["text"]) == 750_000


async def test_retention_deletes_only_what_is_over(database: str, base: Path):
    async with launched(database, base / "state") as fleet:
        done, running = queue_sprint(fleet.store, 1), queue_sprint(fleet.store, 2)
        await fleet.settled(done)
        await fleet.settled(running)
        fleet.notes.hold = "work"
        running = queue_sprint(fleet.store, 3)
        await fleet.running(running, "work")
        await until(lambda: _statuses(fleet, done)[workflow_id(done, 1)] == "SUCCESS")
        tomorrow = datetime.now(UTC) + timedelta(days=1)
        assert await fleet.engine.prune({"sprint:": tomorrow, "sched-": tomorrow}) == 2
        prefix = "" if fleet.store.sqlite else "dbos."

        def left(conn: sa.Connection) -> dict[str, int]:
            tables = [name for name in sa.inspect(conn).get_table_names(schema=prefix.rstrip(".") or None) if _has(conn, prefix, name)]
            counts = {
                name: conn.execute(
                    sa.text(f"SELECT count(*) FROM {prefix}{name} WHERE workflow_uuid=:w"), {"w": workflow_id(done, 1)}
                ).scalar()
                for name in tables
            }
            assert {"workflow_status", "operation_outputs"} <= set(counts)
            return {name: count for name, count in counts.items() if count}

        assert fleet.store.read_sync(left) == {}
        assert _statuses(fleet, running) == {workflow_id(running, 1): "PENDING"}
        fleet.notes.go.set()
        await fleet.settled(running)
        assert fleet.store.read_sync(lambda conn: sprints.get(conn, done)) is not None


def _has(conn: sa.Connection, prefix: str, name: str) -> bool:
    return any(column["name"] == "workflow_uuid" for column in sa.inspect(conn).get_columns(name, schema=prefix.rstrip(".") or None))


def _statuses(fleet, sprint: str) -> dict[str, str]:
    return fleet.store.read_sync(lambda conn: fleet.engine.statuses(conn, [workflow_id(sprint, 1)]))


async def test_retention_keeps_open_deliveries(database: str, base: Path):
    async with launched(database, base / "state") as fleet:

        def fill(conn: sa.Connection) -> int:
            for name in ("open", "done", "dead"):
                deliveries.add(conn, digest=name, event_type="issues", delivery=name, body=b"{}", now_ms=1)
            deliveries.done(conn, "done", 2)
            deliveries.dead(conn, "dead", error="no", now_ms=2)
            return deliveries.prune(conn, done_before_ms=3, dead_before_ms=1)

        assert fleet.store.write_sync(fill) == 1
        left = fleet.store.read_sync(lambda conn: set(conn.execute(sa.select(deliveries.table.c.hash)).scalars()))
        assert left == {"open", "dead"}


def test_the_private_names_of_dbos_that_we_use():
    """To be looked at anew at every bump of dbos: engine.py leans on these."""
    from dbos._recovery import recover_pending_workflows
    from dbos._schemas.system_database import SystemSchema

    assert dbos.__version__.startswith("3.4.") if hasattr(dbos, "__version__") else True
    assert list(inspect.signature(DBOS._recover_pending_workflows).parameters) == ["executor_ids"]
    assert "reenqueue_for_recovery" in inspect.getsource(__import__("dbos._recovery", fromlist=["_recover_workflow"])._recover_workflow)
    assert list(inspect.signature(recover_pending_workflows).parameters) == ["dbos", "executor_ids"]
    assert list(inspect.signature(DefaultSerializer.deserialize).parameters) == ["self", "serialized_data"]
    columns = set(SystemSchema.workflow_status.c.keys())
    assert {"workflow_uuid", "status", "executor_id", "application_version", "queue_name", "serialization", "inputs"} <= columns
    assert SystemSchema.workflow_status.name == "workflow_status"
    assert VERSION == "sprint-1"
