"""The file tools' only door into a workspace: openat2 beneath it, no links of any kind, regular files only."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bot.models import UserError
from bot.sandbox.contract import SandboxUnavailable

_OPENAT2 = 437
_NO_XDEV, _NO_MAGICLINKS, _NO_SYMLINKS, _BENEATH = 1, 2, 4, 8
_RESOLVE = _BENEATH | _NO_SYMLINKS | _NO_MAGICLINKS | _NO_XDEV
_FOLDER = os.O_RDONLY | os.O_DIRECTORY
_FILE = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY
_ATTEMPTS = 8
_INSIDE = "/workspace"

_libc = ctypes.CDLL(None, use_errno=True)


class PathRefused(UserError):
    """A path of the model that cannot be used; the text tells it what is wrong and what to do instead."""


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a listing: path relative to the workspace, kind (`file`, `directory`, `symlink`, `other`) and size in bytes (files only)."""

    path: str
    kind: str
    size: int = 0


_Entries = list[Entry]


def openat2(directory: int, path: str, flags: int, mode: int = 0) -> int:
    """Opens `path` beneath the open `directory`; raises OSError as the kernel has it (ELOOP for a link, EXDEV for a way out)."""
    how = _OpenHow(flags | os.O_CLOEXEC, mode, _RESOLVE)
    for _ in range(_ATTEMPTS):
        fd = int(
            _libc.syscall(
                ctypes.c_long(_OPENAT2), ctypes.c_int(directory), os.fsencode(path), ctypes.byref(how), ctypes.c_size_t(ctypes.sizeof(how))
            )
        )
        if fd >= 0:
            return fd
        code = ctypes.get_errno()
        if code not in {errno.EAGAIN, errno.EINTR}:
            break
    else:
        code = errno.EAGAIN
    raise OSError(code, os.strerror(code))


