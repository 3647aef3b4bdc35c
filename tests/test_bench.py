"""The table of the benchmarks says what was measured, and its goals are judged as written."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.run import BENCHMARKS, arguments
from bench.table import Row, machine, quantile, table


def row(ours: float, floor: float | None = None, *, most_ratio: float | None = None, most_ours: float | None = None) -> Row:
    return Row("B0", "a thing", "ms", ours, floor, "3 x 100", "a bare thing", most_ratio=most_ratio, most_ours=most_ours)


@pytest.mark.parametrize(
    ("found", "met"),
    [
        (row(3.0, 2.0, most_ratio=1.5), True),
        (row(3.1, 2.0, most_ratio=1.5), False),
        (row(99.0, 2.0, most_ours=100.0), True),
        (row(3.0, 2.0, most_ratio=1.5, most_ours=2.5), False),
        (row(3.0, 2.0), None),
    ],
)
def test_a_goal_is_met_only_in_all_its_parts(found: Row, met: bool | None):
    assert found.met is met


def test_the_table_shows_ours_floor_ratio_goal_and_samples():
    shown = table([row(31.0, 20.0, most_ratio=1.5)]).splitlines()
    assert shown[0].split()[:5] == ["id", "what", "ours", "floor", "ratio"]
    for cell in ("31.0 ms", "20.0 ms", "1.55", "<= 1.5 x", "NO", "3 x 100", "a bare thing"):
        assert cell in shown[2]


def test_quantiles_are_values_that_were_measured():
    values = [float(number) for number in range(1, 101)]
    assert (quantile(values, 0.5), quantile(values, 0.99), quantile(values, 1.0), quantile([7.0], 0.99)) == (50.0, 99.0, 100.0, 7.0)


def test_all_of_them_run_unless_some_are_named(capsys: pytest.CaptureFixture[str]):
    assert arguments([]).which == list(BENCHMARKS)
    assert arguments(["b3", "--runs", "1"]).which == ["B3"]
    with pytest.raises(SystemExit):
        arguments(["B99"])
    assert "B99" in capsys.readouterr().err


def test_the_machine_is_named(tmp_path: Path):
    assert "cores" in machine(tmp_path)
