"""Live proofs that the sandbox holds on this machine, each with what was seen and how to mend it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from bot.config import SandboxSettings
from bot.sandbox import seccomp
from bot.sandbox.contract import Sandbox, SandboxUnavailable
from bot.sandbox.launch import Bubblewrap, remedy

_MODULE = "bot.sandbox.probes"
_OUTSIDE = 30.0


@dataclass(frozen=True, slots=True)
class Probe:
    """One proof: `name` is also a metric label; `remedy` is empty when it passed."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class _Check:
    """What a probe does; `quick` ones together take under three seconds, so that every start can run them."""

    name: str
    quick: bool
    run: Callable[[Bubblewrap, SandboxSettings, Path], Awaitable[str]]
    remedy: str


class _Fault(Exception):
    """A probe saw something that must not be."""


async def probe_sandbox(settings: SandboxSettings, *, state_dir: Path, quick: bool = False) -> list[Probe]:
    """Runs the probes in order, the slow ones only without `quick`; a broken bubblewrap ends the list. For `kind: none` the list is one warning.

    Needs no running service; makes a scratch folder below `state_dir`, whose parents must let the sandbox user through, and removes it.
    """
    if settings.kind == "none":
        return [
            Probe(
                "bwrap",
                ok=False,
                detail="`sandbox: none` is set: nothing keeps the model from this machine",
                remedy="Set `sandbox.kind: bubblewrap`.",
            )
        ]
    results: list[Probe] = []
    try:
        sandbox = Bubblewrap(settings)
        sandbox.check()
    except SandboxUnavailable as error:
        return [Probe("bwrap", ok=False, detail=error.detail, remedy=error.remedy)]
    results.append(Probe("bwrap", ok=True, detail="starts and makes its namespaces"))
    async with _scratch(sandbox, state_dir) as workspace:
        for check in _CHECKS:
            if quick and not check.quick:
                continue
            try:
                results.append(Probe(check.name, ok=True, detail=await check.run(sandbox, settings, workspace)))
            except _Fault as fault:
                results.append(Probe(check.name, ok=False, detail=str(fault), remedy=check.remedy))
            except (SandboxUnavailable, OSError) as error:
                results.append(Probe(check.name, ok=False, detail=str(error), remedy=remedy(str(error))))
    await sandbox.close()
    return results


@asynccontextmanager
async def _scratch(sandbox: Sandbox, state_dir: Path) -> AsyncIterator[Path]:
    """A workspace for the probes; what they leave in it is flat and removed."""
    workspace = _make_scratch(sandbox, state_dir)
    try:
        yield workspace
    finally:
        with contextlib.suppress(SandboxUnavailable):
            await sandbox.run("find . -mindepth 1 -delete", workspace=workspace, watch=False)
        _remove_scratch(workspace)


def _make_scratch(sandbox: Sandbox, state_dir: Path) -> Path:
    outer = Path(tempfile.mkdtemp(prefix="probe-", dir=state_dir))
    outer.chmod(0o711)
    workspace = outer / "work"
    workspace.mkdir(mode=0o700)
    if sandbox.owner is not None:
        os.chown(workspace, sandbox.owner, sandbox.owner)
    return workspace


def _remove_scratch(workspace: Path) -> None:
    with contextlib.suppress(OSError):
        workspace.rmdir()
        workspace.parent.rmdir()


async def _inside(sandbox: Bubblewrap, workspace: Path, script: str, **more: float) -> str:
    result = await sandbox.run(script, workspace=workspace, timeout=more.get("timeout", _OUTSIDE))
    if result.killed:
        raise _Fault(f"the probe was killed: {result.killed}")
    return result.output


async def _identity(sandbox: Bubblewrap, _: SandboxSettings, workspace: Path) -> str:
    script = 'while read -r key value rest; do case "$key" in Uid:|CapEff:|CapBnd:|NoNewPrivs:|Seccomp:) echo "$key$value";; esac; done < /proc/self/status'
    seen = dict(line.split(":", 1) for line in (await _inside(sandbox, workspace, script)).split())
    wanted = {"Uid": "1000", "CapEff": "0" * 16, "CapBnd": "0" * 16, "NoNewPrivs": "1", "Seccomp": "2"}
    wrong = {key: seen.get(key) for key, value in wanted.items() if seen.get(key) != value}
    if wrong:
        raise _Fault(f"inside it is {wrong}, not { ({key: wanted[key] for key in wrong}) }")
    file = workspace / "identity"
    await _inside(sandbox, workspace, "echo x > identity")
    owner = file.stat().st_uid
    if owner == 0:
        raise _Fault("what the sandbox writes belongs to root: its real uid is 0")
    return f"real uid {owner}, inside 1000, no capabilities, no new privileges, filtered calls"


