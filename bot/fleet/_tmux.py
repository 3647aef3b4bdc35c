"""tmux as a program that may be missing, dead, hung or somebody else's: every call has an end, a clean environment and a socket of our own."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from bot.models import UserError

CALL_SECONDS = 5.0
END_SECONDS = 1.0
SOCKET_MAX = 107
DEFAULT_PATH = "/usr/local/bin:/usr/bin:/bin"
# What a worker needs of its surroundings. Nothing here is a secret: a tmux server keeps its environment readable, and shows it on demand.
PASSED = (
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "PYTHONPATH"),
    *("XDG_STATE_HOME", "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR", "HERMES_HOME", "CREDENTIALS_DIRECTORY"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "NO_PROXY", "no_proxy"),
)
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")
MISSING = "tmux is not installed. Remedy: install it (apt install tmux), or run `timmy-dispatch worker` by hand or as a service instead"


class TmuxError(UserError):
    """tmux could not do what was asked; says why and what to do."""


class TmuxMissing(TmuxError):
    """There is no tmux on this machine."""


class TmuxHung(TmuxError):
    """The server did not answer in time."""


def passed_on(environ: Mapping[str, str]) -> dict[str, str]:
    """What of an environment reaches a lane: a closed list, and proxies that carry no password."""
    kept = {name: environ[name] for name in PASSED if environ.get(name)}
    kept |= {name: environ[name] for name in PROXIES if environ.get(name) and "@" not in environ[name]}
    kept.setdefault("PATH", DEFAULT_PATH)
    return kept


class Tmux:
    """The server behind one socket: `-L name`, in `folder` instead of the folder that all users share."""

    def __init__(self, name: str, folder: Path, environ: Mapping[str, str], *, seconds: float = CALL_SECONDS) -> None:
        self.name = name
        self.folder = folder
        self.environ = {**passed_on(environ), "TMUX_TMPDIR": str(folder)}
        self._seconds = seconds

    def program(self) -> str:
        """The path of tmux; raises TmuxMissing."""
        found = shutil.which("tmux", path=self.environ["PATH"])
        if found is None:
            raise TmuxMissing(MISSING)
        return found

    def argv(self, *words: str) -> list[str]:
        """The command line; nobody's configuration file is read. UTF-8 whatever the locale, or names come back mutilated."""
        return [self.program(), "-u", "-f", "/dev/null", "-L", self.name, *words]

    async def ask(self, *words: str) -> str | None:
        """What a question answers; None where there is no server, or not what was asked about. Raises TmuxMissing, TmuxHung."""
        code, out, _ = await self._call(words)
        return out if code == 0 else None

    async def do(self, *words: str) -> str:
        """The output of a command that must succeed; raises TmuxError."""
        code, out, err = await self._call(words)
        if code != 0:
            raise TmuxError(f"tmux: {err.strip() or f'exit code {code}'}")
        return out

    def check_socket(self, uid: int) -> None:
        """Raises TmuxError where the path of the socket is longer than the system allows."""
        path = self.folder / f"tmux-{uid}" / self.name
        if len(str(path).encode()) > SOCKET_MAX:
            raise TmuxError(
                f"the socket {path} would be longer than {SOCKET_MAX} bytes. Remedy: shorten `lanes.session`, or move `state_dir` up"
            )

    async def _call(self, words: Sequence[str]) -> tuple[int, str, str]:
        process = await asyncio.create_subprocess_exec(
            *self.argv(*words),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self.environ,
            cwd="/",
            start_new_session=True,
        )
        try:
            async with asyncio.timeout(self._seconds):
                out, err = await process.communicate()
        except TimeoutError:
            raise TmuxHung(
                f"the tmux server at {self.folder} did not answer within {self._seconds:g} s. Remedy: look at it with "
                f"`TMUX_TMPDIR={self.folder} tmux -L {self.name} list-sessions`; end it if it hangs, and the lanes come back"
            ) from None
        finally:
            if process.returncode is None:
                await _end(process)
        return process.returncode or 0, out.decode(errors="replace"), err.decode(errors="replace")


async def _end(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    # A server that was just started holds the pipes open; only the client is waited for.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(END_SECONDS):
            await process.wait()
