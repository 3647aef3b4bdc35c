"""What a command of the terminal needs of the service's rooms: the store, and where it asks the forge, the decider over both."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bot.config import Loaded
    from bot.decide import Decider
    from bot.gitea.forge import Forge
    from bot.repositories import Repositories
    from bot.store import Store


@dataclass(frozen=True, slots=True)
class House:
    """The rooms of one call; a running service sees new rows at its next tick."""

    store: Store
    forge: Forge
    repositories: Repositories
    decider: Decider


def now_ms() -> int:
    """Unix milliseconds by this machine's clock."""
    return time.time_ns() // 1_000_000


@contextlib.contextmanager
def opened(loaded: Loaded) -> Iterator[Store]:
    """The service's database; raises UserError where there is none yet."""
    from bot.models import UserError
    from bot.store import Store

    store = Store(loaded.settings.database_url())
    if store.path is not None and not store.path.exists():
        raise UserError(f"there is no state in {loaded.settings.state_dir}: start the service once (`timmy-dispatch serve`)")
    store.open()
    try:
        yield store
    finally:
        store.close()


@contextlib.asynccontextmanager
async def house(loaded: Loaded, store: Store) -> AsyncIterator[House]:
    """The forge, the repositories it shows and the decider; what they log goes to the error channel, and only warnings do."""
    import commands
    from bot.chatops import Command
    from bot.decide import Decider
    from bot.discovery import discover
    from bot.failpoints import Failpoints
    from bot.gitea.aiohttp import GiteaClient
    from bot.gitea.forge import Forge
    from bot.logs import configure
    from bot.redaction import Redactor
    from bot.repositories import Repositories

    settings, keys = loaded.settings, loaded.secrets
    secrets = [keys.forge_token, *keys.webhook_secrets, *(key for key in keys.provider_keys if key is not None)]
    configure(Redactor(secrets), level="WARNING")
    async with GiteaClient(settings.forge.url, loaded.secrets.forge_token, ca_file=settings.forge.ca_file) as client:
        forge = Forge(client)
        repositories = Repositories(store, forge, settings)
        await repositories.load()
        decider = Decider(
            store,
            forge,
            settings=settings,
            repositories=repositories,
            commands=dict(discover(commands, Command)),
            kick_queue=_nothing,
            kick_projector=_nothing,
            observe=lambda _event: None,
            count=lambda _verb, _result: None,
            failpoint=Failpoints(),
            now_ms=now_ms,
        )
        yield House(store, forge, repositories, decider)


def _nothing() -> None:
    """The service sees new rows at its next tick."""