async def _secrets(sandbox: Bubblewrap, _: SandboxSettings, workspace: Path) -> str:
    canary = secrets.token_hex(16)
    folder = workspace.parent / "canary"
    folder.mkdir(mode=0o700)
    file = folder / "secret"
    file.write_text(canary)
    # inheritable on purpose: a sandbox that hands descriptors through shows it
    read, write = os.pipe()
    os.set_inheritable(read, True)
    os.write(write, canary.encode())
    os.environ["TIMMY_PROBE_CANARY"] = canary
    script = f"""
    env; cat /proc/*/environ 2>/dev/null | tr '\\0' '\\n'; cat {file} 2>/dev/null
    for fd in /proc/*/fd/*; do case "$(readlink $fd)" in pipe:*|/dev/*) ;; *) timeout 1 head -c 4096 $fd 2>/dev/null;; esac; done
    [ "$(head -c 1 /proc/1/environ 2>/dev/null | wc -c)" = 0 ] || echo LAUNCHER-ENVIRONMENT
    echo done
    """
    try:
        output = await _inside(sandbox, workspace, script)
        holders = await _inside(sandbox, workspace, "set -- /proc/$$/fd/*; echo $#")
    finally:
        os.environ.pop("TIMMY_PROBE_CANARY", None)
        os.close(read)
        os.close(write)
        file.unlink()
        folder.rmdir()
    if canary in output:
        raise _Fault("a canary of the service's environment, files or descriptors was found inside")
    if "LAUNCHER-ENVIRONMENT" in output:
        raise _Fault("/proc/1/environ is not empty inside")
    if "done" not in output:
        raise _Fault(f"the probe did not finish: {output[-200:]}")
    if int(holders or 0) > 4:  # noqa: PLR2004  stdin, stdout, stderr and the folder the shell lists
        raise _Fault(f"a command inside holds {holders.strip()} open descriptors")
    return "canaries in environment, file and open descriptor not found inside"


async def _view(sandbox: Bubblewrap, _: SandboxSettings, workspace: Path) -> str:
    script = """
    set -- /proc/[0-9]*; echo "pids $#"
    for path in /root /etc/shadow /sys /opt /srv /mnt /boot /etc/ssh; do [ -e $path ] && echo "sees $path"; done
    for path in /home/*; do [ $path = /home/agent ] || echo "sees $path"; done
    for path in / /usr /etc /dev /proc/sys/kernel /home /var; do ( : > $path/.probe ) 2>/dev/null && echo "writes $path"; done
    while read -r _ point kind options _; do case "$kind,$options" in tmpfs,*rw,*|tmpfs,rw*) case "$options" in *size=*) ;; *) echo "unsized $point";; esac;; esac
    done < /proc/mounts
    """
    lines = (await _inside(sandbox, workspace, script)).splitlines()
    pids = next((int(line.split()[1]) for line in lines if line.startswith("pids ")), 0)
    bad = [line for line in lines if line.startswith(("sees ", "writes ", "unsized "))]
    if bad or not 0 < pids < 10:  # noqa: PLR2004  the bound of the doctor's table
        raise _Fault("; ".join(bad) or f"{pids} processes are visible")
    return f"{pids} processes visible, an allow-listed read-only root"


