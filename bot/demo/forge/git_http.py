"""Git's smart HTTP, spoken by git's own programs: this file checks who may, streams both ways, and tells the forge what was pushed."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from aiohttp import web

from bot.demo.forge import gitio
from bot.demo.forge.acts import Actor, Update
from bot.demo.forge.api import LOGIN, ROUTE, Site, find_repo, moved
from bot.demo.forge.auth import BadCredentialsError, identify
from bot.demo.forge.gitio import ZERO
from bot.demo.forge.payloads import Shapes
from bot.demo.forge.state import Repo, User

CHUNK: Final = 65536
COMMANDS_CAP: Final = 4 * 1024 * 1024
PROCESSES: Final = 16
_UPDATE_WORDS: Final = 3
# Reads what git hands to pre-receive. It runs only for pushes that are to be refused or touch a protected branch.
_PRE_RECEIVE: Final = """#!/bin/sh
if [ -n "$FORGE_REFUSE" ]; then
    echo "error: $FORGE_REFUSE" >&2
    exit 1
fi
while read -r old new ref; do
    case " $FORGE_GUARDED " in
    *" $ref "*)
        branch=${ref#refs/heads/}
        if [ -n "$(git rev-list --max-count=1 "$old" "^$new" 2>/dev/null)" ]; then
            echo "error: branch $branch is protected from force push" >&2
        else
            echo "error: Not allowed to push to protected branch $branch" >&2
        fi
        exit 1
        ;;
    esac
done
"""


def lay_hooks(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "pre-receive"
    script.write_text(_PRE_RECEIVE)
    script.chmod(0o755)


def commands(data: bytes) -> tuple[list[Update], bool]:
    """The ref updates at the head of a receive-pack request, and whether the list is complete in these bytes."""
    found: list[Update] = []
    at = 0
    while at + 4 <= len(data):
        try:
            size = int(data[at : at + 4], 16)
        except ValueError:
            return found, True
        if size == 0:
            return found, True
        if at + size > len(data):
            return found, False
        words = data[at + 4 : at + size].partition(b"\0")[0].decode(errors="replace").strip().split(" ")
        if len(words) == _UPDATE_WORDS and len(words[0]) == len(ZERO):
            found.append(Update(words[2], words[0], words[1]))
        at += max(size, 4)
    return found, False


@dataclass(frozen=True, slots=True)
class Caller:
    user: User | None
    repo: Repo


class GitHttp:
    """The three endpoints of smart HTTP, on `/{owner}/{repo}.git/`."""

    def __init__(self, site: Site, hooks_folder: Path) -> None:
        self.site = site
        self.hooks_folder = hooks_folder
        self.slots = asyncio.Semaphore(PROCESSES)

    def routes(self) -> list[web.RouteDef]:
        base = "/{owner}/{repo}.git"
        return [
            web.get(f"{base}/info/refs", self.advertise),
            web.post(base + "/{service:git-(?:upload|receive)-pack}", self.serve),
        ]

    async def _enter(self, request: web.Request, service: str) -> Caller | web.Response:
        """Whether this caller may speak this service here: 401, 403, 404 as plain text."""
        push = service == "git-receive-pack"
        request[ROUTE] = f"/{{owner}}/{{repo}}.git/{service}"
        state = self.site.state
        denied = web.Response(status=401, text="Unauthorized\n", headers={"WWW-Authenticate": 'Basic realm="Gitea"'})
        try:
            identity = identify(state, request.headers.get("Authorization", ""))
        except BadCredentialsError:
            return denied
        user = identity.user
        request[LOGIN] = user.login if user else ""
        repo, old_name = find_repo(self.site, request.match_info["owner"], request.match_info["repo"])
        if user is None and (push or repo is None or repo.private):
            return denied
        if repo is None or not state.may(repo, user, "read"):
            return web.Response(status=404, text="Repository not found\n")
        if old_name:
            return moved(self.site, request, repo)
        if identity.token is not None and (push or repo.private) and not identity.token.allows("repository", write=push):
            return web.Response(status=403, text="token does not have at least one of required scope(s)\n")
        if push and repo.archived:
            text = "This repo is archived. You can view files and clone it, but cannot push or open issues/pull-requests.\n"
            return web.Response(status=403, text=text)
        return Caller(user, repo)

    async def advertise(self, request: web.Request) -> web.StreamResponse:
        service = request.query.get("service", "")
        if service not in {"git-upload-pack", "git-receive-pack"}:
            return web.Response(status=403, text="the dumb protocol is not served\n")
        caller = await self._enter(request, service)
        if isinstance(caller, web.Response):
            return caller
        async with self.slots:
            process = await self._git(request, caller.repo, service, "--advertise-refs", env={})
            refs, _ = await process.communicate()
        head = f"# service={service}\n"
        body = f"{len(head) + 4:04x}{head}0000".encode() + refs
        headers = {"Content-Type": f"application/x-{service}-advertisement", "Cache-Control": "no-cache"}
        return web.Response(body=body, headers=headers)

    async def _git(
        self, request: web.Request, repo: Repo, service: str, *options: str, env: Mapping[str, str]
    ) -> asyncio.subprocess.Process:
        protocol = request.headers.get("Git-Protocol", "")
        extra = {"GIT_PROTOCOL": protocol} if protocol in {"version=1", "version=2"} else {}
        config = ["-c", f"core.hooksPath={self.hooks_folder}"] if env else []
        return await asyncio.create_subprocess_exec(
            "git",
            *config,
            service.removeprefix("git-"),
            "--stateless-rpc",
            *options,
            str(repo.path),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env={**gitio.ENV, **extra, **env},
        )

    async def serve(self, request: web.Request) -> web.StreamResponse:
        service = request.match_info["service"]
        caller = await self._enter(request, service)
        if isinstance(caller, web.Response):
            return caller
        head, updates = b"", list[Update]()
        if service == "git-receive-pack":
            complete = False
            while not complete and len(head) < COMMANDS_CAP:
                chunk = await request.content.readany()
                if not chunk:
                    break
                head += chunk
                updates, complete = commands(head)
        reply = web.StreamResponse(headers={"Content-Type": f"application/x-{service}-result", "Cache-Control": "no-cache"})
        async with self.slots:
            process = await self._git(request, caller.repo, service, env=self._guards(caller, updates))
            feeding = asyncio.create_task(_feed(request, process, head))
            try:
                await reply.prepare(request)
                while process.stdout is not None and (chunk := await process.stdout.read(CHUNK)):
                    await reply.write(chunk)
                await feeding
                await process.wait()
            finally:
                feeding.cancel()
                if process.returncode is None:
                    process.kill()
                    await process.wait()
        if updates and caller.user is not None:
            # A push speaks of the server by ROOT_URL: its hook runs inside, where no request host is known.
            shapes = Shapes(self.site.state, self.site.root_url, self.site.root_url, caller.user)
            await self.site.acts.pushed(Actor(caller.user, shapes), caller.repo, updates)
        await reply.write_eof()
        return reply

    def _guards(self, caller: Caller, updates: list[Update]) -> dict[str, str]:
        """What the pre-receive script needs to know; nothing for a push that no rule concerns."""
        repo = caller.repo
        if not updates:
            return {}
        if not self.site.state.may(repo, caller.user, "write"):
            return {"FORGE_REFUSE": "User permission denied for writing."}
        guarded = []
        for update in updates:
            branch = update.ref.removeprefix("refs/heads/")
            if update.ref.startswith("refs/heads/") and update.new == ZERO and branch == repo.default_branch:
                return {"FORGE_REFUSE": f"branch {branch} is the default branch and cannot be deleted"}
            if update.ref.startswith("refs/heads/") and branch in repo.protected:
                if update.new == ZERO:
                    return {"FORGE_REFUSE": f"branch {branch} is protected from deletion"}
                guarded.append(update.ref)
        return {"FORGE_GUARDED": " ".join(guarded)} if guarded else {}


async def _feed(request: web.Request, process: asyncio.subprocess.Process, head: bytes) -> None:
    """Copy the request's body to git, which may have ended before it is all read."""
    if process.stdin is None:
        return
    try:
        process.stdin.write(head)
        async for chunk in request.content.iter_any():
            process.stdin.write(chunk)
            await process.stdin.drain()
        process.stdin.close()
        await process.stdin.wait_closed()
    except (BrokenPipeError, ConnectionResetError):
        return
