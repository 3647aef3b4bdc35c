"""The example configuration and the table of settings, both written from the records, so that neither can be wrong."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from bot.models import TRANSITIONS, SprintState
from bot.settings import Settings, record

WIDTH = 110
PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9_./-]*")
HEADER = """\
# timmy-dispatch: every setting with its meaning. A value shown is the default unless it names your server, model or repository;
# a line that starts with `# key:` is optional and off. `timmy-dispatch init` writes the short form of this file;
# `timmy-dispatch check-config` reports every fault in it at once. Relative paths start at this file's folder.
# Secrets stand in files of their own (mode 0600) or come as systemd credentials: forge-token, webhook-secret, provider-NAME.
"""
INTRO = """\
# Settings

`dispatch.yml` holds them; `dispatch.example.yml` shows every one in its place. This page is written by `timmy-dispatch check-config --table`
and checked by the tests: change the records in `bot/settings.py` and write it anew.
"""


def example() -> str:
    """The annotated example: loads once `gitea.token` and `webhook.secret` lie beside it."""
    return HEADER + "\n".join(_example(Settings, "")) + "\n"


def table() -> str:
    """One Markdown table a record, top level first."""
    parts = [INTRO]
    for title, model in _records(Settings, ""):
        rows = [
            f"| `{name}` | {_kind(info)} | {_default(info)} | {_cell(info.description or '')} |"
            for name, info in model.model_fields.items()
        ]
        parts.append(f"## {title or 'Top level'}\n\n| key | value | default | meaning |\n|---|---|---|---|\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def _example(model: type[BaseModel], indent: str) -> Iterator[str]:
    for name, info in model.model_fields.items():
        inner = record(info.annotation)
        if not indent:
            yield ""
        yield from (f"{indent}# {line}" for line in textwrap.wrap(info.description or "", WIDTH - len(indent)))
        if inner is None:
            yield f"{indent}{_setting(name, info)}"
        elif get_origin(info.annotation) is tuple:
            yield f"{indent}{name}:"
            lines = list(_example(inner, indent + "    "))
            first = next(index for index, line in enumerate(lines) if not line.lstrip().startswith("#"))
            lines[: first + 1] = [*(f"{indent}  {line.strip()}" for line in lines[:first]), f"{indent}  - {lines[first].strip()}"]
            yield from lines
        else:
            yield f"{indent}{name}:"
            yield from _example(inner, indent + "  ")


def _setting(name: str, info: FieldInfo) -> str:
    shown = info.examples[0] if info.examples else info.default
    if shown is None or name == "state_dir":
        return f"# {name}: {_yaml(shown) if info.examples else '...'}"
    return f"{name}: {_yaml(shown)}"


def _yaml(value: Any) -> str:
    """The value as one line of YAML; JSON is YAML, and plain words need no quotes."""
    if isinstance(value, str) and PLAIN.fullmatch(value) and value not in ("true", "false", "null", "yes", "no", "on", "off"):
        return value
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)


def _records(model: type[BaseModel], title: str) -> Iterator[tuple[str, type[BaseModel]]]:
    yield title, model
    for name, info in model.model_fields.items():
        inner = record(info.annotation)
        if inner:
            step = f"{name}[]" if get_origin(info.annotation) is tuple else name
            yield from _records(inner, f"{title}.{step}".lstrip("."))


def _kind(info: FieldInfo) -> str:
    words = _word(info.annotation)
    bounds: list[str] = []
    for constraint in info.metadata:
        match constraint:
            case annotated_types.Ge(ge=low):
                bounds.append(f"at least {low}")
            case annotated_types.Gt(gt=low):
                bounds.append(f"more than {low}")
            case annotated_types.Le(le=high):
                bounds.append(f"at most {high}")
            case annotated_types.MinLen(min_length=least):
                bounds.append(f"at least {least}" if record(info.annotation) else "not empty")
            case _:
                continue
    return ", ".join([words, *bounds])


def _word(annotation: Any) -> str:
    if record(annotation):
        return "list of mappings" if get_origin(annotation) is tuple else "mapping"
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{choice}`" for choice in get_args(annotation))
    if get_origin(annotation) is tuple:
        return f"list of {_word(get_args(annotation)[0])}"
    if get_origin(annotation) is dict:
        return "mapping"
    chosen = next((part for part in get_args(annotation) if part is not type(None)), annotation)
    if get_origin(chosen) in (tuple, dict):
        return _word(chosen)
    return {str: "text", int: "whole number", float: "number", bool: "true or false", Path: "path"}.get(chosen, "text")


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "`/var/lib/timmy-dispatch` as root, else `~/.local/state/timmy-dispatch`" if info.annotation is Path else "required"
    if record(info.annotation) or info.default in (None, "", (), {}):
        return ""
    return f"`{_yaml(info.default)}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def state_diagram() -> str:
    """The life of a sprint as a Mermaid diagram, from `bot.models.TRANSITIONS`; ARCHITECTURE.md holds it, a test compares."""
    rows = ["```mermaid", "stateDiagram-v2", "  [*] --> queued"]
    rows += [f"  {state} --> {after}" for state, afters in TRANSITIONS.items() for after in SprintState if after in afters]
    return "\n".join([*rows, "  settled --> [*]", "```"]) + "\n"
