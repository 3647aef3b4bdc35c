"""How a sandbox dies: by the PID 1 of its namespace and its process group, and by name when an earlier life of the service left it behind."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from pathlib import Path

MARK = "timmy-sandbox"
_PROC = Path("/proc")


def start_time(pid: int) -> str:
    """When a process started, in clock ticks since boot, as the kernel prints it; "" when there is no such process."""
    try:
        text = (_PROC / str(pid) / "stat").read_text(errors="replace")
    except OSError:
        return ""
    fields = text.rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 and fields[0] != "Z" else ""  # noqa: PLR2004  field 22 of proc(5), counted behind the name


def mark() -> str:
    """The name every sandbox of this process carries in its argument list: who started it, so that a later life can tell orphans from neighbours."""
    return f"{MARK}:{os.getpid()}:{start_time(os.getpid())}"


class Namespace:
    """The PID 1 of a sandbox, held by a pidfd from the moment its number is known."""

    def __init__(self, pid: int) -> None:
        """Takes hold of `pid`; harmless when it is gone or, in the start-up window, already somebody else's."""
        self._pidfd = -1
        with contextlib.suppress(ProcessLookupError):
            self._pidfd = os.pidfd_open(pid)
        if self._pidfd >= 0 and not _is_bubblewrap(pid):
            os.close(self._pidfd)
            self._pidfd = -1

    def kill(self, *, wait_ms: int = 2000) -> None:
        """SIGKILL; the kernel then ends every process of the namespace. Returns when it is gone."""
        if self._pidfd < 0:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        poll.poll(wait_ms)
        os.close(self._pidfd)
        self._pidfd = -1


def _is_bubblewrap(pid: int) -> bool:
    try:
        return (_PROC / str(pid) / "comm").read_text().strip() == "bwrap"
    except OSError:
        return False


def sweep() -> int:
    """Kills the sandboxes whose service process is gone; returns how many processes got the signal.

    Ours are known by the mark in their argument list, which nothing inside can change. Those of a living process (another worker) and everything foreign are
    left alone.
    """
    killed = 0
    for entry in _PROC.iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        owner = next((word for word in words if word.startswith(MARK.encode() + b":")), b"").decode("ascii", "replace").split(":")
        if len(owner) != 3 or not owner[1].isdigit() or start_time(int(owner[1])) == owner[2]:  # noqa: PLR2004  name, pid, start
            continue
        try:
            if entry.stat().st_uid != os.getuid() and os.getuid() != 0:
                continue
            os.kill(int(entry.name), signal.SIGKILL)
            killed += 1
        except (OSError, ValueError):
            continue
    return killed
