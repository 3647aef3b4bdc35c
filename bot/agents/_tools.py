"""The model's tools: named operations with typed arguments through two doors, the workspace files and the sandbox; every result is a capped, redacted string."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bot.agents._toolbox import FilesLike, ForgeReader, ResultLike, SandboxLike
from bot.models import UserError
from bot.redaction import encodable

RESULT_CAP: Final = 40_000
READ_BYTES: Final = 200_000
LIST_LIMIT: Final = 500
LIST_DEPTH: Final = 3
SEARCH_LINES: Final = 200
SEARCH_SECONDS: Final = 30.0
FINISH: Final = "finish"
FORGE: Final = "gitea"

_NUMBER_MAX: Final = 1_000_000_000
_ARGUMENTS_CAP: Final = 4_000_000

# Operation of the `gitea` tool: the arguments it takes. All read, all of this repository; `issue` and `comments` mean the issue at hand.
OPERATIONS: Final[Mapping[str, tuple[str, ...]]] = {
    "issue": (),
    "comments": ("page",),
    "pull": ("number",),
    "pull_files": ("number", "page"),
    "pull_commits": ("number", "page"),
    "labels": ("page",),
    "milestones": ("page",),
    "branches": ("page",),
    "commits": ("ref", "page"),
    "contents": ("path", "ref"),
}
_PATH: Final = re.compile(r"[A-Za-z0-9_.+@=,~()-]+(?:/[A-Za-z0-9_.+@=,~()-]+)*")
_REF: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(?:/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument of a tool: JSON type, what it means, whether it must be given."""

    kind: str
    meaning: str
    required: bool = True


@dataclass(frozen=True, slots=True)
class Tool:
    """Name, purpose and arguments, as the model sees them."""

    name: str
    purpose: str
    arguments: Mapping[str, Argument]

    def schema(self) -> dict[str, Any]:
        """In chat-completions form; kept plain, because some servers refuse `pattern` and `format`."""
        properties = {name: {"type": one.kind, "description": one.meaning} for name, one in self.arguments.items()}
        required = [name for name, one in self.arguments.items() if one.required]
        parameters = {"type": "object", "properties": properties, "required": required}
        return {"type": "function", "function": {"name": self.name, "description": self.purpose, "parameters": parameters}}


TOOLS: Final = (
    Tool(
        "run_command",
        "Run a shell command in the work tree (bash). Output and exit code come back; background processes end with it.",
        {"command": Argument("string", "The command."), "timeout": Argument("integer", "Seconds it may take.", required=False)},
    ),
    Tool(
        "read_file",
        "Read a text file.",
        {
            "path": Argument("string", "Relative to the work tree."),
            "offset": Argument("integer", "First line, from 1.", required=False),
            "limit": Argument("integer", "How many lines.", required=False),
        },
    ),
    Tool(
        "write_file",
        "Create a file or replace it as a whole.",
        {"path": Argument("string", "Relative to the work tree."), "content": Argument("string", "The whole new content.")},
    ),
    Tool(
        "edit_file",
        "Replace a piece of a file. `old` must match exactly, with its white space, and occur once unless `all` is true.",
        {
            "path": Argument("string", "Relative to the work tree."),
            "old": Argument("string", "The text to replace."),
            "new": Argument("string", "What stands there afterwards."),
            "all": Argument("boolean", "Replace every occurrence.", required=False),
        },
    ),
    Tool(
        "list_files",
        "List files and folders.",
        {
            "path": Argument("string", "Folder, default the whole work tree.", required=False),
            "depth": Argument("integer", "How many levels, default 3.", required=False),
        },
    ),
    Tool(
        "search",
        "Search file contents with an extended regular expression (grep -E).",
        {
            "pattern": Argument("string", "The expression."),
            "path": Argument("string", "File or folder, default everything.", required=False),
        },
    ),
    Tool(
        FORGE,
        f"Read from the forge. Operations: {', '.join(f'{name}({chr(44).join(taken)})' for name, taken in OPERATIONS.items())}.",
        {
            "operation": Argument("string", "One of the operations."),
            "number": Argument("integer", "Number of a pull request.", required=False),
            "path": Argument("string", "Path in the repository.", required=False),
            "ref": Argument("string", "Branch, tag or commit.", required=False),
            "page": Argument("integer", "Page, from 1.", required=False),
        },
    ),
    Tool(
        FINISH,
        "End the work. Call it once, when all is done.",
        {"summary": Argument("string", "What was wrong, what you changed, what you ran.")},
    ),
)
# Of a run that only plans: it may look and try, and its end carries the plan.
PLAN_TOOLS: Final = (
    *(tool for tool in TOOLS if tool.name not in {"write_file", "edit_file", FINISH}),
    Tool(FINISH, "End the planning. Call it once, with the whole plan.", {"plan": Argument("string", "The plan, in Markdown.")}),
)
_BY_NAME: Final = {tool.name: tool for tool in TOOLS}
_BY_NAME_PLANNING: Final = {tool.name: tool for tool in PLAN_TOOLS}


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call with arguments of the right types, or `fault`: what is wrong with it, said to the model."""

    id: str
    name: str
    arguments: Mapping[str, Any]
    raw: str
    fault: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a tool answered; `status` is ok, error or timeout."""

    text: str
    status: str = "ok"


