"""Logging of the process: one line a record, on the error channel, redacted on every way out."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, TextIO

import structlog

from bot.redaction import RedactingFilter, Redactor

FILE_BYTES = 5_000_000
MINUTE = 60.0
LINES_A_MINUTE = 20
KINDS_REMEMBERED = 1000
TEXT_OF_KIND = 40
FILES_KEPT = 3
QUIET = ("aiohttp.access", "openai", "httpx2", "httpcore2", "asyncio", "alembic", "sqlalchemy.engine")


class Calm(logging.Filter):
    """A trouble that lasts is told, not poured out: of each kind of warning 20 lines a minute, and its traceback once a minute.

    A kind is a logger and what it says, without the particulars. The first line after some were left out says how many (`left_out`).
    Where a database is away every loop of the service meets it several times a second, and the log would fill the disk in a night.
    """

    def __init__(self, *, now: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._now = now
        self._lock = threading.Lock()
        self._kinds: dict[tuple[str, str], tuple[float, int, int]] = {}
        self._traces: dict[tuple[str, str, str], float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is told; takes a traceback out of it that was shown a moment ago. A second handler gets the same answer."""
        if record.levelno < logging.WARNING or record.levelno >= logging.CRITICAL:
            return True
        told: bool | None = getattr(record, "calm_told", None)
        if told is None:
            with self._lock:
                told = self._told(record)
            record.calm_told = told
        return told

    def _told(self, record: logging.LogRecord) -> bool:
        said = record.msg if isinstance(record.msg, dict) else None
        text = str(said.get("event", "")) if said is not None else str(record.msg)
        kind = (record.name, text[:TEXT_OF_KIND])
        began, lines, left_out = self._kinds.get(kind, (self._now(), 0, 0))
        if self._now() - began >= MINUTE:
            began, lines = self._now(), 0
        if lines >= LINES_A_MINUTE:
            self._kinds[kind] = (began, lines, left_out + 1)
            return False
        self._remember(self._kinds, kind, (began, lines + 1, 0))
        if said is not None:
            self._shorten(kind, said, left_out)
        elif "\n" in text and not record.args and not self._is_new((*kind, "")):
            record.msg = text.strip().splitlines()[0] + (f" ({left_out} left out)" if left_out else "")
        return True

    def _shorten(self, kind: tuple[str, str], said: dict[str, Any], left_out: int) -> None:
        if left_out:
            said["left_out"] = left_out
        trace = str(said.get("exception") or "")
        if not trace:
            return
        last = _error_of(trace)
        if not self._is_new((*kind, last[:TEXT_OF_KIND])):
            del said["exception"]
            said.setdefault("error", last)

    def _is_new(self, trace: tuple[str, str, str]) -> bool:
        shown = self._traces.get(trace)
        if shown is not None and self._now() - shown < MINUTE:
            return False
        self._remember(self._traces, trace, self._now())
        return True

    @staticmethod
    def _remember(memory: dict[Any, Any], key: Any, value: Any) -> None:
        if len(memory) >= KINDS_REMEMBERED:
            memory.clear()
        memory[key] = value


def _error_of(trace: str) -> str:
    """The line of a traceback that names the error: the last one that is not indented and looks like `module.Error: ...`."""
    lines = [line for line in trace.splitlines() if line and not line[0].isspace()]
    named = [line for line in lines if line.partition(":")[0].replace(".", "").replace("_", "").isalnum()]
    return (named or lines or [trace])[-1][:300]


def configure(
    redactor: Redactor, *, level: str = "INFO", json: bool = False, stream: TextIO | None = None, file: Path | None = None
) -> None:
    """Sends structlog and the standard library's records to `stream`, else to stderr, and to `file`, which is rotated; a second call replaces the first."""
    stream = stream or sys.stderr
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    handlers: list[logging.Handler] = [logging.StreamHandler(stream)]
    if file is not None:
        handlers.append(RotatingFileHandler(file, maxBytes=FILE_BYTES, backupCount=FILES_KEPT, encoding="utf-8"))
    calm = Calm()
    for handler, coloured in zip(handlers, (stream.isatty(), False), strict=False):
        renderer: structlog.typing.Processor = (
            structlog.processors.JSONRenderer() if json else structlog.dev.ConsoleRenderer(colors=coloured, sort_keys=False)
        )
        handler.setFormatter(structlog.stdlib.ProcessorFormatter(processor=renderer, foreign_pre_chain=shared))
        handler.addFilter(calm)
        handler.addFilter(RedactingFilter(redactor))
    root = logging.getLogger()
    for former in root.handlers:
        if isinstance(former, RotatingFileHandler):
            former.close()
    root.handlers[:] = handlers
    root.setLevel(level)
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    engine = logging.getLogger("dbos")
    engine.handlers[:] = handlers
    engine.propagate = False
