"""Runs the service until it is told to stop."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(short_help="Run the service.")
@click.option("--log-level", type=click.Choice(["DEBUG", "INFO", "WARNING", "ERROR"]), default="INFO", show_default=True)
@click.option("--log-json", is_flag=True, help="One JSON object a line, for journals and collectors.")
@click.pass_obj
def command(config: Path, log_level: str, log_json: bool) -> int:  # noqa: FBT001 - click passes options by name
    """Take deliveries, run sprints, show what becomes of them. SIGTERM and Ctrl-C end it politely; work goes on at the next start.

    The configuration is dispatch.yml, or what --config or $TIMMY_DISPATCH_CONFIG names.
    """
    import asyncio

    from bot.cli._load import load
    from bot.cli._process import run_service

    return asyncio.run(run_service(load(config, serves=True), level=log_level, json=log_json))
