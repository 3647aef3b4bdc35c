"""results.csv, paper/ and retention: what is exported is what the rows say, once, whatever crashes; what is old goes, what decides stays."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import os
import random
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from fleet_support import now_ms
from hypothesis import given
from hypothesis import strategies as st
from talk import issue_with
from test_launcher import cli
from test_report import fill
from world import World, until

from bot.cli.telemetry import TABLES, _parquet
from bot.doctor import sizes as doctor
from bot.fleet.dataset import DATASETS, RESULTS, cell, dictionary, line, names, time_ms, time_text
from bot.fleet.exports import Exporter
from bot.fleet.retention import DAY_MS, prune_files, prune_journals, prune_rows
from bot.models import OutcomeKind
from bot.settings import RetentionSettings
from bot.snapshot import HealthVerdict
from bot.store import Store, deliveries, intents, outbox, spells, sprints, steps

NOW = 1_800_000_000_000
KEEP = RetentionSettings()
LIMITS = {"steps": 60, "seconds": 60, "tokens": 1000, "usd": 1.0}


@pytest.fixture
def store(base: Path) -> Iterator[Store]:
    made = Store(f"sqlite:///{base}/timmy.db")
    made.open()
    try:
        yield made
    finally:
        made.close()


def row(n: int, settled_ms: int | None, **more: Any) -> dict[str, Any]:
    first = {
        "id": f"s{n:04}",
        "repo_id": 1,
        "repo": "acme/rocket",
        "issue": n,
        "state": "settled" if settled_ms is not None else "working",
        "outcome": OutcomeKind.PULL_REQUEST if settled_ms is not None else None,
        "reason": "",
        "detail": "",
        "source": "label",
        "provider": "nous",
        "model": "hermes-4",
        "engine": "loop",
        "steps": 3,
        "tokens": 100,
        "usd": 0.25,
        "queued_ms": NOW - DAY_MS,
        "started_ms": NOW - DAY_MS + 1500,
        "settled_ms": settled_ms,
        "admitted_n": 1,
        "crashes": 0,
        "pr": 7,
    }
    return first | more


def add(store: Store, *rows: dict[str, Any]) -> None:
    fixed = {
        "priority": 5,
        "trigger": "t",
        "requester_id": 1,
        "requester": "alice",
        "options": {},
        "limits": {},
        "checks": [],
        "flagged": [],
        "config_faults": [],
    }
    store.write_sync(lambda conn: conn.execute(sprints.table.insert(), [fixed | one | {"updated_ms": NOW} for one in rows]))


def exporter(store: Store, base: Path) -> Exporter:
    return Exporter(store, base / "exports", scrub=lambda text: text.replace("hunter2", "***"))


def results(base: Path) -> list[dict[str, str]]:
    with (base / "exports" / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


async def test_results_csv_has_one_line_a_sprint_and_one_log(store: Store, base: Path):
    add(store, *(row(n, NOW - n * 1000) for n in range(1, 6)), row(9, None))
    assert await exporter(store, base).round() == 5
    assert await exporter(store, base).round() == 0
    found = results(base)
    assert [line["sprint"] for line in found] == ["s0005", "s0004", "s0003", "s0002", "s0001"]
    assert found[-1] == {
        "time": time_text(NOW - 1000),
        "repository": "acme/rocket",
        "issue": "1",
        "sprint": "s0001",
        "engine": "loop",
        "provider": "nous",
        "model": "hermes-4",
        "outcome": "pull_request",
        "pr": "7",
        "steps": "3",
        "tokens": "100",
        "cost": "0.25",
        "seconds": str((NOW - 1000 - (NOW - DAY_MS + 1500)) / 1000),
    }
    logs = sorted((base / "exports" / "logs").iterdir())
    assert len(logs) == 5
    assert "acme-rocket-1-s0001" in logs[0].name
    assert {oct(path.stat().st_mode & 0o777) for path in (*logs, base / "exports" / "results.csv")} == {"0o600"}
    assert (base / "exports").stat().st_mode & 0o777 == 0o700
    add(store, row(9999, NOW - 2500))
    assert await exporter(store, base).round() == 1, "one that another host settled by a slower clock is not lost"


async def test_a_crash_at_any_byte_neither_loses_nor_doubles_a_line(store: Store, base: Path):
    add(store, *(row(n, NOW + n * 7_000_000) for n in range(1, 8)))
    await exporter(store, base).round()
    path = base / "exports" / "results.csv"
    whole = path.read_bytes()
    for cut in random.Random(7).sample(range(len(whole)), 40):
        path.write_bytes(whole[:cut])
        await exporter(store, base).round()
        assert path.read_bytes() == whole, cut


async def test_more_than_fits_the_tail_is_not_written_again(store: Store, base: Path):
    add(store, *(row(n, NOW + n * 1000, model="m" * 2000) for n in range(1, 260)))
    assert await exporter(store, base).round() == 259
    assert (base / "exports" / "results.csv").stat().st_size > 262_144
    add(store, row(900, NOW + 900_000))
    assert await exporter(store, base).round() == 1
    assert len({found["sprint"] for found in results(base)}) == 260 == len(results(base))


async def test_a_file_of_another_version_stays_under_another_name(store: Store, base: Path):
    add(store, row(1, NOW))
    folder = base / "exports"
    folder.mkdir()
    (folder / "results.csv").write_text("when,what\n1,2\n")
    assert await exporter(store, base).round() == 1
    assert (folder / "results-1.csv").read_text() == "when,what\n1,2\n"
    assert len(results(base)) == 1


async def test_a_log_tells_all_and_no_secret(store: Store, base: Path):
    add(store, row(1, NOW, title="parse\x1b[31m it", detail="the end"))

    def write(conn: Any) -> None:
        message = {"content": "I shall look. hunter2"}
        values = {"sprint_id": "s0001", "attempt": 1, "n": 1, "reserved_usd": 1.0, "reserved_tokens": 5, "started_ms": NOW}
        conn.execute(
            steps.table.insert().values(**values, reply=message, provider="nous", model="hermes-4", cost_usd=0.5, input=3, output=4)
        )
        conn.execute(steps.table.insert().values(**(values | {"n": 2}), error="rate limit"))
        call = {"sprint_id": "s0001", "attempt": 1, "n": 1, "call_id": "c", "arguments": '{"command": "ls"}', "started_ms": NOW}
        conn.execute(steps.tool_calls.insert().values(**call, i=0, tool="run_command", result="README"))
        conn.execute(steps.tool_calls.insert().values(**call, i=1, tool="search"))

    store.write_sync(write)
    await exporter(store, base).round()
    [path] = (base / "exports" / "logs").iterdir()
    text = path.read_text()
    order = ["sprint s0001", "step 1: nous/hermes-4, 7 tokens, $0.5000", "I shall look. ***", "> run_command", "README", "> search"]
    order += ["! interrupted", "step 2: no answer", "! rate limit", "pull_request, pull request #7", "the end"]
    places = [text.index(part) for part in order]
    assert places == sorted(places)
    assert "\x1b" not in text
    assert "hunter2" not in text


@given(st.text())
def test_a_cell_is_one_line_and_no_formula(text: str):
    made = cell(text)
    assert not made.startswith(("=", "+", "-", "@"))
    written = line([text, 1, None, 2.5, True])
    assert written.count("\n") == 1
    [found] = csv.reader(io.StringIO(written))
    assert found[1:] == ["1", "", "2.5", "true"]


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM", "\t=1", " =1", "\r=1"])
def test_a_formula_is_text(text: str):
    assert cell(text).startswith("'")


@given(st.integers(1, 4_000_000_000_000))
def test_times_survive(ms: int):
    assert time_ms(time_text(ms) or "") == ms


def test_the_dictionary_names_every_column_with_its_meaning():
    text = dictionary()
    assert tuple(DATASETS) == TABLES
    for dataset in DATASETS.values():
        assert len(set(names(dataset.columns))) == len(dataset.columns)
        for column in dataset.columns:
            assert f"| `{column.name}` | {column.type} |" in text
            assert column.meaning
            assert column.type in ("text", "integer", "number", "boolean", "time")
    assert DATASETS["sprints"].columns[: len(RESULTS)] == RESULTS


def test_every_value_has_the_type_that_its_column_says(store: Store):
    calls = [(1, NOW, 30, 50, False), (1, NOW, None, 50, True)]
    fill(
        store,
        [row(1, NOW), row(2, NOW, started_ms=None, queued_ms=NOW)],
        {(1, 7, "merged"): NOW},
        calls,
        [(1, "paused", NOW)],
        [(1, "run", "ok", NOW)],
        [],
    )
    store.write_sync(lambda conn: spells.note(conn, HealthVerdict.STALLED, causes=["provider_down"], reason="it is so", now_ms=NOW))
    kinds = {"text": str, "time": str, "integer": int, "number": float, "boolean": bool}
    for dataset in DATASETS.values():
        found = store.read_sync(lambda conn, dataset=dataset: list(dataset.records(conn, NOW - 1)))
        assert found or dataset.name == "tools"
        for record in found:
            for column in dataset.columns:
                value = record[column.name]
                assert value is None or type(value) is kinds[column.type], (column.name, value)


async def test_paper_telemetry_export(world: World):
    issue = await issue_with(world)
    await world.alice.label(issue, "dispatch")
    sprint = await world.settled(issue)
    code, said = await cli(world, "telemetry", "export", "--since", "1h")
    lines = said.splitlines()
    assert code == 0
    assert lines[1].split(",")[3] == sprint.id
    path = world.state_dir.parent / "steps.jsonl"
    assert (await cli(world, "telemetry", "export", "--table", "steps", "--format", "jsonl", "-o", str(path)))[0] == 0
    found = [json.loads(text) for text in path.read_text().splitlines()]
    assert {record["sprint"] for record in found} == {sprint.id}
    assert len(found) == sprint.steps
    assert world.alice.login not in path.read_text()
    if find_spec("pyarrow") is None:
        code, said = await cli(world, "telemetry", "export", "--format", "parquet", "-o", str(path))
        assert (code, "pip install pyarrow" in said) == (1, True)
    assert (await cli(world, "telemetry", "export", "--dictionary"))[1].startswith("# Data dictionary")
    assert (await cli(world, "telemetry", "export", "--since", "yesterday"))[0] == 1


async def test_parquet_holds_the_same_rows(store: Store, tmp_path: Path):
    arrow = pytest.importorskip("pyarrow", reason="pyarrow (the extra `parquet`) is not installed")
    pytest.importorskip("pyarrow.parquet")
    add(store, row(1, NOW), row(2, NOW))
    chosen = DATASETS["sprints"]
    records = list(store.read_sync(lambda conn: list(chosen.records(conn, 0))))
    assert _parquet(arrow, chosen, iter(records), tmp_path / "sprints.parquet") == 2
    found = arrow.parquet.read_table(tmp_path / "sprints.parquet").to_pylist()
    assert found == [{column.name: record.get(column.name) for column in chosen.columns} for record in records]


async def test_the_service_writes_them_by_itself(world: World):
    await world.stop()
    await world.start(exports={"every_seconds": 0.2})
    issue = await issue_with(world)
    await world.alice.label(issue, "dispatch")
    sprint = await world.settled(issue)
    path = world.state_dir / "exports" / "results.csv"
    await until(lambda: path.is_file() and sprint.id in path.read_text())
    [log] = (world.state_dir / "exports" / "logs").iterdir()
    assert "run_command" in log.read_text() or "write_file" in log.read_text()
    assert world.timmy.token.reveal() not in log.read_text()


async def test_rows_of_long_ago_go_and_what_decides_stays(store: Store):
    old, young = NOW - 100 * DAY_MS, NOW - DAY_MS
    add(store, row(1, old), row(2, young), row(3, None, queued_ms=old))

    def write(conn: Any) -> None:
        for n, sprint in enumerate(("s0001", "s0002", "s0003")):
            values = {"sprint_id": sprint, "attempt": 1, "n": 1}
            conn.execute(
                steps.table.insert().values(
                    **values, reserved_usd=1.0, reserved_tokens=5, cost_usd=0.5, input=1, reply={"content": "said"}, started_ms=old
                )
            )
            conn.execute(steps.tool_calls.insert().values(**values, i=0, call_id="c", tool="search", arguments="{}", started_ms=old))
            deliveries.add(conn, digest=str(n), event_type="issues", delivery="", body=b"x", now_ms=old)
            intents.claim(conn, f"command:{n}", old)
            intents.decide(conn, repo_id=1, issue=n, kind="run", result="ok", reason="", now_ms=old)
        deliveries.done(conn, "0", old)
        deliveries.dead(conn, "1", error="no", now_ms=NOW - 20 * DAY_MS)
        for key, made in (("old", old), ("young", young)):
            outbox.received(conn, key=key, repo_id=1, repo="a/b", issue=1, comment_id=1, received_ms=made, now_ms=made)
            outbox.shown(conn, key, 1)

    store.write_sync(write)
    store.write_sync(lambda conn: prune_rows(conn, KEEP, NOW))
    assert await prune_journals(store, KEEP, NOW) == 1
    assert await prune_journals(store, KEEP, NOW) == 0

    def look(conn: Any) -> dict[str, Any]:
        def count(table: Any) -> int:
            return conn.execute(sa.select(sa.func.count()).select_from(table)).scalar()

        said = dict(conn.execute(sa.select(steps.table.c.sprint_id, steps.table.c.reply)).all())
        return {
            "said": {key for key, value in said.items() if value},
            "spent": steps.spent(conn, "s0001").usd,
            "calls": count(steps.tool_calls),
            "deliveries": set(conn.execute(sa.select(deliveries.table.c.hash)).scalars()),
            "outbox": set(conn.execute(sa.select(outbox.table.c.key)).scalars()),
            "kept": (count(sprints.table), count(intents.table), count(intents.decisions)),
        }

    assert store.read_sync(look) == {
        "said": {"s0002", "s0003"},
        "spent": 0.5,
        "calls": 2,
        "deliveries": {"1", "2"},
        "outbox": {"young"},
        "kept": (3, 3, 3),
    }


async def test_files_of_long_ago_go_and_those_of_live_sprints_stay(world: World):
    service = world.service
    root, exports = world.state_dir / "sprints", world.state_dir / "exports"
    now, long_ago = now_ms(), time.time() - 100 * 86_400
    # The service's own first look is over by then; the next one is an hour away.
    await until((exports / "results.csv").exists)
    await asyncio.sleep(0.5)
    add(service.store, row(1, now - 30 * DAY_MS), row(2, now - DAY_MS), row(3, None))
    (root / ".patches").mkdir(exist_ok=True)
    (exports / "logs").mkdir(parents=True, exist_ok=True)
    for name in ("s0001", "s0002", "s0003", "unknown-old", "unknown-new"):
        (root / name / "work").mkdir(parents=True)
        (root / name / "work" / "file").write_text("x")
        if service.sandbox.owner is not None and name != "s0001":
            for path in (root / name / "work", root / name / "work" / "file"):
                os.chown(path, service.sandbox.owner, service.sandbox.owner)
        (root / ".patches" / f"{name}.patch").write_text("diff")
        (exports / "logs" / f"{name}.log").write_text("log")
    stuck = service.sandbox.owner is not None  # "s0001" is not the sandbox user's, so it cannot be emptied, and the others go all the same
    for path in (root / "unknown-old", root / ".patches" / "unknown-old.patch", root / "s0003", exports / "logs" / "s0001.log"):
        os.utime(path, (long_ago, long_ago))
    found = await prune_files(service.store, service.workspaces, exports, KEEP, now)
    assert (found.folders, found.patches, found.logs) == (1 if stuck else 2, 2, 1)
    left = {path.name for path in root.iterdir() if not path.name.startswith(".")}
    assert left - {"s0001"} == {"s0002", "s0003", "unknown-new"}
    assert not (exports / "logs" / "s0001.log").exists()
    probe = doctor.sizes(service.settings)
    assert probe.mark == "ok"
    assert f"{len(left)} sprint folders" in probe.detail
    assert "database" in probe.detail
    await service._retention()


@pytest.mark.parametrize(
    ("size", "said"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 1024**3, "3.0 GiB"), (2**50, "1024.0 TiB")]
)
def test_sizes_for_people(size: int, said: str):
    assert doctor.human(size) == said
