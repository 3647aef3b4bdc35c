"""The two clocks agree: reconciliation asks by time, and a clock that is wrong by minutes loses or repeats work."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from email.utils import parsedate_to_datetime

from bot.doctor import Check, Patient, Probe, fail, ok, warn
from bot.gitea.errors import ForgeError, NotFound

NOTABLE_SECONDS = 5.0
WRONG_SECONDS = 60.0


async def run(patient: Patient) -> AsyncIterator[Probe]:
    """Compares with the Date header that comes with a refusal, because only refusals show their headers."""
    repository = patient.settings.repositories[0].name
    owner, _, name = repository.partition("/")
    before = time.time()
    try:
        await patient.forge.api.getitem("/repos/{owner}/{repo}/labels/{id}", owner=owner, repo=name, id=0)
    except NotFound as refusal:
        yield judge(next((value for key, value in refusal.headers.items() if key.lower() == "date"), ""), before, time.time())
    except ForgeError:
        return  # told by the checks of account and rights
    else:
        yield warn("clock", "the server's clock could not be read", "compare `date` on both machines")


def judge(date: str, before: float, after: float) -> Probe:
    """Compares the HTTP date with the moments (Unix seconds) round the call; the header has whole seconds."""
    try:
        theirs = parsedate_to_datetime(date).timestamp()
    except (ValueError, TypeError):
        return warn("clock", "the server sends no date", "compare `date` on both machines")
    skew = max(before - 1 - theirs, theirs - after, 0.0)
    remedy = "switch on time synchronisation (systemd-timesyncd or chrony) on both machines"
    if skew > WRONG_SECONDS:
        return fail("clock", f"the clocks differ by {skew:.0f} s", remedy)
    if skew > NOTABLE_SECONDS:
        return warn("clock", f"the clocks differ by {skew:.0f} s", remedy)
    return ok("clock", "both clocks agree")


plugin = Check("clock", run, forge=True, rank=15)
