"""Runs one command without a sandbox and kills every descendant it leaves; started by path with `python -I -S`, so it imports the standard library only.

Arguments: MARK UID_OR_DASH WORKSPACE CONTROL_FD NAME=LIMIT... -- ARGV. End of file on the control descriptor (the service is gone, or wants the end) kills.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import select
import signal
import sys
import time

_SET_NO_NEW_PRIVS, _SET_CHILD_SUBREAPER = 38, 36
_ROUNDS = 400


def _prctl(option: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def _descendants() -> list[int]:
    """All living processes below this one, by a walk over /proc."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):  # noqa: PTH208  pathlib doubles the start-up time of this script
        if not name.isdigit():
            continue
        with contextlib.suppress(OSError, IndexError, ValueError), open(f"/proc/{name}/stat", "rb") as file:  # noqa: PTH123
            fields = file.read().rpartition(b")")[2].split()
            if fields[0] != b"Z":
                children.setdefault(int(fields[1]), []).append(int(name))
    found: list[int] = []
    waiting = [os.getpid()]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def _signal_all(pids: list[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _kill_tree() -> None:
    """Stops everybody first, so that nobody forks while others die, then kills until nothing is left."""
    stopped: set[int] = set()
    for _ in range(_ROUNDS):
        fresh = [pid for pid in _descendants() if pid not in stopped]
        if not fresh:
            break
        _signal_all(fresh, signal.SIGSTOP)
        stopped.update(fresh)
    for turn in range(_ROUNDS):
        left = _descendants()
        if not left:
            break
        _signal_all(left, signal.SIGKILL)
        _reap()
        if turn:
            time.sleep(0.005)
    _reap()


def _become(uid: str, workspace: str, limits: list[str]) -> None:
    """In the child: own session, dropped identity, limits, no new rights."""
    os.setsid()
    if uid != "-":
        os.setgroups([])
        os.setresgid(int(uid), int(uid), int(uid))
        os.setresuid(int(uid), int(uid), int(uid))
    _prctl(_SET_NO_NEW_PRIVS)
    for limit in limits:
        name, _, value = limit.partition("=")
        key = getattr(resource, f"RLIMIT_{name.upper()}")
        hard = resource.getrlimit(key)[1]
        wanted = int(value) if hard == resource.RLIM_INFINITY else min(int(value), hard)
        resource.setrlimit(key, (wanted, wanted))
    os.chdir(workspace)


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit code, 128 + signal for a signal, 125 when it could not be started."""
    _, uid, workspace, control_text, *rest = arguments
    limits, argv = rest[: rest.index("--")], rest[rest.index("--") + 1 :]
    control = int(control_text)
    _prctl(_SET_CHILD_SUBREAPER)
    pid = os.fork()
    if pid == 0:
        try:
            os.close(control)
            _become(uid, workspace, limits)
            os.execve(argv[0], argv, dict(os.environ))  # noqa: S606  an argument list, no shell
        except BaseException as error:
            os.write(2, f"cannot start: {error}\n".encode())
        os._exit(125)
    for number in (0, 1, 2):
        os.close(number)
    os.open("/dev/null", os.O_RDWR)
    os.dup2(0, 1)
    os.dup2(0, 2)
    poll = select.poll()
    command = os.pidfd_open(pid)
    poll.register(command, select.POLLIN)
    poll.register(control, select.POLLIN | select.POLLHUP)
    ended = any(fd == command for fd, _ in poll.poll())
    status = os.waitpid(pid, 0)[1] if ended else signal.SIGKILL
    _kill_tree()
    return os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
