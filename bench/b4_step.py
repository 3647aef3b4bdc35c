"""B4: what one model step costs beside the model: 100 commands that do nothing, from one request at the model to the next."""

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.stand import Process, Side, Stand, stand
from bench.table import Row, middle

STEPS = 100
PACKAGE = "mini-swe-agent"
INSTALL_SECONDS = 300


def _install(venv: Path | None) -> tuple[Path | None, Path | None]:
    """(a Python that has mini-swe-agent, the folder to remove afterwards); (None, None) where it cannot be had."""
    if venv is not None and (venv / "bin" / "python").is_file():
        return venv / "bin" / "python", None
    folder = Path(tempfile.mkdtemp(prefix="timmy-bench-mini-", dir="/var/tmp"))
    try:
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, capture_output=True, timeout=INSTALL_SECONDS)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-input", PACKAGE]
        subprocess.run(pip, check=True, capture_output=True, timeout=INSTALL_SECONDS)
    except (subprocess.SubprocessError, OSError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        print(f"{PACKAGE} cannot be installed here ({type(error).__name__}); the floor is our own bare loop instead", file=sys.stderr)
        return None, None
    return folder / "bin" / "python", folder


def _version(python: Path) -> str:
    code = f"from importlib.metadata import version; print(version({PACKAGE!r}))"
    return subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def _steps(place: Stand, script: str) -> list[float]:
    """Seconds between the first request and the last of STEPS commands, one a step."""
    moments = [request.at for request in place.model.requests if request.script == script][: STEPS + 1]
    if len(moments) <= STEPS:
        raise RuntimeError(f"{script}: only {len(moments)} requests")
    return [after - before for before, after in itertools.pairwise(moments)]


async def _ours(place: Stand, side: Side) -> list[float]:
    place.model.requests.clear()
    alice = side.stage.people["alice"]
    issue = await alice.open_issue("a hundred commands", f"script: noops({STEPS})")
    before = await place.pulls(side)
    await alice.label(issue, "dispatch")

    async def there() -> bool:
        return bool(await place.pulls(side) - before)

    await place.until(side, there, 120)
    await asyncio.sleep(1.0)
    return _steps(place, "noops")


async def _theirs(place: Stand, folder: Path, python: Path | None) -> list[float]:
    place.model.requests.clear()
    script = Path(__file__).parent / ("floor_mini.py" if python else "floor_loop.py")
    facts = {"model": place.model.url, "folder": str(folder), "task": f"A hundred commands.\n\nscript: bash_noops({STEPS})"}
    env = {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": str(folder),
        "MSWEA_SILENT_STARTUP": "1",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    }
    process = Process([str(python or sys.executable), "-P", str(script)], folder / "log", stdin=json.dumps(facts), env=env)
    if await process.ended():
        raise RuntimeError(f"the floor failed: {(folder / 'log').read_text()[-2000:]}")
    return _steps(place, "bash_noops")


async def measure(*, runs: int, mini: Path | None = None) -> list[Row]:
    """One run of STEPS each, in turn."""
    python, scratch = await asyncio.to_thread(_install, mini)
    name = f"{PACKAGE} {_version(python)}, its loop, LiteLLM, its bubblewrap" if python else "bare loop, openai, one bwrap a command"
    taken: dict[str, list[list[float]]] = {"ours": [], "floor": []}
    try:
        async with stand() as place:
            ours = await place.side("ours")
            folder = place.root / "floor"
            folder.mkdir()
            await place.serve(ours)
            for number in range(runs):
                for mine in (True, False) if number % 2 == 0 else (False, True):
                    found = await (_ours(place, ours) if mine else _theirs(place, folder, python))
                    taken["ours" if mine else "floor"].append(found)
                    await asyncio.sleep(0.5)
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
    values = {side: 1000 * middle([sum(found) / len(found) for found in rounds]) for side, rounds in taken.items()}
    return [
        Row("B4", "one model step with `true`", "ms", values["ours"], values["floor"], f"{runs} x {STEPS}", name, most_ratio=1.0),
    ]