async def _network(sandbox: Bubblewrap, _: SandboxSettings, workspace: Path) -> str:
    name = f"timmy-probe-{secrets.token_hex(8)}"
    with socket.socket(socket.AF_INET) as listener, socket.socket(socket.AF_UNIX) as abstract:
        listener.bind(("127.0.0.1", 0))
        listener.listen(8)
        abstract.bind("\0" + name)
        abstract.listen(8)
        port = listener.getsockname()[1]
        language = await _language(sandbox, workspace)
        script = f"""
        (exec 3<>/dev/tcp/127.0.0.1/{port}) 2>/dev/null && echo "reaches loopback"
        (exec 3<>/dev/tcp/1.1.1.1/53) 2>/dev/null && echo "reaches 1.1.1.1"
        (exec 3<>/dev/udp/8.8.8.8/53) 2>/dev/null && echo "reaches 8.8.8.8"
        (exec 3<>/dev/tcp/example.com/80) 2>/dev/null && echo "resolves names"
        while read -r line; do case "$line" in *lo:*|Inter-*|*face*) ;; *) echo "has $line";; esac; done < /proc/net/dev
        {_socket_test(language, name)}
        """
        lines = (await _inside(sandbox, workspace, script)).splitlines()
    bad = [line for line in lines if line.startswith(("reaches ", "resolves ", "has "))]
    if bad:
        raise _Fault("; ".join(bad))
    return "host loopback, abstract sockets, raw addresses, names and VSOCK are out of reach"


async def _language(sandbox: Bubblewrap, workspace: Path) -> str:
    found = await _inside(sandbox, workspace, "command -v python3 || command -v perl || true")
    return Path(found.strip().splitlines()[-1]).name if found.strip() else ""


def _socket_test(language: str, name: str) -> str:
    if language == "python3":
        code = (
            "import socket\n"
            "def t(label, f, a):\n"
            " try:\n  s = socket.socket(f); s.settimeout(1); s.connect(a); print('reaches', label)\n"
            " except (OSError, AttributeError): pass\n"
            f"t('abstract', socket.AF_UNIX, '\\0{name}')\n"
            "t('vsock', getattr(socket, 'AF_VSOCK', 40), (2, 22))\n"
        )
        return f"python3 -I -S -c {_quote(code)}"
    if language == "perl":
        return (
            'perl -MSocket -e \'socket(my $s, 40, 1, 0) and print "reaches vsock\\n"; '
            f'socket(my $u, AF_UNIX, SOCK_STREAM, 0); connect($u, pack_sockaddr_un("\\0{name}")) and print "reaches abstract\\n"\''
        )
    return ":"


