"""Logging of the process: one line a record, on the error channel, redacted on every way out."""

from __future__ import annotations

import logging
import sys
from typing import TextIO

import structlog

from bot.redaction import RedactingFilter, Redactor

QUIET = ("aiohttp.access", "openai", "httpx2", "httpcore2", "asyncio", "alembic", "sqlalchemy.engine")


def configure(redactor: Redactor, *, level: str = "INFO", json: bool = False, stream: TextIO | None = None) -> None:
    """Sends structlog and the standard library's records to `stream`, else to stderr; a second call replaces the first."""
    stream = stream or sys.stderr
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer() if json else structlog.dev.ConsoleRenderer(colors=stream.isatty())
    )
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
    handler = logging.StreamHandler(stream)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(processor=renderer, foreign_pre_chain=shared))
    handler.addFilter(RedactingFilter(redactor))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    engine = logging.getLogger("dbos")
    engine.handlers[:] = [handler]
    engine.propagate = False
