"""`.dispatch.yml` of a repository's default branch: it may narrow what the operator set and never widens it; a fault in it is told, never an exception."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from pydantic_core import ErrorDetails

from bot.document import At, dotted
from bot.models import Permission
from bot.settings import RepositorySettings, Settings, Trigger, UnfitError

FILE = ".dispatch.yml"
MAX_BYTES = 65_536
MAX_DEPTH = 10
MAX_ITEMS = 20
MAX_FAULTS = 10
SHOWN = 60

_WANTED = {
    "int_type": "should be a whole number",
    "float_type": "should be a number",
    "bool_type": "should be true or false",
    "string_type": "should be text (numbers in quotes)",
    "string_too_short": "should not be empty",
    "string_too_long": "is too long",
    "too_long": "has too many entries",
    "tuple_type": "should be a list",
    "dict_type": "should be a mapping of keys",
    "model_type": "should be a mapping of keys",
    "model_attributes_type": "should be a mapping of keys",
}


def _branch(name: str) -> str:
    fit = re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+/-]{0,199}", name) and ".." not in name and "//" not in name
    if not fit or name.endswith(("/", ".", ".lock")) or name.startswith("dispatch/"):
        raise UnfitError(f"'{name[:SHOWN]}' is no branch to begin at", "write the name of a branch, for example main")
    return name


def _verb(name: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9_-]{0,39}", name):
        raise UnfitError(f"'{name[:SHOWN]}' is no verb", "write a verb of /dispatch in small letters, for example run")
    return name


ShellCommand = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
Path = Annotated[str, StringConstraints(min_length=1, max_length=300)]
Label = Annotated[str, StringConstraints(min_length=1, max_length=100)]
Role = Literal["read", "write", "admin", "operator"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class RepoLimits(_Part):
    """The most one sprint may use here; of the operator's and the repository's figure the lower one counts."""

    steps: int | None = Field(default=None, ge=1, description="Most model calls of one sprint.")
    minutes: float | None = Field(default=None, gt=0, description="Most working time of one sprint (minutes).")
    tokens: int | None = Field(default=None, ge=1000, description="Most tokens of one sprint, input and output together.")
    usd: float | None = Field(default=None, gt=0, description="Most money of one sprint (USD).")


class RepoFile(_Part):
    """Every key of `.dispatch.yml`."""

    checks: tuple[ShellCommand, ...] = Field(
        default=(), max_length=MAX_ITEMS, description="Commands run in the sandbox on the result, after those that the operator has set."
    )
    checks_timeout_minutes: float | None = Field(default=None, gt=0, description="Time all checks together may take (minutes).")
    setup: tuple[ShellCommand, ...] = Field(
        default=(),
        max_length=MAX_ITEMS,
        description="Commands run in the sandbox in a fresh work tree before the agent begins; without network, like all that runs there.",
    )
    base_branch: Annotated[str, AfterValidator(_branch)] = Field(
        default="", description="Branch to work from and to open pull requests against, where the operator has named none."
    )
    triggers: tuple[Trigger, ...] | None = Field(
        default=None, description="What starts a sprint here, of what the operator allows: label, command, assignment, mention."
    )
    skip_labels: tuple[Label, ...] = Field(
        default=(), max_length=MAX_ITEMS, description="Further labels of issues that are left alone unless somebody asks with `run force`."
    )
    limits: RepoLimits = Field(default=RepoLimits(), description="The most one sprint may use here.")
    protected_paths: tuple[Path, ...] = Field(default=(), max_length=200, description="Further paths that the agent may not change.")
    roles: dict[Annotated[str, AfterValidator(_verb)], Role] = Field(
        default={}, max_length=50, description="Level a verb needs here, where that is higher than usual; a lower one changes nothing."
    )
    max_open_prs: int | None = Field(default=None, ge=1, description="Most open pull requests of the bot before the next issue waits.")
    plan_first: bool = Field(
        default=False,
        description="Whether what nobody writes a comment for (label, assignment, backlog) begins with a plan that a person approves; "
        "false changes nothing.",
    )


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong at one place; `line` and `column` count from 1, neither text ends in a full stop."""

    line: int
    column: int
    text: str
    remedy: str

    def __str__(self) -> str:
        return f"line {self.line}, column {self.column}: {self.text}. Remedy: {self.remedy}."


@dataclass(frozen=True, slots=True)
class RepoConfig:
    """What a repository declares for its own sprints. What is at fault is left out of `file`, the rest of it holds."""

    file: RepoFile = field(default_factory=RepoFile)
    faults: tuple[Fault, ...] = ()

    @property
    def setup(self) -> tuple[str, ...]:
        """Commands to run before the agent."""
        return self.file.setup

    def told(self) -> list[str]:
        """The faults as lines for people, the first ten of them."""
        more = [f"and {len(self.faults) - MAX_FAULTS} more"] if len(self.faults) > MAX_FAULTS else []
        return [*(str(fault) for fault in self.faults[:MAX_FAULTS]), *more]


