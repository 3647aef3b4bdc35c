"""The stand every benchmark is held on: one forge, one scripted model, and each contender as a process of its own with a repository and a hook."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from aiohttp import web

from bot.demo.forge.server import ForgeServer
from bot.demo.model import SCRIPTS, ScriptedModel, Talk, Turn
from bot.demo.sample import BUGGY_LINE, FILES, FIXED_LINE
from bot.demo.stage import Stage
from bot.redaction import Secret

LIVE_URL, LIVE_TOKEN = os.environ.get("GITEA_URL", ""), os.environ.get("GITEA_ADMIN_TOKEN", "")
START_SECONDS = 30.0
POLL_SECONDS = 0.001
LIVE_POLL_SECONDS = 0.02
# A real Gitea looks for deliveries to send at growing distances, up to two seconds, while there are none: a round that began
# at a fixed moment of that rhythm would measure the rhythm.
LIVE_REST_SECONDS = (0.5, 3.0)


def three(talk: Talk) -> Turn:
    """Edits, tests, finishes: the shortest sprint that makes an honest pull request."""
    if not talk.results("edit_file"):
        return Turn("", (("edit_file", {"path": "lib/slug.sh", "old": BUGGY_LINE, "new": FIXED_LINE}),))
    if not talk.results("run_command"):
        return Turn("", (("run_command", {"command": "sh test.sh"}),))
    return Turn("", (("finish", {"summary": "slug folds case now; sh test.sh passes."}),))


def bash_noops(talk: Talk, count: int = 100) -> Turn:
    """`count` commands that do nothing, in the words of the loop we compare with."""
    command = "true" if talk.turns < count else "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"
    return Turn("", (("bash", {"command": f"{command} # {talk.turns}" if talk.turns < count else command}),))


class Model(ScriptedModel):
    """The scripted model, also for clients that do not stream."""

    async def _stream(self, request: web.Request, body: dict[str, Any], turn: Turn) -> web.StreamResponse:
        if body.get("stream"):
            return await super()._stream(request, body, turn)
        number = sum(message.get("role") == "assistant" for message in body.get("messages") or ())
        calls = [
            {
                "id": f"call_{number}_{index}",
                "type": "function",
                "function": {"name": name, "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments)},
            }
            for index, (name, arguments) in enumerate(turn.calls)
        ]
        message = {"role": "assistant", "content": turn.text or None, "tool_calls": calls or None}
        choice = {"index": 0, "message": message, "finish_reason": "tool_calls" if calls else "stop"}
        usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
        head = {"id": "chatcmpl-scripted", "object": "chat.completion", "created": 0, "model": body.get("model") or "scripted-1"}
        return web.json_response({**head, "choices": [choice], "usage": usage})


SCRIPTS.update({script.__name__: script for script in (three, bash_noops)})


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """A folder on a disk (never in memory) that the sandbox's user can pass through."""
    path = Path(tempfile.mkdtemp(prefix="timmy-bench-", dir="/var/tmp"))
    path.chmod(0o711)
    try:
        yield path
    finally:
        subprocess.run(["chmod", "-R", "u+rwX", str(path)], check=False)
        shutil.rmtree(path, ignore_errors=True)


