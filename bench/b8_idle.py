"""B8, its cheap third: the memory of a service that has nothing to do, beside a process that only imports it."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from pathlib import Path

from bench.stand import stand
from bench.table import Row, middle

REST_SECONDS = 5.0
IMPORTS = "import re, bot.service, bot.cli.serve, bot.cli._process; print(open('/proc/self/status').read())"


def _rss(status: str) -> float:
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    if found is None:
        raise RuntimeError("the kernel does not tell the memory of a process")
    return int(found[1]) / 1024


def _imports() -> float:
    return _rss(subprocess.run([sys.executable, "-P", "-c", IMPORTS], capture_output=True, text=True, check=True).stdout)


async def measure(*, runs: int) -> list[Row]:
    """One start each a run."""
    taken: dict[str, list[float]] = {"ours": [], "floor": []}
    for _ in range(runs):
        async with stand() as place:
            ours = await place.side("ours")
            await place.serve(ours)
            await asyncio.sleep(REST_SECONDS)
            assert ours.process is not None
            taken["ours"].append(_rss(Path(f"/proc/{ours.process.pid}/status").read_text()))
        taken["floor"].append(await asyncio.to_thread(_imports))
    values = {side: middle(found) for side, found in taken.items()}
    return [Row("B8", "memory when idle (RSS)", "MiB", values["ours"], values["floor"], str(runs), "its imports alone", most_ours=130.0)]
