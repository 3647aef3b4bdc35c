"""The trigger label and the five state labels exist; the state labels push one another out, the trigger label stays beside them."""

from __future__ import annotations

from collections.abc import AsyncIterator

from bot.doctor import Check, Patient, Probe, fail, ok, refused
from bot.gitea.errors import ForgeError
from bot.gitea.forge import Forge
from bot.models import STATE_LABEL_COLORS, StateLabel

TRIGGER_COLOR = "#5319e7"
MEANINGS = {
    StateLabel.QUEUED: "waiting for its turn",
    StateLabel.RUNNING: "the bot is at work",
    StateLabel.REVIEW: "a pull request waits for review",
    StateLabel.FAILED: "the bot did not succeed; see its comment",
    StateLabel.BLOCKED: "needs a person; see the bot's comment",
}


async def run(patient: Patient) -> AsyncIterator[Probe]:
    """Every configured repository."""
    for repository in patient.settings.repositories:
        yield await look(patient.forge, repository.name, patient.settings.trigger_label)


async def look(forge: Forge, full_name: str, trigger: str) -> Probe:
    """Compares what is there with what must be."""
    name = f"{full_name} labels"
    try:
        there = {str(label.get("name")): bool(label.get("exclusive")) for label in await forge.labels(full_name)}
    except ForgeError as error:
        return refused(name, error)
    wanted = {trigger: False} | dict.fromkeys(map(str, StateLabel), True)
    missing = [label for label in wanted if label not in there]
    wrong = [label for label, exclusive in wanted.items() if label in there and there[label] is not exclusive]
    if missing or wrong:
        said = [f"missing: {', '.join(missing)}"] if missing else []
        said += [f"exclusive where it must not be, or the other way round: {', '.join(wrong)}"] if wrong else []
        return fail(name, "; ".join(said), "run `timmy-dispatch init` again")
    return ok(name, "all six")


async def make(forge: Forge, full_name: str, trigger: str) -> None:
    """Makes what is missing and mends `exclusive`; colours and texts that people changed stay."""
    await forge.ensure_label(full_name, trigger, color=TRIGGER_COLOR, description="Let the bot work on this issue")
    for label, color in STATE_LABEL_COLORS.items():
        await forge.ensure_label(full_name, label, color=color, description=MEANINGS[label], exclusive=True)


plugin = Check("labels", run, forge=True, rank=30)