def not_a_file() -> RepoConfig:
    """Where `.dispatch.yml` is a folder, a link or a submodule."""
    return RepoConfig(faults=(Fault(1, 1, f"{FILE} is no regular file", "make it a plain text file"),))


def parse_repo_config(raw: bytes | None) -> RepoConfig:
    """Reads the file, None where there is none. Whatever stands in it, the answer is a value."""
    if raw is None:
        return RepoConfig()
    if len(raw) > MAX_BYTES:
        return _unreadable(f"the file has {len(raw):,} bytes, more than {MAX_BYTES:,}", "keep it to a few lines")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        return _unreadable(f"byte {error.start} is not UTF-8", "save the file as UTF-8 text", line)
    marks: dict[At, tuple[int, int]] = {}
    faults: list[Fault] = []
    try:
        faults += _refused(text)
        data = {} if faults else _values(text, marks, faults)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = " ".join(part for part in (error.context, error.problem) if part) or "cannot be read"
        remedy = "mend this line; spaces, never tabs, and quotes round text with a colon or a star"
        return _unreadable(f"not valid YAML: {what}", remedy, mark.line + 1 if mark else 1, mark.column + 1 if mark else 1)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        return _unreadable(f"not valid YAML: {str(error)[:200]}", "save the file as UTF-8 text without control characters")
    return RepoConfig(_checked(data, marks, faults), tuple(sorted(faults, key=lambda fault: (fault.line, fault.column))))


def narrow(settings: Settings, repository: RepositorySettings, config: RepoConfig) -> tuple[Settings, RepositorySettings]:
    """The operator's settings as the repository narrows them: of two limits the lower, of two lists of prohibitions both, of two levels the higher."""
    file, limits = config.file, settings.limits
    lowered = limits.model_copy(
        update={
            "steps": min(limits.steps, file.limits.steps or limits.steps),
            "minutes": min(limits.minutes, file.limits.minutes or limits.minutes),
            "tokens": min(limits.tokens, file.limits.tokens or limits.tokens),
            # 0 means that the operator has set no limit.
            "usd": min(limits.usd or file.limits.usd or 0.0, file.limits.usd or limits.usd),
        }
    )
    triggers = settings.triggers_of(repository)
    timeout = repository.checks_timeout_seconds
    narrowed = repository.model_copy(
        update={
            "checks": tuple(dict.fromkeys((*repository.checks, *file.checks))),
            "checks_timeout_seconds": min(timeout, max(1, round(file.checks_timeout_minutes * 60)))
            if file.checks_timeout_minutes
            else timeout,
            "base_branch": repository.base_branch or file.base_branch,
            "triggers": triggers if file.triggers is None else tuple(one for one in triggers if one in file.triggers),
            "protected_paths": tuple(dict.fromkeys((*repository.protected_paths, *file.protected_paths))),
            "roles": {verb: _higher(repository.roles.get(verb), file.roles.get(verb)) for verb in {**repository.roles, **file.roles}},
            "max_open_prs": min(repository.max_open_prs or file.max_open_prs or 0, file.max_open_prs or repository.max_open_prs),
            "plan_first": repository.plan_first or file.plan_first,
        }
    )
    skip = tuple(dict.fromkeys((*settings.skip_labels, *file.skip_labels)))
    return settings.model_copy(update={"limits": lowered, "skip_labels": skip}), narrowed


def _higher(one: str | None, other: str | None) -> str:
    return max((level for level in (one, other) if level), key=lambda level: Permission[level.upper()])


def _unreadable(text: str, remedy: str, line: int = 1, column: int = 1) -> RepoConfig:
    return RepoConfig(faults=(Fault(line, column, text, remedy),))


def _refused(text: str) -> list[Fault]:
    """What a settings file does not need and a hostile one is made of: references (which unfold without end), tags, several documents, depth.

    The parser's events come one by one, so that nothing has been built yet when it ends here.
    """
    depth = documents = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        mark: Any = event.start_mark
        line, column = mark.line + 1, mark.column + 1
        documents += isinstance(event, yaml.DocumentStartEvent)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.NodeEvent) and event.anchor is not None:
            return [Fault(line, column, "references (& and *) are not read", "write the value out, or put text that begins so in quotes")]
        if getattr(event, "tag", None) is not None:
            return [Fault(line, column, "tags (!) are not read", "leave the tag out, or put text that begins so in quotes")]
        if depth > MAX_DEPTH:
            return [Fault(line, column, f"nested more than {MAX_DEPTH} deep", "no key of this file needs that")]
        if documents > 1:
            return [Fault(line, column, "a second document", "keep one document, without a line of ---")]
    return []


