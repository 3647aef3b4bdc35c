"""Bubblewrap as security.md describes it: an allow-listed root, no network, no environment, no rights, and a handshake before anything of the model runs."""

from __future__ import annotations

import asyncio
import contextlib
import functools
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
from bot.sandbox.limits import PRLIMIT, Watcher, shell_limits
from bot.sandbox.process import Child, PipeReader, memory_file, pipe
from bot.sandbox.run import Running, finish, unusable

BWRAP = "/usr/bin/bwrap"
START_SECONDS = 15.0
TMPFS_BYTES = {"/home/agent": 256 * 1024**2, "/run": 1024**2, "/dev/shm": 64 * 1024**2}  # noqa: S108  paths inside the sandbox
OPTIONS = (
    "--args --unshare-all --unshare-user --disable-userns --uid --gid --hostname --die-with-parent --new-session --info-fd --cap-drop --clearenv --setenv "
    "--ro-bind --ro-bind-try --file --bind --symlink --proc --dev --size --perms --tmpfs --dir --remount-ro --chdir --seccomp"
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
SETPRIV = "/usr/bin/setpriv"
AHEAD_SECONDS = 10.0
REAP_SECONDS = 0.1
AHEAD_BYTES = 4000
_UP = b"up\n"
# One line says how the command comes: "LINES INPUT", where LINES is how many lines of it follow (0: it is the argument) and INPUT whether it gets what comes
# after them as its input. End of file before the command is whole: nobody is there to want it.
_HANDSHAKE = """
echo up
IFS=' ' read -r lines input || exit 125
command=${1-}
while [ "$lines" -gt 0 ]; do
    IFS= read -r line || exit 125
    command="$command${separator-}$line"
    separator='
'
    lines=$((lines - 1))
done
[ "$input" = 1 ] || exec <"/dev/null"
exec /bin/bash --noprofile --norc -c "$command"
"""


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


@dataclass(slots=True)
class _Waiting:
    """A sandbox that is up and waits for its one command; `commands` is where it is told."""

    child: Child
    output: PipeReader
    kill: Callable[[], None]
    commands: int

    def drop(self) -> None:
        """Kills it, nothing was ever run in it."""
        self.kill()
        self.output.close(drain=0)
        os.close(self.commands)

    def go(self, command: str | None, stdin: bytes | None) -> Running:
        """Lets it run `command` (None: the one in its argument list); raises OSError when it is dead."""
        lines = [] if command is None else command.split("\n")
        head = f"{len(lines)} {int(stdin is not None)}\n"
        try:
            if self.child.returncode is not None:
                raise BrokenPipeError
            os.write(self.commands, (head + "".join(f"{line}\n" for line in lines)).encode())
        except BaseException:
            self.drop()
            raise
        if stdin is None:
            os.close(self.commands)
        return Running(self.child, self.output, self.kill, stdin_fd=-1 if stdin is None else self.commands, stdin=stdin or b"")


@dataclass(slots=True)
class _Ahead:
    """A sandbox started before its command is known, with what it shows; `expiry` ends it when no command comes."""

    task: asyncio.Task[_Waiting]
    binds: tuple[Bind, ...]
    expiry: asyncio.TimerHandle


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
        self._ahead: dict[Path, _Ahead] = {}
        self._shell = f"{shell_limits(settings)} || exit 125{_HANDSHAKE}"

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
        prefix = dropped(self.owner)
        user = self.owner if not prefix else None
        try:
            tried = subprocess.run(
                [*prefix, self._bwrap, "--args", str(start.arguments), "--", "/bin/sh", "-c", "exit 0", mark()],
                env={},
                cwd="/",
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=START_SECONDS,
                check=False,
                pass_fds=start.handed,
                user=user,
                group=user,
                extra_groups=None if user is None else [],
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
        running = await self._started(command, workspace, binds, stdin)
        self._running.add(running.kill)
        try:
            return await finish(running, self._settings, timeout=timeout, watcher=self._watcher(workspace) if watch else None)
        finally:
            self._running.discard(running.kill)

    def expect(self, workspace: Path, *, binds: Sequence[Bind] = ()) -> None:
        """See `Sandbox.expect`."""
        ahead = self._ahead.get(workspace)
        if ahead is not None and ahead.binds == tuple(binds):
            return
        self.dismiss(workspace)
        loop = asyncio.get_running_loop()
        task = loop.create_task(self._enter(workspace, binds))
        # Whoever takes it hears of a failure; where nobody does, there is nobody to tell.
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._ahead[workspace] = _Ahead(task, tuple(binds), loop.call_later(AHEAD_SECONDS, self.dismiss, workspace))

    def dismiss(self, workspace: Path) -> None:
        """See `Sandbox.dismiss`."""
        ahead = self._ahead.pop(workspace, None)
        if ahead is None:
            return
        ahead.expiry.cancel()
        if not ahead.task.done():
            ahead.task.cancel()
        elif not ahead.task.cancelled() and ahead.task.exception() is None:
            ahead.task.result().drop()

    async def close(self) -> None:
        """See `Sandbox.close`."""
        starting = [ahead.task for ahead in self._ahead.values()]
        for workspace in tuple(self._ahead):
            self.dismiss(workspace)
        for kill in tuple(self._running):
            kill()
        await asyncio.gather(*starting, return_exceptions=True)

    def _watcher(self, workspace: Path) -> Watcher:
        if len(self._watchers) > 1000:  # noqa: PLR2004  only a memory of how dear a look was
            self._watchers.clear()
        return self._watchers.setdefault(workspace, Watcher(workspace, self._settings))

    async def _started(self, command: str, workspace: Path, binds: Sequence[Bind], stdin: bytes | None) -> Running:
        """The command in the sandbox that waits for it, else in a new one; one that died while it waited has run nothing."""
        ahead = self._ahead.get(workspace)
        if ahead is not None and ahead.binds == tuple(binds) and len(command.encode()) <= AHEAD_BYTES:
            del self._ahead[workspace]
            ahead.expiry.cancel()
            with contextlib.suppress(SandboxUnavailable, OSError):
                return (await ahead.task).go(command, stdin)
        waiting = await self._enter(workspace, binds, command)
        try:
            return waiting.go(None, stdin)
        except OSError as error:
            raise SandboxUnavailable("the sandbox died while it started") from error

    async def _enter(self, workspace: Path, binds: Sequence[Bind], *command: str) -> _Waiting:
        """A new sandbox, up and waiting; a `command` in its argument list needs only the word."""
        # a file, not a pipe: with nobody left to read, a pipe would end the outer bwrap between its fork and the moment its child may go on or die
        info = memory_file("info", b"")
        start: _Start | None = None
        out_read = out_write = in_read = in_write = -1
        try:
            prefix = dropped(self.owner)
            start = self._open(workspace, binds, info=info)
            out_read, out_write = pipe(self.owner)
            in_read, in_write = pipe(self.owner)
            child = Child(
                [*prefix, self._bwrap, "--args", str(start.arguments), "--", "/bin/sh", "-c", self._shell, mark(), *command],
                env={},
                stdin=in_read,
                stdout=out_write,
                stderr=out_write,
                umask=0o022,
                user=None if prefix else self.owner,
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
        return await self._handshake(child, info=info, out_read=out_read, in_write=in_write)

    async def _handshake(self, child: Child, *, info: int, out_read: int, in_write: int) -> _Waiting:
        """Waits for "up" from inside; on any other end everything started is dead."""
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
            for one in namespace:
                one.kill()
            if namespace:
                # the outer bwrap then reaps it and ends; killed first, it would leave that to the init of the machine, which may not care
                child.wait_blocking(REAP_SECONDS)
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
        except BaseException:
            kill()
            out_pipe.close(drain=0)
            os.close(in_write)
            raise
        finally:
            ready.cancel()
            gone.cancel()
        return _Waiting(child, out_pipe, kill, in_write)

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
                arguments += ["--perms", "0644", "--file", data("etc", text.encode()), name]
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


@functools.cache
def dropped(uid: int | None) -> tuple[str, ...]:
    """What to put before a program so that it runs under `uid`; nothing where it need not or setpriv cannot, tried once (some 2 ms).

    Python's own way makes it copy the whole process with `fork`, which takes milliseconds in which the event loop stands still.
    """
    if uid is None:
        return ()
    prefix = (SETPRIV, f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--no-new-privs", "--")
    try:
        tried = subprocess.run(
            [*prefix, "/bin/sh", "-c", "exit 0"], env={}, cwd="/", capture_output=True, timeout=START_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return () if tried.returncode else prefix


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
