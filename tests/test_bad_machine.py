"""The machine itself is bad: crowds at the door, a full disk, killed helpers, damaged files, a database that is not there; what is said, and what goes on."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import aiohttp
import pytest
import sqlalchemy as sa
import structlog
from aiohttp import web
from postgres_support import PostgresServer, require
from served import ROOT, ServedWorld
from talk import issue_with, one_of_each, state_is
from world import World, make_world, until

from bot.config import UnfitError, _long_enough
from bot.lease import node_name
from bot.listeners import CannotListen, Door
from bot.logs import LINES_A_MINUTE, MINUTE, Calm, configure
from bot.redaction import Redactor, Secret
from bot.rooms import EX_TEMPFAIL
from bot.sandbox import CommandResult
from bot.sprint._stage import _scarce
from bot.store import explain, may_come_back, watched
from bot.workspace import GitFailed, GitKilled, GitUnavailable, TreeRefused
from bot.workspace.hostgit import HostGit, classify

HALF = b"POST /webhook HTTP/1.1\r\nHost: x\r\nX-Slow: "


# the door


async def test_a_crowd_that_says_nothing_keeps_nobody_out():
    """Half a header for ever, many times over: whoever comes with a whole request is served, also on a connection that was there before."""

    async def hello(_request: web.Request) -> web.Response:
        return web.Response(text="hello")

    app = web.Application()
    app.router.add_get("/", hello)
    door = Door(app, most=8, access_log=None, keepalive_timeout=75.0)
    port = await door.open("127.0.0.1", 0)
    url = f"http://127.0.0.1:{port}/"
    crowd = []
    try:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1)) as regular:
            for round_ in range(6):
                async with regular.get(url) as reply:
                    assert await reply.text() == "hello", round_
                for _ in range(20):
                    reader, writer = await asyncio.open_connection("127.0.0.1", port)
                    writer.write(HALF)
                    crowd.append((reader, writer))
                await until(lambda: len(door._runner.server.connections) <= 2 * 8)
            async with regular.get(url) as reply:
                assert reply.status == 200
        over = [reader for reader, _ in crowd if reader.at_eof() or reader.exception()]
        assert len(over) >= len(crowd) - 2 * 8
        assert len(door._answered) <= 3 * 8
    finally:
        for _, writer in crowd:
            writer.close()
        await door.close()


async def test_an_address_that_is_taken_is_told():
    app = web.Application()
    first = Door(app, access_log=None)
    port = await first.open("127.0.0.1", 0)
    second = Door(web.Application(), access_log=None)
    try:
        with pytest.raises(CannotListen, match=f"127.0.0.1:{port}: Address already in use. Remedy: "):
            await second.open("127.0.0.1", port)
    finally:
        await second.close()
        await first.close()


# the log


def record(name: str, level: int, said: object) -> logging.LogRecord:
    return logging.LogRecord(name, level, "", 0, said, None, None)


def test_a_trouble_that_lasts_is_told_and_not_poured_out():
    clock = [0.0]
    calm = Calm(now=lambda: clock[0])
    trace = "Traceback (most recent call last):\n  File x\nsa.exc.OperationalError: (psycopg) gone\n(Background on this error at: x)"

    def tell(level: int = logging.ERROR, event: str = "leader.round", exception: str = trace) -> dict[str, object] | None:
        line = record("bot.leader", level, {"event": event, "exception": exception})
        told = calm.filter(line)
        assert calm.filter(line) is told, "a second handler is told the same"
        return line.msg if told else None

    shown = [tell() for _ in range(100)]
    assert shown[0] == {"event": "leader.round", "exception": trace}
    assert shown[1] == {"event": "leader.round", "error": "sa.exc.OperationalError: (psycopg) gone"}
    assert sum(line is not None for line in shown) == LINES_A_MINUTE
    other = tell(exception="Traceback\nValueError: of another kind")
    assert other is None, "it is the same trouble to whoever reads"
    assert tell(event="projector.work") is not None
    assert all(tell(logging.CRITICAL) for _ in range(50))
    assert all(tell(logging.INFO) for _ in range(50))
    clock[0] += MINUTE
    assert tell() == {"event": "leader.round", "exception": trace, "left_out": 81}
    text = [record("dbos", logging.WARNING, "Exception polling: Traceback\n  File x\nError: y") for _ in range(30)]
    told = [line.msg for line in text if calm.filter(line)]
    assert (len(told), told[0].count("\n"), told[1].count("\n")) == (LINES_A_MINUTE, 2, 0)


def test_the_calm_is_in_every_log(capsys: pytest.CaptureFixture[str]):
    root = logging.getLogger()
    library = logging.getLogger("dbos")
    before, level, theirs, propagates = root.handlers[:], root.level, library.handlers[:], library.propagate
    try:
        configure(Redactor([Secret("a-secret-of-tests")]), level="INFO")
        for _ in range(200):
            try:
                raise sqlite3.OperationalError("database or disk is full")
            except sqlite3.OperationalError:
                structlog.get_logger("bot.x").exception("x.round")
    finally:
        root.handlers[:], library.handlers[:], library.propagate = before, theirs, propagates
        root.setLevel(level)
        structlog.reset_defaults()
    said = capsys.readouterr().err
    assert (said.count("x.round"), said.count("Traceback")) == (LINES_A_MINUTE, 1)


# what a step needs of the machine


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x"), "the disk is full"),
        (OSError(errno.EROFS, "Read-only file system"), "the disk cannot be written to"),
        (OSError(errno.EMFILE, "Too many open files"), "the service has too many files open"),
        (BlockingIOError(errno.EAGAIN, "fork"), "this machine starts no more processes"),
        (FileNotFoundError(errno.ENOENT, "gone"), ""),
        (ConnectionResetError(errno.ECONNRESET, "reset"), ""),
        (TreeRefused("too large"), ""),
        (ValueError("a fault of ours"), ""),
    ],
)
def test_what_the_machine_is_short_of(error: Exception, says: str):
    assert _scarce(error, lambda: "") == says
    wrapped = GitFailed("git cannot be started")
    wrapped.__cause__ = error
    assert _scarce(wrapped, lambda: "") == says


def test_a_full_disk_explains_a_failure_of_git_and_no_fault_of_ours():
    assert _scarce(GitFailed("git commit-tree: unable to write"), lambda: "the disk is full") == "the disk is full"
    assert _scarce(TreeRefused("could not be packed"), lambda: "the disk is full") == "the disk is full"
    assert _scarce(ValueError("x"), lambda: "the disk is full") == ""


def test_git_itself_says_what_the_machine_is_short_of():
    full = classify("fatal: write error: No space left on device\nfatal: index-pack failed\n")
    assert _scarce(full, lambda: "") == "the disk is full"
    assert _scarce(GitFailed("git fetch: error: cannot fork"), lambda: "") == ""
    assert _scarce(GitFailed("git commit-tree: error: unable to write file: No space left on device"), lambda: "") == "the disk is full"
    theirs = classify("remote: fatal: write error: No space left on device\nerror: failed to push some refs\n")
    assert _scarce(theirs, lambda: "") == ""
    assert isinstance(theirs, GitUnavailable), "the forge's disk is full: it is asked again"
    assert _scarce(TreeRefused("fatal: No space left on device"), lambda: "") == "", "words of the sandbox are the agent's"


async def test_git_that_is_killed_is_no_refusal(base: Path):
    """By the kernel for want of memory, say: git itself, or the helper of its that speaks to the forge."""
    assert isinstance(classify("error: git-remote-http died of signal 9\n"), type(classify("Connection refused")))
    killed = base / "git"
    killed.write_text("#!/bin/sh\nkill -9 $$\n")
    killed.chmod(0o700)
    git = HostGit(forge_url="http://127.0.0.1:1", login="timmy", token=Secret("a-token-of-tests"), ca_file=None, askpass=base / ".askpass")
    git._git = str(killed)
    for call in (git.ok(base, "status"), git.network(base, "fetch")):
        with pytest.raises(GitKilled, match="signal 9"):
            await call


async def test_a_sprint_outlives_a_killed_checkout_and_push_and_a_full_disk(world: World):
    """They are nothing of the sprint: it waits, says why, and is published with the tree it has; no model is asked again."""
    issue = await issue_with(world)
    git, commit = world.service.workspaces._git, world.service.workspaces.commit
    mark, real = world.state_dir / "killed-once", git._git
    script = world.state_dir / "git"
    script.write_text(f'#!/bin/sh\nif [ "$1" = push ] && [ ! -e {mark} ]; then : > {mark}; kill -9 $$; fi\nexec {real} "$@"\n')
    script.chmod(0o700)
    git._git = str(script)
    inside, died = world.service.workspaces._inside, []

    async def dies_once(*args: object, **options: object) -> CommandResult:
        if died:
            return await inside(*args, **options)
        died.append(args)
        return CommandResult(128 + signal.SIGKILL, "", timed_out=False, omitted_bytes=0, killed="")

    world.service.workspaces._inside = dies_once
    await world.alice.label(issue, "dispatch")
    sprint = await one_of_each(world, issue)
    assert mark.exists()
    assert died
    assert (sprint.attempt, sprint.outcome) == (1, "pull_request")
    asked = len(world.model.requests)

    async def full(*_args: object, **_options: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    other = await issue_with(world, title="a full disk")
    world.service.workspaces.commit = full
    await world.alice.label(other, "dispatch")
    await until(lambda: len(world.model.requests) > asked)
    await state_is(world, other, "queued")
    await until(lambda: _says(world, other, "the disk is full"))
    asked = len(world.model.requests)
    world.service.workspaces.commit = commit
    await world.store.write(lambda conn: conn.exec_driver_sql("update sprints set not_before_ms = 0 where state = 'queued'"))
    sprint = await one_of_each(world, other)
    assert (sprint.attempt, len(world.model.requests)) == (1, asked)


async def _says(world: World, issue: int, words: str) -> bool:
    return words in await world.status_comment(issue)


# what a start finds


@pytest.mark.parametrize(
    "content", [b"", b"\n", os.urandom(3) + b"\xff", b"x" * 500, b"a b\n"], ids=["empty", "newline", "binary", "long", "blank"]
)
def test_a_damaged_name_of_the_folder_is_made_anew(tmp_path: Path, content: bytes):
    (tmp_path / "node").write_bytes(content)
    name = node_name(tmp_path)
    assert (len(name), name) == (8, node_name(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["node"]


def config_with(folder: Path, **settings: object) -> Path:
    lines = ["forge: {url: 'http://127.0.0.1:1', token_file: token}", "webhook: {secret_files: [secret], listen: '127.0.0.1:0'}"]
    lines += ["repositories: [{name: a/b}]", "providers: [{base_url: 'http://127.0.0.1:1/v1', model: m, key_file: token}]"]
    for name in ("token", "secret"):
        (folder / name).write_text("long-enough-secret")
        (folder / name).chmod(0o600)
    lines += [f"{key}: {value}" for key, value in settings.items()]
    path = folder / "dispatch.yml"
    path.write_text("\n".join(lines) + "\n")
    path.chmod(0o600)
    return path


@pytest.mark.parametrize("damage", ["garbage", "cut", "folder"])
def test_a_damaged_database_is_told_in_a_sentence(base: Path, damage: str):
    state = base / "state"
    state.mkdir(mode=0o711)
    path = config_with(base, state_dir=state)
    if damage == "folder":
        (state / "timmy.db").mkdir()
    else:
        with sqlite3.connect(state / "timmy.db") as conn:
            conn.execute("create table x (y)")
        conn.close()
        data = (state / "timmy.db").read_bytes()
        (state / "timmy.db").write_bytes(os.urandom(4096) if damage == "garbage" else data[:50])
    # In a process of its own: `serve` sets up logging and hardens the process it is in.
    command = [sys.executable, "-P", "-m", "bot", "--config", str(path), "serve"]
    done = subprocess.run(
        command, cwd=ROOT, env={"PATH": os.environ["PATH"], "HOME": str(base)}, capture_output=True, text=True, timeout=120
    )
    said = done.stderr
    assert done.returncode == 1, said
    assert "Traceback" not in said
    assert "Remedy: " in said.splitlines()[-1]
    assert ("is damaged" in said) == (damage != "folder"), said


def test_errors_of_databases_in_words():
    gone = sa.exc.OperationalError("s", {}, Exception('connection to server at "db" failed: Connection refused\n\tIs it running?'))
    assert explain(gone).startswith('the database cannot be used: connection to server at "db" failed: Connection refused. Remedy: ')
    assert explain(ValueError("x")) == ""
    assert may_come_back(gone)
    assert not may_come_back(sa.exc.OperationalError("s", {}, Exception('FATAL:  database "x" does not exist')))
    assert may_come_back(sa.exc.OperationalError("s", {}, Exception("FATAL:  the database system is starting up")))
    assert not may_come_back(sa.exc.OperationalError("s", {}, sqlite3.OperationalError("unable to open database file")))
    assert watched("sqlite:////x") == "sqlite:////x"
    assert watched("postgresql://u:p%40@h/d?keepalives_idle=3").startswith("postgresql://u:p%40@h/d?keepalives_count=4&keepalives_idle=3&")


def test_a_secret_with_a_line_break_is_a_fault_of_the_configuration():
    with pytest.raises(UnfitError, match="control character"):
        _long_enough("a-long-enough\nsecret", "token")


@pytest.mark.postgres
async def test_a_server_that_starts_after_us_is_waited_for(base: Path):
    require()
    server = PostgresServer()
    try:
        server.start()
        database, timing = server.database(), {"shutdown_seconds": 0.5}
        await asyncio.to_thread(server.stop)
        async with make_world(base, kind=ServedWorld, start=False, database=database, timing=timing) as world:
            process = await world.serve()
            await until(lambda: (world.state_dir.parent / "serve.log").exists() and "service.database_away" in world.log())
            assert process.returncode is None
            await asyncio.to_thread(server.start)
            await world.listening()
            # And one that went for good does not keep us from ending.
            await asyncio.to_thread(server.stop)
            await until(lambda: "leader.round" in world.log())
            process.terminate()
            assert await asyncio.wait_for(process.wait(), 90) in (0, EX_TEMPFAIL)
    finally:
        await asyncio.to_thread(server.remove)
