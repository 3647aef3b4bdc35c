"""Which repositories the bot serves: keyed on the forge's numeric id, addressed by whatever name they have today."""

from __future__ import annotations

import base64
import binascii
import time
from collections.abc import Mapping
from typing import Any

import structlog
from sqlalchemy.engine import Connection

from bot.config import RepositorySettings, Settings
from bot.gitea.errors import ForgeError, NotFound, Unavailable, is_transient, may_recover
from bot.gitea.forge import Forge
from bot.repo_config import FILE, MAX_BYTES, RepoConfig, not_a_file, parse_repo_config
from bot.store import Store, cursors, pauses, plans, sprints

log = structlog.get_logger()

FACT = "repositories"
CAPS = "open_pr_caps"
RECORD_SECONDS = 60.0
# A person who mends the file and asks again should meet what it says now.
CONFIG_SECONDS = 5.0
DECIDING = ("archived", "empty", "default_branch", "has_pull_requests")


def known_repositories(conn: Connection) -> dict[int, tuple[str, str]]:
    """Repository id -> (name in the configuration, name of today), as the service learnt them."""
    known = cursors.get(conn, FACT) or {}
    return {int(key): (entry["configured"], entry["full_name"]) for key, entry in known.items()}


def open_pr_caps(conn: Connection) -> dict[int, int]:
    """Repository id -> the most open pull requests of the bot that its `.dispatch.yml` allows, where it says so."""
    return {int(key): int(value) for key, value in (cursors.get(conn, CAPS) or {}).items()}


def _remember_cap(conn: Connection, repo_id: int, most: int | None) -> None:
    caps = {key: value for key, value in (cursors.get(conn, CAPS) or {}).items() if key != str(repo_id)}
    cursors.put(conn, CAPS, caps | ({} if most is None else {str(repo_id): most}))


def read_config(found: Any) -> RepoConfig:
    """The `.dispatch.yml` in an answer of `Forge.content`."""
    if found is None:
        return RepoConfig()
    if not isinstance(found, dict) or found.get("type") != "file":
        return not_a_file()
    content = found.get("content")
    if not isinstance(content, str):
        # A file that the server finds too large to send has no content here.
        return parse_repo_config(b"\n" * min(int(found.get("size") or 0), MAX_BYTES + 1))
    try:
        return parse_repo_config(base64.b64decode(content))
    except binascii.Error:
        return not_a_file()


