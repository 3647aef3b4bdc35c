"""The wall round the model holds on this machine, proven by trying to get through it."""

from __future__ import annotations

from collections.abc import AsyncIterator

from bot.doctor import Check, Patient, Probe, fail, ok, warn


async def run(patient: Patient) -> AsyncIterator[Probe]:
    """The live probes of the sandbox, under the settings as they are."""
    from bot.sandbox.probes import probe_sandbox

    settings = patient.settings
    if not settings.state_dir.is_dir():
        yield warn("sandbox", "cannot be tried before the state folder is there", "run `timmy-dispatch init`, then this again")
        return
    for probe in await probe_sandbox(settings.sandbox, state_dir=settings.state_dir):
        name = f"sandbox {probe.name}"
        if probe.ok:
            yield ok(name, probe.detail)
        elif settings.sandbox.kind == "none":
            yield warn(name, probe.detail, probe.remedy)
        else:
            yield fail(name, probe.detail, probe.remedy)


plugin = Check("sandbox", run, rank=55)
