"""`sandbox: none`: no wall at all, only a clean environment, a dropped uid, limits, and a supervisor that leaves no descendant behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from bot.config import SandboxSettings
from bot.sandbox.contract import Bind, CommandResult, SandboxUnavailable
from bot.sandbox.kill import mark
from bot.sandbox.limits import Watcher, rlimits
from bot.sandbox.process import Child, PipeReader, pipe
from bot.sandbox.run import Running, finish, unusable

KILL_SECONDS = 2.0
_SUPERVISOR = Path(__file__).with_name("_supervisor.py")
_GITCONFIG = "[safe]\n\tdirectory = *\n[user]\n\tname = agent\n\temail = agent@localhost\n[init]\n\tdefaultBranch = main\n[advice]\n\tdetachedHead = false\n"


class Plain:
    """Runs commands on the bare machine, as the sandbox user when the service is root."""

    level = "none"

    def __init__(self, settings: SandboxSettings, *, state_dir: Path) -> None:
        self._settings = settings
        self._running: set[Callable[[], None]] = set()
        self._watchers: dict[Path, Watcher] = {}
        state_dir.mkdir(parents=True, exist_ok=True, mode=0o711)
        _drop_homes_of_the_dead(state_dir)
        self._home = Path(tempfile.mkdtemp(prefix=f"unsandboxed-{os.getpid()}-", dir=state_dir))
        config = self._home / "gitconfig"
        config.write_text(_GITCONFIG)
        config.chmod(0o644)
        inner = self._home / "home"
        inner.mkdir(mode=0o700)
        if self.owner is not None:
            os.chown(inner, self.owner, self.owner)
            self._home.chmod(0o711)
        self._environment = {
            "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin",
            "HOME": str(inner),
            "LANG": "C.UTF-8",
            "TERM": "dumb",
            "USER": "agent",
            "GIT_TERMINAL_PROMPT": "0",
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_CONFIG_GLOBAL": str(config),
            "CI": "1",
        }

    @property
    def owner(self) -> int | None:
        """The uid commands run under; None when the service is not root, or only root exists where it runs, and it shares its own."""
        return self._settings.user if os.getuid() == 0 and _exists(self._settings.user) else None

    async def run(
        self,
        command: str,
        *,
        workspace: Path,
        timeout: float | None = None,
        binds: Sequence[Bind] = (),  # noqa: ARG002  nothing can be bound here; callers use real paths
        stdin: bytes | None = None,
        watch: bool = True,
    ) -> CommandResult:
        """See `Sandbox.run`."""
        refused = unusable(command)
        if refused is not None:
            return refused
        running = self._start(command, workspace, stdin)
        self._running.add(running.kill)
        try:
            watcher = self._watchers.setdefault(workspace, Watcher(workspace, self._settings)) if watch else None
            return await finish(running, self._settings, timeout=timeout, watcher=watcher)
        finally:
            self._running.discard(running.kill)

    def expect(self, workspace: Path, *, binds: Sequence[Bind] = ()) -> None:
        """Nothing here takes time to start."""

    def dismiss(self, workspace: Path) -> None:
        """Nothing was started."""

    async def close(self) -> None:
        """See `Sandbox.close`."""
        for kill in tuple(self._running):
            kill()
        await asyncio.to_thread(shutil.rmtree, self._home, ignore_errors=True)

    def _start(self, command: str, workspace: Path, stdin: bytes | None) -> Running:
        out_read, out_write = pipe(self.owner)
        control_read, control_write = pipe()
        in_read, in_write = pipe(self.owner) if stdin is not None else (os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC), -1)
        # the count is per user here: for an operator's own account it would include his desktop
        limits = [f"{name}={value}" for name, value in rlimits(self._settings).items() if name != "nproc" or self.owner is not None]
        uid = "-" if self.owner is None else str(self.owner)
        argv = [mark(), uid, str(workspace), str(control_read), *limits, "--", "/bin/bash", "--noprofile", "--norc", "-c", command]
        try:
            child = Child(
                [sys.executable, "-I", "-S", str(_SUPERVISOR), *argv],
                env=self._environment,
                stdin=in_read,
                stdout=out_write,
                stderr=out_write,
                umask=0o022,
                pass_fds=(control_read,),
            )
        except OSError as error:
            for fd in (out_read, control_write, in_write):
                if fd >= 0:
                    os.close(fd)
            raise SandboxUnavailable(
                f"the command cannot be started: {error}", "Check limits on processes and open files of the service."
            ) from error
        finally:
            for fd in (out_write, control_read, in_read):
                os.close(fd)
        control = [control_write]

        def kill() -> None:
            for fd in control:
                os.close(fd)
            control.clear()
            if child.returncode is None and not child.wait_blocking(KILL_SECONDS):
                child.kill()
            with contextlib.suppress(ChildProcessError):
                child.reap()

        return Running(child, PipeReader(out_read, lambda _: None), kill, stdin_fd=in_write, stdin=stdin or b"")


def _drop_homes_of_the_dead(state_dir: Path) -> None:
    for home in state_dir.glob("unsandboxed-*"):
        pid = home.name.split("-")[1]
        if not pid.isdigit() or not (Path("/proc") / pid).exists():
            shutil.rmtree(home, ignore_errors=True)


def _exists(uid: int) -> bool:
    """Whether this user namespace knows the uid (user_namespaces(7)): a rootless container may have mapped none but root."""
    lines = (line.split() for line in Path("/proc/self/uid_map").read_text().splitlines())
    return any(int(first) <= uid < int(first) + int(count) for first, _, count in lines)