def schemas(*, forge: bool, planning: bool = False) -> list[dict[str, Any]]:
    """All tools in chat-completions form; `forge` says whether the `gitea` tool is among them, `planning` leaves out those that write."""
    return [tool.schema() for tool in (PLAN_TOOLS if planning else TOOLS) if forge or tool.name != FORGE]


def parse_calls(message: Mapping[str, Any], *, planning: bool = False) -> list[Call]:
    """The calls of an assistant message, in order, each checked."""
    known = _BY_NAME_PLANNING if planning else _BY_NAME
    return [_parse(call, known) for call in message.get("tool_calls") or ()]


def _parse(call: Mapping[str, Any], known: Mapping[str, Tool]) -> Call:
    function = call.get("function") or {}
    call_id, name, raw = str(call.get("id") or ""), str(function.get("name") or ""), function.get("arguments") or ""
    tool = known.get(name)
    fault = ""
    values: dict[str, Any] = {}
    if tool is None:
        fault = f"there is no tool `{name[:80]}`; the tools are {', '.join(known)}"
    elif len(raw) > _ARGUMENTS_CAP:
        fault = f"the arguments are longer than {_ARGUMENTS_CAP} characters"
    else:
        try:
            values, fault = _typed(tool, json.loads(raw) if raw.strip() else {})
        except (ValueError, RecursionError) as error:
            fault = f"the arguments are not valid JSON: {error}"
    return Call(call_id, name, values, raw, f"invalid arguments: {fault}" if fault else "")


def _typed(tool: Tool, given: Any) -> tuple[dict[str, Any], str]:
    if not isinstance(given, dict):
        return {}, "they must be a JSON object"
    values: dict[str, Any] = {}
    for name, argument in tool.arguments.items():
        value = given.get(name)
        if value is None:
            # Without a summary the work still counts; without a plan there is none.
            if argument.required and name != "summary":
                return {}, f"`{name}` is missing"
            continue
        # Models write numbers as text now and then, and mean them.
        if argument.kind == "integer" and isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}", value):
            value = int(value)
        if not _is(argument.kind, value):
            return {}, f"`{name}` must be of type {argument.kind}"
        if isinstance(value, str) and encodable(value) != value:
            if tool.name != "finish":
                return {}, f"`{name}` holds half a character, a surrogate without the other one: write the character itself"
            value = encodable(value)
        values[name] = value
    return values, ""


def _is(kind: str, value: Any) -> bool:
    match kind:
        case "string":
            return isinstance(value, str)
        case "boolean":
            return isinstance(value, bool)
        case _:
            return isinstance(value, int) and not isinstance(value, bool)


