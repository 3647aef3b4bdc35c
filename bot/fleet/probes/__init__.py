"""What the watchdog looks at, one probe a file: each looks without changing anything, and may know one action that mends what it found."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bot.fleet.lanes import Lanes
from bot.gitea.forge import Forge
from bot.models import DispatchError
from bot.providers.chain import Login, ProviderChain
from bot.providers.entries import Entries, hermes_home
from bot.redaction import Secret
from bot.settings import Settings
from bot.snapshot import Finding, ProbeVerdict
from bot.store import Store

# Who a stop flag or a decision of the watchdog is credited to.
WATCHDOG = "the watchdog"


class MendError(DispatchError):
    """The action did not help; its text says why."""


def boottime() -> float:
    """Seconds of a clock that nobody sets; it runs on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _nothing() -> None:
    return None


@dataclass(frozen=True, slots=True)
class Reach:
    """What probes may look at and act through.

    `names` tells the served repositories by id; `logins` renew the keys of providers; `hermes` is the root of Hermes' profiles. `lanes` are those of
    this host. `webhook_secret` is the one that hooks are made with, None where this process does not know it. `memory` is what a probe remembers from
    one look of this process to the next. `make_room` deletes what retention allows and says how much; it is None where this process may not.
    """

    settings: Settings
    store: Store
    forge: Forge
    names: Callable[[], Mapping[int, str]]
    chain: ProviderChain
    entries: Entries
    hermes: Path
    environ: Mapping[str, str] = field(repr=False)
    now_ms: Callable[[], int]
    logins: Mapping[str, Login] = field(default_factory=dict)
    boottime: Callable[[], float] = boottime
    lanes: Lanes | None = None
    make_room: Callable[[], Awaitable[str]] | None = None
    webhook_secret: Secret | None = None
    kick_queue: Callable[[], None] = _nothing
    kick_projector: Callable[[], None] = _nothing
    memory: dict[str, object] = field(default_factory=dict)


def _always(_settings: Settings) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class Probe:
    """One thing to watch: the `plugin` of each module here, named after its file.

    `look` returns one finding a target and changes nothing people could miss; nothing to look at is well. It gets `limit_seconds`, is called every
    `period_seconds`, and `again_seconds` after a look that was not well. `mend` acts on one finding that calls itself mendable, says what it did,
    and raises MendError where that did not help; `does` names the action in a few words. `distance_seconds` is the least time between two actions
    on one target where that is not the settings' `backoff_minutes`. Where `wanted` says no, the settings give it nothing to look at.
    """

    title: str
    look: Callable[[Reach], Awaitable[Sequence[Finding]]]
    period_seconds: float
    mend: Callable[[Reach, Finding], Awaitable[str]] | None = None
    does: str = ""
    limit_seconds: float = 30.0
    mend_seconds: float = 120.0
    again_seconds: float | None = None
    distance_seconds: float | None = None
    wanted: Callable[[Settings], bool] = _always


def probes() -> dict[str, Probe]:
    """Every probe there is, by name."""
    import bot.fleet.probes as package
    from bot.discovery import discover

    return dict(discover(package, Probe))


def hermes_root(settings: Settings, *, environ: Mapping[str, str], home: Path) -> Path:
    """The root of Hermes' profiles: what the watchdog's settings name, else that of the provider with `from_hermes`, else the person's own."""
    if settings.watchdog.hermes_home is not None:
        return settings.watchdog.hermes_home
    provider = next((provider for provider in settings.providers if provider.from_hermes), settings.providers[0])
    return hermes_home(provider, environ=environ, home=home)


def fine(target: str, reason: str, **evidence: object) -> Finding:
    """All in order."""
    return Finding(target, ProbeVerdict.OK, reason, evidence)


def notable(target: str, reason: str, **evidence: object) -> Finding:
    """Something an operator should know; the fleet works."""
    return Finding(target, ProbeVerdict.WARN, reason, evidence)


def failing(target: str, reason: str, **evidence: object) -> Finding:
    """Something the fleet cannot work with."""
    return Finding(target, ProbeVerdict.FAILING, reason, evidence)


def untold(target: str, reason: str, **evidence: object) -> Finding:
    """It cannot be told from here, and why."""
    return Finding(target, ProbeVerdict.UNKNOWN, reason, evidence)


def ago(seconds: float) -> str:
    """`40 s`, `12 min`, `5 h`, `3 d`."""
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
