"""The life of one command: started, bounded, ended; whatever happens, its tree is dead before the caller goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from bot.config import SandboxSettings
from bot.sandbox.contract import CommandResult
from bot.sandbox.limits import KEPT_OUTPUT, Watcher
from bot.sandbox.process import Child, Output, PipeReader, PipeWriter

MAX_COMMAND = 131_000


def unusable(command: str) -> CommandResult | None:
    """The answer to a command the kernel could not take as one argument, or None where it can: the model's mistake, not a broken sandbox."""
    why = ""
    if "\0" in command:
        why = "the command holds a NUL character"
    else:
        try:
            if len(command.encode()) > MAX_COMMAND:
                why = f"the command is longer than {MAX_COMMAND} bytes: write it to a file first"
        except UnicodeEncodeError:
            why = "the command is not valid Unicode"
    return CommandResult(126, f"{why}; nothing was run", timed_out=False, omitted_bytes=0, killed="") if why else None


@dataclass(slots=True)
class Running:
    """A started command. `kill` ends its whole tree and returns when it is gone; `output` reads what it prints."""

    child: Child
    output: PipeReader
    kill: Callable[[], None]
    stdin_fd: int = -1
    stdin: bytes = b""


async def finish(running: Running, settings: SandboxSettings, *, timeout: float | None, watcher: Watcher | None) -> CommandResult:
    """Waits for the end of a started command within the bounds, kills what is left of it, and says how it ended."""
    seconds = settings.command_seconds if timeout is None else timeout
    ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    note = ""

    def end(why: str) -> None:
        if not ended.done():
            ended.set_result(why)

    def breach(sentence: str) -> None:
        nonlocal note
        note = sentence
        end("disk")

    output = Output(keep=KEPT_OUTPUT, limit=settings.output_bytes, on_limit=lambda: end("output"))
    running.output.feed = output.feed
    writer = PipeWriter(running.stdin_fd, running.stdin) if running.stdin_fd >= 0 else None
    tasks = [asyncio.ensure_future(_watch_end(running.child, end))]
    if watcher is not None:
        tasks.append(asyncio.ensure_future(watcher.watch(breach)))
    why = ""
    try:
        try:
            async with asyncio.timeout(seconds):
                why = await ended
        except TimeoutError:
            why = "timeout"
    finally:
        for task in tasks:
            task.cancel()
        running.kill()
        if writer is not None:
            writer.close()
        running.output.close()
    if not why and watcher is not None and watcher.worth_a_look:
        note = await asyncio.to_thread(watcher.look)
        why = "disk" if note else ""
    text = output.text()
    if why == "disk":
        text += f"\n[killed: {note}]"
    return CommandResult(
        exit_code=None if why else _exit_code(running.child.returncode),
        output=text,
        timed_out=why == "timeout",
        omitted_bytes=output.omitted,
        killed=why,
    )


async def _watch_end(child: Child, end: Callable[[str], None]) -> None:
    await child.ended.wait()
    end("")


def _exit_code(returncode: int | None) -> int | None:
    return 128 - returncode if returncode is not None and returncode < 0 else returncode