def _quote(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


async def _kernel(sandbox: Bubblewrap, _: SandboxSettings, workspace: Path) -> str:
    names = [name for name in seccomp.DENIED if seccomp.number(name) is not None]
    table = " ".join(f"{name} {seccomp.number(name)}" for name in names)
    clone3, clone = seccomp.number("clone3"), seccomp.number("clone")
    language = await _language(sandbox, workspace)
    if language == "python3":
        code = (
            "import ctypes\nc = ctypes.CDLL(None, use_errno=True)\n"
            "def t(n, *a):\n ctypes.set_errno(0); r = c.syscall(ctypes.c_long(n), *map(ctypes.c_long, a)); return ctypes.get_errno() if r == -1 else 0\n"
            f"w = {table!r}.split()\n"
            "for k, n in zip(w[::2], w[1::2]): print(k, t(int(n), 0, 0, 0, 0, 0))\n"
            f"print('clone3', t({clone3}, 0, 0))\nprint('userns', t({clone}, 0x10000000, 0, 0, 0, 0))\n"
        )
        output = await _inside(sandbox, workspace, f"python3 -I -S -c {_quote(code)}")
    elif language == "perl":
        code = (
            f"my @w = qw({table}); while (@w) {{ my $k = shift @w; my $n = shift @w; $! = 0; syscall($n+0,0,0,0,0,0); print $k, ' ', $!+0, qq(\\n); }}"
            f" $! = 0; syscall({clone3},0,0); print 'clone3 ', $!+0, qq(\\n); $! = 0; syscall({clone},0x10000000,0,0,0,0); print 'userns ', $!+0, qq(\\n);"
        )
        output = await _inside(sandbox, workspace, f"perl -e {_quote(code)}")
    else:
        return "not tried: neither python3 nor perl inside"
    seen = {words[0]: int(words[1]) for line in output.splitlines() if len(words := line.split()) == 2 and words[1].isdigit()}  # noqa: PLR2004
    wanted = {**dict.fromkeys(names, errno.EPERM), "clone3": errno.ENOSYS, "userns": errno.EPERM}
    wrong = [f"{name} gave {seen.get(name, 'nothing')}" for name, code_wanted in wanted.items() if seen.get(name) != code_wanted]
    if wrong:
        raise _Fault(", ".join(wrong[:5]))
    return f"{len(wanted)} system calls refused, nested user namespaces among them"


async def _bounds(sandbox: Bubblewrap, settings: SandboxSettings, workspace: Path) -> str:
    # dash gives up at the first refused fork, where bash would wait and retry for 15 s; counting uses builtins only
    burst = f"i=0; while [ $i -lt {settings.processes + 200} ]; do sleep 20 & i=$((i+1)); done"
    forks = await _inside(sandbox, workspace, f"/bin/sh -c '{burst}' 2>/dev/null; set -- /proc/[0-9]*; echo pids $#")
    counted = [int(line.split()[1]) for line in forks.splitlines() if line.startswith("pids ")]
    if counted and counted[-1] > settings.processes + 4:
        raise _Fault(f"{counted[-1]} processes ran, {settings.processes} are allowed")
    filled = await _inside(sandbox, workspace, "head -c 80000000 /dev/zero > /dev/shm/f; stat -c 'size %s' /dev/shm/f; rm -f /dev/shm/f")
    size = next((int(line.split()[1]) for line in filled.splitlines() if line.startswith("size ")), 0)
    if size >= 80_000_000:  # noqa: PLR2004  what was written
        raise _Fault("a tmpfs took more than its size")
    flood = await sandbox.run("exec yes", workspace=workspace, timeout=_OUTSIDE)
    if flood.killed != "output":
        raise _Fault("a flood of output was not stopped")
    slow = await sandbox.run("exec >&- 2>&-; sleep 20", workspace=workspace, timeout=0.3)
    if not slow.timed_out:
        raise _Fault("a command that closed its output outlived its time")
    return "forks, tmpfs, output and time are bounded; no cgroup is used (give the unit MemoryMax and TasksMax)"


async def _death(_: Bubblewrap, settings: SandboxSettings, workspace: Path) -> str:
    for delay in (0.0, 0.004, 0.008, 0.012, 0.02, 0.3):
        word = f"{secrets.randbelow(10**8) + 10**8}"
        order = json.dumps({"settings": settings.model_dump(mode="json"), "workspace": str(workspace), "word": word})
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",
            "-m",
            _MODULE,
            env={"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        if child.stdin is None or child.stdout is None:
            raise _Fault("the stand-in service has no pipes")
        child.stdin.write(order.encode() + b"\n")
        await child.stdin.drain()
        if not await child.stdout.readline():
            raise _Fault("the stand-in service did not start")
        await asyncio.sleep(delay)
        child.send_signal(signal.SIGKILL)
        await child.wait()
        child.stdin.close()
        if not await _gone(word):
            raise _Fault(f"a sandbox outlived its service, killed {delay * 1000:.0f} ms after it began to start")
    return "six killed services left no process behind"


async def _gone(word: str) -> bool:
    for _ in range(100):
        if not _runs(word.encode()):
            return True
        await asyncio.sleep(0.02)
    return False


def _runs(word: bytes) -> bool:
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and word in (entry / "cmdline").read_bytes():
                return True
    return False


_CHECKS = (
    _Check("identity", True, _identity, "Update bubblewrap and the kernel; never run the sandbox user as uid 0."),
    _Check("secrets", True, _secrets, "Do not start sprints on this machine: report this with the versions of bubblewrap and the kernel."),
    _Check("view", True, _view, "Check `sandbox.read_only_paths`: nothing under /home, /root or /etc belongs there."),
    _Check("network", True, _network, "Do not start sprints on this machine: the kernel does not separate the network."),
    _Check("kernel", True, _kernel, "The kernel was built without seccomp filters: use one that has CONFIG_SECCOMP_FILTER."),
    _Check("bounds", False, _bounds, "Check that `prlimit` works and that the limits in `sandbox` are what you want."),
    _Check("death", False, _death, "Do not start sprints on this machine: a killed service would leave commands running."),
)


async def _parent() -> None:
    """The service that the probe `death` kills: says that it starts, then runs a command for ever."""
    order = json.loads(sys.stdin.readline())
    sandbox = Bubblewrap(SandboxSettings.model_validate(order["settings"]))
    print("starting", flush=True)  # noqa: T201  the probe waits for this line
    await sandbox.run(f"(setsid sleep {order['word']} &); sleep {order['word']}", workspace=Path(order["workspace"]))


if __name__ == "__main__":
    asyncio.run(_parent())