def _values(text: str, marks: dict[At, tuple[int, int]], faults: list[Fault]) -> dict[Any, Any]:
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return {}
        if not isinstance(node, yaml.MappingNode):
            if not (isinstance(node, yaml.ScalarNode) and not node.value):
                faults.append(
                    Fault(node.start_mark.line + 1, node.start_mark.column + 1, "not a mapping of keys", "write for example `checks:`")
                )
            return {}
        _mark(node, (), marks, faults)
        data: dict[Any, Any] = loader.construct_document(node)
        return data
    finally:
        loader.dispose()


def _mark(node: yaml.Node, at: At, marks: dict[At, tuple[int, int]], faults: list[Fault]) -> None:
    """Where every key and item stands; a key that stands twice is a fault, and the last of them would count."""
    marks.setdefault(at, (node.start_mark.line + 1, node.start_mark.column + 1))
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*at, str(key.value) if isinstance(key, yaml.ScalarNode) else "?")
            place = (key.start_mark.line + 1, key.start_mark.column + 1)
            if inner in marks:
                faults.append(
                    Fault(*place, f"`{dotted(inner)[:SHOWN]}` stands twice (first in line {marks[inner][0]})", "keep one of the two")
                )
            marks[inner] = place
            _mark(value, inner, marks, faults)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _mark(item, (*at, index), marks, faults)


def _checked(data: dict[Any, Any], marks: dict[At, tuple[int, int]], faults: list[Fault]) -> RepoFile:
    """What can be used; each key or item that cannot is a fault and left out, so that the rest goes on narrowing."""
    # A key without a value says nothing.
    data = {key: value for key, value in data.items() if value is not None}
    while True:
        try:
            return RepoFile.model_validate(_as_tuples(data))
        except ValidationError as error:
            found = error.errors()
        faults += [_fault(detail, marks) for detail in found]
        ways = {tuple(part for part in detail["loc"] if part != "[key]") for detail in found}
        removed = [_take_out(data, way) for way in sorted(ways, key=_place, reverse=True)]
        if not any(removed):
            return RepoFile()


def _place(way: tuple[Any, ...]) -> list[tuple[int, str]]:
    """Sorts items by their number: taken out from the last to the first, the places of the others stay true."""
    return [(part, "") if isinstance(part, int) else (0, str(part)) for part in way]


def _take_out(data: Any, way: tuple[Any, ...]) -> bool:
    """Removes what stands there; False where nothing does."""
    for n, part in enumerate(way):
        if part not in (data if isinstance(data, dict) else range(len(data) if isinstance(data, list) else 0)):
            return False
        if n == len(way) - 1:
            del data[part]
            return True
        data = data[part]
    return False


def _as_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_tuples(item) for key, item in value.items()}
    return tuple(_as_tuples(item) for item in value) if isinstance(value, list) else value


def _fault(detail: ErrorDetails, marks: dict[At, tuple[int, int]]) -> Fault:
    at: At = tuple(part for part in detail["loc"] if part != "[key]")
    place = at
    while place and place not in marks:
        place = place[:-1]
    line, column = marks.get(place, (1, 1))
    name = f"`{dotted(tuple(str(part)[:SHOWN] if isinstance(part, str) else part for part in at))}`" if at else "the file"
    if detail["type"] == "extra_forbidden":
        known = list(RepoLimits.model_fields if at[0] == "limits" and len(at) > 1 else RepoFile.model_fields)
        near = difflib.get_close_matches(str(at[-1]), known, n=1, cutoff=0.6)
        remedy = f"write `{near[0]}`, if you mean that" if near else f"the keys here are {', '.join(known)}"
        return Fault(line, column, f"{name}: unknown key", remedy)
    if detail["type"] == "value_error":
        cause = detail.get("ctx", {}).get("error")
        return Fault(line, column, f"{name}: {cause}", cause.remedy if isinstance(cause, UnfitError) else _meaning(at))
    if detail["type"] == "literal_error":
        offer = ", ".join(get_args(Role) if at and at[0] == "roles" else get_args(Trigger))
        return Fault(line, column, f"{name}: {_shown(detail['input'])} is not one of them", f"write one of {offer}")
    wanted = _WANTED.get(detail["type"]) or detail["msg"].replace("Input should", "should")
    return Fault(line, column, f"{name}: {wanted}{_instead(detail['input'])}", _meaning(at))


def _instead(value: object) -> str:
    return "" if isinstance(value, dict | list | tuple) else f", not {_shown(value)}"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


def _meaning(at: Sequence[str | int]) -> str:
    fields = RepoLimits.model_fields if at and at[0] == "limits" and len(at) > 1 else RepoFile.model_fields
    name = at[1] if fields is RepoLimits.model_fields else at[0] if at else ""
    info = fields.get(str(name))
    return f"it means: {info.description.rstrip('.')}" if info and info.description else f"see the documentation of {FILE}"
