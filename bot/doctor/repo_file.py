"""What a repository says of itself in `.dispatch.yml` can be read."""

from __future__ import annotations

from collections.abc import AsyncIterator

from bot.doctor import Check, Patient, Probe, ok, warn
from bot.gitea.errors import ForgeError
from bot.repo_config import FILE
from bot.repositories import read_config


async def run(patient: Patient) -> AsyncIterator[Probe]:
    """Every repository that has the file; one whose file cannot be asked for is told by the checks of account and rights."""
    for repository in patient.settings.repositories:
        try:
            found = await patient.forge.content(repository.name, FILE)
        except ForgeError:
            continue
        if found is None:
            continue
        config = read_config(found)
        name = f"{repository.name} {FILE}"
        if config.faults:
            yield warn(name, "; ".join(config.told()), "mend it on the default branch; until then what is at fault is left out")
        else:
            yield ok(name, ", ".join(config.file.model_dump(exclude_defaults=True)) or "says nothing")


plugin = Check("repository file", run, forge=True, rank=25)
