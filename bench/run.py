"""Runs the benchmarks one after another and prints one table. Exit code 0 when every goal is met, 1 when one is missed, 2 when one could not be run."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from bench import b1_intake, b2_ack, b3_label_to_pr, b4_step, b5_storm, b7_cancel, b8_idle, b11_page, b14_metrics, b15_collector
from bench.stand import LIVE_URL
from bench.table import Row, machine, table

Measure = Callable[[argparse.Namespace], Awaitable[list[Row]]]

BENCHMARKS: dict[str, Measure] = {
    "B1": lambda given: b1_intake.measure(runs=given.runs, seconds=given.seconds),
    "B2": lambda given: b2_ack.measure(runs=given.runs),
    "B3": lambda given: b3_label_to_pr.measure(runs=given.runs),
    "B4": lambda given: b4_step.measure(runs=given.runs, mini=given.mini),
    "B5": lambda given: b5_storm.measure(runs=given.runs),
    "B7": lambda given: b7_cancel.measure(runs=given.runs),
    "B8": lambda given: b8_idle.measure(runs=given.runs),
    "B11": lambda given: b11_page.measure(runs=given.runs, fast=not given.full),
    "B14": lambda given: b14_metrics.measure(runs=given.runs),
    "B15": lambda given: b15_collector.measure(runs=given.runs),
}
LIVE: dict[str, Measure] = {
    "B2": lambda given: b2_ack.measure(runs=given.runs, live=True),
    "B3": lambda given: b3_label_to_pr.measure(runs=given.runs, live=True),
}


def arguments(given: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="./dev bench", description="The service against named floors, in one run on this machine.")
    parser.add_argument("which", nargs="*", metavar="ID", help=f"what to run: {', '.join(BENCHMARKS)} (default: all)")
    parser.add_argument("--runs", type=int, default=3, help="rounds of each, ours and floor in turn (default: 3)")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of one round of B1 (default: 20)")
    parser.add_argument("--mini", type=Path, help="an environment that has mini-swe-agent, instead of a temporary one (B4)")
    parser.add_argument("--full", action="store_true", help="B11 once with the files as shipped (11 minutes) instead of compressed")
    found = parser.parse_args(list(given))
    found.which = [name.upper() for name in found.which] or list(BENCHMARKS)
    unknown = sorted(set(found.which) - BENCHMARKS.keys())
    if unknown:
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    return found


async def run(given: argparse.Namespace) -> int:
    """All that was asked for; with GITEA_URL and GITEA_ADMIN_TOKEN in the environment B2 and B3 also on that server."""
    host = machine(Path("/var/tmp"))
    rows: list[Row] = []
    broken = False
    todo = [(name, BENCHMARKS[name]) for name in given.which]
    if LIVE_URL:
        todo += [(f"{name} on {LIVE_URL}", LIVE[name]) for name in given.which if name in LIVE]
    for name, measure in todo:
        began = time.monotonic()
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            rows += await measure(given)
        except Exception as error:
            broken = True
            print(f"{name} could not be run: {type(error).__name__}: {error}", file=sys.stderr)
        print(f"{name} took {time.monotonic() - began:.0f} s", file=sys.stderr)
    print(table(rows))
    print(f"\nmachine: {host}")
    return 2 if broken else int(any(row.met is False for row in rows))


def main(given: Sequence[str]) -> int:
    """Entry point."""
    return asyncio.run(run(arguments(given)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
