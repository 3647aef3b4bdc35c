"""The wall: what runs inside reaches nothing, takes no more than its bounds, and is dead when it should be."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import secrets
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bot.config import SandboxSettings
from bot.sandbox import Bind, PathRefused, SandboxUnavailable, WorkspaceFiles, build, seccomp, sweep
from bot.sandbox.kill import start_time
from bot.sandbox.launch import Bubblewrap, remedy
from bot.sandbox.limits import measure
from bot.sandbox.probes import probe_sandbox
from bot.sandbox.process import Output
from tests.sandbox_support import gone, make_workspace, processes_with, python_path, require_sandbox, state_folder

LEVELS = [pytest.param("bubblewrap", marks=pytest.mark.sandbox), "none"]


class Box:
    """A sandbox with its workspace."""

    def __init__(self, base: Path, kind: str, **settings) -> None:
        self.base = base
        self.settings = SandboxSettings(kind=kind, **settings)
        self.sandbox = build(self.settings, state_dir=base)
        self.work = make_workspace(base, self.sandbox, secrets.token_hex(4))

    async def run(self, command: str, **more):
        return await self.sandbox.run(command, workspace=self.work, **more)


@pytest.fixture
def base():
    with state_folder() as folder:
        yield folder


@pytest.fixture(params=LEVELS)
async def box(request, base):
    if request.param == "bubblewrap":
        require_sandbox()
    found = Box(base, request.param)
    yield found
    await found.sandbox.close()


@pytest.fixture
async def walled(base):
    require_sandbox()
    found = Box(base, "bubblewrap")
    yield found
    await found.sandbox.close()


async def test_runs_and_reports(box):
    done = await box.run("echo out; echo err >&2; pwd; exit 7")
    where = "/workspace" if box.sandbox.level == "bubblewrap" else str(box.work)
    assert (done.exit_code, done.output, done.killed, done.ok) == (7, f"out\nerr\n{where}\n", "", False)
    assert (await box.run("kill -9 $$")).exit_code == 137
    assert (await box.run("cat | wc -c; wc -c < /dev/stdin", stdin=b"x" * 300_000)).output == "300000\n0\n"
    assert (await box.run("echo a > /dev/stderr; echo b > /dev/stdout; echo c >> /proc/self/fd/2")).output == "a\nb\nc\n"
    assert (await box.run("cat", stdin=b"in")).output == "in"
    assert (await box.run("true", stdin=b"x" * 300_000)).ok
    assert (await box.run("read x; echo end=$?")).output == "end=1\n"
    assert (await box.run("echo a\0b")).exit_code == 126
    assert (await box.run("printf '\\xff\\xfe'")).output == "\ufffd\ufffd"
    for command in ("exit 0; " + "#" * 200_000, "echo \ud800"):
        assert (await box.run(command)).exit_code == 126
    assert (await box.run("exit 3; " + "#" * 130_000)).exit_code == 3


async def test_clean_environment_and_identity(box):
    os.environ["TIMMY_CANARY"] = "c" * 32
    try:
        seen = await box.run("env; id -u; echo x > mine; grep NoNewPrivs /proc/self/status")
    finally:
        del os.environ["TIMMY_CANARY"]
    names = {line.partition("=")[0] for line in seen.output.splitlines() if "=" in line}
    assert names <= {
        "PATH",
        "HOME",
        "LANG",
        "TERM",
        "USER",
        "GIT_TERMINAL_PROMPT",
        "CI",
        "PWD",
        "SHLVL",
        "_",
        "GIT_CONFIG_GLOBAL",
        "GIT_CONFIG_NOSYSTEM",
    }
    assert "NoNewPrivs:\t1" in seen.output
    owner = (box.work / "mine").stat().st_uid
    assert owner == (box.settings.user if os.getuid() == 0 else os.getuid())
    assert owner != 0


@pytest.mark.parametrize(
    "command", ["sleep 30", "exec >&- 2>&-; sleep 30", "kill -STOP $$", "trap '' TERM; sleep 30", "setsid sleep 30 & wait"]
)
async def test_timeout(box, command):
    began = time.monotonic()
    done = await box.run(command, timeout=0.3)
    assert (done.exit_code, done.timed_out, done.killed) == (None, True, "timeout")
    assert time.monotonic() - began < 1.5


async def test_output_flood_is_cut_and_killed(box):
    done = await box.run("echo first; yes")
    assert (done.killed, done.exit_code) == ("output", None)
    assert done.output.startswith("first\n")
    assert f"[... {done.omitted_bytes} bytes left out ...]" in done.output
    assert len(done.output) < 33_000
    assert 8_000_000 < done.omitted_bytes < 12_000_000
    calm = await box.run("seq 20000")
    assert (calm.exit_code, calm.killed) == (0, "")
    assert calm.output.startswith("1\n2\n")
    assert calm.output.endswith("20000\n")


def test_output_keeps_head_and_tail():
    hits = []
    output = Output(keep=10, limit=1000, on_limit=lambda: hits.append(1))
    for i in range(300):
        output.feed(f"{i:04d}".encode())
    assert (
        output.text()
        == "0000000100\n[... 1180 bytes left out ...]\n9802980299"[:11] + f"[... {output.omitted} bytes left out ...]\n" + "9702980299"
    )
    assert hits == [1]
    short = Output(keep=10, limit=1000, on_limit=lambda: None)
    short.feed(b"0123456789abcde")
    assert (short.text(), short.omitted) == ("0123456789abcde", 0)


async def test_fork_bomb_stays_within_its_limit_and_the_next_command_runs(base):
    require_sandbox()
    box = Box(base, "bubblewrap", processes=64)
    task = asyncio.ensure_future(box.run("bomb() { bomb | bomb & }; bomb; sleep 5", timeout=0.8))
    most = 0
    while not task.done():
        most = max(most, len(processes_with("bomb() { bomb")))
        await asyncio.sleep(0.05)
    assert (await task).killed == "timeout"
    assert 10 < most <= 64 + 8
    assert await gone("bomb() { bomb")
    assert (await box.run("echo fine")).output == "fine\n"


@pytest.mark.parametrize(
    ("command", "word"),
    [
        ("for i in 1 2 3 4 5 6 7 8; do head -c 4000000 /dev/zero > f$i; done; sleep 5", "bytes"),
        ("for i in $(seq 400); do : > f$i; done; sleep 5", "files"),
        ("for i in $(seq 140); do mkdir d; cd d; done; sleep 5", "deeper"),
        ("mkdir shut; echo x > shut/x; chmod 300 shut; sleep 5", "cannot be read"),
    ],
)
async def test_workspace_bounds(base, command, word):
    if word == "cannot be read" and os.getuid() == 0:
        pytest.skip("root reads any folder, so nothing can hide there")
    box = Box(base, "none", workspace_bytes=20_000_000, workspace_inodes=300)
    began = time.monotonic()
    done = await box.run(command)
    assert (done.killed, done.exit_code) == ("disk", None)
    assert word in done.output
    assert time.monotonic() - began < 4
    # commands that end before the first look are seen as well, as soon as a look costs little of the time passed
    assert (await box.run("true", watch=False)).ok
    assert "disk" in [(await box.run("true")).killed for _ in range(30)]
    await box.sandbox.close()


async def test_memory_and_file_limits(base):
    require_sandbox()
    box = Box(base, "bubblewrap", file_bytes=1_000_900, memory_bytes=300_000_000, tmp_bytes=2_000_000)
    # a limit on files is kept in blocks of 512 bytes, rounded down
    assert (await box.run("head -c 3000000 /dev/zero > f; stat -c %s f")).output.endswith("1000448\n")
    assert "No space left" in (await box.run("for i in 1 2 3 4; do head -c 900000 /dev/zero > /tmp/f$i; done")).output
    assert not (await box.run("perl -e '$x = \"a\" x 900000000'")).ok
    held = await box.run(
        "for d in /dev/shm /run /home/agent; do for i in $(seq 400); do head -c 999999 /dev/zero > $d/$i || break; done 2>/dev/null; du -sm $d; done"
    )
    sizes = {line.split()[1]: int(line.split()[0]) for line in held.output.splitlines()}
    assert sizes["/dev/shm"] <= 65
    assert sizes["/run"] <= 2
    assert sizes["/home/agent"] <= 257
    held_open = await box.run("exec 9> gone; rm gone; head -c 3000000 /dev/zero >&9; stat -L -c %s /proc/self/fd/9")
    assert held_open.output.endswith("1000448\n")
    limits = await box.run(
        "for kind in S H; do ulimit -$kind -c; ulimit -$kind -t; ulimit -$kind -n; ulimit -$kind -v; ulimit -$kind -u; done"
    )
    assert limits.output.split() == ["0", "300", "1024", str(300_000_000 // 1024), "256"] * 2


def test_measure(base):
    assert measure(base).inodes == 0
    for i in range(300):
        (base / f"d{i}" / "e").mkdir(parents=True)
        (base / f"d{i}" / "e" / "f").write_bytes(b"x" * 5000)
    (base / "up").symlink_to("/usr")
    found = measure(base)
    assert (found.inodes, found.fault) == (901, "")
    assert 300 * 8192 <= found.bytes < 300 * 30_000
    assert measure(base, max_inodes=10).inodes == 11
    assert measure(base, max_bytes=10_000).bytes > 10_000
    assert measure(base / "missing").fault


async def test_nothing_is_left_after_a_normal_end(box):
    word = str(secrets.randbelow(10**8) + 10**8)
    began = time.monotonic()
    done = await box.run(
        f"(setsid sleep {word} &) ; nohup sleep {word} & (setsid setsid sleep {word} >/dev/null 2>&1 &); disown; echo started"
    )
    assert done.exit_code == 0, done
    assert time.monotonic() - began < 1.5
    assert not processes_with(word)


@pytest.mark.parametrize("delay", [0.0, 0.002, 0.005, 0.01, 0.02, 0.3])
async def test_cancellation_kills_the_tree(box, delay):
    word = str(secrets.randbelow(10**8) + 10**8)
    task = asyncio.ensure_future(box.run(f"(setsid sleep {word} &); (setsid setsid nohup sleep {word} & ) ; trap '' TERM; sleep {word}"))
    await asyncio.sleep(delay)
    began = time.monotonic()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert time.monotonic() - began < 2
    assert await gone(word, 1.0)


async def test_close_kills_what_runs(box):
    word = str(secrets.randbelow(10**8) + 10**8)
    task = asyncio.ensure_future(box.run(f"(setsid sleep {word} &); sleep {word}"))
    while not processes_with(f"sleep\0{word}"):
        await asyncio.sleep(0.02)
    await box.sandbox.close()
    assert (await asyncio.wait_for(task, 2)).exit_code == 137
    assert await gone(word, 1.0)


async def test_many_at_once(box):
    results = await asyncio.gather(*(box.run(f"sleep 0.1; echo {i}") for i in range(12)))
    assert [r.output for r in results] == [f"{i}\n" for i in range(12)]
    assert len(os.listdir("/proc/self/fd")) < 60  # noqa: PTH208


async def test_descriptors_do_not_leak(box):
    await box.run("true")
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(5):
        await box.run("true", stdin=b"x")
        await box.run("sleep 5", timeout=0.05)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


ODD = [
    "true",
    "exit 7",
    "echo one\necho two; false",
    "cat <<'END'\n a\\tb  āă€\u0081\u0088 \\\n\n'quoted' \"$HOME\" `x`\nEND\n\n",
    "printf '%s|' $# \"$0\" $LINENO $SHLVL; env | sort; pwd; ulimit -a; ls -l /proc/self/fd | wc -l",
    "echo $((1 +)) ",
    "cat; read x; echo end=$?",
    "x() { echo f; }; x\n# " + "ü" * 1000,
    "exit 3; " + "#" * 100_000,
]


@pytest.mark.parametrize("stdin", [None, b"in\nput"], ids=["empty", "given"])
async def test_one_started_ahead_is_like_any_other(walled, stdin):
    """The same words give the same result, whether the sandbox waited for them or not; each takes one command."""
    mark = f"timmy-sandbox:{os.getpid()}:"
    for command in ODD:
        cold = await walled.run(command, stdin=stdin)
        walled.sandbox.expect(walled.work)
        walled.sandbox.expect(walled.work)
        await until_waiting(mark)
        assert await walled.run(command, stdin=stdin) == cold, command
    walled.sandbox.dismiss(walled.work)
    assert not processes_with(mark)


async def test_one_started_ahead_is_gone_when_nobody_wants_it(walled):
    mark = f"timmy-sandbox:{os.getpid()}:"
    descriptors = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for delay in (0.0, 0.004, 0.01):
        walled.sandbox.expect(walled.work)
        await asyncio.sleep(delay)
        walled.sandbox.dismiss(walled.work)
        walled.sandbox.dismiss(walled.work)
        assert await gone(mark, 2.0)
    walled.sandbox.expect(walled.work)
    # Another view of the machine is another sandbox.
    await until_waiting(mark)
    shown = walled.base / "shown"
    shown.mkdir(mode=0o755)
    (shown / "file").write_text("shown\n")
    seen = await walled.run("cat /shown/file", binds=[Bind(shown, "/shown")])
    assert seen.output == "shown\n"
    # One that died meanwhile has run nothing, so that the command runs in a new one.
    for pid in processes_with(mark):
        # the end of one ends the others
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert await gone(mark, 2.0)
    # A process that ends loses its name a moment before its files.
    await asyncio.sleep(0.1)
    assert (await walled.run("echo x >> ran; cat ran")).output == "x\n"
    walled.sandbox.expect(walled.work)
    await walled.sandbox.close()
    assert await gone(mark, 2.0)
    assert len(os.listdir("/proc/self/fd")) == descriptors  # noqa: PTH208


async def test_nothing_of_a_command_meets_the_next(walled):
    """The one that waits has its own processes, its own scratch and its own limits, whatever runs beside it."""
    walled.sandbox.expect(walled.work)
    await until_waiting(f"timmy-sandbox:{os.getpid()}:")
    ahead = asyncio.ensure_future(walled.run("sleep 0.3; ls -A /tmp /dev/shm /home/agent /run; set -- /proc/[0-9]*; echo $#"))
    await asyncio.sleep(0)
    walled.sandbox.expect(walled.work)
    word = str(secrets.randbelow(10**8) + 10**8)
    await walled.run(f"echo x > /tmp/x; echo x > /dev/shm/x; echo x > ~/x; kill -9 -1; setsid sleep {word} & exit")
    assert (await ahead).output.split() == ["/dev/shm:", "/home/agent:", "/run:", "/tmp:", "2"]
    assert await gone(word, 1.0)


async def until_waiting(mark: str) -> None:
    """Until a sandbox of this process sits there with nothing to do: its two bubblewraps and the shell that reads."""
    while len(processes_with(mark)) < 3:
        await asyncio.sleep(0.01)


PARENT = """
import asyncio, sys
from pathlib import Path
from bot.config import SandboxSettings
from bot.sandbox import build
async def main(kind, base, work, word):
    sandbox = build(SandboxSettings(kind=kind), state_dir=Path(base))
    print("go", flush=True)
    if word.startswith("-"):
        sandbox.expect(Path(work))
        await asyncio.sleep(60)
    await sandbox.run(f"(setsid sleep {word} &); sleep {word}", workspace=Path(work))
asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.parametrize("ahead", [False, True], ids=["running", "waiting"])
@pytest.mark.parametrize("delay", [0.0, 0.006, 0.012, 0.3])
async def test_sigkill_of_the_service_leaves_nothing(box, delay, ahead):
    word = "-" if ahead else str(secrets.randbelow(10**8) + 10**8)
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        PARENT,
        box.settings.kind,
        str(box.base),
        str(box.work),
        word,
        env=python_path(),
        stdout=asyncio.subprocess.PIPE,
    )
    assert await child.stdout.readline() == b"go\n"
    await asyncio.sleep(delay)
    child.kill()
    await child.wait()
    assert await gone(f"timmy-sandbox:{child.pid}:" if ahead else word)


async def test_sweep_kills_orphans_of_dead_services_only():
    dead = subprocess.Popen(["true"])
    dead.wait()
    orphan = subprocess.Popen(["sleep", "77"], executable="/bin/sleep")
    orphan.kill()
    orphan.wait()
    living = f"timmy-sandbox:{os.getpid()}:{start_time(os.getpid())}"
    marks = {
        "orphan": f"timmy-sandbox:{dead.pid}:12345",
        "neighbour": living,
        "foreign": "timmy-sandboxes",
        "reborn": f"timmy-sandbox:{os.getpid()}:1",
    }
    started = {name: subprocess.Popen([mark, "77"], executable="/bin/sleep") for name, mark in marks.items()}
    try:
        await asyncio.sleep(0.1)
        assert sweep() >= 2
        await asyncio.sleep(0.1)
        assert {name: process.poll() for name, process in started.items()} == {
            "orphan": -signal.SIGKILL,
            "neighbour": None,
            "foreign": None,
            "reborn": -signal.SIGKILL,
        }
    finally:
        for process in started.values():
            process.kill()
            process.wait()