class Process:
    """A contender. Its output goes to a file, which an unexpected end shows."""

    def __init__(self, argv: list[str], log: Path, *, stdin: str = "", env: dict[str, str] | None = None) -> None:
        self.log = log
        with log.open("wb") as out:
            self._popen = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=out, stderr=out, env=env, start_new_session=True)
        assert self._popen.stdin is not None
        self._popen.stdin.write(stdin.encode())
        self._popen.stdin.close()

    @property
    def pid(self) -> int:
        """Its id."""
        return self._popen.pid

    def alive(self) -> None:
        """Raises with the last words where it has ended."""
        if self._popen.poll() is not None:
            raise RuntimeError(f"ended with {self._popen.returncode}: {self.log.read_text(errors='replace')[-2000:]}")

    def send(self, number: int) -> None:
        """A signal."""
        self._popen.send_signal(number)

    async def ended(self) -> int:
        """Waits for the end."""
        return await asyncio.to_thread(self._popen.wait)

    async def listening(self, port: int) -> None:
        """Until it takes connections."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            self.alive()
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.05)
            else:
                writer.close()
                return
        raise RuntimeError(f"does not listen: {self.log.read_text(errors='replace')[-2000:]}")

    async def stop(self) -> None:
        """Politely, then not."""
        if self._popen.poll() is None:
            self._popen.terminate()
            try:
                await asyncio.wait_for(self.ended(), 15)
            except TimeoutError:
                self._popen.kill()
                await self.ended()


@dataclass(slots=True)
class Side:
    """One contender on the stand: its cast and repository, its port, its process once started."""

    name: str
    stage: Stage
    port: int
    folder: Path
    process: Process | None = None
    seen: set[int] = field(default_factory=set)

    @property
    def url(self) -> str:
        """Where its deliveries go."""
        return f"http://127.0.0.1:{self.port}/webhook"

    def signed(self, event_type: str, body: bytes) -> dict[str, str]:
        """The headers of a delivery as Gitea sends them."""
        return {
            "Content-Type": "application/json",
            "X-Gitea-Event": event_type,
            "X-Gitea-Event-Type": event_type,
            "X-Gitea-Delivery": str(uuid.uuid4()),
            "X-Gitea-Signature": hmac.new(self.stage.webhook_secret.reveal().encode(), body, hashlib.sha256).hexdigest(),
        }


class Stand:
    """The forge (embedded, or the real one that GITEA_URL names), the model and the sides."""

    def __init__(self, root: Path, model: Model, forge: ForgeServer | None, url: str, token: Secret) -> None:
        self.root = root
        self.model = model
        self.forge = forge
        self.url = url
        self._token = token
        self._mark = secrets.token_hex(3)
        self.sides: list[Side] = []

    async def rest(self, seconds: float) -> None:
        """Between two rounds: `seconds`, on a real Gitea a random while."""
        await asyncio.sleep(seconds if self.forge is not None else random.uniform(*LIVE_REST_SECONDS))

    @property
    def kind(self) -> str:
        """Which forge."""
        return "embedded forge" if self.forge is not None else "real Gitea"

    async def side(self, name: str, *, hook: bool = True) -> Side:
        """A cast of its own with a repository and, unless told otherwise, its hook."""
        stage = await Stage.build(self.url, self._token, files=FILES, suffix=f"-{name}-{self._mark}")
        side = Side(name, stage, free_port(), self.root / name)
        side.folder.mkdir(mode=0o711)
        self.sides.append(side)
        if hook:
            await stage.hook(side.url)
        return side

    async def serve(self, side: Side, **changes: Any) -> None:
        """Starts the service as an operator does: `serve` with a configuration file and its secrets in files. Its defaults stay."""
        stage = side.stage
        files = {"token": stage.people["timmy"].token, "webhook": stage.webhook_secret}
        for name, secret in files.items():
            path = side.folder / name
            path.touch(mode=0o600)
            path.write_text(secret.reveal() + "\n")
        config: dict[str, Any] = {
            "forge": {"url": stage.url, "token_file": str(side.folder / "token")},
            "repositories": [{"name": stage.repo}],
            "webhook": {
                "listen": f"127.0.0.1:{side.port}",
                "public_url": f"http://127.0.0.1:{side.port}",
                "secret_files": [str(side.folder / "webhook")],
            },
            "metrics": {"listen": f"127.0.0.1:{free_port()}"},
            "state_dir": str(side.folder / "state"),
            "providers": [{"name": "scripted", "base_url": self.model.url, "model": "scripted-1"}],
            "commands_per_person": 1_000_000,
            "limits": {"steps": 1000},
            **changes,
        }
        path = side.folder / "dispatch.yml"
        path.write_text(yaml.safe_dump(config))
        argv = [sys.executable, "-P", "-m", "bot", "-c", str(path), "serve", "--log-level", os.environ.get("BENCH_LOG", "ERROR")]
        side.process = Process(argv, side.folder / "log")
        await side.process.listening(side.port)

    async def floor(self, side: Side, script: str) -> None:
        """Starts a floor of this folder; what it needs comes on its standard input."""
        stage = side.stage
        facts = {
            "port": side.port,
            "forge": stage.url,
            "repo": stage.repo,
            "login": stage.people["timmy"].login,
            "token": stage.people["timmy"].token.reveal(),
            "secret": stage.webhook_secret.reveal(),
            "folder": str(side.folder),
            "old": BUGGY_LINE,
            "new": FIXED_LINE,
        }
        argv = [sys.executable, "-P", str(Path(__file__).parent / script)]
        side.process = Process(argv, side.folder / "log", stdin=json.dumps(facts))
        await side.process.listening(side.port)

    async def eyes(self, side: Side, issue: int, comment: int) -> bool:
        """Whether the 👀 is there; on the embedded forge without a request, so that looking costs nothing."""
        if self.forge is not None:
            found = next(entry for entry in self.forge.find_issue(side.stage.repo, issue).comments if entry.id == comment)
            return any(reaction.content == "eyes" for reaction in found.reactions)
        api = side.stage.people["alice"].client
        listed = await api.getitem(f"/repos/{side.stage.repo}/issues/comments/{comment}/reactions")
        return any(item["content"] == "eyes" for item in listed or ())

    async def pulls(self, side: Side) -> set[int]:
        """Numbers of all pull requests."""
        if self.forge is not None:
            return {issue.number for issue in self.forge.repo(side.stage.repo).issues.values() if issue.pull is not None}
        return {int(pull["number"]) for pull in await side.stage.people["alice"].forge.pulls(side.stage.repo, "all")}

    async def comments(self, side: Side, issue: int) -> list[str]:
        """The bodies of all comments by the bot."""
        bot = side.stage.people["timmy"].id
        if self.forge is not None:
            return [entry.body for entry in self.forge.find_issue(side.stage.repo, issue).comments if entry.user_id == bot]
        listed = await side.stage.people["alice"].forge.comments(side.stage.repo, issue)
        return [item["body"] for item in listed if item["user"]["id"] == bot]

    async def until(self, side: Side, what: Callable[[], Awaitable[Any]], seconds: float = 60.0) -> float:
        """The moment (monotonic seconds) a condition became true."""
        deadline = time.monotonic() + seconds
        while not await what():
            if time.monotonic() > deadline:
                assert side.process is not None
                side.process.alive()
                raise RuntimeError(f"{side.name}: not within {seconds} s; its log: {side.process.log.read_text(errors='replace')[-3000:]}")
            await asyncio.sleep(POLL_SECONDS if self.forge is not None else LIVE_POLL_SECONDS)
        return time.monotonic()

    async def close(self) -> None:
        """Ends everybody; on a real server also removes what was made."""
        for side in self.sides:
            if side.process is not None:
                await side.process.stop()
            if self.forge is None:
                for left in await side.stage.remove():
                    print(f"left behind: {left}", file=sys.stderr)
            await side.stage.close()


@contextlib.asynccontextmanager
async def stand(*, live: bool = False) -> AsyncIterator[Stand]:
    """A stand, gone at the end."""
    with folder() as root:
        model = Model("three")
        forge = None if live else ForgeServer(root / "forge")
        try:
            await model.start()
            if forge is not None:
                await forge.start()
                await forge.create_user("root1", admin=True)
                url, token = forge.url, await forge.create_token("root1", ["all"])
            else:
                url, token = LIVE_URL, LIVE_TOKEN
            made = Stand(root, model, forge, url, Secret(token))
            try:
                yield made
            finally:
                await made.close()
        finally:
            await model.stop()
            if forge is not None:
                await forge.stop()


def http() -> aiohttp.ClientSession:
    """A client with as many connections as it likes."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=30))
