"""Lanes: ordinary workers in the panes of one tmux session of our own; what died is noticed and by policy restarted, what was stopped never is."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

import structlog
from sqlalchemy.engine import Connection

from bot.fleet._tmux import Tmux, TmuxError, TmuxHung, TmuxMissing, passed_on
from bot.fleet.panes import BEGAN, FOLDER, LANE, MARK, Pane, Topology, as_json, look, over, snapshot, tmux_of, topology
from bot.models import PauseScope, UserError
from bot.settings import Settings
from bot.store import Store, intents, lanes, pauses
from bot.store.lanes import Lane

__all__ = [
    "LaneState",
    "Lanes",
    "Pane",
    "Shown",
    "TmuxError",
    "TmuxHung",
    "TmuxMissing",
    "Topology",
    "as_json",
    "over",
    "passed_on",
    "snapshot",
    "tmux_of",
    "topology",
]

log = structlog.get_logger()

LOCK_SECONDS = 30.0
WAIT_SECONDS = 0.2
CALM_MS = 600_000
BACKOFF_MAX_SECONDS = 600.0
MISUSED = 2
SIZE = ("-x", "220", "-y", "50")
WINDOW = "lanes"
HISTORY = "20000"
BORDER = " #{pane_title}#{?pane_dead, (ended #{pane_dead_status}#{pane_dead_signal}),} "


class LaneState(StrEnum):
    """What is to be seen of a lane. `gone` is a lane without a pane, `ended` one whose pane shows the last words of its worker."""

    RUNNING = "running"
    ENDED = "ended"
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class Shown:
    """A lane as it is wanted and as it is. `pane` is None where there is none."""

    row: Lane
    state: LaneState
    pane: Pane | None

    @property
    def well(self) -> bool:
        """Whether it is as it is wanted."""
        return (self.state is LaneState.RUNNING) == (self.row.wanted == lanes.UP)


class Lanes:
    """The lanes of one state folder. Every change of panes happens under a lock in that folder, so that several may be at it at once."""

    def __init__(self, store: Store, settings: Settings, *, node_id: str, environ: Mapping[str, str], now_ms: Callable[[], int]) -> None:
        self._store = store
        self._settings = settings
        self._node = node_id
        self._session = settings.lanes.session
        self._tmux: Tmux = tmux_of(settings, environ)
        self._now_ms = now_ms
        self._trouble = ""
        self._seen: tuple[Pane, ...] = ()

    async def up(self, count: int, *, config: Path, by: str) -> Topology:
        """The first `count` lanes run from now on; those that run go on. Raises UserError where tmux, the folder or the session cannot be used."""
        self._tmux.program()
        self._check_folder()
        self._tmux.check_socket(os.geteuid())
        async with self._alone():
            found = await self._ours()
            now = self._now_ms()
            numbers = range(count)
            await self._store.write(lambda conn: lanes.want(conn, self._node, numbers, config=str(config), by=by, now_ms=now))
            for row in await self._rows():
                pane = found.lane(row.lane) if found else None
                if row.lane in numbers and (pane is None or pane.dead) and await self._start(row, pane, restarts=0):
                    found = await self._ours()
        if found is None:
            raise TmuxError(
                "the tmux session ended as soon as it was made. Remedy: run `timmy-dispatch worker` by hand and see what it says"
            )
        snapshot(self._settings, found)
        return found

    async def down(self, numbers: Iterable[int] | None = None, *, by: str, now: bool = False, wait: float | None = None) -> tuple[int, ...]:
        """These lanes, or all, take no new sprint and end, with `now` at once; returns those that still run after `wait` seconds (None: no limit).

        They are not started again, whatever becomes of tmux, before somebody says `up`. Panes that others made in the session stay.
        """
        rows = await self._rows()
        chosen = {row.lane for row in rows} if numbers is None else set(numbers)
        await self._store.write(lambda conn: lanes.unwant(conn, self._node, chosen, why="lanes down", by=by, now_ms=self._now_ms()))
        self._check_folder()
        deadline = None if wait is None else time.monotonic() + wait
        told = False
        while True:
            async with self._alone():
                found = await self._ours()
                mine = [pane for pane in (found.panes if found else ()) if pane.lane in chosen]
                alive = [pane for pane in mine if not pane.dead]
                if not told:
                    _signal(alive, signal.SIGHUP if now else signal.SIGTERM)
                    told = True
                for pane in mine:
                    if pane.dead:
                        await self._tmux.ask("kill-pane", "-t", pane.id)
            if not alive or (deadline is not None and time.monotonic() >= deadline):
                break
            await asyncio.sleep(WAIT_SECONDS)
        if self._tmux.folder.exists():
            snapshot(self._settings, await self._ours())
        return tuple(sorted(pane.lane for pane in alive if pane.lane is not None))

    async def shown(self) -> list[Shown]:
        """Every lane there is or was, as wanted and as seen."""
        found = await self._ours()
        out = []
        for row in await self._rows():
            pane = found.lane(row.lane) if found else None
            state = LaneState.GONE if pane is None else LaneState.ENDED if pane.dead else LaneState.RUNNING
            out.append(Shown(row, state, pane))
        return out

    async def mend(self, *, patient: bool = True) -> list[int]:
        """Starts again what died and by policy may; returns those lanes. `patient` keeps the distance between restarts. Raises UserError as `up` does.

        A worker that ended by itself with 0 was drained by a person: it is not wanted any more. While the fleet is paused nothing is started.
        """
        wanted = [row for row in await self._rows() if row.wanted == lanes.UP]
        if not wanted or self._settings.lanes.restart == "never" or await self._store.read(self._paused):
            return []
        async with self._alone():
            found = await self._ours()
            started = []
            # Anew, under the lock: somebody may have said `down` meanwhile.
            for row in await self._rows():
                pane = found.lane(row.lane) if found else None
                if row.wanted != lanes.UP or (pane is not None and not over(pane)) or await self._let_rest(row, pane):
                    continue
                if patient and self._now_ms() < row.due_ms:
                    continue
                calm = self._now_ms() - row.started_ms > CALM_MS
                if await self._start(row, pane, restarts=1 if calm else row.restarts + 1):
                    started.append(row.lane)
                    found = await self._ours()
        return started

    async def restart(self, pane: Pane) -> bool:
        """Starts a dead pane's worker again, now; False where it is alive, is no lane, or is not wanted (a person stopped it, or the fleet is paused)."""
        if not over(pane) or pane.lane is None or await self._store.read(self._paused):
            return False
        async with self._alone():
            found = await self._ours()
            seen = found.lane(pane.lane) if found else None
            row = next((row for row in await self._rows() if row.lane == pane.lane), None)
            if row is None or row.wanted != lanes.UP or (seen is not None and not over(seen)) or await self._let_rest(row, seen):
                return False
            return await self._start(row, seen, restarts=row.restarts + 1)

    async def run(self, keeps: Callable[[], bool]) -> None:
        """Looks after the panes until cancelled, while `keeps()`; what tmux cannot do is said once and tried again."""
        while True:
            try:
                if keeps():
                    await self._watch()
            except UserError as error:
                if str(error) != self._trouble:
                    log.warning("lanes.trouble", error=str(error))
                self._trouble = str(error)
            except Exception:
                log.exception("lanes.watch")
            await asyncio.sleep(self._settings.lanes.check_seconds)

    async def _watch(self) -> None:
        before = self._seen
        if not before and all(row.wanted != lanes.UP for row in await self._rows()):
            return
        found = await look(self._tmux, self._session)
        for pane in _lasting(found):
            if over(pane) and pane.lane is not None and pane not in before:
                log.warning("lanes.ended", lane=pane.lane, status=pane.dead_status, signal=pane.dead_signal)
        if await self.mend():
            found = await look(self._tmux, self._session)
        if _lasting(found) != before:
            await asyncio.to_thread(snapshot, self._settings, found)
        self._seen, self._trouble = _lasting(found), ""

    async def _let_rest(self, row: Lane, pane: Pane | None) -> bool:
        """Whether this lane's end was somebody's will, or nothing that a restart mends: then it is written down as not wanted.

        A worker that was still draining when somebody said `up` again ends with 0 too; that lane is wanted.
        """
        if pane is None or pane.dead_status is None:
            return False
        drained = pane.dead_status == 0 and row.changed_ms <= row.started_ms
        misused = pane.dead_status == MISUSED and self._settings.lanes.restart != "always"
        if not drained and not misused:
            return False
        why = "drained" if drained else "its configuration has a fault; the pane shows it"
        await self._store.write(lambda conn: lanes.unwant(conn, self._node, [row.lane], why=why, by="worker", now_ms=self._now_ms()))
        log.info("lanes.stopped", lane=row.lane, why=why)
        return True

    async def _start(self, row: Lane, pane: Pane | None, *, restarts: int) -> bool:
        now = self._now_ms()
        distance = min(BACKOFF_MAX_SECONDS, self._settings.lanes.backoff_seconds * 2.0 ** min(restarts, 16))
        ended = "gone" if pane is None else f"ended with {pane.dead_status if pane.dead_signal is None else f'signal {pane.dead_signal}'}"

        def take(conn: Connection) -> bool:
            if not lanes.start(conn, row, restarts=restarts, due_ms=now + int(distance * 1000), now_ms=now):
                return False
            if restarts:
                reason = f"lane {row.lane} of {self._node}: {ended}, start {restarts} in a row"
                intents.decide(conn, repo_id=0, issue=0, kind="lane", result="restarted", reason=reason, now_ms=now)
            return True

        if not await self._store.write(take):
            return False
        await self._spawn(row, pane, again=restarts > 0)
        if restarts:
            log.warning("lanes.restarted", lane=row.lane, was=ended, restarts=restarts)
        return True

    async def _spawn(self, row: Lane, pane: Pane | None, *, again: bool) -> None:
        """The worker in its old pane, beside the others, or as the first of the session.

        `again` in a pane is what ran there before, with the surroundings of who said `up`: systemd's credentials differ from unit to unit.
        """
        command = [*("-c", _literal(str(self._settings.state_dir))), "--", *self._command(row)]
        found = await self._ours()
        if pane is not None:
            await self._tmux.do("respawn-pane", "-t", pane.id, *([] if again else command), ";", *_marks(pane.id, row.lane))
            return
        near = sorted(
            (other for other in (found.panes if found else ()) if other.lane is not None), key=lambda other: (other.lane or 0) < row.lane
        )
        beside = near[-1] if near else None
        if found is None:
            await self._tmux.do(*await self._first(), *command, ";", *self._session_options(), ";", *_marks(f"={self._session}:", row.lane))
        elif beside is None or not await self._split(beside, row.lane, command):
            fresh = ["new-window", "-t", f"={self._session}:", "-n", WINDOW, *command]
            await self._tmux.do(*fresh, ";", *_marks(f"={self._session}:", row.lane))

    async def _first(self) -> list[str]:
        words = ["new-session", "-d", "-s", self._session, "-n", WINDOW, *SIZE]
        if await self._tmux.ask("list-sessions") is not None:
            return words
        # Only in a server that we start: its defaults are nobody else's.
        return ["start-server", ";", "set-option", "-g", "history-limit", HISTORY, ";", *words]

    async def _split(self, beside: Pane, lane: int, command: Sequence[str]) -> bool:
        """False where the window has no room."""
        try:
            window = (await self._tmux.do("display-message", "-p", "-t", beside.id, "#{window_id}")).strip()
            marks = _marks(window, lane)
            await self._tmux.do("split-window", "-t", beside.id, *command, ";", *marks, ";", "select-layout", "-t", window, "tiled")
        except TmuxHung:
            raise
        except TmuxError as error:
            if "no space" not in str(error):
                raise
            return False
        return True

    def _command(self, row: Lane) -> list[str]:
        """A worker that begins with a clean environment, whatever the server's holds."""
        file = self._settings.state_dir / FOLDER / f"lane-{row.lane}.log"
        file.parent.mkdir(mode=0o700, exist_ok=True)
        surroundings = [f"{name}={value}" for name, value in self._tmux.environ.items() if name != "TMUX_TMPDIR"]
        program = [sys.executable, "-P", "-m", "bot", "--config", row.config, "worker", "--lane", str(row.lane), "--log-file", str(file)]
        return [_word(word) for word in ("env", "-i", "TERM=screen-256color", *surroundings, *program)]

    def _session_options(self) -> list[str]:
        at = f"={self._session}:"
        return [
            *("set-option", "-t", at, MARK, self._node, ";"),
            *("set-option", "-t", at, "update-environment", "", ";"),
            *("set-option", "-t", at, "destroy-unattached", "off", ";"),
            *("set-option", "-t", at, "mouse", "on"),
        ]

    async def _ours(self) -> Topology | None:
        """Our session; raises TmuxError where one of its name belongs to somebody else."""
        found = await look(self._tmux, self._session)
        if found is not None and not found.ours:
            raise TmuxError(
                f"there is a tmux session `{self._session}` that timmy-dispatch did not make; it is left alone. "
                "Remedy: end or rename it, or set `lanes.session` to another name"
            )
        return found

    async def _rows(self) -> list[Lane]:
        return await self._store.read(lambda conn: lanes.of_node(conn, self._node))

    def _paused(self, conn: Connection) -> bool:
        return any(pause.scope is PauseScope.FLEET for pause in pauses.current(conn, self._now_ms()))

    def _check_folder(self) -> None:
        """The workers run as whoever starts them, and must be able to share this folder."""
        owner = self._settings.state_dir.stat().st_uid
        if owner != os.geteuid():
            raise UserError(
                f"the state folder {self._settings.state_dir} belongs to user {owner}, and you are {os.geteuid()}. "
                f"Remedy: run this as its owner (`sudo -u '#{owner}' timmy-dispatch lanes ...`)"
            )

    @contextlib.asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        """One at a time in this state folder, other processes included."""
        descriptor = os.open(self._settings.state_dir / "lanes.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            deadline = time.monotonic() + LOCK_SECONDS
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        raise TmuxError(
                            "somebody else changes the lanes and does not end. Remedy: look for a `lanes` command that hangs"
                        ) from None
                    await asyncio.sleep(WAIT_SECONDS / 4)
            yield
        finally:
            os.close(descriptor)


def _lasting(found: Topology | None) -> tuple[Pane, ...]:
    """The panes without what changes from moment to moment: the name of the program in front."""
    return () if found is None else tuple(replace(pane, command="") for pane in found.panes)


def _marks(target: str, lane: int) -> list[str]:
    """Says which lane the pane is, and since when: commands that follow the one that starts the worker, before tmux looks at anything else."""
    return [
        *("set-option", "-p", "-t", target, LANE, str(lane), ";"),
        *("set-option", "-p", "-t", target, BEGAN, str(int(time.time())), ";"),
        *("set-option", "-w", "-t", target, "remain-on-exit", "on", ";"),
        *("set-option", "-w", "-t", target, "allow-rename", "off", ";"),
        *("set-option", "-w", "-t", target, "pane-border-status", "top", ";"),
        *("set-option", "-w", "-t", target, "pane-border-format", BORDER, ";"),
        *("select-pane", "-t", target, "-T", f"lane {lane}"),
    ]


def _word(text: str) -> str:
    """A word that tmux does not take for the end of a command."""
    return text[:-1] + "\\;" if text.endswith(";") else text


def _literal(text: str) -> str:
    """A text that tmux does not take for a format."""
    return _word(text.replace("#", "##"))


def _signal(panes: Iterable[Pane], number: signal.Signals) -> None:
    for pane in panes:
        if pane.pid > 1:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pane.pid, number)
