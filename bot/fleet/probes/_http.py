"""Whether a program of the operator's answers that it is healthy."""

from __future__ import annotations

import aiohttp

from bot.fleet.probes import failing, fine
from bot.snapshot import Finding

TARGET = "server"
SECONDS = 10.0
OK = 200


async def healthy(url: str) -> Finding:
    """Prometheus and Alertmanager say it at /-/healthy, and at /-/ready that they do their work."""
    timeout = aiohttp.ClientTimeout(total=SECONDS)
    async with aiohttp.ClientSession(timeout=timeout, trust_env=False) as session:
        for path in ("/-/healthy", "/-/ready"):
            try:
                async with session.get(url.rstrip("/") + path, allow_redirects=False) as reply:
                    if reply.status != OK:
                        return failing(TARGET, f"{path} answers {reply.status}")
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                return failing(TARGET, f"{path} does not answer ({type(error).__name__})")
    return fine(TARGET, "healthy and ready")