class Repositories:
    """The served repositories; what is known survives restarts in the store, so that a silent forge does not make us forget whom we serve."""

    def __init__(self, store: Store, forge: Forge, settings: Settings) -> None:
        self._store = store
        self._forge = forge
        self._settings = settings
        self._configured: dict[int, str] = {}
        self._names: dict[int, str] = {}
        self._records: dict[int, tuple[float, Mapping[str, Any]]] = {}
        self._configs: dict[int, tuple[float, RepoConfig]] = {}

    async def load(self) -> None:
        """Reads what is known, then asks the forge for what is not."""
        wanted = {repository.name.casefold() for repository in self._settings.repositories}
        for repo_id, (configured, full_name) in (await self._store.read(known_repositories)).items():
            if configured.casefold() in wanted:
                self._configured[repo_id] = configured
                self._names[repo_id] = full_name
        await self.refresh()

    async def refresh(self) -> list[str]:
        """Asks the forge about every repository that is configured; returns those it could not tell, with the reason."""
        missing = []
        for repository in self._settings.repositories:
            owner, _, name = repository.name.partition("/")
            repo_id = next((key for key, value in self._configured.items() if value == repository.name), None)
            try:
                record = await (self._forge.repo(owner, name) if repo_id is None else self._forge.repo_by_id(repo_id))
            except ForgeError as error:
                missing.append(f"{repository.name}: {error}")
                if not is_transient(error):
                    log.warning("repositories.unreadable", repository=repository.name, error=str(error))
                continue
            self._remember(int(record["id"]), repository.name, record)
        await self._save()
        return missing

    def _remember(self, repo_id: int, configured: str, record: Mapping[str, Any]) -> None:
        self._configured[repo_id] = configured
        self._names[repo_id] = str(record["full_name"])
        self._records[repo_id] = (time.monotonic(), record)

    async def _save(self) -> None:
        known = {str(key): {"configured": value, "full_name": self._names[key]} for key, value in self._configured.items()}
        await self._store.write(lambda conn: cursors.put(conn, FACT, known))

    def names(self) -> dict[int, str]:
        """Repository id -> `owner/repo` as it is called today."""
        return dict(self._names)

    def serves(self, repo_id: int | None, full_name: str | None) -> RepositorySettings | None:
        """The settings of a repository by its id, else (where no id was ever learnt) by its name; None for a foreign one."""
        if repo_id is not None and repo_id in self._configured:
            return self._settings.repository(self._configured[repo_id])
        if full_name and self._settings.repository(full_name) and full_name not in self._configured.values():
            return self._settings.repository(full_name)
        return None

    def configured_names(self) -> dict[int, str]:
        """Repository id -> the name it has in the configuration."""
        return dict(self._configured)

    def name_of(self, repo_id: int, otherwise: str) -> str:
        """The address of today."""
        return self._names.get(repo_id, otherwise)

    async def renamed(self, repo_id: int, full_name: str) -> None:
        """A payload or a redirect told another address."""
        if self._names.get(repo_id) == full_name:
            return
        configured = self._settings.repository(full_name)
        if repo_id not in self._configured:
            if configured is None:
                return
            self._configured[repo_id] = configured.name
        self._names[repo_id] = full_name
        self._records.pop(repo_id, None)
        await self._save()

        def write(conn: Connection) -> None:
            sprints.renamed(conn, repo_id, full_name)
            plans.renamed(conn, repo_id, full_name)
            pauses.renamed(conn, repo_id, full_name)

        await self._store.write(write)
        log.info("repositories.renamed", repo_id=repo_id, full_name=full_name)

    def told(self, repo_id: int, record: object) -> None:
        """A payload's repository: where ours says otherwise about what decides, it is asked for anew."""
        known = self._records.get(repo_id)
        if known is not None and isinstance(record, Mapping) and any(record.get(key) != known[1].get(key) for key in DECIDING):
            del self._records[repo_id]

    async def resolve(self, repo_id: int) -> str:
        """Asks the forge for the address of an id, after a redirect or a 404; raises ForgeError."""
        full_name = await self._forge.resolve(repo_id)
        await self.renamed(repo_id, full_name)
        return full_name

    async def must_be_seen(self, repo_id: int) -> None:
        """After a 404 of something in it: raises Unavailable where the forge does not show the repository itself.

        Then it is deleted, or the bot has lost its access: nothing is known of what was asked for.
        """
        try:
            await self._forge.repo_by_id(repo_id)
        except NotFound as error:
            raise Unavailable("the repository is gone, or hidden from me", status=error.status) from error

    async def config(self, repo_id: int, *, fresh: bool = False) -> RepoConfig:
        """What `.dispatch.yml` of the default branch says, at most CONFIG_SECONDS old; raises ForgeError.

        Always that branch: whoever may push another one, or name it with `base=`, must not choose by which rules their work is judged.
        """
        known = self._configs.get(repo_id)
        if known is not None and not fresh and time.monotonic() - known[0] < CONFIG_SECONDS:
            return known[1]
        try:
            found = await self._forge.content(self._names[repo_id], FILE) if repo_id in self._names else None
        except ForgeError as error:
            if may_recover(error):
                raise
            log.warning("repositories.no_config", repo_id=repo_id, error=str(error))
            found = None
        config = read_config(found)
        self._configs[repo_id] = (time.monotonic(), config)
        if known is None or known[1].file.max_open_prs != config.file.max_open_prs:
            await self._store.write(lambda conn: _remember_cap(conn, repo_id, config.file.max_open_prs))
        return config

    async def record(self, repo_id: int) -> Mapping[str, Any]:
        """The forge's record of the repository, at most RECORD_SECONDS old; raises ForgeError."""
        known = self._records.get(repo_id)
        if known is not None and time.monotonic() - known[0] < RECORD_SECONDS:
            return known[1]
        record = await self._forge.repo_by_id(repo_id)
        self._remember(repo_id, self._configured.get(repo_id, str(record["full_name"])), record)
        return record