class Tools:
    """The tools of one sprint. `call` never raises for what the model did wrong; cancellation and a missing sandbox pass."""

    def __init__(
        self,
        *,
        sandbox: SandboxLike,
        files: FilesLike,
        forge: ForgeReader | None,
        workdir: Path,
        scrub: Callable[[str], str],
        command_seconds: float,
    ) -> None:
        self._sandbox = sandbox
        self._files = files
        self._forge = forge
        self._workdir = workdir
        self._scrub = scrub
        self._command_seconds = command_seconds
        self._do: Mapping[str, Callable[[Mapping[str, Any]], Awaitable[Outcome]]] = {
            "run_command": self._run_command,
            "read_file": self._read_file,
            "write_file": self._write_file,
            "edit_file": self._edit_file,
            "list_files": self._list_files,
            "search": self._search,
            FORGE: self._gitea,
        }

    async def call(self, call: Call, *, seconds: float) -> Outcome:
        """Runs one call; `seconds` is what the sprint has left, which bounds a command too."""
        if call.fault:
            return Outcome(self._fit(call.fault), "error")
        try:
            if call.name == "run_command":
                wanted = float(call.arguments.get("timeout") or self._command_seconds)
                outcome = await self._shell(str(call.arguments["command"]), max(1.0, min(wanted, self._command_seconds, seconds)))
            else:
                outcome = await self._do[call.name](call.arguments)
        except UserError as error:
            outcome = Outcome(f"refused: {error}", "error")
        except OSError as error:
            outcome = Outcome(f"failed: {error.strerror or type(error).__name__}", "error")
        return Outcome(self._fit(outcome.text), outcome.status)

    def _fit(self, text: str) -> str:
        text = self._scrub(text)
        if len(text) <= RESULT_CAP:
            return text
        half = RESULT_CAP // 2
        return f"{text[:half]}\n[... {len(text) - 2 * half} characters left out ...]\n{text[-half:]}"

    async def _run_command(self, given: Mapping[str, Any]) -> Outcome:
        return await self._shell(str(given["command"]), self._command_seconds)

    async def _shell(self, command: str, seconds: float) -> Outcome:
        result = await self._sandbox.run(command, workspace=self._workdir, timeout=seconds)
        return Outcome(_ended(result, seconds), "timeout" if result.timed_out else "ok" if result.exit_code == 0 else "error")

    async def _read_file(self, given: Mapping[str, Any]) -> Outcome:
        data = self._files.read(given["path"], READ_BYTES)
        if b"\0" in data:
            return Outcome(f"`{given['path']}` is not a text file ({len(data)} bytes)", "error")
        text = data.decode("utf-8", "replace")
        offset, limit = given.get("offset") or 1, given.get("limit")
        if offset <= 1 and limit is None:
            return Outcome(text or "(the file is empty)")
        lines = text.splitlines(keepends=True)
        chosen = lines[max(0, offset - 1) :][: max(0, limit) if limit is not None else None]
        return Outcome("".join(chosen) or f"(the file has {len(lines)} lines)")

    async def _write_file(self, given: Mapping[str, Any]) -> Outcome:
        data = given["content"].encode("utf-8", "replace")
        self._files.write(given["path"], data)
        return Outcome(f"wrote {len(data)} bytes to {given['path']}")

    async def _edit_file(self, given: Mapping[str, Any]) -> Outcome:
        path, old, new = given["path"], given["old"].encode("utf-8", "replace"), given["new"].encode("utf-8", "replace")
        if not old:
            return Outcome("`old` is empty: use write_file to create a file", "error")
        data = self._files.read(path, READ_BYTES)
        count = data.count(old)
        if count == 0:
            return Outcome(f"`old` does not occur in {path}: read the file again and copy the text exactly", "error")
        if count > 1 and not given.get("all"):
            return Outcome(f"`old` occurs {count} times in {path}: give more of the text around it, or set all to true", "error")
        self._files.write(path, data.replace(old, new))
        return Outcome(f"replaced {count} occurrence{'s' if count > 1 else ''} in {path}")

    async def _list_files(self, given: Mapping[str, Any]) -> Outcome:
        depth = min(max(given.get("depth") or LIST_DEPTH, 1), 20)
        found = self._files.list(given.get("path") or ".", depth, LIST_LIMIT)
        lines = [entry.path + _suffix(entry.kind, entry.size) for entry in found if entry.path != ".git"]
        if len(found) >= LIST_LIMIT:
            lines.append(f"(cut at {LIST_LIMIT} entries: list a folder below)")
        return Outcome("\n".join(lines) or "(nothing there)")

    async def _search(self, given: Mapping[str, Any]) -> Outcome:
        where = given.get("path") or "."
        # The path stands behind `--` and starts with ./ or /, so that it is never an option.
        where = where if where.startswith(("/", "./")) else f"./{where}"
        command = f"grep -rnIE --exclude-dir=.git -e {shlex.quote(given['pattern'])} -- {shlex.quote(where)} 2>&1 | cut -c1-400 | head -n {SEARCH_LINES}"
        result = await self._sandbox.run(command, workspace=self._workdir, timeout=min(SEARCH_SECONDS, self._command_seconds))
        if result.timed_out:
            return Outcome("the search took too long: narrow the path", "timeout")
        return Outcome(result.output.strip("\n") or "no match")

    async def _gitea(self, given: Mapping[str, Any]) -> Outcome:
        operation = given["operation"]
        if self._forge is None or operation not in OPERATIONS:
            return Outcome(f"there is no operation `{operation[:60]}`; there are {', '.join(OPERATIONS)}", "error")
        taken = {name: given[name] for name in OPERATIONS[operation] if name in given}
        if fault := _forge_fault(operation, taken, given):
            return Outcome(f"invalid arguments: {fault}", "error")
        return Outcome(await self._forge.read(operation, taken))


