"""The clock of this machine is right: it did not jump since the last look, and agrees with that of Gitea."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

from bot.fleet.probes import Probe, Reach, failing, fine, notable, untold
from bot.gitea.errors import ForgeError, NotFound
from bot.gitea.forge import Forge
from bot.snapshot import Finding

NOTABLE_SECONDS = 5.0
WRONG_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Moment:
    """The same moment by the wall clock (Unix ms) and by one that nobody sets (seconds)."""

    wall_ms: int
    boot: float


async def look(reach: Reach) -> Sequence[Finding]:
    """The jump, then the difference to Gitea."""
    now, before = Moment(reach.now_ms(), reach.boottime()), reach.memory.get("clock")
    reach.memory["clock"] = now
    found = [jump(before, now) if isinstance(before, Moment) else fine("jump", "this is the first look")]
    repository = next(iter(reach.names().values()), reach.settings.repositories[0].name)
    began = reach.now_ms()
    try:
        date = await server_date(reach.forge, repository)
    except ForgeError as error:
        return [*found, untold("gitea", f"it does not tell its time: {error}")]
    return [*found, compare(date, began / 1000, reach.now_ms() / 1000)]


def jump(before: Moment, now: Moment) -> Finding:
    """Whether the wall clock went another way than time itself."""
    seconds = (now.wall_ms - before.wall_ms) / 1000 - (now.boot - before.boot)
    way = "forward" if seconds > 0 else "back"
    text = f"the clock of this machine was set {way} by {abs(seconds):.0f} s"
    if abs(seconds) > WRONG_SECONDS:
        return failing("jump", text, seconds=round(seconds, 1))
    if abs(seconds) > NOTABLE_SECONDS:
        return notable("jump", text, seconds=round(seconds, 1))
    return fine("jump", "no jump since the last look", seconds=round(seconds, 1))


def compare(date: str, before: float, after: float) -> Finding:
    """Judges Gitea's date by the moments (Unix seconds) round the call."""
    seconds = skew(date, before, after)
    if seconds is None:
        return untold("gitea", "it sends no date")
    text = f"its clock and ours differ by {seconds:.0f} s"
    if seconds > WRONG_SECONDS:
        return failing("gitea", text, seconds=round(seconds, 1))
    if seconds > NOTABLE_SECONDS:
        return notable("gitea", text, seconds=round(seconds, 1))
    return fine("gitea", "both clocks agree", seconds=round(seconds, 1))


async def server_date(forge: Forge, repository: str) -> str:
    """The Date header of a refusal, because only refusals show their headers; "" where there is none. Raises ForgeError where nobody answers."""
    owner, _, name = repository.partition("/")
    try:
        await forge.api.getitem("/repos/{owner}/{repo}/labels/{id}", owner=owner, repo=name, id=0)
    except NotFound as refusal:
        return next((value for key, value in refusal.headers.items() if key.lower() == "date"), "")
    return ""


def skew(date: str, before: float, after: float) -> float | None:
    """Seconds by which an HTTP date, which has whole seconds, lies outside the moments (Unix seconds) round the call; None for no date."""
    try:
        theirs = parsedate_to_datetime(date).timestamp()
    except (ValueError, TypeError):
        return None
    return max(before - 1 - theirs, theirs - after, 0.0)


plugin = Probe("the clocks of this machine and of Gitea", look, period_seconds=60.0)
