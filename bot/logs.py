"""Logging of the process: one line a record, on the error channel, redacted on every way out."""

from __future__ import annotations

import logging
import sys
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import TextIO

import structlog

from bot.redaction import RedactingFilter, Redactor

FILE_BYTES = 5_000_000
FILES_KEPT = 3
QUIET = ("aiohttp.access", "openai", "httpx2", "httpcore2", "asyncio", "alembic", "sqlalchemy.engine")


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
    for handler, coloured in zip(handlers, (stream.isatty(), False), strict=False):
        renderer: structlog.typing.Processor = (
            structlog.processors.JSONRenderer() if json else structlog.dev.ConsoleRenderer(colors=coloured, sort_keys=False)
        )
        handler.setFormatter(structlog.stdlib.ProcessorFormatter(processor=renderer, foreign_pre_chain=shared))
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
