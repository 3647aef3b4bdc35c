"""dispatch.yml as it stands: its values, the line of every key, and the faults and warnings found so far, each with its remedy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

At = tuple[str | int, ...]


@dataclass(slots=True)
class Document:
    """The file while it is read: where each key stands, and what was found so far as (line, text)."""

    path: Path
    data: dict[str, Any] = field(default_factory=dict)
    lines: dict[At, int] = field(default_factory=dict)
    faults: list[tuple[int, str]] = field(default_factory=list)
    warnings: list[tuple[int, str]] = field(default_factory=list)

    def line(self, at: At) -> int:
        """The line of that key, or of the nearest one above it that is in the file."""
        while at and at not in self.lines:
            at = at[:-1]
        return self.lines.get(at, 1)

    def fault(self, at: At, text: str, remedy: str) -> None:
        """Notes what makes the file unusable; neither text ends in a full stop."""
        self.faults.append((self.line(at), self._text(at, text, remedy)))

    def warn(self, at: At, text: str, remedy: str) -> None:
        """Notes what the operator should know."""
        self.warnings.append((self.line(at), self._text(at, text, remedy)))

    def get(self, *at: str | int) -> Any:
        """The raw value there, or None."""
        value: Any = self.data
        for part in at:
            if isinstance(value, dict):
                value = value.get(part)
            elif isinstance(value, list) and isinstance(part, int) and part < len(value):
                value = value[part]
            else:
                return None
        return value

    def count(self, key: str) -> int:
        """Entries of a list at the top level; 0 where there is none."""
        value = self.data.get(key)
        return len(value) if isinstance(value, list) else 0

    def told(self, found: Sequence[tuple[int, str]]) -> list[str]:
        """Faults or warnings in order of lines, each once, as `FILE:LINE: text`."""
        return [f"{self.path}:{line}: {text}" for line, text in sorted(dict.fromkeys(found))]

    @staticmethod
    def _text(at: At, text: str, remedy: str) -> str:
        return f"{dotted(at)}: {text}. Remedy: {remedy}." if at else f"{text}. Remedy: {remedy}."


def parse(path: Path) -> Document:
    """Reads the file. What cannot be read as YAML is a fault of the document, never an exception."""
    document = Document(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        document.fault((), "the file does not exist", "run `timmy-dispatch init`, or copy dispatch.example.yml")
        return document
    except (OSError, UnicodeDecodeError) as error:
        document.fault((), f"the file cannot be read ({error})", "let the service's own user read it, as UTF-8 text")
        return document
    loader: yaml.SafeLoader | None = None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None or not isinstance(node, yaml.MappingNode):
            document.fault((), "the file holds no settings", "start from dispatch.example.yml")
            return document
        _map_lines(document, node, ())
        document.data = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        what = " ".join(part for part in (error.context, error.problem) if part) or "cannot be read"
        document.faults.append(
            (line, f"not valid YAML: {what}. Remedy: mend this line; spaces, never tabs, and quotes round text with a colon.")
        )
    except (yaml.YAMLError, RecursionError) as error:
        document.faults.append((1, f"not valid YAML: {error}. Remedy: save the file as UTF-8 text without control characters."))
    finally:
        if loader is not None:
            loader.dispose()
    return document


def _map_lines(document: Document, node: yaml.Node, at: At) -> None:
    document.lines.setdefault(at, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*at, str(key.value))
            if inner in document.lines:
                document.faults.append((key.start_mark.line + 1, f"{dotted(inner)}: stands twice. Remedy: keep one of the two."))
            document.lines[inner] = key.start_mark.line + 1
            _map_lines(document, value, inner)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _map_lines(document, value, (*at, index))


def dotted(at: At) -> str:
    """`repositories[0].name` for `("repositories", 0, "name")`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in at).lstrip(".")
