"""One started process at a time: pipes read without threads, its end seen through a pidfd, its process group killed on every way out."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence

CHUNK = 65_536


class Output:
    """Keeps the first and the last `keep` bytes of a stream, counts the rest, and reports once when `limit` is passed."""

    def __init__(self, *, keep: int, limit: int, on_limit: Callable[[], None]) -> None:
        self.total = 0
        self._keep = keep
        self._limit = limit
        self._on_limit: Callable[[], None] | None = on_limit
        self._head = bytearray()
        self._tail = bytearray()

    def feed(self, data: bytes) -> None:
        """Takes the next bytes of the stream."""
        self.total += len(data)
        room = self._keep - len(self._head)
        if room > 0:
            self._head += data[:room]
            data = data[room:]
        if data:
            self._tail += data
            if len(self._tail) > 2 * self._keep:
                del self._tail[: -self._keep]
        if self.total > self._limit and self._on_limit is not None:
            report, self._on_limit = self._on_limit, None
            report()

    @property
    def omitted(self) -> int:
        """How many bytes stand between the kept head and the kept tail."""
        return self.total - len(self._head) - min(len(self._tail), self._keep)

    def text(self) -> str:
        """What was kept, with one line naming the bytes left out."""
        head = self._head.decode("utf-8", "replace")
        tail = bytes(self._tail[-self._keep :]).decode("utf-8", "replace")
        return f"{head}\n[... {self.omitted} bytes left out ...]\n{tail}" if self.omitted else head + tail


class PipeReader:
    """Feeds what arrives on a descriptor it owns to `feed`, which may be exchanged meanwhile; `ended` is set at end of file."""

    def __init__(self, fd: int, feed: Callable[[bytes], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._fd = fd
        self.feed = feed
        self.ended = asyncio.Event()
        os.set_blocking(fd, False)
        self._loop.add_reader(fd, self._ready)

    def _ready(self) -> None:
        try:
            data = os.read(self._fd, CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self.feed(data)
            return
        self._stop()

    def _stop(self) -> None:
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1
        self.ended.set()

    def close(self, *, drain: int = 1_048_576) -> None:
        """Takes what already lies in the pipe (at most `drain` bytes), then closes the descriptor."""
        while self._fd >= 0 and drain > 0:
            try:
                data = os.read(self._fd, CHUNK)
            except OSError:
                break
            if not data:
                break
            drain -= len(data)
            self.feed(data)
        self._stop()


class PipeWriter:
    """Writes `data` to a descriptor it owns as fast as the reader takes it, then closes it; a reader that went away is not an error."""

    def __init__(self, fd: int, data: bytes) -> None:
        self._loop = asyncio.get_running_loop()
        self._fd = fd
        self._data = memoryview(data)
        os.set_blocking(fd, False)
        self._loop.add_writer(fd, self._ready)

    def _ready(self) -> None:
        try:
            while self._data:
                self._data = self._data[os.write(self._fd, self._data[:CHUNK]) :]
        except BlockingIOError:
            return
        except OSError:
            self._data = memoryview(b"")
        self.close()

    def close(self) -> None:
        """Closes the descriptor, written or not."""
        if self._fd >= 0:
            self._loop.remove_writer(self._fd)
            os.close(self._fd)
            self._fd = -1


class Child:
    """A process that leads its own session. Made in the event-loop thread: the kernel ties a death signal to the thread that started it."""

    def __init__(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        stdin: int,
        stdout: int,
        stderr: int,
        executable: str | None = None,
        user: int | None = None,
        umask: int = 0o077,
        pass_fds: Sequence[int] = (),
    ) -> None:
        """`stdin`, `stdout`, `stderr` are descriptors of the caller (he closes them). `user` drops uid and gid to that number, without groups."""
        self._loop = asyncio.get_running_loop()
        self.ended = asyncio.Event()
        self._popen = subprocess.Popen(
            list(argv),
            executable=executable,
            env=dict(env),
            cwd="/",
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            pass_fds=tuple(pass_fds),
            close_fds=True,
            start_new_session=True,
            umask=umask,
            user=user,
            group=user,
            extra_groups=[] if user is not None else None,
        )
        try:
            self._pidfd = os.pidfd_open(self._popen.pid)
        except OSError:
            self.kill()
            self._popen.wait()
            raise
        self._loop.add_reader(self._pidfd, self._reap)

    @property
    def pid(self) -> int:
        """The process id."""
        return self._popen.pid

    @property
    def returncode(self) -> int | None:
        """As subprocess has it: None while it runs, negative for a signal."""
        return self._popen.returncode

    def _reap(self) -> None:
        if self._popen.poll() is None:
            return
        self._forget()

    def _forget(self) -> None:
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
        self.ended.set()

    def kill(self) -> None:
        """SIGKILL to its process group, as long as the leader was not reaped (its number cannot have been given away)."""
        if self._popen.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._popen.pid, signal.SIGKILL)

    def wait_blocking(self, seconds: float) -> bool:
        """Blocks until it ended, at most `seconds`; True when it did."""
        if self._pidfd < 0:
            return True
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def reap(self) -> int:
        """Blocks until it is gone; for after `kill`, where that is a matter of milliseconds. Returns the return code."""
        code = self._popen.wait()
        self._forget()
        return code


def pipe(owner: int | None = None) -> tuple[int, int]:
    """A pipe (read end, write end) that no child inherits by accident.

    It belongs to `owner`, who can then open it again by name: `/dev/stdin` and `/dev/stderr` of a process with a dropped uid.
    """
    ends = os.pipe2(os.O_CLOEXEC)
    if owner is not None:
        os.fchown(ends[0], owner, owner)
    return ends


def memory_file(name: str, content: bytes) -> int:
    """A descriptor on an anonymous file in memory with that content, at offset 0; the caller closes it."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(fd, rest) :]
        os.lseek(fd, 0, os.SEEK_SET)
    except BaseException:
        os.close(fd)
        raise
    return fd
