"""The two clocks agree: reconciliation asks by time, and a clock that is wrong by minutes loses or repeats work."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

from bot.doctor import Check, Patient, Probe, fail, ok, warn
from bot.fleet.probes.clock import NOTABLE_SECONDS, WRONG_SECONDS, server_date, skew
from bot.gitea.errors import ForgeError


async def run(patient: Patient) -> AsyncIterator[Probe]:
    """Compares with what the server dates its refusals."""
    before = time.time()
    try:
        date = await server_date(patient.forge, patient.settings.repositories[0].name)
    except ForgeError:
        return  # told by the checks of account and rights
    yield judge(date, before, time.time())


def judge(date: str, before: float, after: float) -> Probe:
    """Compares the HTTP date with the moments (Unix seconds) round the call."""
    seconds = skew(date, before, after)
    if seconds is None:
        return warn("clock", "the server sends no date", "compare `date` on both machines")
    remedy = "switch on time synchronisation (systemd-timesyncd or chrony) on both machines"
    if seconds > WRONG_SECONDS:
        return fail("clock", f"the clocks differ by {seconds:.0f} s", remedy)
    if seconds > NOTABLE_SECONDS:
        return warn("clock", f"the clocks differ by {seconds:.0f} s", remedy)
    return ok("clock", "both clocks agree")


plugin = Check("clock", run, forge=True, rank=15)
