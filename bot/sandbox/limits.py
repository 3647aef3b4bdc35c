"""Bounds on what one command may take: rlimits, output kept, and a watcher that sees the workspace outgrow its size whatever hides in it."""

from __future__ import annotations

import asyncio
import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bot.config import SandboxSettings

KEPT_OUTPUT = 16_384
WATCH_SECONDS = 0.25
DEPTH = 128
FREE_FLOOR = 256 * 1024**2
PRLIMIT = "/usr/bin/prlimit"
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def rlimits(settings: SandboxSettings) -> dict[str, int]:
    """The limits of each process by their prlimit names (bytes, seconds, counts)."""
    return {
        "as": settings.memory_bytes,
        "nproc": settings.processes,
        "cpu": settings.cpu_seconds,
        "fsize": settings.file_bytes,
        "nofile": settings.open_files,
        "core": 0,
    }


def shell_limits(settings: SandboxSettings) -> str:
    """The same, hard and soft, as a list of POSIX shell builtins that stops at the first that fails; sizes are rounded down to the shell's units.

    The limit on processes is -p in dash and BusyBox, -u in bash.
    """
    limits = rlimits(settings)
    processes = limits["nproc"]
    return (
        f"ulimit -c {limits['core']} && ulimit -t {limits['cpu']} && ulimit -n {limits['nofile']} && ulimit -f {limits['fsize'] // 512}"
        f" && ulimit -v {limits['as'] // 1024} && {{ ulimit -p {processes} 2>&- || ulimit -u {processes}; }}"
    )


@dataclass(frozen=True, slots=True)
class Usage:
    """What a directory holds: `bytes` on disk and `inodes`; `fault` names what kept us from seeing all of it."""

    bytes: int
    inodes: int
    fault: str = ""


def measure(root: Path, *, max_bytes: int | None = None, max_inodes: int | None = None) -> Usage:
    """Counts a directory by descriptors, following nothing; stops at the first bound passed.

    Anything that hides its content (a directory that cannot be opened, or nested deeper than 128) is a `fault`, never a zero. Entries that vanish meanwhile
    are not.
    """
    count = _Count(max_bytes, max_inodes)
    opened: list[int] = []
    pending: list[list[str]] = []
    try:
        opened.append(os.open(root, _DIRECTORY))
        pending.append(count.take(opened[-1]))
        while opened:
            if count.full:
                break
            if not pending[-1]:
                pending.pop()
                os.close(opened.pop())
                continue
            if len(opened) > DEPTH:
                return Usage(count.bytes, count.inodes, f"directories are nested deeper than {DEPTH}")
            name = pending[-1].pop()
            try:
                opened.append(os.open(name, _DIRECTORY, dir_fd=opened[-1]))
            except FileNotFoundError:
                continue
            pending.append(count.take(opened[-1]))
    except OSError as error:
        return Usage(count.bytes, count.inodes, f"a directory cannot be read: {error.strerror}")
    finally:
        for directory in opened:
            os.close(directory)
    return Usage(count.bytes, count.inodes)


class _Count:
    """The running sum of one walk."""

    def __init__(self, max_bytes: int | None, max_inodes: int | None) -> None:
        self.bytes = 0
        self.inodes = 0
        self._max_bytes = max_bytes
        self._max_inodes = max_inodes

    @property
    def full(self) -> bool:
        return (self._max_bytes is not None and self.bytes > self._max_bytes) or (
            self._max_inodes is not None and self.inodes > self._max_inodes
        )

    def take(self, directory: int) -> list[str]:
        """Adds the entries of an open directory; returns the names of those that are directories."""
        below: list[str] = []
        with os.scandir(directory) as entries:
            for entry in entries:
                try:
                    found = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                self.inodes += 1
                self.bytes += found.st_blocks * 512
                if self.full:
                    break
                if stat.S_ISDIR(found.st_mode):
                    below.append(entry.name)
        return below


class Watcher:
    """Looks at a workspace every 0.25 s (less often where a look is dear) and names the first breach."""

    def __init__(self, root: Path, settings: SandboxSettings) -> None:
        self._root = root
        self._bytes = settings.workspace_bytes
        self._inodes = settings.workspace_inodes
        self._cost = 0.0
        self._last = 0.0

    def look(self) -> str:
        """What is wrong now, or an empty string. Blocks for the time of one walk."""
        began = time.monotonic()
        found = measure(self._root, max_bytes=self._bytes, max_inodes=self._inodes)
        self._last = time.monotonic()
        self._cost = self._last - began
        if found.bytes > self._bytes:
            return f"the workspace holds more than {self._bytes} bytes"
        if found.inodes > self._inodes:
            return f"the workspace holds more than {self._inodes} files and directories"
        if found.fault:
            return f"the workspace cannot be measured: {found.fault}"
        try:
            free = os.statvfs(self._root)
        except OSError as error:
            return f"the workspace cannot be measured: {error.strerror}"
        if free.f_bavail * free.f_frsize < FREE_FLOOR:
            return f"less than {FREE_FLOOR} bytes are free on the disk"
        return ""

    @property
    def worth_a_look(self) -> bool:
        """True when one more look would not make looking more than a twentieth of the time since the last one."""
        return time.monotonic() - self._last > 20 * self._cost

    async def watch(self, on_breach: Callable[[str], None]) -> None:
        """Looks until cancelled or until a breach was reported."""
        while True:
            await asyncio.sleep(max(WATCH_SECONDS, 4 * self._cost))
            breach = await asyncio.to_thread(self.look)
            if breach:
                on_breach(breach)
                return