@pytest.mark.sandbox
async def test_probes_pass(base):
    require_sandbox()
    probes = await probe_sandbox(SandboxSettings(), state_dir=base)
    assert [(probe.name, probe.ok, probe.detail) for probe in probes if not probe.ok] == []
    assert [probe.name for probe in probes] == ["bwrap", "identity", "secrets", "view", "network", "kernel", "bounds", "death"]
    assert list(base.iterdir()) == []
    began = time.monotonic()
    assert all(probe.ok for probe in await probe_sandbox(SandboxSettings(), state_dir=base, quick=True))
    assert time.monotonic() - began < 3


async def test_probe_of_no_sandbox_fails(base):
    (probe,) = await probe_sandbox(SandboxSettings(kind="none"), state_dir=base)
    assert not probe.ok
    assert "nothing keeps the model" in probe.detail


@pytest.mark.sandbox
async def test_no_secret_is_reachable(walled, tmp_path):
    canary = "canary" + secrets.token_hex(16)
    file = tmp_path / "secret"
    file.write_text(canary)
    beside = walled.base / "token"
    beside.write_text(canary)
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        PARENT.replace(
            'f"(setsid sleep {word} &); sleep {word}"',
            "'env; cat /proc/*/environ /proc/*/mem /proc/*/maps 2>/dev/null | head -c 1000000; "
            'for f in /proc/*/fd/*; do [ -f $f ] && cat $f; done; ls /proc/*/fd; find / -xdev -type f -size -9 -path "*secret*" 2>/dev/null; '
            "grep -rl canary /workspace /etc /tmp /run /home /var /dev/shm 2>/dev/null; cat /proc/1/environ | wc -c' if word else ''",
        )
        .replace("await sandbox.run", "r = await sandbox.run")
        .replace("asyncio.run(main", f"keep = open({str(file)!r}); keep.fileno()\nasyncio.run(main")
        .replace("workspace=Path(work))", "workspace=Path(work)); print(r.output)"),
        "bubblewrap",
        str(walled.base),
        str(walled.work),
        "x",
        env={**python_path(), "GITEA_TOKEN": canary},
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await child.communicate()
    assert child.returncode == 0
    assert canary.encode() not in out
    assert out.decode().strip().endswith("0")


