"""What the watchdog does about a webhook that vanished and about workers that are lost: only where told to, once, and as a decision."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from fleet_support import queue_sprint
from postgres_support import BACKENDS
from test_launcher import cli
from test_watchdog import Room
from world import FORGES, make_world, until

from bot.fleet.hooks import arrivals
from bot.fleet.probes import MendError, webhook, worker
from bot.fleet.retention import prune_rows
from bot.models import SprintState
from bot.settings import RetentionSettings
from bot.snapshot import WorkerBeat, WorkerState
from bot.store import cursors, deliveries, intents, sprints, workers
from bot.store._base import database_now_ms

NOW = 1_800_000_000_000
HOUR = 3_600_000


# ------------------------------------------------------------------ webhooks


@pytest.mark.parametrize("where", FORGES)
async def test_a_webhook_that_vanished_is_made_again_where_the_policy_says_so(base: Path, where: str):
    changes: dict[str, Any] = {
        "watchdog": {"policy": {"webhook": "act"}, "every_seconds": {"webhook": 0.3}, "webhook_silent_minutes": 60, "backoff_minutes": 0.01}
    }
    async with make_world(base, live=where == "live", **changes) as world:
        await world.store.write(lambda conn: cursors.put(conn, cursors.LAST_DELIVERY, int(time.time() * 1000)))

        async def hooks() -> list[Any]:
            return await world.timmy.forge.hooks(world.stage.repo)

        async def known() -> Any:
            return await world.store.read(lambda conn: cursors.get(conn, cursors.OWN_HOOKS))

        await until(known)
        (first,) = await hooks()
        await world.timmy.forge.delete_hook(world.stage.repo, first["id"])

        async def again() -> Any:
            made = await hooks()
            return made and made[0]["id"] != first["id"]

        await until(again)

        async def told() -> Any:
            c = intents.decisions.c
            statement = sa.select(c.result, c.reason).where(c.kind == "watchdog webhook")
            return [row for row in await world.store.read(lambda conn: conn.execute(statement).all()) if row.result == "ok"]

        ((_, reason),) = await until(told)
        assert "has vanished" in reason
        assert "the webhook was made again. Now: " in reason
        issue = await world.alice.open_issue("after it", "hello")
        await world.alice.comment(issue, "/dispatch status")

        async def heard() -> Any:
            rows = await world.store.read(lambda conn: deliveries.newest(conn, limit=20))
            return arrivals(rows).get(world.stage.repo.casefold())

        await until(heard)
        assert len(await hooks()) == 1


async def test_what_is_amiss_with_a_hook_and_what_is_left_to_people(base: Path):
    async with make_world(base, watchdog={"enabled": False}) as world:
        reach = world.service.watchdog.reach
        forge, repo = world.timmy.forge, world.stage.repo
        (hook,) = world.forge.state.hooks.values()
        await world.store.write(lambda conn: cursors.put(conn, cursors.LAST_DELIVERY, int(time.time() * 1000)))
        assert [one.target for one in await webhook.look(reach)] == [webhook.TARGET]

        await forge.update_hook(repo, hook.id, hook.url, ["push"])
        (_, cut) = await webhook.look(reach)
        assert (cut.verdict, cut.mendable, "issue_comment" in cut.reason) == ("warn", True, True)
        assert await webhook.mend(reach, cut) == "the webhook sends everything again"
        assert len(await webhook.look(reach)) == 1

        hook.active = False
        (_, off) = await webhook.look(reach)
        assert (off.verdict, off.mendable, off.repo_id) == ("failing", False, world.stage.repo_id)
        hook.active = True

        await forge.delete_hook(repo, hook.id)
        (_, gone) = await webhook.look(reach)
        assert (gone.verdict, gone.mendable) == ("failing", True)
        with pytest.raises(MendError, match="does not know"):
            await webhook.mend(replace(reach, webhook_secret=None), gone)
        # Deliveries that come all the same are those of another hook: nothing is amiss any more, also after a silence.
        body = json.dumps({"repository": {"full_name": repo.upper()}}).encode()
        later = int(time.time() * 1000) + webhook.LATE_MS + 60_000
        await world.store.write(lambda conn: deliveries.add(conn, digest="d", event_type="issues", delivery="d", body=body, now_ms=later))
        assert [one.target for one in await webhook.look(reach)] == [webhook.TARGET]
        quiet = reach.settings.watchdog.model_copy(update={"webhook_silent_minutes": 0.00001})
        silent = replace(reach, settings=reach.settings.model_copy(update={"watchdog": quiet}), now_ms=lambda: later + HOUR)
        await world.store.write(lambda conn: cursors.put(conn, cursors.LAST_DELIVERY, later))
        (unknown,) = await webhook.look(silent)
        assert (unknown.verdict, "of its owner or the server" in unknown.reason) == ("unknown", True)

        # The terminal may wish it, with the hook that this very configuration names.
        made = await forge.create_hook(repo, hook.url, world.stage.webhook_secret, ["push"])
        assert [one.verdict for one in await webhook.look(reach)] == ["ok", "warn"]
        await world.store.write(lambda conn: cursors.put(conn, cursors.LAST_DELIVERY, int(time.time() * 1000)))
        code, said = await cli(world, "watchdog", "--once", "--fix", "webhook")
        assert code == 0, said
        assert [one.id for one in world.forge.state.hooks.values()] == [made["id"]]
        assert len(await webhook.look(reach)) == 1


def test_arrivals_take_the_newest_of_each_repository_and_no_nonsense():
    rows = [
        (9, b'{"repository": {"full_name": "Acme/Rocket"}}'),
        (8, b"not json"),
        (7, b"[]"),
        (6, b'{"repository": {"full_name": "acme/rocket"}}'),
        (5, b'{"repository": null}'),
    ]
    assert arrivals(rows) == {"acme/rocket": 9, "none": 5}


# ------------------------------------------------------------------ workers


@pytest.fixture
def room(base: Path, database: str) -> Iterator[Room]:
    made = Room(base, database)
    try:
        yield made
    finally:
        made.store.close()


@pytest.mark.parametrize(
    ("silent", "running", "verdict", "mendable"),
    [(60, 1, "warn", False), (130, 0, "failing", False), (130, 1, "failing", True), (3700, 0, "failing", True)],
)
def test_when_an_action_helps_a_lost_worker(silent: int, running: int, verdict: str, mendable: bool):
    beat = WorkerBeat("n-0", WorkerState.LOST, NOW - silent * 1000, slots=1, running=running)
    found = worker.judge(beat, NOW, 120.0)
    assert (found.verdict, found.mendable) == (verdict, mendable)


@pytest.mark.parametrize("database", BACKENDS, indirect=True)
async def test_a_worker_that_is_gone_is_waited_for_no_more(room: Room):
    store = room.store
    entry = {"host": "h", "pid": 1, "app_version": "v", "capacity": 2}

    def enter(conn: Any) -> None:
        for executor, node in (("dead-1", "dead"), ("live-1", "live")):
            workers.enter(conn, executor_id=executor, node_id=node, slot=0, **entry)
        conn.execute(workers.table.update().where(workers.table.c.executor_id == "dead-1").values(beat_ms=database_now_ms(conn) - 2 * HOUR))

    store.write_sync(enter)
    held = queue_sprint(store, 1)

    def run(conn: Any) -> None:
        conn.execute(sprints.table.update().where(sprints.c.id == held).values(state=SprintState.WORKING, executor_id="dead-1"))

    store.write_sync(run)
    dog = room.dog({"worker": worker.plugin}, policy={"worker": "act"})
    room.now = int(time.time() * 1000)
    await dog.once(["worker"], fix=False, by="")
    assert [row.executor_id for row in store.read_sync(workers.every)] == ["live-1"]
    assert store.read_sync(lambda conn: workers.without_lease(conn, ["dead-1", "live-1"])) == {"dead-1"}, (
        "the leader takes over what it had"
    )
    assert store.read_sync(lambda conn: sprints.field(conn, held, "crashes")).crashes == 1
    assert not store.write_sync(lambda conn: workers.beat(conn, "dead-1")), "if it lives after all it ends"
    ((_, result, reason, _),) = await room.decisions("watchdog worker")
    assert (result, "what it held is taken over (1)" in reason) == ("ok", True)
    assert (await room.states())["worker"].verdict == "ok"

    # One that lives again meanwhile is left alone.
    (alive,) = [one for one in await worker.look(dog.reach) if one.target == "live-0"]
    with pytest.raises(MendError, match="lives again"):
        await worker.mend(dog.reach, alive)
    assert [row.executor_id for row in store.read_sync(workers.every)] == ["live-1"]


@pytest.mark.parametrize("database", BACKENDS, indirect=True)
def test_retention_forgets_a_silent_worker_that_nobody_reaped(room: Room):
    entry = {"node_id": "n", "host": "h", "pid": 1, "app_version": "v", "capacity": 1}

    def enter(conn: Any) -> int:
        now = database_now_ms(conn)
        for slot, age in enumerate((0, 23 * HOUR, 25 * HOUR)):
            workers.enter(conn, executor_id=f"n-{slot}", slot=slot, **entry)
            conn.execute(workers.table.update().where(workers.table.c.slot == slot).values(beat_ms=now - age))
        return now

    now = room.store.write_sync(enter)
    room.store.write_sync(lambda conn: prune_rows(conn, RetentionSettings(), now))
    assert sorted(row.executor_id for row in room.store.read_sync(workers.every)) == ["n-0", "n-1"]
