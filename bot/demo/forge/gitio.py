"""Git on the forge's disk: bare repositories only, every child with an environment built from nothing, nothing synced to the platter."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

ZERO: Final = "0" * 40
ENV: Final[Mapping[str, str]] = {
    "PATH": f"/usr/local/bin:{os.defpath}",
    "HOME": "/nonexistent",
    "LC_ALL": "C.UTF-8",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_TERMINAL_PROMPT": "0",
}
_CONFIG: Final = """[core]
\trepositoryformatversion = 0
\tbare = true
\tfsync = none
[gc]
\tauto = 0
[receive]
\tautogc = false
\thideRefs = refs/pull
[uploadpack]
\tallowAnySHA1InWant = true
\tallowFilter = true
[maintenance]
\tauto = false
"""
_SHORTSTAT: Final = re.compile(rb"(\d+) (file|insertion|deletion)")


class Threads:
    """Threads of the forge's own: a test whose clients block every thread of the event loop's pool must not stop the server too."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(max_workers=8, thread_name_prefix="forge")
        return await asyncio.get_running_loop().run_in_executor(self._pool, partial(work, *args, **kwargs))

    def close(self) -> None:
        """End the threads when their work is done; the next use makes new ones."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


class GitError(Exception):
    """A git command failed; the text is its stderr."""


class ConflictError(GitError):
    """A merge cannot be made by machine, or a ref moved meanwhile."""


@dataclass(frozen=True, slots=True)
class Person:
    """Who is written into a commit; `when` is in seconds since the epoch."""

    name: str
    email: str
    when: int


@dataclass(frozen=True, slots=True)
class Commit:
    """One commit as a push delivery lists it."""

    sha: str
    message: str
    author: Person
    committer: Person
    added: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    modified: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Change:
    """One file of a pull request."""

    path: str
    status: str
    previous: str
    additions: int
    deletions: int


@dataclass(frozen=True, slots=True)
class Comparison:
    merge_base: str
    mergeable: bool
    additions: int
    deletions: int
    changed_files: int


def run(path: Path, *args: str, data: bytes | None = None, env: Mapping[str, str] | None = None) -> bytes:
    """Run git in a bare repository and return its stdout; GitError on any exit status but 0. Blocks: call it in a thread."""
    done = subprocess.run(
        ["git", *args],
        cwd=path,
        input=data,
        stdin=subprocess.DEVNULL if data is None else None,
        capture_output=True,
        env={**ENV, **(env or {})},
        check=False,
    )
    if done.returncode:
        raise GitError(done.stderr.decode(errors="replace").strip())
    return done.stdout


def text(path: Path, *args: str) -> str:
    return run(path, *args).decode(errors="replace").strip()


def init(path: Path, default_branch: str) -> None:
    """Lay out an empty bare repository without starting a process."""
    for folder in ("objects/info", "objects/pack", "refs/heads", "refs/tags", "info"):
        (path / folder).mkdir(parents=True)
    (path / "HEAD").write_text(f"ref: refs/heads/{default_branch}\n")
    (path / "config").write_text(_CONFIG)


def fork(source: Path, target: Path) -> None:
    shutil.copytree(source, target)
    shutil.rmtree(target / "refs" / "pull", ignore_errors=True)


def refs(path: Path) -> dict[str, str]:
    """All refs with their object, read from the files without starting a process."""
    found: dict[str, str] = {}
    packed = path / "packed-refs"
    if packed.exists():
        for line in packed.read_text().splitlines():
            if line and line[0] not in "#^":
                sha, _, name = line.partition(" ")
                found[name] = sha
    for folder, _, names in os.walk(path / "refs"):
        for name in names:
            if not name.endswith(".lock"):
                file = Path(folder, name)
                found[file.relative_to(path).as_posix()] = file.read_text().strip()
    return found


def commit_files(
    path: Path,
    branch: str,
    *,
    files: Mapping[str, str | bytes | None],
    message: str,
    author: Person,
    parent: str = "",
) -> str:
    """One new commit on a branch, made by one process; None deletes the file. Returns its sha."""
    out = [f"commit refs/heads/{branch}\nmark :1\n".encode()]
    who = f"{author.name} <{author.email}> {author.when} +0000"
    body = message.encode()
    out.append(f"author {who}\ncommitter {who}\ndata {len(body)}\n".encode() + body + b"\n")
    if parent:
        out.append(f"from {parent}\n".encode())
    for name, content in files.items():
        quoted = '"' + name.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
        if content is None:
            out.append(f"D {quoted}\n".encode())
            continue
        blob = content.encode() if isinstance(content, str) else content
        out.append(f"M 100644 inline {quoted}\ndata {len(blob)}\n".encode() + blob + b"\n")
    out.append(b"\nget-mark :1\n")
    return run(path, "fast-import", "--quiet", "--date-format=raw", data=b"".join(out)).decode().strip()


def set_ref(path: Path, ref: str, sha: str, *, old: str = "") -> None:
    """Point a ref at a commit, or delete it when `sha` is empty. ConflictError when it is not at `old` any more."""
    try:
        run(path, "update-ref", *(["-d", ref] if not sha else [ref, sha]), *([old] if old else []))
    except GitError as error:
        raise ConflictError(str(error)) from error


def resolve(path: Path, name: str) -> str:
    """The commit a branch, tag or sha stands for; empty when there is none."""
    if name.startswith("-"):
        return ""
    try:
        return text(path, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
    except GitError:
        return ""


def compare(path: Path, base: str, head: str) -> Comparison:
    """What merging head into base would mean. GitError when the two have no common history."""
    merge_base = text(path, "merge-base", base, head)
    counts = {"file": 0, "insertion": 0, "deletion": 0}
    for number, word in _SHORTSTAT.findall(run(path, "diff", "--shortstat", merge_base, head)):
        counts[word.decode()] = int(number)
    mergeable = merge_base == base
    if not mergeable:
        try:
            run(path, "merge-tree", "--write-tree", base, head)
            mergeable = True
        except GitError:
            mergeable = False
    return Comparison(
        merge_base=merge_base,
        mergeable=mergeable,
        additions=counts["insertion"],
        deletions=counts["deletion"],
        changed_files=counts["file"],
    )


def changes(path: Path, merge_base: str, head: str) -> list[Change]:
    names = run(path, "diff", "-M", "--name-status", "-z", merge_base, head).decode(errors="replace").split("\0")
    stats: dict[str, tuple[int, int]] = {}
    for line in run(path, "diff", "-M", "--numstat", merge_base, head).decode(errors="replace").splitlines():
        added, removed, name = line.split("\t", 2)
        stats[name] = (int(added) if added.isdigit() else 0, int(removed) if removed.isdigit() else 0)
    words = {"A": "added", "D": "deleted", "M": "changed", "R": "renamed", "C": "copied", "T": "changed"}
    found: list[Change] = []
    rest = iter(names)
    for code in rest:
        if not code:
            continue
        previous = next(rest) if code[0] in "RC" else ""
        name = next(rest)
        added_lines, removed_lines = stats.get(name, (0, 0))
        found.append(
            Change(path=name, status=words.get(code[0], "changed"), previous=previous, additions=added_lines, deletions=removed_lines)
        )
    return found


def diff(path: Path, merge_base: str, head: str) -> bytes:
    return run(path, "diff", "-M", "--full-index", "--binary", merge_base, head)


def log(path: Path, *wanted: str, limit: int = 30) -> list[Commit]:
    """Commits with the files they touched, newest first; `wanted` is what git log takes as its range."""
    pretty = "--format=%x00%H%x01%B%x01%an%x01%ae%x01%at%x01%cn%x01%ce%x01%ct%x01"
    out = run(path, "log", pretty, "--name-status", "--no-renames", f"--max-count={limit}", *wanted, "--")
    found: list[Commit] = []
    for record in out.decode(errors="replace").split("\0")[1:]:
        sha, message, name, email, when, c_name, c_email, c_when, files = record.split("\x01", 8)
        touched: dict[str, list[str]] = {"A": [], "D": [], "M": []}
        for line in files.strip().splitlines():
            code, _, file = line.partition("\t")
            touched.setdefault(code[:1], []).append(file)
        found.append(
            Commit(
                sha=sha,
                message=message.rstrip("\n") + "\n",
                author=Person(name, email, int(when)),
                committer=Person(c_name, c_email, int(c_when)),
                added=touched["A"],
                removed=touched["D"],
                modified=touched["M"],
            )
        )
    return found


def merge(
    path: Path,
    *,
    base_ref: str,
    base: str,
    head: str,
    style: str,
    message: str,
    author: Person,
    committer: Person,
) -> str:
    """Merge head into the base ref: `squash` makes one commit, `fast-forward-only` none, all else a merge commit. Returns the new head."""
    if style == "fast-forward-only":
        if text(path, "merge-base", base, head) != base:
            raise ConflictError("not a fast-forward")
        new = head
    else:
        try:
            tree = text(path, "merge-tree", "--write-tree", base, head)
        except GitError as error:
            raise ConflictError(str(error)) from error
        people = {
            "GIT_AUTHOR_NAME": author.name,
            "GIT_AUTHOR_EMAIL": author.email,
            "GIT_AUTHOR_DATE": f"{author.when} +0000",
            "GIT_COMMITTER_NAME": committer.name,
            "GIT_COMMITTER_EMAIL": committer.email,
            "GIT_COMMITTER_DATE": f"{committer.when} +0000",
        }
        parents = ["-p", base] if style == "squash" else ["-p", base, "-p", head]
        new = run(path, "commit-tree", tree, *parents, data=message.encode(), env=people).decode().strip()
    set_ref(path, base_ref, new, old=base)
    return new


def read(path: Path, ref: str, name: str) -> bytes | None:
    """A file's content, None when there is no such file."""
    try:
        return run(path, "cat-file", "blob", f"{ref}:{name}")
    except GitError:
        return None


def tree(path: Path, ref: str, folder: str = "", *, recursive: bool = False) -> list[tuple[str, str, str, int, str]] | None:
    """(mode, type, sha, size, path) of a folder's entries; None when there is no such folder."""
    treeish = f"{ref}:{folder.strip('/')}" if folder.strip("/") else ref
    try:
        out = run(path, "ls-tree", "-z", "--long", *(["-r", "-t"] if recursive else []), treeish)
    except GitError:
        return None
    found: list[tuple[str, str, str, int, str]] = []
    for line in out.decode(errors="replace").split("\0"):
        if line:
            head, _, name = line.partition("\t")
            mode, kind, sha, size = head.split()
            found.append((mode, kind, sha, int(size) if size.isdigit() else 0, "/".join(filter(None, (folder.strip("/"), name)))))
    return found