@pytest.mark.sandbox
async def test_no_network(walled):
    name = f"timmy-{secrets.token_hex(6)}"
    heard = []

    async def greet(_, writer):
        heard.append(1)
        writer.close()

    server = await asyncio.start_server(greet, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    with socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind("\0" + name)
        abstract.listen()
        code = f"""
import socket
def t(label, family, address, kind=socket.SOCK_STREAM):
    try:
        s = socket.socket(family, kind); s.settimeout(1); s.connect(address); s.send(b"x"); print(label, "REACHED")
    except OSError as e: print(label, e.errno)
t("loopback", socket.AF_INET, ("127.0.0.1", {port}))
t("six", socket.AF_INET6, ("::1", {port}))
t("raw", socket.AF_INET, ("1.1.1.1", 53))
t("udp", socket.AF_INET, ("8.8.8.8", 53), socket.SOCK_DGRAM)
t("abstract", socket.AF_UNIX, "\\0{name}")
t("vsock", 40, (2, 22))
t("packet", 17, ("lo", 0), socket.SOCK_RAW)
try: socket.getaddrinfo("example.com", 80); print("dns REACHED")
except OSError as e: print("dns", e.errno)
print(socket.gethostbyname("localhost"), socket.if_nameindex())
"""
        (walled.base / "probe.py").write_text(code)
        done = await walled.run("python3 -I -S /probe.py", binds=(Bind(_readable(walled.base / "probe.py"), "/probe.py"),))
    server.close()
    assert "REACHED" not in done.output
    words = dict(line.split() for line in done.output.splitlines()[:7])
    assert words["vsock"] == str(errno.EAFNOSUPPORT)
    assert words["packet"] == str(errno.EAFNOSUPPORT)
    assert words["abstract"] == str(errno.ECONNREFUSED)
    assert done.output.splitlines()[-1] == "127.0.0.1 [(1, 'lo')]"
    assert heard == []


def _readable(path: Path) -> Path:
    path.chmod(0o644)
    return path


@pytest.mark.sandbox
async def test_ordinary_work_still_works(walled):
    script = r"""
    set -e
    whoami; hostname; git init -q r; cd r; echo x > x; git add x; git commit -qm x; git log --format=%an
    python3 -c 'import threading, multiprocessing, socket, subprocess, tempfile, pty
t = threading.Thread(target=lambda: None); t.start(); t.join()
p = multiprocessing.Process(target=print, args=("forked",)); p.start(); p.join()
a, b = socket.socketpair(); s = socket.create_server(("127.0.0.1", 0)); c = socket.create_connection(s.getsockname())
pty.openpty(); tempfile.mkdtemp(); print(subprocess.check_output(["id", "-un"]).decode().strip())'
    echo > /dev/null; [ -w /tmp ]; [ -w ~ ]; [ -w /dev/shm ]; touch /var/tmp/x
    """
    done = await walled.run(script)
    assert (done.exit_code, done.output) == (0, "agent\nsprint\nagent\nforked\nagent\n")


@pytest.mark.sandbox
async def test_broken_bubblewrap_is_refused_with_a_remedy(base, monkeypatch):
    require_sandbox()
    missing = Bubblewrap(SandboxSettings(), bwrap="/nonexistent/bwrap")
    with pytest.raises(SandboxUnavailable, match="apt install bubblewrap"):
        missing.check()
    fake = base / "bwrap"
    fake.write_text("#!/bin/sh\necho --args\n")
    fake.chmod(0o755)
    with pytest.raises(SandboxUnavailable, match=r"too old(.|\n)*0\.8"):
        Bubblewrap(SandboxSettings(), bwrap=str(fake)).check()
    fake.chmod(0o4755)
    with pytest.raises(SandboxUnavailable, match="setuid"):
        Bubblewrap(SandboxSettings(), bwrap=str(fake)).check()
    fake.write_text(
        "#!/bin/sh\n[ \"$1\" = --help ] && exec /usr/bin/bwrap --help\necho 'bwrap: setting up uid map: Permission denied' >&2; exit 1\n"
    )
    fake.chmod(0o755)
    broken = Bubblewrap(SandboxSettings(), bwrap=str(fake))
    with pytest.raises(SandboxUnavailable, match="AppArmor"):
        broken.check()
    with pytest.raises(SandboxUnavailable, match="uid map"):
        await broken.run("true", workspace=base)
    with pytest.raises(SandboxUnavailable, match="read_only_paths"):
        Bubblewrap(SandboxSettings(read_only_paths=(Path("/nonexistent"),))).check()
    assert "network" in remedy("bwrap: loopback: Failed RTM_NEWADDR: Operation not permitted")


@pytest.mark.sandbox
async def test_missing_workspace_is_reported(walled):
    with pytest.raises(SandboxUnavailable, match="source path"):
        await walled.sandbox.run("true", workspace=walled.base / "missing")


def interpret(program: bytes, nr: int, arch: int, args=(0,) * 6) -> int:
    """Runs a classic BPF program on one system call."""
    data = struct.pack("=iIQ6Q", nr if nr < 2**31 else nr - 2**32, arch, 0, *args)
    at, register = 0, 0
    while True:
        code, true, false, k = struct.unpack_from("=HBBI", program, at * 8)
        at += 1
        if code == 0x20:
            (register,) = struct.unpack_from("=I", data, k)
        elif code == 0x06:
            return k
        else:
            hit = {0x15: register == k, 0x35: register >= k, 0x45: bool(register & k)}[code]
            at += true if hit else false


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_filter(machine):
    program = seccomp.program(machine)
    arch = seccomp.AUDIT_ARCHITECTURE[machine]
    number = lambda name: seccomp.number(name, machine)  # noqa: E731
    assert len(program) // 8 < 200
    for name in seccomp.DENIED:
        if number(name) is not None:
            assert interpret(program, number(name), arch) == seccomp.ERRNO | errno.EPERM, name
    assert interpret(program, number("clone3"), arch) == seccomp.ERRNO | errno.ENOSYS
    assert interpret(program, number("clone"), arch, (0x10000000, 0, 0, 0, 0, 0)) == seccomp.ERRNO | errno.EPERM
    assert interpret(program, number("clone"), arch, (0x01200011, 0, 0, 0, 0, 0)) == seccomp.ALLOW
    for request in (0x5412, 0x541C):
        assert interpret(program, number("ioctl"), arch, (0, request, 0, 0, 0, 0)) == seccomp.ERRNO | errno.EPERM
    assert interpret(program, number("ioctl"), arch, (0, 0x5413, 0, 0, 0, 0)) == seccomp.ALLOW
    for call in ("socket", "socketpair"):
        for family in range(50):
            wanted = seccomp.ALLOW if family in {1, 2, 10, 16} else seccomp.ERRNO | errno.EAFNOSUPPORT
            assert interpret(program, number(call), arch, (family, 0, 0, 0, 0, 0)) == wanted
    denied = {number(name) for name in (*seccomp.DENIED, "clone3", "socket", "socketpair")}
    for nr in range(500):
        if nr not in denied:
            assert interpret(program, nr, arch) == seccomp.ALLOW, nr
    assert interpret(program, 1, 0x40000003) == seccomp.KILL_PROCESS
    if machine == "x86_64":
        assert interpret(program, 0x40000000 + 101, arch) == seccomp.KILL_PROCESS


def test_unknown_machine_has_no_sandbox():
    with pytest.raises(SandboxUnavailable):
        seccomp.program("riscv64")


@pytest.fixture
def tree(base):
    work = base / "work"
    (work / "src").mkdir(parents=True)
    (work / "src/a.txt").write_text("hello\n")
    (base / "outside").write_text("secret")
    if os.getuid() == 0:
        for path in (work, work / "src", work / "src/a.txt"):
            os.chown(path, 61184, 61184)
    return work


def test_files(tree):
    files = WorkspaceFiles(tree)
    assert files.read("src/a.txt", 100) == b"hello\n"
    assert files.read("/workspace/src/a.txt", 100) == b"hello\n"
    assert files.read(f"{tree}/src/a.txt", 6) == b"hello\n"
    assert files.read("src/../src/a.txt", 100) == b"hello\n"
    with pytest.raises(PathRefused, match="6 bytes"):
        files.read("src/a.txt", 5)
    (tree / "src/a.txt").chmod(0o755)
    files.write("src/a.txt", b"new")
    assert (tree / "src/a.txt").stat().st_mode & 0o777 == 0o755
    files.write("deep/er/still/b", b"x" * 3_000_000)
    assert (tree / "deep/er/still/b").stat().st_size == 3_000_000
    owner = tree.stat().st_uid
    assert {path.stat().st_uid for path in (tree / "deep", tree / "deep/er", tree / "deep/er/still/b")} == {owner}
    assert (tree / "deep/er").stat().st_mode & 0o777 == 0o755
    assert files.exists("deep/er")
    assert files.exists(".")
    assert not files.exists("deep/no")
    assert not files.exists("src/a.txt/x")
    (tree / "link").symlink_to("/etc")
    assert files.exists("link")
    (tree / ".git/x").mkdir(parents=True)
    listed = files.list(".", 9, 100)
    assert [(e.path, e.kind, e.size) for e in listed] == [
        (".git", "directory", 0),
        ("deep", "directory", 0),
        ("deep/er", "directory", 0),
        ("deep/er/still", "directory", 0),
        ("deep/er/still/b", "file", 3_000_000),
        ("link", "symlink", 0),
        ("src", "directory", 0),
        ("src/a.txt", "file", 3),
    ]
    assert [e.path for e in files.list("src", 1, 100)] == ["src/a.txt"]
    assert len(files.list(".", 9, 3)) == 3
    assert [e.path for e in files.list(".", 1, 100)] == [".git", "deep", "link", "src"]
    assert not list(tree.rglob("*.tmp"))


def test_files_refuse_every_way_out(tree, base):
    files = WorkspaceFiles(tree)
    outside = base / "outside"
    (tree / "out").symlink_to(outside)
    (tree / "dir").symlink_to(base)
    (tree / "inside").symlink_to("src/a.txt")
    (tree / "environ").symlink_to("/proc/self/environ")
    (tree / "hard").hardlink_to(outside)
    os.mkfifo(tree / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tree / "sock"))
        attempts = [
            "../outside",
            "src/../../outside",
            "..",
            str(outside),
            "/etc/passwd",
            "/proc/self/environ",
            f"/workspace/../{base.name}/outside",
            "out",
            "dir/outside",
            "inside",
            "environ",
            "hard",
            "pipe",
            "sock",
            "src",
            "",
            "a\0b",
            "x" * 5000,
            "src/a.txt/x",
        ]
        for path in attempts:
            with pytest.raises(PathRefused):
                files.read(path, 10_000)
            if path != "x" * 5000:
                with pytest.raises(PathRefused):
                    files.write(path, b"owned")
        for path in ("missing", "missing/x"):
            with pytest.raises(PathRefused, match="does not exist"):
                files.read(path, 10)
        for path in ("dir", "..", "/etc", "src/a.txt"):
            with pytest.raises(PathRefused):
                files.list(path, 2, 10)
        for path in ("src/", "dir/new", "../new", "src/.."):
            with pytest.raises(PathRefused):
                files.write(path, b"x")
    assert outside.read_text() == "secret"
    assert sorted(path.name for path in base.iterdir()) == ["outside", "work"]
    if os.getuid() != 0:
        (tree / "src/a.txt").chmod(0)
        with pytest.raises(PathRefused, match="mode"):
            files.read("src/a.txt", 10)


def test_file_tool_cannot_read_a_service_that_is_not_dumpable(base):
    code = "import ctypes, time; ctypes.CDLL(None).prctl(4, 0); print('go', flush=True); time.sleep(20)"
    user = 61184 if os.getuid() == 0 else None
    service = subprocess.Popen(["/usr/bin/python3", "-I", "-S", "-c", code], stdout=subprocess.PIPE, user=user, cwd="/", env={"TOKEN": "x"})
    try:
        service.stdout.readline()
        tried = subprocess.run(["cat", f"/proc/{service.pid}/environ"], capture_output=True, user=user, cwd="/", check=False)
        assert b"Permission denied" in tried.stderr
    finally:
        service.kill()
        service.wait()
        service.stdout.close()
