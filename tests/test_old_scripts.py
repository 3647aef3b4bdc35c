"""The toolbelt of old, script by script: what each did is done here. Lanes and tmux snapshots have theirs in test_lanes.py, the watchdog in test_watchdog.py."""

from __future__ import annotations

import csv
import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio
from talk import answered, issue_with
from test_launcher import cli
from world import World, base_folder, make_world, until

from bot.providers.nous import nous_login

pytestmark = pytest.mark.asyncio(loop_scope="module")


class Toolbelt(World):
    """One world for all of them: an issue was worked on by the night's end, an epic and a study were left alone."""

    picked: int
    left: tuple[int, ...]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def belt():
    with base_folder() as base:
        more = {
            "collector": {"enabled": True, "every_seconds": 3.0, "deadline_seconds": 30.0},
            "exports": {"every_seconds": 0.5},
            "launcher": {"enabled": True, "schedule": "*/2 * * * * *"},
        }
        async with make_world(base, kind=Toolbelt, start=False, **more) as world:
            epic = await world.alice.open_issue("[EPIC] all of it", "as told")
            study = await world.alice.open_issue("[STUDY] what it is", "as told")
            world.left = (epic, study)
            world.picked = await issue_with(world)
            await world.start()

            async def settled():
                found = await world.sprint(world.picked)
                return found if found is not None and found.state == "settled" else None

            await until(settled, 90)
            await world.shown(world.picked)
            yield world


async def test_sprint_launcher_sh(belt: Toolbelt):
    """Takes the next open issue that is neither epic nor study, once, and writes results.csv."""
    sprint = await belt.sprint(belt.picked)
    assert (sprint.source, sprint.outcome) == ("schedule", "pull_request")
    for issue in belt.left:
        assert await belt.sprint(issue) is None
    code, said = await cli(belt, "launch", "--dry-run", "--json")
    assert code == 0
    left = {entry["issue"]: entry["left_out"] for entry in json.loads(said)["repositories"][0]["issues"]}
    assert left == {belt.left[0]: "epic", belt.left[1]: "study", belt.picked: "pull"}
    results = belt.state_dir / "exports" / "results.csv"
    await until(lambda: results.is_file() and sprint.id in results.read_text())
    with results.open(newline="") as file:
        [line] = csv.DictReader(file)
    assert (line["sprint"], line["outcome"], line["issue"]) == (sprint.id, "pull_request", str(belt.picked))


async def test_sprint_runner_py(belt: Toolbelt):
    """Clones, works with tools, commits, pushes, opens the pull request and says so on the issue."""
    sprint = await belt.sprint(belt.picked)
    [pull] = await belt.pulls()
    assert pull["number"] == sprint.pr
    assert f"Closes #{belt.picked}" in pull["body"]
    assert pull["head"]["label"] == f"dispatch/issue-{belt.picked}"
    assert sprint.steps >= 2
    [comment] = await belt.by_bot(belt.picked)
    assert f"#{pull['number']}" in comment
    assert "dispatch/review" in await belt.labels(belt.picked)


async def test_agent_dispatch_sh(belt: Toolbelt):
    """Prints a prompt from which another agent can work, and no token with it."""
    code, said = await cli(belt, "prompt", f"{belt.stage.repo}#{belt.left[0]}")
    assert code == 0, said
    assert f"{belt.stage.repo}#{belt.left[0]}" in said
    assert f"{belt.stage.url}/{belt.stage.repo}.git" in said
    assert belt.timmy.token.reveal() not in said


