"""Which trees may become a pull request: rules on names, modes, links, sizes and protected paths, decided on values alone."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

MAX_FILES = 500
MAX_BLOB = 5 * 1024**2
MAX_LISTED = 20

PROTECTED = (
    ".gitea/",
    ".github/",
    ".forgejo/",
    ".woodpecker*",
    ".dispatch.yml",
    ".dispatch.yaml",
    ".gitlab-ci.yml",
    ".drone.yml",
    "Jenkinsfile",
    ".gitmodules",
    ".gitattributes",
    ".lfsconfig",
    "CODEOWNERS",
)
FLAGGED = (
    "AGENTS.md",
    "CLAUDE.md",
    "GEMINI.md",
    ".cursorrules",
    ".windsurfrules",
    ".aider*",
    ".claude/",
    ".cursor/",
    ".codex/",
    ".gemini/",
    ".vscode/",
    ".idea/",
    ".zed/",
    ".devcontainer/",
    ".devcontainer.json",
    ".envrc",
    ".husky/",
    ".githooks/",
    ".pre-commit-config.yaml",
    "lefthook.yml",
    "Makefile",
    "Dockerfile*",
    "package.json",
    "setup.py",
    "conftest.py",
    "build.rs",
    "build.gradle*",
    "pom.xml",
    "CMakeLists.txt",
    "Rakefile",
)
_SUBMODULE, _LINK, _ABSENT = "160000", "120000", "000000"
_FILES = frozenset({"100644", "100755"})
_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


@dataclass(frozen=True, slots=True)
class Change:
    """One path that differs. Modes are git's six digits, status its letter (A, D, M, T), `size` bytes of the new blob."""

    path: str
    old_mode: str
    new_mode: str
    status: str
    size: int = 0


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken rule: `protected`, `submodule`, `mode`, `name`, `symlink`, `size`, `files`, `empty`, `secret`; `detail` is for people."""

    rule: str
    path: str
    detail: str


@dataclass(frozen=True, slots=True)
class Policy:
    """What the policy found: any violation refuses the tree; flagged paths pass and are named first in the pull request."""

    violations: list[Violation]
    flagged: list[str]


def judge(
    changes: Sequence[Change],
    *,
    links: Mapping[str, str],
    protected: Iterable[str],
    allow_protected: bool,
    max_files: int = MAX_FILES,
    max_blob: int = MAX_BLOB,
) -> Policy:
    """Every rule but the secret scan. `links` holds the targets of new symbolic links by path."""
    violations: list[Violation] = []
    flagged: list[str] = []
    patterns = (*PROTECTED, *protected)
    if not changes:
        violations.append(Violation("empty", "", "nothing was changed"))
    if len(changes) > max_files:
        violations.append(Violation("files", "", f"more than {max_files} files are changed"))
    for change in changes[: max_files + 1]:
        path = change.path
        if any(unicodedata.category(char) in {"Cc", "Cs"} or char in _BIDI for char in path):
            violations.append(Violation("name", printable(path), "the name holds control, direction or undecodable characters"))
        rule = next((pattern for pattern in patterns if matches(path, pattern)), "")
        if rule and allow_protected:
            flagged.append(path)
        elif rule:
            violations.append(Violation("protected", printable(path), f"`{rule}` is protected: only people change it"))
        elif any(matches(path, pattern) for pattern in FLAGGED):
            flagged.append(path)
        if _SUBMODULE in {change.old_mode, change.new_mode}:
            violations.append(
                Violation("submodule", printable(path), "submodules and nested repositories are not added, changed or removed")
            )
        elif change.new_mode == _LINK:
            reason = link_fault(path, links.get(path, ""))
            if reason:
                violations.append(Violation("symlink", printable(path), reason))
        elif change.new_mode not in _FILES and change.new_mode != _ABSENT:
            violations.append(Violation("mode", printable(path), f"mode {change.new_mode} is not allowed"))
        if change.size > max_blob:
            violations.append(Violation("size", printable(path), f"{change.size} bytes; at most {max_blob} are allowed"))
    return Policy(violations, flagged)


def printable(path: str) -> str:
    """A path as one harmless line."""
    return "".join(char if char.isprintable() and char not in _BIDI else char.encode("unicode_escape", "replace").decode() for char in path)


def link_fault(path: str, target: str) -> str:
    """Why a symbolic link at `path` may not point to `target`, or an empty string.

    `..` only as leading parts, at most as many as the link is deep: anything else can lead out through another link.
    """
    if not target or "\0" in target or any(unicodedata.category(char) in {"Cc", "Cs"} for char in target):
        return "the target is empty or holds control characters"
    if target.startswith("/"):
        return "the target is absolute"
    parts = [part for part in target.split("/") if part not in {"", "."}]
    leading = next((index for index, part in enumerate(parts) if part != ".."), len(parts))
    if ".." in parts[leading:]:
        return "the target holds `..` behind a name"
    if leading > path.count("/"):
        return "the target leads out of the repository"
    if any(_fold(part) == ".git" for part in parts):
        return "the target lies in .git"
    return ""


def matches(path: str, pattern: str) -> bool:
    """Compares without case. `dir/` covers what is below that folder of the root; a pattern without `/` any part of the path; else the whole path."""
    folded, wanted = _fold(path), _fold(pattern).removeprefix("/")
    if wanted.endswith("/"):
        return folded.startswith(wanted) or folded == wanted[:-1]
    if "/" in wanted:
        return fnmatchcase(folded, wanted) or folded.startswith(wanted + "/")
    return any(fnmatchcase(part, wanted) for part in folded.split("/"))


def _fold(text: str) -> str:
    """Without case, and without the characters some file systems ignore in a name."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return "/".join("".join(char for char in part if unicodedata.category(char) != "Cf").rstrip(". ") or part for part in text.split("/"))