def _forge_fault(operation: str, taken: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    extra = sorted(set(given) - set(taken) - {"operation"})
    if extra:
        return f"{operation} takes no `{extra[0]}`"
    if "number" in OPERATIONS[operation] and "number" not in taken:
        return "`number` is missing"
    for name in ("number", "page"):
        if name in taken and not 1 <= taken[name] <= _NUMBER_MAX:
            return f"`{name}` must be 1 or more"
    path, ref = taken.get("path", ""), taken.get("ref", "")
    if path and (not _PATH.fullmatch(path) or any(part in {".", ".."} for part in path.split("/"))):
        return "`path` must be a plain relative path"
    if ref and (not _REF.fullmatch(ref) or ".." in ref):
        return "`ref` must be a branch, a tag or a commit"
    return ""


def _ended(result: ResultLike, seconds: float) -> str:
    if result.timed_out:
        head = f"killed after {seconds:.0f} s"
    elif result.killed:
        head = {"output": "killed: too much output", "disk": "killed: the work tree grew too large"}.get(
            result.killed, f"killed: {result.killed}"
        )
    else:
        head = f"exit {result.exit_code}"
    if result.omitted_bytes:
        head += f" ({result.omitted_bytes} bytes of output left out in the middle)"
    return f"{head}\n{result.output}".rstrip("\n")


def _suffix(kind: str, size: int) -> str:
    return {"directory": "/", "file": f"  {size}"}.get(kind, f"  ({kind})")


def history_form(message: Mapping[str, Any]) -> dict[str, Any]:
    """The assistant message as it is sent again: broken arguments become `{}`, because some servers refuse to read them; nothing of ours stays in it."""
    sent: dict[str, Any] = {"role": "assistant", "content": message.get("content") or ""}
    calls: Sequence[Mapping[str, Any]] = message.get("tool_calls") or ()
    if calls:
        sent["tool_calls"] = [
            {
                "id": call["id"],
                "type": "function",
                "function": {"name": call["function"]["name"], "arguments": _json(call["function"]["arguments"])},
            }
            for call in calls
        ]
    return sent


def _json(text: str) -> str:
    try:
        return text if isinstance(json.loads(text), dict) else "{}"
    except (ValueError, RecursionError):
        return "{}"
