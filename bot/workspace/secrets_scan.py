"""Credentials in added lines of a diff; a hit names the file, the line and the kind, never the value."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

PATTERNS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (kind, re.compile(pattern))
    for kind, pattern in (
        ("GitHub token", r"\b(?:gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_[A-Za-z0-9_]{50,255})"),
        ("GitLab token", r"\bgl(?:pat|dt|rt|cbt|ptt|ft|soat)-[A-Za-z0-9_-]{20,100}"),
        ("AWS key", r"\b(?:AKIA|ASIA|ABIA|ACCA)[A-Z2-7]{16}\b"),
        ("Anthropic key", r"\bsk-ant-[A-Za-z0-9_-]{20,200}"),
        ("OpenAI key", r"\bsk-(?:proj-|svcacct-|admin-)?[A-Za-z0-9_-]{32,200}\b"),
        (
            "Slack token",
            r"\bxox[abeoprs]-[A-Za-z0-9-]{10,200}|hooks\.slack\.com/services/T[A-Za-z0-9]{6,12}/B[A-Za-z0-9]{6,12}/[A-Za-z0-9]{20,30}",
        ),
        ("Google key", r"\bAIza[A-Za-z0-9_-]{35}"),
        ("JSON web token", r"\beyJ[A-Za-z0-9_-]{10,2000}\.eyJ[A-Za-z0-9_-]{10,4000}\.[A-Za-z0-9_-]{10,2000}"),
        ("private key", r"-----BEGIN (?:[A-Z0-9]{1,20} ){0,3}PRIVATE KEY(?: BLOCK)?-----"),
        ("credentials in an address", r"\b[a-z][a-z0-9+.-]{1,20}://[^\s/:@'\"<>{}$]{1,100}:[^\s/:@'\"<>{}$]{4,200}@[A-Za-z0-9.-]{1,200}"),
        (
            "authorization header",
            r"(?i)\bauthorization[\"']?\s{0,3}[:=]\s{0,3}[\"']?(?:basic|bearer|token)\s{1,3}[A-Za-z0-9+/=_.-]{16,2000}",
        ),
        ("npm token", r"\bnpm_[A-Za-z0-9]{36}\b"),
        ("PyPI token", r"\bpypi-AgE[A-Za-z0-9_-]{50,500}"),
        ("Stripe key", r"\b[rs]k_(?:live|test)_[A-Za-z0-9]{20,200}"),
        ("Hugging Face token", r"\bhf_[A-Za-z0-9]{30,50}\b"),
        (
            "quoted secret",
            r"(?i)(?:password|passwd|secret|token|api_?key|access_?key)[\"']?\s{0,3}[:=]\s{0,3}[\"'](?!\$\{|\{\{|<|%\()(?=[^\"'\s]{0,200}[0-9])[^\"'\s]{12,200}[\"']",
        ),
    )
)
_HUNK = re.compile(rb"@@ -\d+(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")
_LONGEST = 20_000
OURS = "secret of this service"


@dataclass(frozen=True, slots=True)
class Hit:
    """A credential by place and kind; `line` counts from 1 in the new file."""

    path: str
    line: int
    kind: str


def scan_text(text: str) -> str:
    """The kind of the first credential in `text`, or an empty string."""
    return next((kind for kind, pattern in PATTERNS if pattern.search(text)), "")


def scan_patch(patch: bytes) -> list[Hit]:
    """Every added line of a unified diff (as `git diff-tree -p -U0 --text` prints it) that holds a credential."""
    return [Hit(path, line, kind) for path, line, text in added_lines(patch) if (kind := _scan_line(text))]


def scan_known(patch: bytes, scrub: Callable[[str], str]) -> list[Hit]:
    """The same for the service's own secrets, which `scrub` takes out; one that is spread over lines is told by its first added line of the file."""
    files: dict[str, list[tuple[int, str]]] = {}
    for path, line, text in added_lines(patch):
        files.setdefault(path, []).append((line, text))
    hits: list[Hit] = []
    for path, lines in files.items():
        whole = "\n".join(text for _, text in lines)
        if scrub(whole) != whole:
            found = [line for line, text in lines if scrub(text) != text] or [lines[0][0]]
            hits += [Hit(path, line, OURS) for line in found]
    return hits


def _scan_line(text: str) -> str:
    if len(text) <= _LONGEST:
        return scan_text(text)
    starts = range(0, len(text), _LONGEST - 4000)
    return next((kind for start in starts if (kind := scan_text(text[start : start + _LONGEST]))), "")


def added_lines(patch: bytes) -> Iterator[tuple[str, int, str]]:
    """(path, line number, text) of each added line. Counts the lines a hunk announces, so that content cannot pose as a header."""
    path, number, old_left, new_left = "", 0, 0, 0
    for line in patch.split(b"\n"):
        if old_left or new_left:
            if line.startswith(b"+"):
                yield path, number, line[1:].decode("utf-8", "replace")
                number += 1
                new_left -= 1
            elif line.startswith(b"-"):
                old_left -= 1
            elif not line.startswith(b"\\"):
                old_left, new_left, number = old_left - 1, new_left - 1, number + 1
            continue
        if line.startswith(b"+++ "):
            path = line[4:].strip().strip(b'"').removeprefix(b"b/").decode("utf-8", "replace")
        elif (hunk := _HUNK.match(line)) is not None:
            old_left = int(hunk[1]) if hunk[1] is not None else 1
            number = int(hunk[2])
            new_left = int(hunk[3]) if hunk[3] is not None else 1
