"""One new file in `commands/` and one in `handlers/` is all that a verb and a handler need: help, permission, reply, command line."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from pathlib import Path

from served import ROOT, ServedWorld
from talk import issue_with, reacted
from world import make_world, until

COMMAND = '''"""`/dispatch greet`: says hello, by the file's name."""

from __future__ import annotations

from bot.chatops import Command, Context
from bot.models import Permission, Reaction, Reply, Verdict


def greet(context: Context) -> Verdict:
    """Greets with the answer of help."""
    verbs = [{"usage": "/dispatch greet", "summary": f"hello {context.ask.actor.login}", "needs": "WRITE", "examples": []}]
    return Verdict("ok", "greeted", Reply("help_text", {"verbs": verbs, "has": context.permission.name}, Reaction.ROCKET))


plugin = Command(greet, usage="/dispatch greet", needs=Permission.WRITE, examples=("/dispatch greet",))
'''
HANDLER = '''"""A pull request that is opened by a person is asked about, as if its author had asked for help there."""

from __future__ import annotations

from bot.chatops import Desk, Finding
from bot.gitea.routing import Router
from bot.gitea.sansio import Event
from bot.models import Ask, IssueRef, Source
from handlers._people import place, sender

plugin = Router()


@plugin.on("pull_request", action="opened")
async def welcome(event: Event, desk: Desk) -> list[Finding]:
    """One question a pull request."""
    where, actor, number = place(event), sender(event), event.data["number"]
    if where is None or actor is None:
        return []
    ref = IssueRef.of(where[1], number)
    key = f"welcome:{where[0]}:{number}"
    return [Ask(key=key, repo_id=where[0], issue=ref, actor=actor, source=Source.COMMAND, verb="greet", asked_ms=0)]
'''


class CopiedWorld(ServedWorld):
    """The service runs from a copy of the three packages that holds two more files."""

    @property
    def copy(self) -> Path:
        return self.state_dir.parent / "code"

    def make_copy(self) -> None:
        for package in ("bot", "commands", "handlers"):
            shutil.copytree(ROOT / package, self.copy / package, ignore=shutil.ignore_patterns("__pycache__"))
        (self.copy / "commands" / "greet.py").write_text(COMMAND)
        (self.copy / "handlers" / "welcome.py").write_text(HANDLER)
        # The sandbox's user reads the supervisor script.
        for path in (self.copy, *self.copy.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        self.extra_environ = {"PYTHONPATH": str(self.copy)}

    async def cli(self, *arguments: str) -> tuple[int, str]:
        """What the command line of the copy says."""
        environ = {"PATH": os.environ["PATH"], "HOME": str(self.state_dir.parent), "PYTHONPATH": str(self.copy), "COLUMNS": "120"}
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-P", "-m", "bot", *arguments),
            cwd=self.state_dir.parent,
            env=environ,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        out, _ = await process.communicate()
        return process.returncode or 0, out.decode()


async def test_a_file_dropped_into_commands_and_one_into_handlers_work(base: Path):
    async with make_world(base, kind=CopiedWorld, start=False) as world:
        world.make_copy()
        await world.serve()
        await world.listening()
        issue = await issue_with(world)
        asked = await world.alice.comment(issue, "/dispatch greet")
        await reacted(world, asked, "rocket")
        await until(lambda: _said(world, issue, f"hello {world.alice.login}"))
        helped = await world.bob.comment(issue, "/dispatch help greet")
        await reacted(world, helped, "rocket")
        await until(lambda: _said(world, issue, "Greets with the answer of help"))
        stranger = await world.mallory.comment(issue, "/dispatch greet")
        await reacted(world, stranger, "confused")
        await until(lambda: _said(world, issue, world.mallory.login))
        typo = await world.bob.comment(issue, "/dispatch gret")
        await reacted(world, typo, "confused")
        await until(lambda: _said(world, issue, "/dispatch greet"))
        await world.forge.push_file(world.stage.repo, "bob", "topic", "NOTES.md", "mine\n")
        pull = await world.forge.open_pull(world.stage.repo, "bob", head="topic", title="Mine")
        await until(lambda: _said(world, pull.number, f"hello {world.bob.login}"))
        code, text = await world.cli("--help")
        assert (code, "greet" in text) == (0, True), text
        code, text = await world.cli("greet", "--help")
        assert (code, "Greets with the answer of help" in text) == (0, True), text
        code, text = await world.cli("--config", str(base / "config" / "dispatch.yml"), "greet", f"{world.stage.repo}#{issue}")
        assert (code, "hello" in text) == (0, True), text
        assert world.model.requests == []


async def _said(world: CopiedWorld, issue: int, words: str):
    return [text for text in await world.by_bot(issue) if words in text.replace("\u200b", "")]
