"""`.dispatch.yml` of the base commit: it may add checks and protected paths, and never widens what the operator set."""

from __future__ import annotations

from dataclasses import dataclass

import yaml

from bot.config import RepositorySettings

MAX_CHECKS = 10
MAX_LENGTH = 1_000


@dataclass(frozen=True, slots=True)
class RepoConfig:
    """What a repository declares for its own sprints; `faults` are told in the log, and the operator's settings stand."""

    checks: tuple[str, ...]
    checks_timeout_seconds: float
    protected_paths: tuple[str, ...]
    faults: tuple[str, ...] = ()


def parse_repo_config(raw: bytes, repository: RepositorySettings) -> RepoConfig:
    """The operator's checks if there are any, else the repository's own; protected paths of both."""
    faults: list[str] = []
    try:
        data = yaml.safe_load(raw.decode("utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        data, faults = {}, [f".dispatch.yml cannot be read: {error}"]
    if not isinstance(data, dict):
        data, faults = {}, [".dispatch.yml is not a mapping"]
    checks = _texts(data, "checks", faults)
    return RepoConfig(
        checks=repository.checks or checks,
        checks_timeout_seconds=repository.checks_timeout_seconds,
        protected_paths=_texts(data, "protected_paths", faults),
        faults=tuple(faults),
    )


def _texts(data: dict[object, object], key: str, faults: list[str]) -> tuple[str, ...]:
    value = data.get(key, [])
    if not isinstance(value, list) or not all(isinstance(item, str) and 0 < len(item) <= MAX_LENGTH for item in value):
        faults.append(f".dispatch.yml: {key} must be a list of short texts")
        return ()
    return tuple(str(item) for item in value[:MAX_CHECKS])
