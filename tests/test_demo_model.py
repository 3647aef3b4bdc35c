"""The scripted model: an answer depends on the conversation alone, and every script does what its name says."""

from __future__ import annotations

import asyncio
import json
import time

import aiohttp
import pytest

from bot.demo.model import SCRIPTS, ScriptedModel, Talk, parse
from bot.demo.sample import BUGGY_LINE, FILES, FIXED_LINE


@pytest.fixture
async def model():
    async with ScriptedModel() as server:
        yield server


async def ask(model, messages, *, tools=(), stream_options=None):
    body = {
        "model": "m",
        "messages": messages,
        "stream": True,
        "stream_options": stream_options or {"include_usage": True},
        "tools": list(tools),
    }
    async with (
        aiohttp.ClientSession() as session,
        session.post(model.url + "/chat/completions", json=body, headers={"Authorization": "Bearer k"}) as reply,
    ):
        return reply.status, await reply.text(), reply.headers


def read(text):
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    calls, words, finish, usage = {}, "", None, None
    for chunk in chunks:
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            words += choice["delta"].get("content") or ""
            finish = choice["finish_reason"] or finish
            for call in choice["delta"].get("tool_calls", ()):
                one = calls.setdefault(call["index"], {"id": call.get("id"), "type": "function", "function": {"name": "", "arguments": ""}})
                one["function"]["name"] += call["function"].get("name", "")
                one["function"]["arguments"] += call["function"]["arguments"]
    return words, list(calls.values()), finish, usage


async def converse(model, answer, *, task="Mend it.", turns=20):
    """Plays the agent: `answer(name, arguments)` gives each tool's result."""
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": task}]
    names = []
    for _ in range(turns):
        status, text, _ = await ask(model, messages)
        assert status == 200
        words, calls, _, usage = read(text)
        assert usage["prompt_tokens"] > 0
        messages.append({"role": "assistant", "content": words, "tool_calls": calls})
        for call in calls:
            names.append(call["function"]["name"])
            arguments = json.loads(call["function"]["arguments"])
            if names[-1] == "finish":
                return names, arguments["summary"], messages
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": answer(names[-1], arguments)})
    return names, "", messages


def demo(files):
    def answer(name, arguments):
        match name:
            case "list_files":
                return "\n".join(files)
            case "read_file":
                return files[arguments["path"]]
            case "edit_file":
                assert files[arguments["path"]].count(arguments["old"]) == 1
                files[arguments["path"]] = files[arguments["path"]].replace(arguments["old"], arguments["new"])
                return "replaced"
            case "write_file":
                files[arguments["path"]] = arguments["content"]
                return "wrote"
            case _:
                return "exit 0" if FIXED_LINE in files.get("lib/slug.sh", FIXED_LINE) else "exit 1\nFAIL"

    return answer


async def test_fix(model):
    files = dict(FILES)
    names, summary, messages = await converse(model, demo(files))
    assert names == ["list_files", "read_file", "run_command", "edit_file", "run_command", "finish"]
    assert FIXED_LINE in files["lib/slug.sh"]
    assert "passes" in summary
    # Stateless: the same conversation gets the same answer, whoever asks.
    async with ScriptedModel() as other:
        for end in (2, 4, 6):
            assert read((await ask(model, messages[:end]))[1])[1] == read((await ask(other, messages[:end]))[1])[1]


async def test_fix_depends_on_what_it_read(model):
    files = dict(FILES, **{"lib/slug.sh": FILES["lib/slug.sh"].replace(BUGGY_LINE, "  echo other")})
    names, summary, _ = await converse(model, demo(files))
    assert "edit_file" not in names
    assert "not in lib/slug.sh" in summary


async def test_fix_in_a_strange_repository_leaves_a_note(model):
    files = {"README": "x"}
    await converse(model, demo(files))
    assert "NOTE.md" in files