class WorkspaceFiles:
    """Reads and writes below one workspace. Paths are relative, or absolute as the model sees them (`/workspace/...`, or the real path).

    What a root service writes belongs to the owner of the workspace. Every refusal is a PathRefused. The calls block for as long as the disk does.
    """

    def __init__(self, root: Path) -> None:
        """Raises SandboxUnavailable where the kernel lacks openat2 (before Linux 5.6)."""
        self._root = root
        with _opened(os.open(root, _FOLDER | os.O_NOFOLLOW | os.O_CLOEXEC)) as top:
            found = os.fstat(top)
            try:
                os.close(openat2(top, ".", _FOLDER))
            except OSError as error:
                if error.errno in {errno.ENOSYS, errno.EPERM}:
                    raise SandboxUnavailable(
                        "the kernel has no openat2", "Run on Linux 5.6 or later, with a seccomp profile that admits openat2."
                    ) from error
                raise
        self._owner = (found.st_uid, found.st_gid) if os.getuid() == 0 else None

    def read(self, path: str, max_bytes: int) -> bytes:
        """The whole file; one that is larger than `max_bytes` is refused, never cut."""
        name = self._relative(path)
        with _refusing(path), self._top() as top, _opened(openat2(top, name, _FILE)) as fd:
            size = _regular(fd, path)
            if size > max_bytes:
                raise PathRefused(
                    f"`{path}` has {size} bytes, and at most {max_bytes} can be read at once: use run_command with `sed -n` or `head -c`"
                )
            data = bytearray()
            while len(data) <= max_bytes:
                chunk = os.read(fd, min(1_048_576, max_bytes + 1 - len(data)))
                if not chunk:
                    return bytes(data)
                data += chunk
        raise PathRefused(f"`{path}` grew beyond {max_bytes} bytes while it was read")

    def exists(self, path: str) -> bool:
        """True for anything that stands at the path, links included (they are not followed)."""
        folder, _, last = self._relative(path).rpartition("/")
        with _refusing(path), self._top() as top:
            try:
                with _opened(openat2(top, folder or ".", os.O_PATH | os.O_DIRECTORY)) as fd:
                    if last == "..":
                        raise PathRefused(f"`{path}` must not end in `..`")
                    os.stat(last, dir_fd=fd, follow_symlinks=False)
            except (FileNotFoundError, NotADirectoryError):
                return False
        return True

    def write(self, path: str, data: bytes) -> None:
        """Replaces or creates the file in one rename, with missing folders; an existing file keeps its mode."""
        folder, _, last = self._relative(path).rpartition("/")
        if last in {"", ".", ".."} or path.endswith("/"):
            raise PathRefused(f"`{path}` names a folder; give the path of a file")
        with _refusing(path), self._top() as top, self._parent(top, folder) as parent:
            mode = 0o644
            with contextlib.suppress(FileNotFoundError), _opened(openat2(parent, last, _FILE)) as old:
                _regular(old, path)
                mode = stat.S_IMODE(os.fstat(old).st_mode) & 0o777
            temporary = f".{secrets.token_hex(8)}.tmp"
            with _opened(openat2(parent, temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)) as new:
                try:
                    rest = memoryview(data)
                    while rest:
                        rest = rest[os.write(new, rest) :]
                    self._give(new)
                    os.fchmod(new, mode)
                    os.rename(temporary, last, src_dir_fd=parent, dst_dir_fd=parent)
                except BaseException:
                    with contextlib.suppress(OSError):
                        os.unlink(temporary, dir_fd=parent)
                    raise

    def list(self, path: str, depth: int, limit: int) -> tuple[Entry, ...]:
        """What is below a folder, sorted, at most `depth` levels and `limit` entries; `.git` is named, not entered. `limit` entries mean: maybe more."""
        name = self._relative(path)
        found: _Entries = []
        with _refusing(path), self._top() as top, _opened(openat2(top, name, _FOLDER)) as fd:
            self._walk(fd, "" if name == "." else name + "/", depth, limit, found)
        return tuple(found)

    def _walk(self, folder: int, prefix: str, depth: int, limit: int, found: _Entries) -> None:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries)
        for name in names:
            if len(found) >= limit:
                return
            try:
                info = os.stat(name, dir_fd=folder, follow_symlinks=False)
            except OSError:
                continue
            kind = _kind(info.st_mode)
            found.append(Entry(prefix + name, kind, info.st_size if kind == "file" else 0))
            if kind == "directory" and depth > 1 and name != ".git":
                with contextlib.suppress(OSError), _opened(openat2(folder, name, _FOLDER)) as below:
                    self._walk(below, f"{prefix}{name}/", depth - 1, limit, found)

    @contextmanager
    def _top(self) -> Iterator[int]:
        with _opened(os.open(self._root, _FOLDER | os.O_NOFOLLOW | os.O_CLOEXEC)) as fd:
            yield fd

    @contextmanager
    def _parent(self, top: int, folder: str) -> Iterator[int]:
        """The open folder a file goes into; what is missing of it is made, one level at a time."""
        current = os.dup(top)
        try:
            for part in (part for part in folder.split("/") if part not in {"", "."}):
                try:
                    below = openat2(current, part, _FOLDER)
                except FileNotFoundError:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(part, 0o755, dir_fd=current)
                    below = openat2(current, part, _FOLDER)
                    self._give(below)
                    os.fchmod(below, 0o755)
                os.close(current)
                current = below
            yield current
        finally:
            os.close(current)

    def _give(self, fd: int) -> None:
        if self._owner is not None:
            os.fchown(fd, *self._owner)

    def _relative(self, path: str) -> str:
        """The path below the workspace as given, `..` and links left for the kernel to refuse."""
        if not path or "\0" in path or len(path) > 4000:  # noqa: PLR2004  PATH_MAX less a margin
            raise PathRefused("a path must be 1 to 4000 characters without NUL")
        for prefix in (_INSIDE, str(self._root)):
            if path == prefix:
                return "."
            if path.startswith(prefix + "/"):
                path = path[len(prefix) + 1 :].lstrip("/")
                break
        if path.startswith("/"):
            raise PathRefused(f"`{path}` is outside the workspace; use paths relative to it")
        return path.rstrip("/") or "."


@contextmanager
def _opened(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _refusing(path: str) -> Iterator[None]:
    """Turns what the kernel says about `path` into words for a model."""
    try:
        yield
    except OSError as error:
        reasons = {
            errno.ENOENT: "does not exist",
            errno.ENOTDIR: "does not exist: a part of it is a file, or it is no folder",
            errno.EISDIR: "is a folder, not a file",
            errno.ENXIO: "is a pipe or socket, not a regular file",
            errno.ELOOP: "is a symbolic link or lies behind one; use the path of the target itself",
            errno.EXDEV: "leads out of the workspace",
            errno.EACCES: "is not readable or writable: change its mode with run_command first",
            errno.ENAMETOOLONG: "is too long",
            errno.ENOSPC: "cannot be written: the disk is full",
            errno.EDQUOT: "cannot be written: the disk quota is used up",
        }
        known = reasons.get(error.errno or 0, f"cannot be used: {error.strerror}")
        raise PathRefused(f"`{path}` {known}") from error


def _regular(fd: int, path: str) -> int:
    """The size of an open regular file that has one name only."""
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        raise PathRefused(
            f"`{path}` is a {_kind(found.st_mode) if stat.S_ISDIR(found.st_mode) else 'device, pipe or socket'}, not a regular file"
        )
    if found.st_nlink != 1:
        raise PathRefused(f"`{path}` is a hard link ({found.st_nlink} names); copy it to a new file with run_command first")
    return found.st_size


def _kind(mode: int) -> str:
    if stat.S_ISREG(mode):
        return "file"
    if stat.S_ISDIR(mode):
        return "directory"
    return "symlink" if stat.S_ISLNK(mode) else "other"
