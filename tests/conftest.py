from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from postgres_support import database, postgres_server
from world import World, base_folder, make_world

__all__ = ["base", "database", "postgres_server", "world"]


@pytest.fixture
def base() -> Iterator[Path]:
    """A folder of the shape of a root service's state folder."""
    with base_folder() as path:
        yield path


@pytest.fixture
async def world(base: Path) -> AsyncIterator[World]:
    """The bot beside the embedded forge, with a scripted model; what the model runs is not walled in (test_sandbox has the wall)."""
    async with make_world(base) as made:
        yield made
