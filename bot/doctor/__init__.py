"""What must hold before the fleet can be trusted, one concern a file: each check only looks, and says how to mend what it finds."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from bot.config import Secrets, Settings
from bot.gitea import errors
from bot.gitea.forge import Forge


class Mark(StrEnum):
    """What a probe found; only FAIL makes `doctor` exit with 1."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Probe:
    """One finding: what was looked at, what was seen, and, where it is not in order, what to do. `unanswered`: the server did not answer at all."""

    name: str
    mark: Mark
    detail: str
    remedy: str = ""
    unanswered: bool = False


@dataclass(frozen=True, slots=True)
class Patient:
    """What the checks may look at. `wait_seconds` is how long a test delivery may take."""

    settings: Settings
    secrets: Secrets
    forge: Forge
    environ: Mapping[str, str] = field(repr=False)
    wait_seconds: float = 10.0


@dataclass(frozen=True, slots=True)
class Check:
    """What a module of this package exposes as `plugin`; checks run in order of `rank`, then of title. Those with `forge` need an answering server.

    `only` is `serve` or `worker` where it looks at what the other kind of process does not need.
    """

    title: str
    run: Callable[[Patient], AsyncIterator[Probe]]
    rank: int = 50
    forge: bool = False
    only: str = ""


def ok(name: str, detail: str) -> Probe:
    """A probe that found all in order."""
    return Probe(name, Mark.OK, detail)


def warn(name: str, detail: str, remedy: str) -> Probe:
    """A probe that found something an operator should know."""
    return Probe(name, Mark.WARN, detail, remedy)


def fail(name: str, detail: str, remedy: str) -> Probe:
    """A probe that found something the fleet cannot work with."""
    return Probe(name, Mark.FAIL, detail, remedy)


def refused(name: str, error: errors.ForgeError) -> Probe:
    """A failed probe out of what the forge answered, or did not."""
    detail, remedy = explain(error)
    return Probe(name, Mark.FAIL, detail, remedy, unanswered=errors.is_transient(error))


def checks() -> list[Check]:
    """Every check there is, in the order in which they run."""
    import bot.doctor as package
    from bot.discovery import discover

    return sorted((check for _, check in discover(package, Check)), key=lambda check: (check.rank, check.title))


async def examine(patient: Patient, wanted: list[Check]) -> AsyncIterator[Probe]:
    """Runs the checks one after the other; one that breaks is a failed probe of its own and does not stop the rest.

    Once the server did not answer, what needs it is left out: each question would only wait as long again.
    """
    silent = False
    for check in wanted:
        if check.forge and silent:
            yield fail(check.title, "not looked at, because the server does not answer", "mend that first")
            continue
        try:
            async for probe in check.run(patient):
                silent = silent or probe.unanswered
                yield probe
        except errors.ForgeError as error:
            silent = silent or errors.is_transient(error)
            yield refused(check.title, error)
        except Exception as error:
            yield fail(check.title, f"the check itself broke: {type(error).__name__}: {error}", "report this with the text above")


def explain(error: errors.ForgeError) -> tuple[str, str]:
    """What a refusal of the forge means, and its remedy."""
    text = str(error)
    if isinstance(error, errors.Unauthorized):
        return text, "the server does not know this token: make a new one for the bot's account and put it into the token file"
    if "must change your password" in error.message:
        return (
            "the bot's account must change its password first, so every call is refused",
            "on the Gitea server: gitea admin user must-change-password --unset NAME",
        )
    if isinstance(error, errors.Forbidden) and "scope" in error.message:
        return text, "make a token with the scopes write:issue, write:repository and read:user"
    if isinstance(error, errors.Forbidden):
        return text, "make the bot's account an administrator of the repository (Settings, Collaborators)"
    if isinstance(error, errors.NotFound):
        return text, "check the spelling; a private repository is also hidden from an account that is no collaborator"
    if isinstance(error, errors.Moved):
        return text, "the server answers under another address or name: write that one into dispatch.yml"
    if isinstance(error, errors.BadReply):
        return text, "is this the address of Gitea itself? A proxy or a login page seems to answer"
    return text, "check address, name service, firewall and certificate; is the server up?"
