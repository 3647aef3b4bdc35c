"""Bubblewrap as security.md describes it: an allow-listed root, no network, no environment, no rights, and a handshake before anything of the model runs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bot.config import SandboxSettings
from bot.sandbox import seccomp
from bot.sandbox.contract import Bind, CommandResult, SandboxUnavailable
from bot.sandbox.kill import Namespace, mark
from bot.sandbox.limits import PRLIMIT, Watcher, rlimits
from bot.sandbox.process import Child, PipeReader, memory_file, pipe
from bot.sandbox.run import Running, finish, unusable

BWRAP = "/usr/bin/bwrap"
START_SECONDS = 15.0
TMPFS_BYTES = {"/home/agent": 256 * 1024**2, "/run": 1024**2, "/dev/shm": 64 * 1024**2}  # noqa: S108  paths inside the sandbox
OPTIONS = (
    "--args --unshare-all --unshare-user --disable-userns --uid --gid --hostname --die-with-parent --new-session --info-fd --cap-drop --clearenv --setenv "
    "--ro-bind --ro-bind-try --ro-bind-data --bind --symlink --proc --dev --size --perms --tmpfs --dir --remount-ro --chdir --seccomp"
).split()
ETC = "ld.so.cache ld.so.conf ld.so.conf.d alternatives ssl/certs ca-certificates localtime mime.types protocols services nsswitch.conf".split()
ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin",
    "HOME": "/home/agent",
    "LANG": "C.UTF-8",
    "TERM": "dumb",
    "USER": "agent",
    "GIT_TERMINAL_PROMPT": "0",
    "CI": "1",
}
FILES = {
    "/etc/passwd": "agent:x:1000:1000:agent:/home/agent:/bin/bash\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
    "/etc/group": "agent:x:1000:\nnogroup:x:65534:\n",
    "/etc/hosts": "127.0.0.1 localhost sprint\n::1 localhost\n",
    "/etc/gitconfig": "[safe]\n\tdirectory = /repo.git\n\tdirectory = /repo.git/objects\n[user]\n\tname = agent\n\temail = agent@localhost\n"
    "[init]\n\tdefaultBranch = main\n[advice]\n\tdetachedHead = false\n",
}
_UP = b"up\n"
_HANDSHAKE = f'echo up; IFS= read -r go || exit 125; exec {PRLIMIT} "$@"'
_HANDSHAKE_NO_INPUT = f'{_HANDSHAKE} <"/dev/null"'


def remedy(detail: str) -> str:
    """What an operator can do about a message of bubblewrap."""
    if (
        "Creating new namespace failed" in detail
        or "No permissions to create" in detail
        or "setting up uid map: Permission denied" in detail
    ):
        return (
            "This machine does not let an unprivileged program make user namespaces. On Ubuntu 24.04 and later add the AppArmor profile\n"
            "  profile bwrap /usr/bin/bwrap flags=(unconfined) { userns, }\n"
            "to /etc/apparmor.d/bwrap and run `apparmor_parser -r /etc/apparmor.d/bwrap`. In a container, run it with rootless podman or with a seccomp\n"
            "profile that admits user namespaces. Elsewhere check /proc/sys/user/max_user_namespaces (0 forbids them)."
        )
    if "RTM_NEWADDR" in detail or "loopback" in detail:
        return (
            "The container forbids network namespaces of its own: run it with a profile that admits them. Never share the network instead."
        )
    if "Can't find source path" in detail and "Permission denied" in detail:
        return "Every folder above the state folder must be searchable by the sandbox user: keep it under /var/lib/timmy-dispatch, not under a home."
    if "Can't mount proc" in detail or "proc" in detail:
        return "The container masks /proc, so that no new one can be mounted: run it with unmasked /proc (`--security-opt unmask=/proc/*` with podman)."
    return "Run `timmy-dispatch doctor` for the single probes; `apt install bubblewrap` (0.8 or later) mends an old or missing one."


@dataclass(slots=True)
class _Start:
    """Descriptors handed over to one bwrap; `arguments` is the one that holds its options."""

    handed: list[int]
    arguments: int


class Bubblewrap:
    """The sandbox proper. Each command gets fresh namespaces; nothing is kept between two of them but the workspace."""

    level = "bubblewrap"

    def __init__(self, settings: SandboxSettings, *, bwrap: str = BWRAP) -> None:
        self._settings = settings
        self._bwrap = bwrap
        self._filter = seccomp.program()
        self._system = _system_arguments()
        self._running: set[Callable[[], None]] = set()
        self._watchers: dict[Path, Watcher] = {}

    @property
    def owner(self) -> int | None:
        """The uid of everything inside, seen from the host; None when the service is not root and shares its own."""
        return self._settings.user if os.getuid() == 0 else None

    def check(self) -> None:
        """Raises SandboxUnavailable when bubblewrap is missing, setuid, too old, or cannot make the namespaces. Blocks for some 30 ms."""
        for needed in (self._bwrap, PRLIMIT, "/bin/bash", "/bin/sh"):
            if not os.access(needed, os.X_OK):
                package = {self._bwrap: "bubblewrap", PRLIMIT: "util-linux"}.get(needed, "bash")
                raise SandboxUnavailable(f"{needed} is missing", f"Install it: `apt install {package}`.")
        if Path(self._bwrap).stat().st_mode & 0o6000:
            raise SandboxUnavailable(
                f"{self._bwrap} is setuid", f"Run `chmod u-s,g-s {self._bwrap}`; the kernel's user namespaces are enough."
            )
        listed = set(
            re.findall(r"--[a-z-]+", subprocess.run([self._bwrap, "--help"], capture_output=True, text=True, check=False, env={}).stdout)
        )
        missing = [option for option in OPTIONS if option not in listed]
        if missing:
            raise SandboxUnavailable(f"{self._bwrap} is too old: it lacks {' '.join(missing)}", "Install bubblewrap 0.8 or later.")
        for path in self._settings.read_only_paths:
            if not path.exists():
                raise SandboxUnavailable(
                    f"sandbox.read_only_paths: {path} does not exist", "Remove it from the configuration, or create it."
                )
        start = self._open(None, (), info=None)
        try:
            tried = subprocess.run(
                [mark(), "--args", str(start.arguments), "--", "/bin/true"],
                executable=self._bwrap,
                env={},
                cwd="/",
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=START_SECONDS,
                check=False,
                pass_fds=start.handed,
                user=self.owner,
                group=self.owner,
                extra_groups=None if self.owner is None else [],
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise SandboxUnavailable(f"{self._bwrap} cannot be started: {error}", remedy("")) from error
        finally:
            for fd in start.handed:
                os.close(fd)
        if tried.returncode:
            detail = tried.stderr.strip() or f"{self._bwrap} ended with {tried.returncode}"
            raise SandboxUnavailable(detail, remedy(detail))

    async def run(
        self,
        command: str,
        *,
        workspace: Path,
        timeout: float | None = None,
        binds: Sequence[Bind] = (),
        stdin: bytes | None = None,
        watch: bool = True,
    ) -> CommandResult:
        """See `Sandbox.run`."""
        refused = unusable(command)
        if refused is not None:
            return refused
        running = await self._start(command, workspace, binds, stdin)
        self._running.add(running.kill)
        try:
            return await finish(running, self._settings, timeout=timeout, watcher=self._watcher(workspace) if watch else None)
        finally:
            self._running.discard(running.kill)

    async def close(self) -> None:
        """See `Sandbox.close`."""
        for kill in tuple(self._running):
            kill()

    def _watcher(self, workspace: Path) -> Watcher:
        if len(self._watchers) > 1000:  # noqa: PLR2004  only a memory of how dear a look was
            self._watchers.clear()
        return self._watchers.setdefault(workspace, Watcher(workspace, self._settings))

    async def _start(self, command: str, workspace: Path, binds: Sequence[Bind], stdin: bytes | None) -> Running:
        # a file, not a pipe: with nobody left to read, a pipe would end the outer bwrap between its fork and the moment its child may go on or die
        info = memory_file("info", b"")
        start: _Start | None = None
        out_read = out_write = in_read = in_write = -1
        try:
            limits = [f"--{name}={value}" for name, value in rlimits(self._settings).items()]
            shell = _HANDSHAKE if stdin is not None else _HANDSHAKE_NO_INPUT
            inner = ["/bin/sh", "-c", shell, "sh", *limits, "--", "/bin/bash", "--noprofile", "--norc", "-c", command]
            start = self._open(workspace, binds, info=info)
            out_read, out_write = pipe(self.owner)
            in_read, in_write = pipe(self.owner)
            child = Child(
                [mark(), "--args", str(start.arguments), "--", *inner],
                executable=self._bwrap,
                env={},
                stdin=in_read,
                stdout=out_write,
                stderr=out_write,
                umask=0o022,
                user=self.owner,
                pass_fds=(*start.handed, info),
            )
        except (OSError, ValueError) as error:
            for fd in (info, out_read, in_write):
                if fd >= 0:
                    os.close(fd)
            raise SandboxUnavailable(
                f"the sandbox cannot be started: {error}", "Check limits on processes and open files of the service."
            ) from error
        finally:
            for fd in (out_write, in_read, *(start.handed if start else ())):
                if fd >= 0:
                    os.close(fd)
        return await self._handshake(child, info=info, out_read=out_read, in_write=in_write, stdin=stdin)

    async def _handshake(self, child: Child, *, info: int, out_read: int, in_write: int, stdin: bytes | None) -> Running:
        """Waits for "up" from inside, then lets the command go; on any other end everything started is dead."""
        heard = bytearray()
        up = asyncio.Event()
        namespace: list[Namespace] = []
        descriptors = [info]

        def hold() -> None:
            """Takes hold of the namespace's PID 1, once; its number is written before it may go on to anything."""
            for fd in descriptors:
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    namespace.append(Namespace(int(json.loads(os.pread(fd, 4096, 0))["child-pid"])))
                os.close(fd)
            descriptors.clear()

        def hear(data: bytes) -> None:
            heard.extend(data)
            if bytes(heard) == _UP or b"\n" + _UP in heard:
                up.set()

        out_pipe = PipeReader(out_read, hear)

        def kill() -> None:
            child.kill()
            child.reap()
            hold()
            for one in namespace:
                one.kill()

        ready = asyncio.ensure_future(up.wait())
        gone = asyncio.ensure_future(child.ended.wait())
        try:
            await asyncio.wait({ready, gone}, timeout=START_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if not up.is_set():
                out_pipe.close()
                raise SandboxUnavailable(_why(heard, child), remedy(heard.decode("utf-8", "replace")))
            hold()
            try:
                os.write(in_write, b"go\n")
            except OSError as error:
                raise SandboxUnavailable("the sandbox died while it started") from error
        except BaseException:
            kill()
            out_pipe.close(drain=0)
            os.close(in_write)
            raise
        finally:
            ready.cancel()
            gone.cancel()
        if stdin is None:
            os.close(in_write)
        return Running(child, out_pipe, kill, stdin_fd=-1 if stdin is None else in_write, stdin=stdin or b"")

    def _open(self, workspace: Path | None, binds: Sequence[Bind], *, info: int | None) -> _Start:
        """Writes the argument list of bwrap into a memory file, with the descriptors it names."""
        handed: list[int] = []
        try:

            def data(name: str, content: bytes) -> str:
                handed.append(memory_file(name, content))
                return str(handed[-1])

            arguments = ["--unshare-all", "--unshare-user", "--disable-userns", "--uid", "1000", "--gid", "1000", "--hostname", "sprint"]
            arguments += ["--die-with-parent", "--new-session", "--cap-drop", "ALL"]
            if info is not None:
                arguments += ["--info-fd", str(info)]
            arguments.append("--clearenv")
            for key, value in ENVIRONMENT.items():
                arguments += ["--setenv", key, value]
            arguments += self._system
            for name, text in FILES.items():
                arguments += ["--perms", "0644", "--ro-bind-data", data("etc", text.encode()), name]
            arguments += ["--proc", "/proc", "--dev", "/dev"]
            arguments += ["--size", str(TMPFS_BYTES["/dev/shm"]), "--perms", "1777", "--tmpfs", "/dev/shm", "--remount-ro", "/dev"]  # noqa: S108
            arguments += ["--size", str(self._settings.tmp_bytes), "--perms", "1777", "--tmpfs", "/tmp"]  # noqa: S108
            arguments += ["--size", str(TMPFS_BYTES["/home/agent"]), "--perms", "0700", "--tmpfs", "/home/agent"]
            arguments += ["--size", str(TMPFS_BYTES["/run"]), "--tmpfs", "/run", "--dir", "/var", "--symlink", "../tmp", "/var/tmp"]  # noqa: S108
            for path in self._settings.read_only_paths:
                arguments += ["--ro-bind", str(path), str(path)]
            if workspace is not None:
                for bind in binds:
                    arguments += ["--bind" if bind.writable else "--ro-bind", str(bind.source), bind.target]
                arguments += ["--bind", str(workspace), "/workspace", "--chdir", "/workspace"]
            arguments += ["--remount-ro", "/", "--seccomp", data("seccomp", self._filter)]
            handed.append(memory_file("arguments", b"\0".join(word.encode("utf-8", "surrogateescape") for word in arguments) + b"\0"))
        except BaseException:
            for fd in handed:
                os.close(fd)
            raise
        return _Start(handed, handed[-1])


def _system_arguments() -> list[str]:
    arguments = ["--ro-bind", "/usr", "/usr"]
    for name in ("bin", "lib", "lib64", "sbin"):
        path = Path("/") / name
        if path.is_symlink():
            arguments += ["--symlink", str(path.readlink()), str(path)]
        elif path.exists():
            arguments += ["--ro-bind", str(path), str(path)]
    for name in ETC:
        arguments += ["--ro-bind-try", f"/etc/{name}", f"/etc/{name}"]
    return arguments


def _why(heard: bytearray, child: Child) -> str:
    text = heard.decode("utf-8", "replace").strip()[-2000:]
    if text:
        return text
    return "the sandbox did not start in time" if child.returncode is None else f"bubblewrap ended with {child.returncode}"
