"""The collector's files: two streams that only grow and one state that is replaced whole; private, bounded, one writer, never inside a repository."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import structlog

from bot.fleet._states import State, is_state
from bot.models import UserError

log = structlog.get_logger()

SCHEMA = 1
METRICS, EVENTS, LAST = "metrics.jsonl", "events.jsonl", "last_state.json"
LOCK = "collector.lock"
LOCK_POLL_SECONDS = 0.05
LAST_BYTES = 8_388_608
TAIL_BYTES = 1_048_576


@dataclass(frozen=True, slots=True)
class Last:
    """The newest sample as `last_state.json` keeps it: its number, when it was taken (wall clock, and seconds since the boot `boot_id`), and the state.

    `judged_from_ms` is since when schedules are judged (the clock jumped then); `events` are those of this sample; `memory` is what sources keep.
    """

    number: int
    wall_ms: int
    boot_seconds: float
    boot_id: str
    judged_from_ms: int
    state: State
    events: tuple[dict[str, Any], ...]
    memory: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """As the file has it."""
        return {
            "schema": SCHEMA,
            "sample": self.number,
            "at": when(self.wall_ms),
            "wall_ms": self.wall_ms,
            "boot_seconds": self.boot_seconds,
            "boot_id": self.boot_id,
            "judged_from_ms": self.judged_from_ms,
            "state": {entity: dict(facets) for entity, facets in self.state.items()},
            "events": list(self.events),
            "memory": self.memory,
        }


class Streams:
    """The folder of one host. `prepare`, then inside `alone()`: `last`, `write`."""

    def __init__(self, folder: Path, *, rotate_bytes: int, keep_files: int) -> None:
        self._folder = folder
        self._rotate_bytes = rotate_bytes
        self._keep_files = keep_files

    def prepare(self) -> None:
        """Makes the folder; raises UserError where it is not private, or lies in a repository, where a commit would publish it."""
        if fault := fault_of(self._folder):
            raise UserError(fault)
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    @contextlib.contextmanager
    def alone(self, seconds: float) -> Iterator[None]:
        """While the block runs nobody else writes here, in this process or another; raises UserError where somebody still does after `seconds`."""
        descriptor = os.open(self._folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            until = time.monotonic() + seconds
            while not _locked(descriptor):
                if time.monotonic() >= until:
                    raise UserError(f"another sample is being written to {self._folder}; try again")
                time.sleep(LOCK_POLL_SECONDS)
            yield
        finally:
            os.close(descriptor)

    def last(self) -> Last | None:
        """The newest sample, or None for the first. What cannot be read, or is another version's, is set aside and said once."""
        path = self._folder / LAST
        try:
            with _opened(path, os.O_RDONLY) as file:
                raw = file.read(LAST_BYTES + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._set_aside(path, str(error))
            return None
        found, fault = _parsed(raw)
        if found is None:
            self._set_aside(path, fault)
        return found

    def write(self, sample: dict[str, Any], last: Last) -> int:
        """Adds a sample and its events, and replaces the state; returns the bytes written. A crash in between loses nothing: see `mend`."""
        line = _line(sample)
        written = self._append(METRICS, line)
        state = _line(last.to_json())
        self._replace(self._folder / LAST, state)
        events = b"".join(_line(event) for event in last.events)
        return written + len(state) + (self._append(EVENTS, events) if events else 0)

    def mend(self, last: Last) -> None:
        """Adds those events of the newest sample that a crash kept out of the stream."""
        known = self._events_of(last.number)
        if missing := last.events[known:]:
            self._append(EVENTS, b"".join(_line(event) for event in missing))

    def _events_of(self, number: int) -> int:
        """How many events of this sample the end of the stream holds."""
        path = self._folder / EVENTS
        try:
            with _opened(path, os.O_RDONLY) as file:
                lines = _whole_tail(file)
        except FileNotFoundError:
            # Set aside just now, or never begun: what was set aside last was written before.
            older = self._aside(EVENTS)
            if not older:
                return 0
            with _opened(older[-1], os.O_RDONLY) as file:
                lines = _whole_tail(file)
        return sum(_number(line) == number for line in lines)

    def _append(self, name: str, data: bytes) -> int:
        path = self._folder / name
        with _opened(path, os.O_RDWR | os.O_CREAT) as file:
            size = _without_torn_line(file)
            if not size or size + len(data) <= self._rotate_bytes:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                return len(data)
        self._rotate(path)
        return self._append(name, data)

    def _rotate(self, path: Path) -> None:
        """Sets a full stream aside under a number one higher than the last, and drops the oldest."""
        older = self._aside(path.name)
        number = _aside_number(older[-1]) + 1 if older else 1
        path.rename(path.with_name(f"{path.stem}-{number:06}{path.suffix}"))
        for old in self._aside(path.name)[: -self._keep_files]:
            old.unlink(missing_ok=True)
        _sync(self._folder)

    def _aside(self, name: str) -> Sequence[Path]:
        stem, _, suffix = name.partition(".")
        pattern = re.compile(rf"{stem}-[0-9]+\.{suffix}")
        return sorted((path for path in self._folder.iterdir() if pattern.fullmatch(path.name)), key=_aside_number)

    def _replace(self, path: Path, data: bytes) -> None:
        temporary = path.with_suffix(".tmp")
        with _opened(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync(self._folder)

    def _set_aside(self, path: Path, fault: str) -> None:
        kept = path.with_name("last_state.unreadable.json")
        path.replace(kept)
        log.warning("collector.state_set_aside", fault=fault, kept=str(kept))


def fault_of(folder: Path) -> str:
    """Why nothing may be written to a folder, and what to do; "" where it may."""
    if (root := repository_of(folder)) is not None:
        return f"{folder} lies in the git repository {root}, and telemetry never does: set `collector.folder`, or `state_dir`, to a folder outside"
    try:
        found = folder.stat()
    except FileNotFoundError:
        return ""
    # A folder that was there may serve others too: it is not ours to close.
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        return f"{folder} is open to others, or another user's: `chmod 700` it, or set `collector.folder` to another folder"
    return ""


def repository_of(folder: Path) -> Path | None:
    """The work tree or bare repository that a folder lies in, through every link; None outside of any."""
    place = folder.resolve()
    for each in (place, *place.parents):
        bare = (each / "HEAD").is_file() and (each / "objects").is_dir() and (each / "refs").is_dir()
        if bare or (each / ".git").exists():
            return each
    return None


def when(wall_ms: int) -> str:
    """`2026-11-25T06:00:00.000Z`."""
    return datetime.fromtimestamp(wall_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _parsed(raw: bytes) -> tuple[Last | None, str]:
    """What a file says, or None and what is wrong with it."""
    if len(raw) > LAST_BYTES:
        return None, "it is too large"
    try:
        data = json.loads(raw)
    except ValueError:
        return None, "it is not complete JSON"
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        return None, f"it is not of schema {SCHEMA}"
    try:
        events, memory = data["events"], data["memory"]
        fit = is_state(data["state"]) and isinstance(events, list) and all(isinstance(event, dict) for event in events)
        if not (fit and isinstance(memory, dict)):
            return None, "its state has another shape"
        return Last(
            number=int(data["sample"]),
            wall_ms=int(data["wall_ms"]),
            boot_seconds=float(data["boot_seconds"]),
            boot_id=str(data["boot_id"]),
            judged_from_ms=int(data["judged_from_ms"]),
            state=data["state"],
            events=tuple(events),
            memory=memory,
        ), ""
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        return None, f"it lacks what it should have: {error}"


def _opened(path: Path, flags: int) -> BinaryIO:
    descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    if flags & os.O_RDWR:
        return os.fdopen(descriptor, "r+b")
    return os.fdopen(descriptor, "wb" if flags & os.O_WRONLY else "rb")


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def _whole_tail(file: BinaryIO) -> list[bytes]:
    size = file.seek(0, os.SEEK_END)
    start = max(0, size - TAIL_BYTES)
    file.seek(start)
    lines = file.read().split(b"\n")
    return lines[bool(start) : -1]


def _without_torn_line(file: BinaryIO) -> int:
    """Cuts off a last line that a crash left short, and stands at the end; returns the size."""
    size = file.seek(0, os.SEEK_END)
    if size:
        file.seek(size - 1)
        if file.read(1) != b"\n":
            file.seek(0)
            size = file.read().rfind(b"\n") + 1
            file.truncate(size)
    file.seek(size)
    return size


def _number(line: bytes) -> int:
    try:
        found = json.loads(line)
    except ValueError:
        return -1
    return int(found["sample"]) if isinstance(found, dict) and isinstance(found.get("sample"), int) else -1


def _aside_number(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
