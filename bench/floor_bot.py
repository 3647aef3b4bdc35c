"""Floor of B2 and B3: a bare script that answers a hook; no store, no sandbox, no permission check, no retry, nothing that survives its end.

A comment that holds `/dispatch` gets its 👀. The label `dispatch` brings: a comment, clone, edit, test, commit, push, pull request, a comment.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web


class Bot:
    """Everything it knows comes on standard input."""

    def __init__(self, facts: dict[str, Any]) -> None:
        self.facts = facts
        self.api = f"{facts['forge']}/api/v1/repos/{facts['repo']}"
        self.secret = facts["secret"].encode()
        self.session: aiohttp.ClientSession | None = None
        self.tasks: set[asyncio.Task[None]] = set()
        basic = base64.b64encode(f"{facts['login']}:{facts['token']}".encode()).decode()
        self.env = {
            "PATH": os.environ["PATH"],
            "HOME": facts["folder"],
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": "http.extraHeader",
            "GIT_CONFIG_VALUE_0": f"Authorization: Basic {basic}",
        }
        for who in ("AUTHOR", "COMMITTER"):
            self.env |= {f"GIT_{who}_NAME": facts["login"], f"GIT_{who}_EMAIL": f"{facts['login']}@example.org"}

    async def receive(self, request: web.Request) -> web.Response:
        """The hook."""
        body = await request.read()
        good = hmac.new(self.secret, body, hashlib.sha256).hexdigest()
        if not hmac.compare_digest(good, request.headers.get("X-Gitea-Signature", "")):
            return web.Response(status=401)
        event, data = request.headers.get("X-Gitea-Event-Type", ""), json.loads(body)
        if event == "issue_comment" and "/dispatch" in data["comment"]["body"]:
            self.later(self.post(f"/issues/comments/{data['comment']['id']}/reactions", {"content": "eyes"}))
        elif event == "issue_label" and any(label["name"] == "dispatch" for label in data["issue"]["labels"] or ()):
            self.later(self.work(data["issue"]["number"]))
        return web.Response(status=202)

    def later(self, work: Any) -> None:
        """After the answer."""
        task = asyncio.ensure_future(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def post(self, path: str, data: object) -> Any:
        """One request."""
        if self.session is None:
            self.session = aiohttp.ClientSession(headers={"Authorization": f"token {self.facts['token']}"})
        async with self.session.post(self.api + path, json=data) as reply:
            reply.raise_for_status()
            return await reply.json()

    async def run(self, *argv: str, cwd: Path) -> None:
        """One process."""
        process = await asyncio.create_subprocess_exec(*argv, cwd=cwd, env=self.env, stdout=asyncio.subprocess.DEVNULL)
        if await process.wait():
            raise RuntimeError(f"{argv[:2]} ended with {process.returncode}")

    async def work(self, issue: int) -> None:
        """Label to pull request."""
        comment = await self.post(f"/issues/{issue}/comments", {"body": "working"})
        with tempfile.TemporaryDirectory(dir=self.facts["folder"]) as scratch:
            tree = Path(scratch) / "tree"
            await self.run("git", "clone", "-q", "--depth=1", f"{self.facts['forge']}/{self.facts['repo']}.git", "tree", cwd=Path(scratch))
            file = tree / "lib" / "slug.sh"
            file.write_text(file.read_text().replace(self.facts["old"], self.facts["new"]))
            await self.run("sh", "test.sh", cwd=tree)
            branch = f"dispatch/issue-{issue}"
            await self.run("git", "checkout", "-q", "-b", branch, cwd=tree)
            await self.run("git", "commit", "-q", "-a", "-m", f"Mend #{issue}", cwd=tree)
            await self.run("git", "push", "-q", "origin", branch, cwd=tree)
        pull = await self.post("/pulls", {"head": branch, "base": "main", "title": f"Mend #{issue}", "body": f"Closes #{issue}"})
        await self.post(f"/issues/{issue}/comments", {"body": f"PR #{pull['number']}, after comment {comment['id']}"})


def main() -> None:
    """Serves until it is ended."""
    facts = json.load(sys.stdin)
    app = web.Application(client_max_size=2**24)
    app.router.add_post("/webhook", Bot(facts).receive)
    web.run_app(app, host="127.0.0.1", port=facts["port"], access_log=None, print=lambda *_: None)


main()
