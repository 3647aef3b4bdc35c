"""results.csv and one log file a sprint, derived from the rows: the file is its own cursor, so that a crash neither loses nor doubles a line."""

from __future__ import annotations

import asyncio
import csv
import json
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import sqlalchemy as sa
import structlog
from sqlalchemy.engine import Connection

from bot.fleet.dataset import RESULTS, line, names, settled, time_ms, time_text
from bot.store import Store, steps

log = structlog.get_logger()

FILE = "results.csv"
LOGS = "logs"
TAIL_BYTES = 262_144
# A sprint that another host settled by a slower clock, or whose transaction was slow, comes behind later ones.
OVERLAP_MS = 600_000
BATCH = 200
TEXT_CAP = 100_000


class Exporter:
    """Writes into `folder` (mode 0700), one process a state folder: `round` belongs to the one that holds the leader's lock."""

    def __init__(self, store: Store, folder: Path, *, scrub: Callable[[str], str]) -> None:
        self._store = store
        self._folder = folder
        self._scrub = scrub

    async def round(self) -> int:
        """Adds what settled since; returns how many sprints those were."""
        added = 0
        while True:
            known, since_ms = await asyncio.to_thread(self._known)
            found = await self._store.read(partial(_new, since_ms=since_ms, known=known))
            for row in found:
                text = await self._store.read(partial(_text, row=row))
                await asyncio.to_thread(self._add, row, self._scrub(text))
            added += len(found)
            if len(found) < BATCH:
                return added

    @property
    def results(self) -> Path:
        """The file of results."""
        return self._folder / FILE

    def _known(self) -> tuple[set[str], int]:
        """Ids at the end of the file, and from when on the rows may hold what is not in it; makes or mends the file."""
        (self._folder / LOGS).mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder.chmod(0o700)
        header = line(names(RESULTS)).encode()
        descriptor = os.open(self.results, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "r+b") as file:
            start = file.read(len(header))
            if start != header:
                if start:
                    # Another version wrote other columns: its file stays, under another name, and this one begins anew.
                    self.results.rename(_free_name(self._folder))
                    return self._known()
                file.seek(0)
                file.truncate()
                file.write(header)
                return set(), 0
            _mend(file, len(header))
            return _end_of(file, len(header))

    def _add(self, row: Any, text: str) -> None:
        day = (time_text(row.settled_ms) or "")[:10]
        repo = re.sub(r"[^A-Za-z0-9._-]", "-", row.repo)
        final = self._folder / LOGS / f"{day}-{repo}-{row.issue}-{row.id}.log"
        _write(final, text)
        descriptor = os.open(self.results, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW)
        with os.fdopen(descriptor, "ab") as file:
            file.write(line(column.of(row) for column in RESULTS).encode())
            file.flush()
            os.fsync(file.fileno())


def _mend(file: BinaryIO, begin: int) -> None:
    """Cuts off the last line where a crash left it short."""
    size = file.seek(0, os.SEEK_END)
    start = max(begin, size - TAIL_BYTES)
    file.seek(start)
    tail = file.read()
    if tail and not tail.endswith(b"\n"):
        file.truncate(start + tail.rfind(b"\n") + 1)


def _end_of(file: BinaryIO, begin: int) -> tuple[set[str], int]:
    """(ids, since) of so much of the file's end that nothing before it can have settled since."""
    size, length = file.seek(0, os.SEEK_END), TAIL_BYTES
    place = names(RESULTS).index("sprint")
    while True:
        start = max(begin, size - length)
        file.seek(start)
        lines = file.read().decode("utf-8", "replace").split("\n")
        rows = [row for row in csv.reader(lines if start == begin else lines[1:]) if len(row) == len(RESULTS)]
        since = max((_ms(row[0]) for row in rows), default=0) - OVERLAP_MS
        # A line may be older than the ones before it by the overlap, never by more: that is how it came to be written.
        if start == begin or (rows and _ms(rows[0][0]) < since - OVERLAP_MS):
            return {row[place] for row in rows}, since
        length *= 2


def _new(conn: Connection, *, since_ms: int, known: set[str]) -> list[Any]:
    """At most BATCH settled sprints that the file does not hold, in order of their end."""
    return list(islice((row for row in settled(conn, since_ms) if row.id not in known), BATCH))


def _text(conn: Connection, *, row: Any) -> str:
    return "".join(journal(conn, row))


def journal(conn: Connection, row: Any) -> Iterator[str]:
    """A sprint's log as text: what it was, every model call, every tool call, how it ended. Secrets were taken out before they were stored."""
    yield f"sprint {row.id}, {row.repo}#{row.issue}: {_one_line(row.title)}\n"
    yield f"asked for by {_one_line(row.requester)} ({row.source}) at {time_text(row.queued_ms)}, started {time_text(row.started_ms) or 'never'}\n"
    if row.instructions:
        yield f"instructions: {_cut(row.instructions)}\n"
    calls: dict[tuple[int, int], list[Any]] = {}
    columns = steps.tool_calls.c
    of_sprint = sa.select(steps.tool_calls).where(columns.sprint_id == row.id)
    for call in conn.execute(of_sprint.order_by(columns.attempt, columns.n, columns.i)):
        calls.setdefault((call.attempt, call.n), []).append(call)
    made = steps.table.c
    for step in conn.execute(sa.select(steps.table).where(made.sprint_id == row.id).order_by(made.attempt, made.n)):
        yield from _step(step, calls.pop((step.attempt, step.n), []))
    end = f"{row.outcome}" + (f" ({row.reason})" if row.reason else "") + (f", pull request #{row.pr}" if row.pr else "")
    yield f"\n{time_text(row.settled_ms)} {end}; {row.steps} steps, {row.tokens} tokens, ${row.usd:.4f}, {row.provider}/{row.model}, {row.engine}\n"
    if row.detail:
        yield f"{_cut(row.detail)}\n"


def _step(step: Any, calls: list[Any]) -> Iterator[str]:
    who = f"{step.provider}/{step.model}" if step.provider else "no answer"
    cost = "" if step.cost_usd is None else f", ${step.cost_usd:.4f}"
    yield f"\n--- {time_text(step.started_ms)} attempt {step.attempt}, step {step.n}: {who}, {(step.input or 0) + (step.output or 0)} tokens{cost}\n"
    if step.error:
        yield f"! {_cut(step.error)}\n"
    content = step.reply.get("content") if isinstance(step.reply, dict) else None
    if content:
        yield f"{_cut(content if isinstance(content, str) else json.dumps(content, ensure_ascii=False))}\n"
    for call in calls:
        yield f"> {call.tool} {_cut(call.arguments)}\n"
        yield f"{_cut(call.result)}\n" if call.result is not None else "! interrupted\n"


def _cut(text: str) -> str:
    return text if len(text) <= TEXT_CAP else f"{text[:TEXT_CAP]}\n[{len(text) - TEXT_CAP} characters left out]"


def _one_line(text: str) -> str:
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def _write(final: Path, text: str) -> None:
    """Whole or not at all."""
    temporary = final.with_suffix(".tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8", errors="replace") as file:
        file.write(text)
    temporary.replace(final)


def _free_name(folder: Path) -> Path:
    return next(path for n in range(1, 10_000) if not (path := folder / f"results-{n}.csv").exists())


def _ms(text: str) -> int:
    try:
        return time_ms(text)
    except ValueError:
        return 0
