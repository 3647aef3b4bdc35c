"""The loop drives a scripted model through real tools, and survives being cut at any point."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from bot import agents
from bot.agents import AgentEnd, AgentJob, Backend, StoredStep, StoredToolCall
from bot.agents._history import History
from bot.agents._toolbox import Toolbox
from bot.agents._tools import OPERATIONS, Tools, history_form, parse_calls, schemas
from bot.agents.loop import plugin
from bot.config import PriceSettings
from bot.demo.model import MODEL, ScriptedModel
from bot.demo.sample import FILES
from bot.discovery import discover
from bot.models import EventKind, FailureReason, Limits, Usage, UserError
from bot.providers.chain import ProviderChain
from bot.providers.entries import Entry
from bot.providers.health import MemoryHealth
from bot.redaction import Redactor, Secret
from bot.sandbox.contract import CommandResult, SandboxUnavailable
from bot.sandbox.files import WorkspaceFiles

SECRET = "canary-0123456789abcdef"


class Power(Exception):
    """The process dies here."""


class Memory:
    """A Trajectory in memory; `dies` names the write before (`-name`) or after (`name`) which the power goes, and its number.

    What is only taken down goes with the power.
    """

    def __init__(self):
        self.rows = {}
        self.calls = {}
        self.taken = []
        self.log = []
        self.dies = None

    def _write(self, name, act):
        self.log.append(name)
        number = self.log.count(name)
        if self.dies == (f"-{name}", number):
            self.taken.clear()
            raise Power
        for one in self.taken:
            one()
        self.taken.clear()
        act()
        if self.dies == (name, number):
            raise Power

    def _take(self, name, act):
        self.log.append(name)
        self.taken.append(act)

    async def steps(self):
        return [StoredStep(n, row.get("reply"), row["usage"]) for n, row in self.rows.items()]

    async def tool_calls(self):
        return [StoredToolCall(n, i, row["call_id"], row["result"]) for (n, i), row in self.calls.items()]

    async def reserve(self, n, *, usd, tokens):
        assert n not in self.rows
        self._write("reserve", lambda: self.rows.update({n: {"usage": Usage(tokens, usd=usd), "reply": None}}))

    def reply(self, n, *, message, usage, provider, model):
        self._take("reply", lambda: self.rows[n].update(reply=json.loads(json.dumps(message)), usage=usage))

    async def failed(self, n, *, error):
        def act():
            self.rows[n]["error"] = error
            if error.startswith("not billed"):
                self.rows[n]["usage"] = Usage()

        self._write("failed", act)

    async def tool_started(self, n, i, *, call_id, tool, arguments):
        assert (n, i) not in self.calls
        self._write(
            "tool_started", lambda: self.calls.update({(n, i): {"call_id": call_id, "tool": tool, "arguments": arguments, "result": None}})
        )

    def tool_ended(self, n, i, *, result):
        self._take("tool_ended", lambda: self.calls[n, i].update(result=result))

    async def flush(self):
        if self.taken:
            self._write("flush", lambda: None)

    async def totals(self):
        if any(name == "reply" for name in self.log[-len(self.taken) :] if self.taken):
            await self.flush()
        return sum((row["usage"] for row in self.rows.values()), Usage()), len(self.rows)


class Shell:
    """Runs commands for real, without a wall."""

    def __init__(self):
        self.commands = []
        self.expected = 0

    def expect(self, workspace):
        self.expected += 1

    def dismiss(self, workspace):
        self.expected = 0

    async def run(self, command, *, workspace, timeout=None):
        self.commands.append(command)
        process = await asyncio.create_subprocess_exec(
            "bash", "-c", command, cwd=workspace, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        try:
            async with asyncio.timeout(timeout):
                output, _ = await process.communicate()
        except TimeoutError:
            return CommandResult(None, "", timed_out=True, omitted_bytes=0, killed="timeout")
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
            process._transport.close()
        return CommandResult(process.returncode, output.decode(), timed_out=False, omitted_bytes=0, killed="")


class World:
    def __init__(self, model, root: Path, **entry):
        self.model = model
        self.root = root
        for name, text in FILES.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        self.now = [1_800_000_000_000]
        self.shell = Shell()
        self.memory = Memory()
        self.events = []
        self.stop = None
        self.entries = [
            Entry(
                **{
                    "provider": "p",
                    "model": MODEL,
                    "base_url": model.url,
                    "key": Secret(SECRET),
                    "price": PriceSettings(input=1, output=1),
                    "idle_seconds": 5,
                    **entry,
                }
            )
        ]
        self.chain = ProviderChain(
            lambda: self.entries, health=MemoryHealth(lambda: self.now[0]), now_ms=lambda: self.now[0], sleep=self.sleep, random=lambda: 0.0
        )
        self.forge = None

    async def sleep(self, seconds):
        await asyncio.sleep(0)

    def toolbox(self):
        return Toolbox(
            chain=self.chain,
            sandbox=self.shell,
            files=WorkspaceFiles,
            forge_reader=(lambda repo, issue: self.forge) if self.forge else None,
            scrub=Redactor([Secret(SECRET)]).scrub,
            now_ms=lambda: self.now[0],
            loop_time=asyncio.get_running_loop().time,
            command_seconds=20,
        )

    def emit(self, kind, data):
        self.events.append((kind, data))

    def kinds(self, kind):
        return [data for found, data in self.events if found is kind]

    async def run(self, script=None, *, task="Mend it.", steps=40, seconds=30.0, tokens=1_000_000, usd=0.0):
        self.model.script = script or self.model.script
        job = AgentJob(
            sprint_id="s",
            attempt=1,
            system="You work.",
            task=task,
            workdir=self.root,
            repo="acme/slug",
            issue=1,
            limits=Limits(steps, int(seconds), tokens, usd),
            deadline=asyncio.get_running_loop().time() + seconds,
            provider="",
            model="",
            trajectory=self.memory,
            stopping=lambda: self.stop,
        )
        return await plugin.build(self.toolbox()).run(job, self.emit)

    def sent(self):
        """The conversation of the last request."""
        return self.model.requests[-1].body["messages"]


@pytest.fixture
async def model():
    async with ScriptedModel() as server:
        yield server


@pytest.fixture
async def world(model, tmp_path):
    made = World(model, tmp_path / "work")
    yield made
    await made.chain.aclose()


def test_the_engine_is_found():
    assert dict(discover(agents, Backend))["loop"] is plugin


async def test_mends_the_demo_repository(world):
    result = await world.run()
    assert result.end is AgentEnd.FINISHED
    assert "sh test.sh passes" in result.text
    assert result.models == (f"p/{MODEL}",)
    assert (await world.shell.run("sh test.sh", workspace=world.root)).exit_code == 0
    assert world.memory.log[:5] == ["reserve", "reply", "tool_started", "tool_ended", "reserve"]
    assert (world.memory.log[-1], world.memory.taken, world.shell.expected) == ("flush", [], 0)
    ended = world.kinds(EventKind.STEP_ENDED)
    assert [data["step"] for data in ended] == [1, 2, 3, 4, 5, 6]
    assert set(ended[0]) == {"step", "provider", "model", "result", "seconds", "input", "output", "cached", "usd"}
    assert [(data["tool"], data["result"]) for data in world.kinds(EventKind.TOOL_ENDED)] == [
        ("list_files", "ok"),
        ("read_file", "ok"),
        ("run_command", "error"),
        ("edit_file", "ok"),
        ("run_command", "ok"),
        ("finish", "ok"),
    ]
    assert world.kinds(EventKind.TEXT)[0] == {"step": 1, "text": "I look at the repository first."}
    assert (await world.memory.totals())[0].usd == pytest.approx(sum(data["usd"] for data in ended))


POINTS = [
    (f"{side}{name}", number)
    for name, count in (("reserve", 6), ("tool_started", 6), ("flush", 1))
    for number in sorted({1, count // 2 + 1, count})
    for side in ("-", "")
]


@pytest.mark.parametrize("point", POINTS, ids=lambda p: f"{p[0]}{p[1]}")
async def test_power_cut_anywhere(world, point):
    """After the restart it ends well, no tool ran twice, and a call in flight stays booked."""
    world.memory.dies = point
    with pytest.raises(Power):
        await world.run()
    world.memory.dies = None
    result = await world.run()
    assert result.end is AgentEnd.FINISHED
    assert (await world.shell.run("sh test.sh", workspace=world.root)).exit_code == 0
    replies = [n for n, row in world.memory.rows.items() if row["reply"]]
    lost = [n for n, row in world.memory.rows.items() if not row["reply"]]
    # Before its first tool row is there, the reply is not either.
    assert len(lost) == (point[0] in ("reserve", "-tool_started"))
    assert all(world.memory.rows[n]["usage"].tokens > 0 for n in lost)
    assert replies == sorted(replies)
    # A call that was cut is not run again by the loop; whoever asks anew is the model, and that is another row.
    assert len(world.shell.commands) - 1 <= sum(row["tool"] == "run_command" for row in world.memory.calls.values())
    for n, i in world.memory.calls:
        assert world.memory.calls[n, i]["result"] is not None


async def test_an_interrupted_call_is_not_run_again(world):
    world.memory.dies = ("tool_started", 1)
    with pytest.raises(Power):
        await world.run('attack(["echo one >> log"])')
    world.memory.dies = None
    assert (await world.run()).end is AgentEnd.FINISHED
    assert not (world.root / "log").exists()
    assert "interrupted, may have run" in world.memory.calls[1, 0]["result"]


@pytest.mark.parametrize(
    ("limits", "limit"),
    [({"steps": 4}, "steps"), ({"tokens": 4000}, "tokens"), ({"usd": 0.004}, "usd"), ({"seconds": 3, "steps": 1000}, "seconds")],
)
async def test_limits(world, limits, limit):
    if limit == "seconds":
        world.model.latency = 0.05
    result = await world.run("endless", **limits)
    assert (result.end, result.limit) == (AgentEnd.LIMIT, limit)
    spent, _ = await world.memory.totals()
    most = max(row["usage"].tokens for row in world.memory.rows.values())
    if limit == "steps":
        assert len(world.memory.rows) == 4
    if limit == "tokens":
        assert spent.tokens - most < 4000
    if limit == "usd":
        assert spent.usd - most / 1e6 < 0.004
    assert any("Limit ahead" in str(message["content"]) for message in world.sent())


async def test_booked_spend_of_a_former_attempt_counts(world):
    world.memory.rows[1] = {"usage": Usage(0, 0, usd=2.0), "reply": None}
    result = await world.run(usd=1.0)
    assert (result.end, result.limit, world.model.requests) == (AgentEnd.LIMIT, "usd", [])


async def test_words_alone_are_nudged_once(world):
    result = await world.run("no_tool_call")
    assert (result.end, result.text) == (AgentEnd.FINISHED, "I think the bug is in lib/slug.sh.")
    assert len(world.model.requests) == 2
    assert "without calling a tool" in world.sent()[-1]["content"]


async def test_three_unusable_turns_end_it(world):
    result = await world.run("bad_arguments")
    assert (result.end, result.reason) == (AgentEnd.FAILED, FailureReason.MODEL_OUTPUT)
    assert len(world.model.requests) == 3
    sent = world.sent()
    assert "invalid arguments: the arguments are not valid JSON" in sent[-1]["content"]
    assert sent[-2]["tool_calls"][0]["function"]["arguments"] == "{}"


async def test_cut_off_replies_run_nothing(world):
    result = await world.run("truncated")
    assert (result.end, result.reason) == (AgentEnd.FAILED, FailureReason.MODEL_OUTPUT)
    assert world.memory.calls == {}
    assert "cut off at the output limit" in world.sent()[-1]["content"]


async def test_going_in_circles_ends(world):
    result = await world.run("repeat")
    assert (result.end, result.reason) == (AgentEnd.FAILED, FailureReason.MODEL_OUTPUT)
    assert len(world.model.requests) == 6
    assert "several times" in json.dumps(world.sent())


async def test_a_hundred_different_commands_are_no_circle(world):
    assert (await world.run("noops(30)")).end is AgentEnd.FINISHED


@pytest.mark.parametrize("script", ["http_500", "http_401", "http_429", "garbage", "html", "half_stream"])
async def test_provider_trouble_requeues_and_runs_nothing(world, script):
    result = await world.run(script)
    assert result.end is AgentEnd.PROVIDER
    assert result.until_ms > world.now[0]
    assert world.memory.calls == {}
    booked = world.memory.rows[1]["error"].split(":")[0]
    assert booked == ("maybe billed" if script in ("garbage", "html", "half_stream") else "not billed")


async def test_goes_on_with_the_next_provider(world):
    async with ScriptedModel("http_401") as bad:
        world.entries.insert(0, Entry("bad", "m", bad.url, Secret(SECRET)))
        result = await world.run()
        assert (result.end, len(bad.requests)) == (AgentEnd.FINISHED, 1)


async def test_no_provider_at_all_fails(world):
    world.entries.clear()
    result = await world.run()
    assert (result.end, result.reason) == (AgentEnd.FAILED, FailureReason.LLM)


async def test_drain_ends_after_the_step_in_flight(world):
    run = world.shell.run

    async def draining(command, **more):
        world.stop = "drain"
        return await run(command, **more)

    world.shell.run = draining
    result = await world.run("endless")
    assert result.end is AgentEnd.STOPPED
    assert world.memory.calls[1, 0]["result"].startswith("exit 0")


@pytest.mark.parametrize("script", ["hang", "sleeper(60)"])
async def test_cancel_is_quick(world, script):
    task = asyncio.create_task(world.run(script))
    await asyncio.sleep(0.5)
    began = asyncio.get_running_loop().time()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert asyncio.get_running_loop().time() - began < 1


async def test_a_missing_sandbox_is_a_reason(world):
    async def none(command, **more):
        raise SandboxUnavailable("no bubblewrap")

    world.shell.run = none
    result = await world.run("endless")
    assert (result.end, result.reason) == (AgentEnd.FAILED, FailureReason.SANDBOX)


async def test_results_are_redacted_and_capped(world):
    (world.root / "leak.txt").write_text(f"key={SECRET}\n" + "x" * 100_000)
    await world.run('attack(["cat leak.txt"])')
    result = world.memory.calls[1, 0]["result"]
    assert SECRET not in json.dumps(world.model.requests[-1].body)
    assert "[redacted]" in result
    assert len(result) < 41_000
    assert "characters left out" in result


async def test_a_long_conversation_is_compacted(model, tmp_path):
    world = World(model, tmp_path / "work", context_window=6000, max_output_tokens=500)
    (world.root / "big.txt").write_text("line of text\n" * 250)
    result = await world.run(f"attack({json.dumps(['cat big.txt; date +%N'] * 30)})", steps=20)
    assert (result.end, result.limit) == (AgentEnd.LIMIT, "steps")
    assert "What you did in them" in world.sent()[1]["content"]
    sizes = [len(json.dumps(request.body["messages"])) for request in model.requests]
    assert max(sizes) < 6000 * 3
    await world.chain.aclose()


async def test_overflow_shortens_and_never_sends_the_same_again(model, tmp_path):
    world = World(model, tmp_path / "work")
    seen = []

    class Narrow:
        """Says that the conversation is too long, whatever its size."""

        async def call(self, entry, messages, tools, **more):
            from bot.providers.classify import Failure, Seen
            from bot.providers.openai_client import CallFailedError

            seen.append((entry.name, json.dumps(messages)))
            raise CallFailedError(Failure(Seen.STATUS, status=413, text="too long"))

        async def aclose(self):
            pass

    world.entries.append(Entry("wide", "m", model.url, Secret(SECRET), context_window=900_000))
    world.chain = ProviderChain(
        lambda: world.entries, health=MemoryHealth(lambda: 0), now_ms=lambda: 0, sleep=world.sleep, random=lambda: 0.0, client=Narrow()
    )
    calls = [{"id": "a", "type": "function", "function": {"name": "read_file", "arguments": '{"path": "x"}'}}]
    for n in range(1, 10):
        world.memory.rows[n] = {
            "usage": Usage(1),
            "reply": {"role": "assistant", "content": "", "tool_calls": calls, "finish_reason": "tool_calls"},
        }
        world.memory.calls[n, 0] = {"call_id": "a", "result": f"{n} " * 500}
    result = await world.run()
    assert (result.end, result.reason) == (AgentEnd.FAILED, FailureReason.LLM)
    assert len(seen) == len(set(seen))
    assert seen[-1][0] == "wide/m"
    assert all(row.get("error", "not billed").startswith("not billed") for row in world.memory.rows.values())


def test_digest_keeps_calls_and_results_paired():
    history = History("s", "t")
    for n in range(12):
        message = {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": f"c{n}", "type": "function", "function": {"name": "read_file", "arguments": '{"path":"a"}'}}],
        }
        history.add(message, parse_calls(message), [f"{n} " * 400])
        while history.shorten():
            shown = history.messages()
            asked = [call["id"] for m in shown for call in m.get("tool_calls", ())]
            assert asked == [m["tool_call_id"] for m in shown if m["role"] == "tool"]
            assert [m["role"] for m in shown[:2]] == ["system", "user"]
    assert "What you did in them" in history.messages()[1]["content"]


def call(name, **arguments):
    return parse_calls({"tool_calls": [{"id": "x", "function": {"name": name, "arguments": json.dumps(arguments)}}]})[0]


@pytest.fixture
def tools(world):
    asked = []

    class Forge:
        async def read(self, operation, arguments):
            asked.append((operation, dict(arguments)))
            if operation == "pull":
                raise UserError("no such pull request")
            return f"{operation} {SECRET}"

    made = Tools(
        sandbox=world.shell,
        files=WorkspaceFiles(world.root),
        forge=Forge(),
        workdir=world.root,
        scrub=Redactor([Secret(SECRET)]).scrub,
        command_seconds=5,
    )
    made.asked = asked
    return made


@pytest.mark.parametrize(
    ("name", "arguments", "text", "status"),
    [
        ("read_file", {"path": "README.md", "offset": 2, "limit": 2}, "\nTurns a title", "ok"),
        ("read_file", {"path": "README.md", "offset": "3", "limit": 1}, "Turns a title", "ok"),
        ("read_file", {"path": "README.md", "offset": 999}, "(the file has 8 lines)", "ok"),
        ("read_file", {"path": "../../etc/passwd"}, "refused: ", "error"),
        ("read_file", {"path": "/etc/passwd"}, "refused: ", "error"),
        ("read_file", {"path": "none"}, "refused: ", "error"),
        ("write_file", {"path": "new/dir/file", "content": "ä"}, "wrote 2 bytes", "ok"),
        ("edit_file", {"path": "README.md", "old": "slug", "new": "x"}, "occurs 2 times", "error"),
        ("edit_file", {"path": "README.md", "old": "slug", "new": "x", "all": True}, "replaced 2 occurrences", "ok"),
        ("edit_file", {"path": "README.md", "old": "nothing like it", "new": "x"}, "does not occur", "error"),
        ("edit_file", {"path": "README.md", "old": "", "new": "x"}, "`old` is empty", "error"),
        ("list_files", {}, "lib/slug.sh  ", "ok"),
        ("list_files", {"path": "lib"}, "lib/slug.sh", "ok"),
        ("search", {"pattern": "tr ' ' '-'"}, "./lib/slug.sh:3:", "ok"),
        ("search", {"pattern": "no such text anywhere"}, "no match", "ok"),
        ("search", {"pattern": "-e", "path": "--help"}, "No such file", "ok"),
        ("search", {"pattern": "$(touch HACKED)", "path": "; touch HACKED"}, "No such file", "ok"),
        ("search", {"pattern": "("}, "grep: ", "ok"),
        ("run_command", {"command": "echo hi; exit 3"}, "exit 3\nhi", "error"),
        ("run_command", {"command": "sleep 9", "timeout": 1}, "killed after 1 s", "timeout"),
        ("gitea", {"operation": "issue"}, "issue [redacted]", "ok"),
        ("gitea", {"operation": "pull", "number": 3}, "refused: no such pull request", "error"),
        ("gitea", {"operation": "merge", "number": 3}, "there is no operation", "error"),
    ],
)
async def test_tools(tools, world, name, arguments, text, status):
    outcome = await tools.call(call(name, **arguments), seconds=30)
    assert text in outcome.text
    assert outcome.status == status
    assert not (world.root / "HACKED").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        {"operation": "contents", "path": path}
        for path in (
            "../x",
            "a/../b",
            "/etc/passwd",
            "a//b",
            "a%2e",
            "a\\b",
            "a b",
            "a?x=1",
            "a#b",
            "a;b",
            "a\r\nb",
            "a\n",
            "é",
            "http://x/y",
            "./a",
            "",
            "a/",
        )
        if path
    ]
    + [{"operation": "commits", "ref": ref} for ref in ("a..b", "-x", "a b", "a%00", "@{1}", "/x", "a?b", "x\n")]
    + [
        {"operation": "issue", "number": 2},
        {"operation": "comments", "path": "x"},
        {"operation": "pull"},
        {"operation": "pull", "number": 0},
        {"operation": "pull", "number": -1},
        {"operation": "labels", "page": 10**12},
        {"operation": "GET /api/v1/admin/users"},
        {"operation": "Issue"},
        {"operation": ""},
    ],
)
async def test_the_gitea_tool_takes_named_operations_only(tools, arguments):
    asked = len(tools.asked)
    outcome = await tools.call(call("gitea", **arguments), seconds=30)
    assert outcome.status == "error"
    assert len(tools.asked) == asked


@pytest.mark.parametrize(
    ("name", "raw", "fault"),
    [
        ("read_file", "{", "not valid JSON"),
        ("read_file", "[]", "must be a JSON object"),
        ("read_file", "{}", "`path` is missing"),
        ("read_file", '{"path": 3}', "`path` must be of type string"),
        ("read_file", '{"path": "x", "limit": true}', "must be of type integer"),
        ("delete_all", "{}", "there is no tool `delete_all`"),
        ("read_file", "[" * 100_000, "not valid JSON"),
    ],
)
def test_faulty_calls_are_explained(name, raw, fault):
    parsed = parse_calls({"tool_calls": [{"id": "x", "function": {"name": name, "arguments": raw}}]})[0]
    assert fault in parsed.fault
    sent = history_form({"tool_calls": [{"id": "x", "function": {"name": name, "arguments": raw}}], "content": None})
    assert isinstance(json.loads(sent["tool_calls"][0]["function"]["arguments"]), dict)


def test_schemas_are_plain_and_small():
    text = json.dumps(schemas(forge=True))
    assert len(text) < 5000
    assert 'pattern":' in text
    assert '"format"' not in text
    assert "gitea" not in json.dumps(schemas(forge=False))
    assert all(name in text for name in OPERATIONS)
