"""Starts `timmy-dispatch serve` without its imports: a process that has made them once forks each one, which then is a process like any other.

A test that looks at what a process was started with (its arguments, its environment in /proc) must start a real one. As a script this file is the process
that forks: it takes orders as lines of JSON on its input, answers with the process id, and tells how each ended.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PRELOADED = (
    "bot.service",
    "bot.cli.serve",
    "bot.cli._load",
    "bot.cli._process",
    "openai",
    "openai.resources.chat.completions",
    "sqlalchemy.dialects.sqlite",
    "sqlalchemy.dialects.postgresql.psycopg",
)


class Zygote:
    """The one that forks, for the life of this test process; its answers are read by a thread, because event loops come and go."""

    def __init__(self) -> None:
        environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__], cwd=ROOT, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.codes: dict[int, int] = {}
        self._pids: list[int] = []
        self._changed = threading.Condition()
        threading.Thread(target=self._listen, name="zygote", daemon=True).start()
        atexit.register(self.close)

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            told = json.loads(line)
            with self._changed:
                if "code" in told:
                    self.codes[told["pid"]] = told["code"]
                else:
                    self._pids.append(told["pid"])
                self._changed.notify_all()

    def fork(self, arguments: Sequence[str], *, environ: Mapping[str, str], output: Path) -> Forked:
        """A process that runs `timmy-dispatch ARGUMENTS` in `environ` and appends what it prints to `output`."""
        order = {"arguments": list(arguments), "environ": dict(environ), "output": str(output)}
        with self._changed:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            assert self._changed.wait_for(lambda: self._pids, 60), f"nothing was forked; it ended with {self._process.poll()}"
            return Forked(self, self._pids.pop())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(20)


class Forked:
    """As much of `asyncio.subprocess.Process` as tests use."""

    def __init__(self, zygote: Zygote, pid: int) -> None:
        self._zygote = zygote
        self.pid = pid

    @property
    def returncode(self) -> int | None:
        return self._zygote.codes.get(self.pid)

    async def wait(self) -> int:
        while self.returncode is None:
            await asyncio.sleep(0.01)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@functools.cache
def zygote() -> Zygote:
    return Zygote()


def _tell(**told: Any) -> None:
    sys.stdout.write(json.dumps(told) + "\n")
    sys.stdout.flush()


def _become(order: Mapping[str, Any]) -> None:
    """In the child: nothing of the one that forked is left but what it imported."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    null = os.open(os.devnull, os.O_RDONLY)
    out = os.open(order["output"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    for fd, place in ((null, 0), (out, 1), (out, 2)):
        os.dup2(fd, place)
    os.closerange(3, 256)
    os.environ.clear()
    os.environ.update(order["environ"])
    sys.argv = ["timmy-dispatch", *order["arguments"]]


def main() -> None:
    """Until nobody gives orders any more; returns in a child, which then is what it was asked to be."""
    import gc
    import importlib

    for name in PRELOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    waker, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    pending = b""
    children: set[int] = set()
    while True:
        ready, _, _ = select.select([0, waker], [], [])
        if waker in ready:
            os.read(waker, 4096)
            for pid in tuple(children):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    children.discard(pid)
                    _tell(pid=pid, code=os.waitstatus_to_exitcode(status))
        if 0 not in ready:
            continue
        data = os.read(0, 1 << 20)
        if not data:
            os._exit(0)
        *orders, pending = (pending + data).split(b"\n")
        for order in orders:
            pid = os.fork()
            if pid == 0:
                _become(json.loads(order))
                return
            children.add(pid)
            _tell(pid=pid)


if __name__ == "__main__":
    main()
    from bot.__main__ import main as program

    program()
