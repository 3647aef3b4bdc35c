"""What tmux shows of our session, as values: asked in bounded time, parsed without trust, written down without a gap."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from bot.fleet._tmux import Tmux
from bot.settings import Settings

MARK = "@timmy-dispatch"
LANE = "@timmy-lane"
BEGAN = "@timmy-began"
FOLDER = "lanes"
LATEST = "topology.json"
FIELDS = (
    *("#{pane_id}", "#{pane_index}", "#{pane_pid}", "#{pane_dead}", "#{pane_dead_status}", "#{pane_dead_signal}"),
    *(f"#{{{LANE}}}", f"#{{{BEGAN}}}", "#{pane_current_command}", "#{pane_title}"),
)
SEPARATOR = "|"


@dataclass(frozen=True, slots=True)
class Pane:
    """One pane of our session. `lane` is None in a pane that a person made there; `started` is Unix seconds of its worker's start, 0 where unknown.

    `dead_status` is the exit code of what ran there, None while it runs or where a signal ended it (then `dead_signal`, where tmux tells).
    """

    id: str
    index: int
    title: str
    pid: int
    dead: bool
    dead_status: int | None
    command: str
    started: int
    lane: int | None = None
    dead_signal: int | None = None


@dataclass(frozen=True, slots=True)
class Topology:
    """Our session at `taken` (Unix milliseconds). `ours` is false where a session of that name does not carry our mark; then `panes` is empty.

    `others` counts the sessions of other people behind the same socket.
    """

    session: str
    ours: bool
    panes: tuple[Pane, ...]
    taken: int
    others: int = 0

    def lane(self, number: int) -> Pane | None:
        """The pane of a lane."""
        return next((pane for pane in self.panes if pane.lane == number), None)

    @property
    def dead(self) -> tuple[Pane, ...]:
        """Lanes whose worker ended."""
        return tuple(pane for pane in self.panes if pane.dead and pane.lane is not None)


def tmux_of(settings: Settings, environ: Mapping[str, str] | None = None) -> Tmux:
    """The server of this state folder; `environ` is where tmux is looked for and what the lanes inherit of it."""
    return Tmux(settings.lanes.session, settings.state_dir, environ or {})


async def topology(settings: Settings, environ: Mapping[str, str] | None = None) -> Topology | None:
    """What there is now; None where no such session exists. Ends within seconds; raises TmuxMissing, TmuxHung (both UserError)."""
    return await look(tmux_of(settings, environ), settings.lanes.session)


async def look(tmux: Tmux, session: str) -> Topology | None:
    """`topology` of a server that is at hand."""
    sessions = await tmux.ask("list-sessions", "-F", f"#{{session_name}}{SEPARATOR}#{{{MARK}}}")
    marks = dict(line.partition(SEPARATOR)[::2] for line in (sessions or "").splitlines())
    if session not in marks:
        return None
    taken = int(datetime.now(UTC).timestamp() * 1000)
    if not marks[session]:
        return Topology(session, ours=False, panes=(), taken=taken, others=len(marks))
    panes = await _panes(tmux, session)
    if panes is not None and any(pane.dead and not over(pane) for pane in panes):
        # tmux may miss that a child ended (seen in 3.3a, where it ended at once); the end of another child makes it look again.
        await tmux.ask("run-shell", "true")
        panes = await _panes(tmux, session)
    return None if panes is None else Topology(session, ours=True, panes=panes, taken=taken, others=len(marks) - 1)


async def _panes(tmux: Tmux, session: str) -> tuple[Pane, ...] | None:
    listed = await tmux.ask("list-panes", "-s", "-t", f"={session}:", "-F", SEPARATOR.join(FIELDS))
    return None if listed is None else parse(listed)


def over(pane: Pane) -> bool:
    """Whether a pane's worker ended and it is known how: tmux sees its terminal close a moment before it learns the exit code."""
    return pane.dead and (pane.dead_status is not None or pane.dead_signal is not None or not Path(f"/proc/{pane.pid}").exists())


def parse(listed: str) -> tuple[Pane, ...]:
    """The panes of `list-panes -F`, one a line; a line that cannot be read is left out."""
    found = []
    for line in listed.splitlines():
        parts = line.split(SEPARATOR, len(FIELDS) - 1)
        if len(parts) != len(FIELDS) or not parts[0].startswith("%"):
            continue
        identity, index, pid, dead, status, signal, lane, began, command, title = parts
        found.append(
            Pane(
                id=identity,
                index=_number(index) or 0,
                title=title,
                pid=_number(pid) or 0,
                dead=dead == "1",
                dead_status=_number(status) if dead == "1" and not _number(signal) else None,
                command=command,
                started=_number(began) or 0,
                lane=_number(lane),
                dead_signal=_number(signal) or None if dead == "1" else None,
            )
        )
    return tuple(found)


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else None  # noqa: PLR2004 - what a database's integer holds


def snapshot(settings: Settings, found: Topology | None) -> Path:
    """Writes what was seen to `lanes/topology.json` and, stamped, beside it; the oldest beyond `lanes.snapshots` go. Returns the stamped file."""
    folder = settings.state_dir / FOLDER
    folder.mkdir(mode=0o700, exist_ok=True)
    text = json.dumps(as_json(found), ensure_ascii=False, indent=1) + "\n"
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    path = folder / f"topology-{stamp}.json"
    for target in (path, folder / LATEST):
        _write(target, text)
    for old in sorted(folder.glob("topology-*.json"))[: -settings.lanes.snapshots]:
        old.unlink(missing_ok=True)
    return path


def as_json(found: Topology | None) -> dict[str, object]:
    """The same as one JSON object; no session is an empty one."""
    if found is None:
        return {"version": 1, "session": None, "panes": []}
    return {"version": 1, **asdict(found)}


def _write(path: Path, text: str) -> None:
    """Whole or not at all, and for nobody else to read."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