async def test_telemetry_collector_py(belt: Toolbelt):
    """Samples the machine into metrics.jsonl, what changed into events.jsonl, and keeps last_state.json."""
    folder = belt.state_dir / "telemetry"
    sprint = await belt.sprint(belt.picked)
    code, said = await cli(belt, "telemetry", "collect", "--once", "--json")
    assert code == 0, said
    record = json.loads(said)
    repository = record["sources"]["gitea"]["repositories"][0]
    assert [repository[name] for name in ("open_issues", "open_pulls", "bot_pulls", "bot_commits")] == [3, 1, 1, 1]
    assert record["sources"]["processes"]["workers"][0]["alive"] is True
    assert {"launcher", "retention", "exports"} <= {each["schedule"] for each in record["sources"]["cron"]["schedules"]}
    assert record["sample"] in [json.loads(line)["sample"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert events[0]["event"] == "began"
    last = json.loads((folder / "last_state.json").read_text())
    assert record["sources"]["gitea"]["status"] == "ok"
    assert last["state"].keys() >= {"source/gitea", "source/tmux", "clock/wall"}
    assert f"sprints/{sprint.id}" not in last["state"], "it is over"


async def test_telemetry_analyzer_py(belt: Toolbelt):
    """Tells in the morning what the night brought."""
    code, said = await cli(belt, "report", "1h", "--format", "json")
    assert code == 0, said
    found = json.loads(said)
    assert (found["outcomes"], found["opened"]) == ({"pull_request": 1}, 1)


async def test_sprint_monitor_sh(belt: Toolbelt):
    """Shows what runs and how far, without the forge."""
    code, said = await cli(belt, "status")
    assert code == 0
    assert "0 running" in said
    assert f"{belt.stage.repo}#{belt.picked}" in said
    assert "pull_request" in said
    assert f"#{(await belt.sprint(belt.picked)).pr}" in said


async def test_dispatch_health_py(belt: Toolbelt):
    """Judges by what moved, not by what runs."""
    async with aiohttp.ClientSession(f"http://127.0.0.1:{belt.service.metrics_port}") as session, session.get("/readyz") as reply:
        assert reply.status == 200
        assert "idle" in (await reply.text()).casefold()
    await answered(belt, belt.left[1], "/dispatch health")
    await belt.shown(belt.left[1])
    said = await belt.by_bot(belt.left[1])
    assert any("idle" in body.casefold() for body in said), said


async def test_nous_auth_refresh_py(tmp_path: Path):
    """Keeps the login alive through Hermes' own command, and only when a call needs a key."""

    def auth(key: str, expires: datetime) -> str:
        return json.dumps({"providers": {"nous": {"agent_key": key, "agent_key_expires_at": expires.isoformat(), "access_token": "x"}}})

    now = datetime.now(UTC)
    home = tmp_path / "hermes"
    home.mkdir()
    (home / "auth.json").write_text(auth("old-key", now - timedelta(hours=1)))
    (home / "new.json").write_text(auth("new-key", now + timedelta(hours=1)))
    program = tmp_path / "bin" / "hermes"
    program.parent.mkdir()
    program.write_text(
        '#!/bin/sh\ncp "$HERMES_HOME/new.json" "$HERMES_HOME/auth.json"\necho "$@" >>"$HERMES_HOME/calls"\necho "nous: logged in"\n'
    )
    program.chmod(0o755)
    results: list[str] = []

    async def lease(_key: str, _seconds: float) -> bool:
        return True

    login = nous_login(
        home,
        {"PATH": f"{program.parent}:{os.environ['PATH']}"},
        lease=lease,
        now_ms=lambda: int(now.timestamp() * 1000),
        on_refresh=results.append,
    )
    assert (await login.fresh()).reveal() == "new-key"
    assert (await login.fresh()).reveal() == "new-key"
    assert ((home / "calls").read_text(), results) == ("auth status nous\n", ["ok"])


async def test_paper(belt: Toolbelt):
    """Telemetry as research data: every table with its dictionary, without names of people."""
    sprint = await belt.sprint(belt.picked)
    out = belt.state_dir.parent / "paper.jsonl"
    code, said = await cli(belt, "telemetry", "export", "--table", "steps", "--since", "1h", "--format", "jsonl", "-o", str(out))
    assert code == 0, said
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert {line["sprint"] for line in lines} == {sprint.id}
    assert len(lines) == sprint.steps
    dictionary = (await cli(belt, "telemetry", "export", "--dictionary"))[1]
    assert all(f"`{name}`" in dictionary for name in lines[0])
    [log] = (belt.state_dir / "exports" / "logs").iterdir()
    assert f"sprint {sprint.id}" in log.read_text()
