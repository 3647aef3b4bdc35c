"""`telemetry`: the rows as data that a paper or a spreadsheet can be built on, with their dictionary, and samples of the fleet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from bot.config import Loaded
    from bot.fleet.collector import Sample
    from bot.fleet.dataset import Dataset, Value
    from bot.store import Store

FORMATS = ("csv", "jsonl", "parquet")
TABLES = ("sprints", "steps", "tools", "decisions", "pulls", "verdicts")
PARQUET_ROWS = 10_000


@click.group(short_help="Export what the fleet did as data; sample what it does.")
def command() -> None:
    """What the fleet did, and does, as data."""


@command.command("export", short_help="Write one table as CSV, JSON lines or Parquet.")
@click.option("--table", type=click.Choice(TABLES), default="sprints", show_default=True, help="What a row is about.")
@click.option("--since", default="30d", show_default=True, metavar="WINDOW|DATE", help="12h, 7d, or a moment such as 2026-11-01.")
@click.option("--format", "form", type=click.Choice(FORMATS), default="csv", show_default=True)
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="File to write; without it standard output.")
@click.option("--dictionary", is_flag=True, help="Print what every column of every table means (Markdown) instead.")
@click.pass_obj
def export(config: Path, table: str, since: str, form: str, output: Path | None, dictionary: bool) -> int:  # noqa: FBT001 - click passes options by name
    """Write one table of what happened since then. Names of people and texts are not in it.

    All rows are read in one transaction; the service need not run, and is not held up.
    """
    from bot.cli._house import opened
    from bot.cli._load import load
    from bot.fleet import dataset
    from bot.store import figures

    if dictionary:
        click.echo(dataset.dictionary(), nl=False)
        return 0
    chosen, since_ms = dataset.DATASETS[table], _since(since)
    if form == "parquet":
        arrow = _arrow()
        if output is None:
            raise click.UsageError("Parquet is not text: name a file with -o FILE.")
    loaded = load(config, quiet=True)
    with opened(loaded) as store:

        def write(conn: Any) -> int:
            figures.consistent(conn)
            records = chosen.records(conn, since_ms)
            if form == "parquet":
                return _parquet(arrow, chosen, records, output or Path())
            counted = _Counted(records)
            lines = dataset.as_csv(chosen, counted) if form == "csv" else dataset.as_jsonl(counted)
            with click.open_file(str(output) if output else "-", "w", encoding="utf-8") as file:
                file.writelines(lines)
            return counted.count

        count = store.read_sync(write)
    click.echo(f"{count} rows of {table}" + (f" in {output}" if output else ""), err=True)
    return 0


class _Counted:
    """Passes records on and counts them."""

    def __init__(self, records: Iterator[Mapping[str, Value]]) -> None:
        self._records = records
        self.count = 0

    def __iter__(self) -> Iterator[Mapping[str, Value]]:
        for record in self._records:
            self.count += 1
            yield record


@command.command("collect", short_help="Sample the fleet and its machine.")
@click.option("--once", is_flag=True, help="One sample; without it one every `collector.every_seconds` until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="Print the sample as metrics.jsonl has it.")
@click.pass_obj
def collect(config: Path, once: bool, as_json: bool) -> int:  # noqa: FBT001 - click passes options by name
    """Take a sample: tmux, workers, schedules, forge, sprints, disk, providers; write it to the telemetry folder and print it.

    The service does the same every minute by itself (`collector.enabled`). This works beside it, and without it: `collect --once` is a line of a crontab.
    A source that gave nothing in time is printed as unknown, and is no failure of the command.
    """
    import asyncio
    import contextlib

    from bot.cli._house import opened
    from bot.cli._load import load

    loaded = load(config, quiet=True)
    with opened(loaded) as store, contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_collect(loaded, store, once=once, as_json=as_json))
    return 0


async def _collect(loaded: Loaded, store: Store, *, once: bool, as_json: bool) -> None:
    import asyncio
    import os

    from bot.fleet.collector import Collector
    from bot.gitea.aiohttp import GiteaClient
    from bot.gitea.forge import Forge
    from bot.models import UserError
    from bot.redaction import Redactor
    from bot.repositories import known_repositories

    settings = loaded.settings
    try:
        node_id = (settings.state_dir / "node").read_text(encoding="ascii").strip()
    except FileNotFoundError:
        raise UserError(f"there is no state in {settings.state_dir}: start the service once (`timmy-dispatch serve`)") from None
    names = {repo_id: name for repo_id, (_, name) in store.read_sync(known_repositories).items()}
    async with GiteaClient(settings.forge.url, loaded.secrets.forge_token, ca_file=settings.forge.ca_file) as client:
        collector = Collector(
            store,
            Forge(client),
            settings=settings,
            node_id=node_id,
            repositories=lambda: names,
            environ=os.environ,
            is_keeper=lambda: True,
            missed=lambda _source: None,
            scrub=Redactor([loaded.secrets.forge_token]).scrub,
        )
        try:
            while True:
                _show_sample(await collector.collect(), as_json=as_json)
                if once:
                    return
                await asyncio.sleep(settings.collector.every_seconds)
        finally:
            await collector.close()


def _show_sample(sample: Sample, *, as_json: bool) -> None:
    import json

    from bot.redaction import terminal

    if as_json:
        click.echo(json.dumps(sample.record, ensure_ascii=True))
        return
    click.echo(f"sample {sample.record['at']}: {len(sample.events)} events, {sample.written:,} bytes written")
    for name, found in sample.record["sources"].items():
        told = {key: value for key, value in found.items() if key not in ("status", "took_ms")}
        click.echo(terminal(f"  {name:<10} {found['status']:<8} {found['took_ms']:>7.1f} ms  {_brief(told)}"))
    for event in sample.events:
        click.echo(terminal(f"  {event['event']} {event['entity']} {_brief(event['before'])} -> {_brief(event['after'])}"))


def _brief(told: Mapping[str, Any]) -> str:
    """What a person needs of it: lists by their length."""
    return ", ".join(f"{name} {len(value) if isinstance(value, list) else value}" for name, value in told.items())


def _since(text: str) -> int:
    from bot.cli._house import now_ms
    from bot.figures import window_ms
    from bot.fleet.dataset import time_ms
    from bot.models import UserError

    try:
        return now_ms() - window_ms(text)
    except UserError:
        try:
            return time_ms(text)
        except ValueError:
            raise UserError(f"`{text[:40]}` is neither a window (12h, 7d) nor a moment (2026-11-01, 2026-11-01T06:00:00Z)") from None


def _arrow() -> Any:
    from importlib import import_module

    from bot.models import UserError

    try:
        import_module("pyarrow.parquet")
        return import_module("pyarrow")
    except ImportError:
        raise UserError(
            "Parquet needs the package pyarrow, which is not installed: `pip install 'timmy-dispatch[parquet]'` (or `pip install pyarrow`), "
            "or take --format csv or jsonl"
        ) from None


def _parquet(arrow: Any, chosen: Dataset, records: Iterator[Mapping[str, Value]], output: Path) -> int:
    """Times stay text, as in the other formats."""
    from itertools import islice

    kinds = {"integer": arrow.int64(), "number": arrow.float64(), "boolean": arrow.bool_()}
    schema = arrow.schema([(column.name, kinds.get(column.type, arrow.string())) for column in chosen.columns])
    count = 0
    with arrow.parquet.ParquetWriter(output, schema) as writer:
        while part := list(islice(records, PARQUET_ROWS)):
            writer.write_table(arrow.Table.from_pylist(part, schema=schema))
            count += len(part)
    return count
