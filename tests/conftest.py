from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import structlog
from postgres_support import database, postgres_server
from world import World, base_folder, make_world

from bot.store import Store

__all__ = ["base", "database", "postgres_server", "world"]


@pytest.fixture(autouse=True)
def quiet_logs() -> Iterator[None]:
    """A test that sets the logs up, as a command of the program does, leaves the next one as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    if structlog.is_configured():
        root.handlers[:] = handlers
        root.setLevel(level)
        structlog.reset_defaults()


@pytest.fixture
def base() -> Iterator[Path]:
    """A folder of the shape of a root service's state folder."""
    with base_folder() as path:
        yield path


@pytest.fixture
def store(database: str) -> Iterator[Store]:
    """A store with its tables, on the database that the test's `database` names."""
    made = Store(database)
    made.open()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
async def world(base: Path) -> AsyncIterator[World]:
    """The bot beside the embedded forge, with a scripted model; what the model runs is not walled in (test_sandbox has the wall)."""
    async with make_world(base) as made:
        yield made
