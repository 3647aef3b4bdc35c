"""Folders of the shape a real state folder has, a git server over HTTP, and the skip for machines without namespaces."""

from __future__ import annotations

import asyncio
import base64
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from aiohttp import web

from bot.config import SandboxSettings
from bot.redaction import Secret
from bot.sandbox import Sandbox, SandboxUnavailable, build
from bot.workspace import Workspaces

TOKEN = "c0ffee" + "0123456789abcdef" * 2 + "77"
LOGIN = "timmy"


@functools.cache
def _why_not() -> str:
    base = Path(tempfile.mkdtemp(prefix="timmy-try-"))
    try:
        build(SandboxSettings(), state_dir=base)
    except SandboxUnavailable as error:
        return str(error)
    finally:
        shutil.rmtree(base)
    return ""


def require_sandbox() -> None:
    """Skips the calling test with what bubblewrap said, where it cannot make namespaces."""
    reason = _why_not()
    if reason:
        pytest.skip(f"no sandbox on this machine: {reason}")


@contextmanager
def state_folder() -> Iterator[Path]:
    """A folder another uid may pass through (pytest's own belongs to root alone), removed with whatever hostile thing is left in it."""
    base = Path(tempfile.mkdtemp(prefix="timmy-test-"))
    base.chmod(0o711)
    try:
        yield base
    finally:
        subprocess.run(["chmod", "-R", "u+rwX", str(base)], check=False, stderr=subprocess.DEVNULL)
        subprocess.run(["rm", "-rf", str(base)], check=False)


def make_workspace(base: Path, sandbox: Sandbox, name: str = "work") -> Path:
    """An empty workspace its sandbox may write to."""
    path = base / name
    path.mkdir(mode=0o700)
    if sandbox.owner is not None:
        os.chown(path, sandbox.owner, sandbox.owner)
    return path


def python_path() -> dict[str, str]:
    """What a child Python needs to find the service and its packages, however this one found them."""
    return {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *(entry for entry in sys.path if entry)])}


def processes_with(word: str) -> list[int]:
    """The processes of this machine whose argument list holds `word`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if word.encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


async def gone(word: str, seconds: float = 2.0) -> bool:
    """True when no process with `word` is left within `seconds`."""
    for _ in range(int(seconds / 0.02)):
        if not processes_with(word):
            return True
        await asyncio.sleep(0.02)
    return False


GIT_ENV = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "HOME": "/nonexistent",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_AUTHOR_NAME": "ann",
    "GIT_AUTHOR_EMAIL": "ann@example.org",
    "GIT_COMMITTER_NAME": "ann",
    "GIT_COMMITTER_EMAIL": "ann@example.org",
    "GIT_AUTHOR_DATE": "@1700000000 +0000",
    "GIT_COMMITTER_DATE": "@1700000000 +0000",
}


def git(*arguments: str, cwd: Path, stdin: bytes | None = None) -> str:
    """Git as a person runs it; stdout without the last newline."""
    done = subprocess.run(["git", *arguments], cwd=cwd, env=GIT_ENV, input=stdin, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode("utf-8", "surrogateescape").rstrip("\n")


class GitServer:
    """Bare repositories below `root`, served by `git http-backend` to whoever has the token."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = ""
        self.requests: list[web.BaseRequest] = []
        self.answer: web.Response | None = None
        self.answer_only = ""
        self._runner: web.AppRunner | None = None

    def create(self, name: str, files: dict[str, str] | None = None, *, object_format: str = "sha1") -> Path:
        """A repository with one commit on main, or an empty one."""
        bare = self.root / f"{name}.git"
        bare.mkdir(parents=True)
        git("init", "-q", "--bare", "-b", "main", f"--object-format={object_format}", cwd=bare)
        git("config", "http.receivepack", "true", cwd=bare)
        if files is not None:
            self.commit(name, files)
        return bare

    def commit(self, name: str, files: dict[str, str], *, branch: str = "main", message: str = "files", start: str = "") -> str:
        """One more commit by a person, straight on the server; `start` makes a new branch from there."""
        with tempfile.TemporaryDirectory() as folder:
            clone, bare = Path(folder) / "c", self.root / f"{name}.git"
            if git("for-each-ref", cwd=bare):
                git("clone", "-q", str(bare), str(clone), cwd=self.root)
            else:
                clone.mkdir()
                git("init", "-q", "--object-format=" + git("rev-parse", "--show-object-format", cwd=bare), cwd=clone)
                git("remote", "add", "origin", str(bare), cwd=clone)
            if start:
                git("checkout", "-q", "-b", branch, start, cwd=clone)
            for path, text in files.items():
                (clone / path).parent.mkdir(parents=True, exist_ok=True)
                (clone / path).write_text(text)
            git("add", "-A", "-f", ".", cwd=clone)
            git("commit", "-q", "--allow-empty", "-m", message, cwd=clone)
            git("push", "-q", "origin", f"HEAD:refs/heads/{branch}", cwd=clone)
            return git("rev-parse", "HEAD", cwd=clone)

    def hook(self, name: str, script: str) -> None:
        """A pre-receive hook on the server."""
        file = self.root / f"{name}.git" / "hooks" / "pre-receive"
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)

    async def start(self) -> None:
        app = web.Application(client_max_size=1 << 28)
        app.router.add_route("*", "/{tail:.*}", self._serve)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request)
        if self.answer is not None and self.answer_only in request.path_qs:
            return web.Response(status=self.answer.status, headers=self.answer.headers, text=self.answer.text)
        header = request.headers.get("Authorization", "")
        if header != "Basic " + base64.b64encode(f"{LOGIN}:{TOKEN}".encode()).decode():
            return web.Response(status=401, headers={"WWW-Authenticate": 'Basic realm="Gitea"'}, text="Unauthorized")
        body = await request.read()
        environment = {
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "GIT_PROJECT_ROOT": str(self.root),
            "GIT_HTTP_EXPORT_ALL": "1",
            "PATH_INFO": request.path,
            "QUERY_STRING": request.query_string,
            "REQUEST_METHOD": request.method,
            "CONTENT_TYPE": request.headers.get("Content-Type", ""),
            "CONTENT_LENGTH": str(len(body)),
            "HTTP_CONTENT_ENCODING": request.headers.get("Content-Encoding", ""),
            "GIT_PROTOCOL": request.headers.get("Git-Protocol", ""),
            "REMOTE_USER": LOGIN,
            "HOME": "/nonexistent",
            "GIT_CONFIG_NOSYSTEM": "1",
        }
        if request.headers.get("Content-Encoding") == "gzip":
            environment["HTTP_CONTENT_ENCODING"] = ""  # aiohttp has unpacked it
        process = await asyncio.create_subprocess_exec(
            "git",
            "http-backend",
            env=environment,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, _ = await process.communicate(body)
        head, _, content = out.partition(b"\r\n\r\n")
        headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n") if ": " in line)
        status = int(headers.pop("Status", "200").split()[0])
        return web.Response(status=status, headers=headers, body=content)


def workspaces(base: Path, sandbox: Sandbox, server: GitServer, *, protected: tuple[str, ...] = (), token: str = TOKEN) -> Workspaces:
    """What the service builds, pointed at the test's server."""
    return Workspaces(
        base / "sprints",
        sandbox=sandbox,
        forge_url=server.url,
        login=LOGIN,
        token=Secret(token),
        ca_file=None,
        sandbox_uid=sandbox.owner,
        user_name="timmy",
        user_email="timmy@example.org",
        protected=protected,
    )