@pytest.mark.parametrize(
    ("script", "names"),
    [
        ("no_change", ["list_files", "finish"]),
        ("noops(3)", ["run_command"] * 3 + ["write_file", "finish"]),
        ('attack(["env", "id"])', ["run_command", "run_command", "write_file", "finish"]),
        ('write({"a": "1", "b/c": "2"})', ["write_file", "write_file", "finish"]),
        ("touch_workflow", ["write_file", "finish"]),
        ("endless", ["run_command"] * 20),
    ],
)
async def test_scripts(model, script, names):
    model.script = script
    assert (await converse(model, demo({})))[0] == names


async def test_the_task_chooses_the_script(model):
    assert (await converse(model, demo({}), task="Look.\n\n  script: noops(2)\n\nThanks"))[0][:2] == ["run_command", "run_command"]
    assert model.requests[0].script == "noops"
    assert model.requests[0].authorization == "Bearer k"
    # What is no script is ignored.
    await ask(model, [{"role": "user", "content": "script: nothing_like_it"}])
    assert model.requests[-1].script == "fix"


async def test_once_goes_first(model):
    model.once.append("http_500")
    hello = [{"role": "user", "content": "x"}]
    assert (await ask(model, hello))[0] == 500
    assert (await ask(model, hello))[0] == 200


@pytest.mark.parametrize(
    ("script", "status", "part"),
    [
        ("http_500", 500, "internal"),
        ("http_401", 401, "invalid_api_key"),
        ("http_429", 429, "Rate limit"),
        ("html", 200, "<!doctype"),
        ("garbage", 200, "{not json"),
    ],
)
async def test_faults(model, script, status, part):
    model.script = script
    got, text, headers = await ask(model, [{"role": "user", "content": "x"}])
    assert got == status
    assert part in text
    assert (headers.get("Retry-After") == "30") == (status == 429)


async def test_half_a_stream(model):
    model.script = "half_stream"
    with pytest.raises(aiohttp.ClientError):
        await ask(model, [{"role": "user", "content": "x"}])


async def test_words_only_and_usage_only_when_asked(model):
    model.script = "no_tool_call"
    words, calls, finish, _ = read((await ask(model, [{"role": "user", "content": "x"}]))[1])
    assert (calls, finish) == ([], "stop")
    assert "lib/slug.sh" in words
    assert read((await ask(model, [], stream_options={"include_usage": False}))[1])[3] is None


async def test_slow_waits_and_hang_does_not_keep_the_server(model):
    model.script = "slow(0.3)"
    began = time.perf_counter()
    await ask(model, [{"role": "user", "content": "x"}])
    assert time.perf_counter() - began >= 0.3
    model.script = "hang"
    task = asyncio.create_task(ask(model, [{"role": "user", "content": "x"}]))
    await asyncio.sleep(0.2)
    began = time.perf_counter()
    await model.stop()
    assert time.perf_counter() - began < 5
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_canary_and_models(model):
    tool = {"type": "function", "function": {"name": "ping"}}
    _, calls, _, _ = read((await ask(model, [{"role": "user", "content": "x"}], tools=[tool]))[1])
    assert calls[0]["function"]["name"] == "ping"
    async with aiohttp.ClientSession() as session, session.get(model.url + "/models") as reply:
        assert (await reply.json())["data"][0]["id"]


def test_names():
    assert parse("noops(5)") == ("noops", [5])
    for bad in ("unknown", "noops(", "noops(x)"):
        with pytest.raises(ValueError):
            parse(bad)
    assert all(script.__doc__ for script in SCRIPTS.values())
    with pytest.raises(TypeError):
        parse("fix(1, 2)")


def test_talk_pairs_calls_with_results():
    call = {"id": "a", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [
        {"role": "user", "content": "t"},
        {"role": "assistant", "tool_calls": [call, {"id": "b", "function": {"name": "f", "arguments": "{"}}]},
        {"role": "tool", "tool_call_id": "a", "content": "interrupted, may have run"},
        {"role": "tool", "tool_call_id": "b", "content": "two"},
    ]
    talk = Talk(messages)
    assert (talk.task, talk.turns, talk.count("f"), talk.results("f")) == ("t", 1, 2, ["two"])
    assert talk.calls[1] == ("f", {}, "two")
