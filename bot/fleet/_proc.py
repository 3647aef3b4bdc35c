"""What Linux tells of a process: alive, since when, its memory and processor time; read from /proc, one small file each, and never more than asked for."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
MOST_CHILDREN = 256
# Field numbers of /proc/PID/stat counted after the command, which may hold blanks and brackets (proc_pid_stat(5)).
STATE, UTIME, STIME, STARTED = 0, 11, 12, 19


@dataclass(frozen=True, slots=True)
class Process:
    """One process. `started_ms` is by the wall clock of now, `resident` and `children_resident` are bytes, `cpu_seconds` all it ever used."""

    pid: int
    started_ms: int
    resident: int
    cpu_seconds: float
    children: int
    children_resident: int


def process(pid: int, *, now_ms: int, proc: Path = PROC) -> Process | None:
    """A living process, or None for one that is gone or only waits to be collected."""
    fields = _stat(proc, pid)
    if fields is None or fields[STATE] in ("Z", "X"):
        return None
    tick = os.sysconf("SC_CLK_TCK")
    below_it = below(pid, proc)
    age = _uptime(proc) - int(fields[STARTED]) / tick
    return Process(
        pid=pid,
        started_ms=now_ms - int(max(0.0, age) * 1000),
        resident=_resident(proc, pid),
        cpu_seconds=(int(fields[UTIME]) + int(fields[STIME])) / tick,
        children=len(below_it),
        children_resident=sum(_resident(proc, child) for child in below_it),
    )


def boot_id(proc: Path = PROC) -> str:
    """A name of this boot: seconds since boot compare only within one."""
    return (_read(proc / "sys/kernel/random/boot_id") or "").strip()


def _stat(proc: Path, pid: int) -> list[str] | None:
    text = _read(proc / str(pid) / "stat")
    return text.rpartition(")")[2].split() if text else None


def _resident(proc: Path, pid: int) -> int:
    text = _read(proc / str(pid) / "statm")
    return int(text.split()[1]) * os.sysconf("SC_PAGE_SIZE") if text else 0


def below(pid: int, proc: Path = PROC) -> list[int]:
    """Its children and theirs; none where the kernel does not list them."""
    found: list[int] = []
    waiting = [pid]
    while waiting and len(found) < MOST_CHILDREN:
        try:
            threads = list((proc / str(waiting.pop()) / "task").iterdir())
        except OSError:
            continue
        for thread in threads:
            children = [int(word) for word in (_read(thread / "children") or "").split()]
            found += children
            waiting += children
    return found


def _uptime(proc: Path) -> float:
    text = _read(proc / "uptime")
    return float(text.split()[0]) if text else 0.0


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
