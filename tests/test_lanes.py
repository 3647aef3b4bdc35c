"""Lanes over the real tmux: what dies comes back by policy, what was stopped stays down, what is somebody else's is left alone, and nothing secret goes in."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from served import ROOT, ServedWorld
from world import make_world, until

from bot.fleet import panes
from bot.fleet._tmux import Tmux, passed_on
from bot.fleet.lanes import Lanes, LaneState, Pane, TmuxError, TmuxHung, TmuxMissing, Topology, over, topology
from bot.models import Pause, PauseScope, UserError
from bot.settings import Settings
from bot.store import Store, intents, pauses, sprints, workers
from bot.store import lanes as rows

TMUX = shutil.which("tmux")
needs_tmux = pytest.mark.skipif(TMUX is None, reason="tmux is not installed here")
PATH = {"PATH": os.environ["PATH"]}
LINE = "%3|1|4711|0|||2|1795576272|python|lane 2"


def now_ms() -> int:
    return time.time_ns() // 1_000_000


# what tmux says


def test_a_pane_is_read():
    [pane] = panes.parse(LINE)
    assert pane == Pane("%3", 1, "lane 2", 4711, False, None, "python", 1795576272, 2, None)


@pytest.mark.parametrize(
    ("line", "status", "signal_"),
    [("%1|0|7|1|2||0|5|sh|t", 2, None), ("%1|0|7|1|0||0|5|sh|t", 0, None), ("%1|0|7|1||9|0|5|sh|t", None, 9), ("%1|0|7|1|||0|5|sh|t", None, None)],
)  # fmt: skip
def test_how_it_ended_is_read(line: str, status: int | None, signal_: int | None):
    [pane] = panes.parse(line)
    assert (pane.dead, pane.dead_status, pane.dead_signal) == (True, status, signal_)


def test_a_pane_that_a_person_made_is_no_lane_and_a_title_may_say_anything():
    [pane] = panes.parse("%9|3|12|0|||||bash|what | a | title")
    assert (pane.lane, pane.started, pane.title) == (None, 0, "what | a | title")


@given(st.text(st.characters(exclude_categories=("Cs",))))
def test_no_answer_of_tmux_breaks_the_parser(text: str):
    panes.parse(text)
    panes.parse("%" + text.replace("|", "") + "|" * (len(panes.FIELDS) - 1))


def test_nothing_secret_reaches_a_lane():
    environ = {
        "PATH": "/bin", "HOME": "/h", "TIMMY_GITEA_TOKEN": "t", "OPENAI_API_KEY": "k", "AWS_SECRET": "s", "TMUX": "x", "SSH_AUTH_SOCK": "a",
        "HTTPS_PROXY": "http://u:p@proxy:3128", "http_proxy": "http://proxy:3128", "LANG": "",
    }  # fmt: skip
    assert passed_on(environ) == {"PATH": "/bin", "HOME": "/h", "http_proxy": "http://proxy:3128"}
    assert passed_on({})["PATH"]


# over the real tmux, with stand-ins for workers


class Sleepers(Lanes):
    """Its workers only wait; 0 at the first SIGTERM, as a worker that drained, or what the file `end-LANE` says at once."""

    def _command(self, row: rows.Lane) -> list[str]:
        folder = self._settings.state_dir
        script = f'[ -f {folder}/end-{row.lane} ] && exit $(cat {folder}/end-{row.lane}); trap "exit 0" TERM; while :; do sleep 0.05; done'
        return ["sh", "-c", script.replace(";", " ; ").strip()]


@pytest.fixture
def settings(base: Path) -> Settings:
    state = base / "state"
    state.mkdir()
    return Settings.model_validate(
        {
            "forge": {"url": "http://127.0.0.1:1"},
            "repositories": [{"name": "alice/slug"}],
            "state_dir": state,
            "providers": [{"base_url": "http://127.0.0.1:1/v1", "model": "m"}],
            "lanes": {"check_seconds": 0.1, "backoff_seconds": 0.001, "snapshots": 3},
        }
    )


@pytest.fixture
def make(settings: Settings) -> Iterator[Callable[..., Sleepers]]:
    """Lanes of this state folder; several stand for several processes."""
    stores: list[Store] = []

    def made(**changes: object) -> Sleepers:
        stores.append(Store(settings.database_url()))
        stores[-1].open()
        changed = settings.model_copy(update={"lanes": settings.lanes.model_copy(update=changes)})
        return Sleepers(stores[-1], changed, node_id="n1", environ=PATH, now_ms=now_ms)

    yield made
    for store in stores:
        store.close()
    with contextlib.suppress(FileNotFoundError):
        subprocess.run(argv(settings, "kill-server"), env=tmux_environ(settings), capture_output=True, check=False)


def argv(settings: Settings, *words: str) -> list[str]:
    return ["tmux", "-f", "/dev/null", "-L", settings.lanes.session, *words]


def tmux_environ(settings: Settings) -> dict[str, str]:
    return {**PATH, "TMUX_TMPDIR": str(settings.state_dir)}


def ask(settings: Settings, *words: str) -> str:
    return subprocess.run(argv(settings, *words), env=tmux_environ(settings), capture_output=True, text=True, check=True).stdout


async def ended(lanes: Lanes, number: int) -> Pane:
    """Waits until the worker of a lane is dead; returns its pane."""

    async def dead():
        found = next(one for one in await lanes.shown() if one.row.lane == number)
        return found.pane if found.pane is not None and over(found.pane) else None

    return await until(dead, 20)


async def states(lanes: Lanes) -> list[tuple[str, str]]:
    return [(one.row.wanted, str(one.state)) for one in await lanes.shown()]


RUNNING, STOPPED = ("up", "running"), ("down", "gone")


@needs_tmux
async def test_up_makes_the_panes_and_again_does_no_harm(make, settings: Settings):
    lanes = make()
    found = await lanes.up(3, config=Path("/c.yml"), by="alice")
    assert [(pane.lane, pane.title, pane.dead) for pane in found.panes] == [(n, f"lane {n}", False) for n in range(3)]
    assert all(pane.pid > 1 and abs(pane.started - time.time()) < 60 for pane in found.panes)
    again = await lanes.up(2, config=Path("/c.yml"), by="bob")
    assert [pane.pid for pane in again.panes] == [pane.pid for pane in found.panes]
    assert ask(settings, "show-options", "-wv", "-t", "=timmy-dispatch:", "remain-on-exit").strip() == "on"
    assert await topology(settings, PATH) is not None
    assert [row.by for row in lanes._store.read_sync(lambda conn: rows.of_node(conn, "n1"))] == ["alice"] * 3


@needs_tmux
async def test_what_died_comes_back_and_the_decision_is_a_row(make):
    lanes = make()
    found = await lanes.up(2, config=Path("/c.yml"), by="alice")
    os.kill(found.lane(1).pid, signal.SIGKILL)
    pane = await ended(lanes, 1)
    assert pane.dead_status is None or pane.dead_signal is None
    assert await lanes.mend() == [1]
    assert await lanes.mend() == []
    assert await states(lanes) == [RUNNING, RUNNING]
    shown = (await lanes.shown())[1]
    assert (shown.row.restarts, shown.pane.lane, shown.pane.id) == (1, 1, pane.id)
    [decision] = lanes._store.read_sync(lambda conn: intents.trail(conn, 0, 0))
    assert (decision.kind, decision.result) == ("lane", "restarted")


@needs_tmux
@pytest.mark.parametrize(
    ("policy", "code", "comes_back"),
    [("never", 1, False), ("on_failure", 1, True), ("on_failure", 2, False), ("on_failure", 75, True), ("always", 2, True), ("always", 0, False)],
)  # fmt: skip
async def test_the_policy_decides_what_comes_back(make, settings: Settings, policy: str, code: int, comes_back: bool):
    lanes = make(restart=policy)
    (settings.state_dir / "end-0").write_text(str(code))
    await lanes.up(1, config=Path("/c.yml"), by="alice")
    pane = await ended(lanes, 0)
    assert pane.dead_status == code
    (settings.state_dir / "end-0").unlink()
    assert await lanes.mend() == ([0] if comes_back else [])
    assert await lanes.mend() == []
    [shown] = await lanes.shown()
    assert (shown.state is LaneState.RUNNING) is comes_back
    if code == 0:
        assert (shown.row.wanted, shown.row.why, shown.well) == ("down", "drained", True)
    if not comes_back:
        await lanes.up(1, config=Path("/c.yml"), by="alice")
        assert await states(lanes) == [RUNNING], "a person may always"


@needs_tmux
async def test_what_was_stopped_is_never_resurrected(make, settings: Settings):
    """By `down`, by a drain in its pane, by a killed tmux in between: only `up` brings it back."""
    lanes, leader = make(), make()
    found = await lanes.up(3, config=Path("/c.yml"), by="alice")
    assert await lanes.down([0], by="alice") == ()
    os.kill(found.lane(1).pid, signal.SIGTERM)
    await ended(lanes, 1)
    assert await leader.mend() == []
    assert await states(lanes) == [STOPPED, ("down", "ended"), RUNNING]
    subprocess.run(argv(settings, "kill-server"), env=tmux_environ(settings), check=True)
    await until(lambda: _gone(settings))
    assert await leader.mend() == [2], "a killed tmux is a failure"
    assert await states(lanes) == [STOPPED, STOPPED, RUNNING]
    assert await lanes.down(by="alice") == ()
    assert await leader.mend(patient=False) == []
    assert await states(lanes) == [STOPPED] * 3
    assert await topology(settings, PATH) is None
    assert await lanes.up(1, config=Path("/c.yml"), by="alice") is not None


async def _gone(settings: Settings) -> bool:
    return await topology(settings, PATH) is None


@needs_tmux
async def test_a_lane_that_is_wanted_again_while_it_drains_comes_back(make, settings: Settings):
    lanes = make()
    await lanes.up(1, config=Path("/c.yml"), by="alice")
    lanes._store.write_sync(lambda conn: rows.unwant(conn, "n1", [0], why="lanes down", by="alice", now_ms=now_ms()))
    await asyncio.sleep(0.002)
    found = await lanes.up(1, config=Path("/c.yml"), by="alice")
    os.kill(found.lane(0).pid, signal.SIGTERM)
    await ended(lanes, 0)
    assert await lanes.mend() == [0]


@needs_tmux
async def test_nothing_is_started_while_the_fleet_is_paused(make):
    lanes = make()
    found = await lanes.up(1, config=Path("/c.yml"), by="alice")
    lanes._store.write_sync(lambda conn: pauses.put(conn, Pause(PauseScope.FLEET, 0, "", "alice", now_ms(), None, "night")))
    os.kill(found.lane(0).pid, signal.SIGKILL)
    pane = await ended(lanes, 0)
    assert (await lanes.mend(), await lanes.restart(pane)) == ([], False)
    lanes._store.write_sync(lambda conn: pauses.lift(conn, PauseScope.FLEET, 0, now_ms()))
    assert await lanes.restart(pane) is True
    assert await lanes.restart(pane) is False
    assert await states(lanes) == [RUNNING]


@needs_tmux
async def test_a_lane_that_keeps_dying_waits_longer_and_longer(make, settings: Settings):
    lanes = make(backoff_seconds=1000.0)
    (settings.state_dir / "end-0").write_text("1")
    await lanes.up(1, config=Path("/c.yml"), by="alice")
    await ended(lanes, 0)
    assert await lanes.mend() == []
    assert await lanes.mend(patient=False) == [0]
    await ended(lanes, 0)
    [row] = lanes._store.read_sync(lambda conn: rows.of_node(conn, "n1"))
    assert row.restarts == 1
    assert row.due_ms - row.started_ms == 600_000, "never more than ten minutes"


@needs_tmux
async def test_several_at_once_make_each_lane_once(make):
    lanes = [make() for _ in range(4)]
    await asyncio.gather(*(one.up(3, config=Path("/c.yml"), by="alice") for one in lanes), *(one.mend() for one in lanes))
    found = await topology(lanes[0]._settings, PATH)
    assert sorted(pane.lane for pane in found.panes) == [0, 1, 2]
    for pane in found.panes:
        os.kill(pane.pid, signal.SIGKILL)
    for number in range(3):
        await ended(lanes[0], number)
    started = await asyncio.gather(*(one.mend(patient=False) for one in lanes))
    assert sorted(number for some in started for number in some) == [0, 1, 2]


@needs_tmux
async def test_a_session_of_our_name_that_is_not_ours_is_left_alone(make, settings: Settings):
    ask(settings, "new-session", "-d", "-s", "timmy-dispatch", "sleep 60")
    lanes = make()
    found = await topology(settings, PATH)
    assert (found.ours, found.panes) == (False, ())
    for work in (lanes.up(1, config=Path("/c.yml"), by="alice"), lanes.down(by="alice"), lanes.shown()):
        with pytest.raises(TmuxError, match="did not make; it is left alone"):
            await work
    assert ask(settings, "list-panes", "-s", "-t", "timmy-dispatch", "-F", "#{pane_dead}").split() == ["0"]


@needs_tmux
async def test_somebody_elses_sessions_and_panes_stay(make, settings: Settings):
    for number in range(5):
        ask(settings, "new-session", "-d", "-s", f"timmy-dispatch-{number}", "sleep 60")
    lanes = make()
    await lanes.up(2, config=Path("/c.yml"), by="alice")
    ask(settings, "split-window", "-t", "=timmy-dispatch:", "sleep 60")
    found = await topology(settings, PATH)
    assert (len(found.panes), found.others, [pane.lane for pane in found.panes].count(None)) == (3, 5, 1)
    assert await lanes.down(by="alice") == ()
    assert len(ask(settings, "list-sessions").splitlines()) == 6
    assert [pane.lane for pane in (await topology(settings, PATH)).panes] == [None]
    await lanes.up(1, config=Path("/c.yml"), by="alice")
    assert await states(lanes) == [RUNNING, STOPPED]


@needs_tmux
async def test_a_hung_tmux_costs_a_moment_and_is_told(make, settings: Settings):
    lanes = make()
    lanes._tmux._seconds = 0.3
    await lanes.up(1, config=Path("/c.yml"), by="alice")
    server = int(ask(settings, "display-message", "-p", "#{pid}"))
    os.kill(server, signal.SIGSTOP)
    watching = asyncio.create_task(lanes.run(lambda: True))
    try:
        with pytest.raises(TmuxHung, match="did not answer"):
            await lanes.shown()
        await until(lambda: "did not answer" in lanes._trouble)
        assert not watching.done()
    finally:
        os.kill(server, signal.SIGCONT)
    await until(lambda: not lanes._trouble)
    watching.cancel()
    assert await states(lanes) == [RUNNING]


async def test_without_tmux_the_remedy_is_named_and_nothing_else_ends(make, settings: Settings):
    lanes = make()
    lanes._tmux = Tmux("timmy-dispatch", settings.state_dir, {"PATH": "/nonexistent"})
    with pytest.raises(TmuxMissing, match="apt install tmux"):
        await lanes.up(1, config=Path("/c.yml"), by="alice")
    assert lanes._store.read_sync(lambda conn: rows.of_node(conn, "n1")) == [], "nothing is wanted that cannot be"
    with pytest.raises(TmuxMissing):
        await topology(settings, {"PATH": "/nonexistent"})
    lanes._store.write_sync(lambda conn: rows.want(conn, "n1", [0], config="/c.yml", by="alice", now_ms=now_ms()))
    watching = asyncio.create_task(lanes.run(lambda: True))
    await until(lambda: "not installed" in lanes._trouble)
    assert not watching.done()
    watching.cancel()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
async def test_the_state_folder_of_another_user_is_refused(make, settings: Settings):
    lanes = make()
    os.chown(settings.state_dir, 12345, -1)
    with pytest.raises(UserError, match="belongs to user 12345"):
        await lanes.up(1, config=Path("/c.yml"), by="alice")


@needs_tmux
async def test_a_socket_that_would_be_too_long_is_refused(make, settings: Settings):
    long = settings.state_dir / ("x" * 100)
    long.mkdir()
    lanes = make()
    lanes._tmux = Tmux("timmy-dispatch", long, PATH)
    with pytest.raises(TmuxError, match="shorten"):
        await lanes.up(1, config=Path("/c.yml"), by="alice")


@needs_tmux
async def test_more_lanes_than_a_window_has_room_for_get_another(make, settings: Settings):
    ask(settings, "new-session", "-d", "-s", "other", "sleep 60")
    lanes = make()
    await lanes.up(1, config=Path("/c.yml"), by="alice")
    ask(settings, "resize-window", "-t", "=timmy-dispatch:", "-x", "10", "-y", "4")
    found = await lanes.up(4, config=Path("/c.yml"), by="alice")
    assert sorted(pane.lane for pane in found.panes) == [0, 1, 2, 3]
    assert int(ask(settings, "list-windows", "-t", "=timmy-dispatch:").count("\n")) > 1


# snapshots


def test_tmux_snapshot_py_the_topology_is_kept_private_whole_and_rotated(settings: Settings):
    found = Topology("timmy-dispatch", ours=True, panes=panes.parse(LINE), taken=1795576272000, others=2)
    written = [panes.snapshot(settings, found) for _ in range(5)]
    folder = settings.state_dir / "lanes"
    assert folder.stat().st_mode & 0o777 == 0o700
    kept = sorted(path.name for path in folder.glob("topology-*.json"))
    assert kept == [path.name for path in written[-3:]]
    for path in (*folder.iterdir(),):
        assert path.stat().st_mode & 0o777 == 0o600
    data = json.loads((folder / "topology.json").read_text())
    assert (data["version"], data["others"], data["panes"][0]["lane"], data["panes"][0]["pid"]) == (1, 2, 2, 4711)
    panes.snapshot(settings, None)
    assert json.loads((folder / "topology.json").read_text())["panes"] == []


@needs_tmux
async def test_tmux_snapshot_py_what_changes_in_the_panes_is_written_down(make, settings: Settings):
    lanes = make()
    found = await lanes.up(1, config=Path("/c.yml"), by="alice")
    watching = asyncio.create_task(lanes.run(lambda: True))

    def last() -> dict:
        return json.loads((settings.state_dir / "lanes" / "topology.json").read_text())

    try:
        os.kill(found.lane(0).pid, signal.SIGKILL)
        await until(lambda: last()["panes"] and last()["panes"][0]["pid"] != found.lane(0).pid and not last()["panes"][0]["dead"])
    finally:
        watching.cancel()


# the real thing


class Laned(ServedWorld):
    """`timmy-dispatch lanes` beside `serve`, as an operator calls it."""

    async def lanes(self, *words: str, **environ: str) -> tuple[int, str]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "bot", "--config", str(self.state_dir.parent / "config" / "dispatch.yml"), "lanes", *words),
            cwd="/",
            env={**PATH, "HOME": str(self.state_dir.parent), "PYTHONPATH": str(ROOT), "AWS_SECRET_ACCESS_KEY": "hush", **environ},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        out, _ = await asyncio.wait_for(process.communicate(), 120)
        return process.returncode or 0, out.decode()

    async def panes(self) -> list[Pane]:
        found = await topology(self.settings(), PATH)
        return [] if found is None else list(found.panes)

    async def stop(self) -> None:
        subprocess.run(argv(self.settings(), "kill-server"), env=tmux_environ(self.settings()), capture_output=True, check=False)
        await super().stop()


@pytest.fixture
async def laned(base: Path) -> AsyncIterator[Laned]:
    changes = {
        "timing": {"beat_seconds": 0.5, "lease_seconds": 6.0},
        "queue": {"slots": 1, "max_per_repository": 9},
        "lanes": {"check_seconds": 0.3, "backoff_seconds": 0.1},
    }
    async with make_world(base, kind=Laned, start=False, **changes) as made:
        made.changes["repositories"] = [{"name": made.stage.repo, "max_running": 9}]
        yield made


@needs_tmux
@pytest.mark.slow
async def test_agent_loop_sh_lanes_take_sprints_to_pull_requests(laned: Laned):
    """Two lanes and a `serve` on one SQLite file; one lane is killed in the middle and comes back; `down` drains, and nothing comes back then."""
    await laned.serve()
    await laned.listening()
    code, said = await laned.lanes("up", "2")
    assert code == 0, said
    first = await laned.panes()
    assert [pane.lane for pane in first] == [0, 1]
    shown = ask(laned.settings(), "show-environment", "-g") + ask(laned.settings(), "show-environment", "-t", "=timmy-dispatch:")
    assert "hush" not in shown
    for pane in first:
        told = Path(f"/proc/{pane.pid}/cmdline").read_bytes()
        # A worker seals itself against its own user, so that only root reads this.
        with contextlib.suppress(PermissionError):
            told += Path(f"/proc/{pane.pid}/environ").read_bytes()
        assert not [secret for secret in (laned.timmy.token, laned.stage.webhook_secret) if secret.reveal().encode() in told]
        assert b"hush" not in told

    issues = [await laned.alice.open_issue(f"slug {n}", "script: slow(0.5)") for n in range(3)]
    for issue in issues:
        await laned.alice.label(issue, "dispatch")

    async def all_at_work():
        c = sprints.table.c
        statement = sa.select(c.executor_id).where(c.executor_id.is_not(None), c.state == "working")
        return len(set(await laned.store.read(lambda conn: conn.execute(statement).scalars().all()))) == 3

    await until(all_at_work, 60)
    os.kill(first[0].pid, signal.SIGKILL)
    for issue in issues:
        assert (await laned.settled(issue, 90)).outcome == "pull_request", laned.log()[-3000:]
    pulls = await laned.pulls()
    assert sorted(pull["head"]["ref"] for pull in pulls) == sorted(f"dispatch/issue-{issue}" for issue in issues)
    for issue in issues:
        assert len(await laned.by_bot(issue)) == 1
    log = (laned.state_dir / "lanes" / "lane-1.log").read_text()
    assert (laned.state_dir / "lanes" / "lane-1.log").stat().st_mode & 0o777 == 0o600
    assert all(word in log for word in ("sprint.started", "sprint.step", "sprint.tool", "sprint.settled", "/60"))

    async def back():
        return [pane for pane in await laned.panes() if pane.lane == 0 and not pane.dead and pane.pid != first[0].pid]

    await until(back, 60)
    assert "lanes.restarted" in laned.log()
    code, said = await laned.lanes("down")
    assert (code, await laned.panes()) == (0, []), said
    held = [row for row in laned.store.read_sync(workers.every) if row.reaped_ms is None]
    assert len(held) == 1, "they left politely"
    code, said = await laned.lanes("status", "--fix", "--json")
    shown = json.loads(said)
    assert (code, [(lane["row"]["wanted"], lane["state"], lane["well"]) for lane in shown["lanes"]]) == (0, [("down", "gone", True)] * 2)
    code, said = await laned.lanes("snapshot")
    assert (code, json.loads(said[: said.rindex("}") + 1])["panes"]) == (0, [])
    assert await laned.panes() == []


@needs_tmux
async def test_secrets_of_the_environment_are_refused_with_the_remedy(laned: Laned):
    """What `serve` could read there a lane must not: a tmux server shows its environment."""
    path = laned.write_config()
    data = json.loads(path.read_text())
    token = data["forge"].pop("token_file")
    path.write_text(json.dumps(data))
    laned.store.close()
    laned._store = None
    code, said = await laned.lanes("up", TIMMY_GITEA_TOKEN=laned.timmy.token.reveal())
    assert code == 2, said
    assert "there is no token for the forge" in said
    assert "tmux shows it" in said
    assert laned.timmy.token.reveal() not in said
    assert (token, await laned.panes()) == ("token", [])


async def test_lanes_without_a_terminal_or_a_session_say_what_to_do(laned: Laned):
    laned.write_config()
    code, said = await laned.lanes("attach")
    assert code == 1
    assert "Remedy" in said
    code, said = await laned.lanes("status")
    assert code == 1
    assert "start the service once" in said
