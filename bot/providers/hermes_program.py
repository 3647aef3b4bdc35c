"""Runs the `hermes` program as its user would, with nothing of ours in its environment; it has no terminal, and an end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from bot.models import DispatchError
from bot.redaction import terminal

_PASSED: Final = ("PATH", "HOME", "LANG", "HERMES_PORTAL_BASE_URL", "NOUS_INFERENCE_BASE_URL", "HERMES_SHARED_AUTH_DIR")


class HermesError(DispatchError):
    """The program cannot be run, or did not end."""


async def run_hermes(home: Path, environ: Mapping[str, str], *arguments: str, seconds: float) -> tuple[int, str]:
    """(exit code, output) of `hermes ARGUMENTS` in the Hermes home `home`, with what it complained of where the code is not 0.

    Control characters are taken out.
    """
    passed = {name: environ[name] for name in _PASSED if name in environ} | {"HERMES_HOME": str(home)}
    program = f"`hermes {' '.join(arguments)}`"
    try:
        process = await asyncio.create_subprocess_exec(
            "hermes", *arguments, env=passed, cwd="/", stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise HermesError(f"`hermes` cannot be run: {error.strerror}") from None
    try:
        async with asyncio.timeout(seconds):
            output, complaints = await process.communicate()
    except TimeoutError:
        raise HermesError(f"{program} did not end") from None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    code = process.returncode or 0
    return code, terminal((output + complaints if code else output).decode("utf-8", "replace"))
