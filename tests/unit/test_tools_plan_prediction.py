"""``tools/plan_prediction``: what it predicts and trains is the same job, and the peak is met."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from planning_models import DRIVE, machine

import plan_prediction as bench
from offload.planner.baseline import measure_baseline


def test_a_throttled_drive_shares_its_rate() -> None:
    slow = bench.throttled(machine(), DRIVE, 1e8)
    assert slow.link(DRIVE, "host").bytes_per_s == 1e8
    assert slow.link("host", DRIVE).bytes_per_s == 1e8
    assert slow.link("host", "host") == machine().link("host", "host")
    assert bench.throttled(machine(), DRIVE, None) == machine()


def test_the_full_run_spans_what_it_promises() -> None:
    assert len(bench.FULL) >= 24
    assert len(bench.QUICK) == 3
    assert {case.sequence for case in bench.FULL} >= {64, 4096}
    assert any(case.bytes_per_s for case in bench.FULL)


@pytest.mark.slow
@pytest.mark.parametrize("case", bench.QUICK[:2], ids=str)
def test_the_kernel_sees_the_peak_that_was_predicted(case: bench.Case, tmp_path: Path) -> None:
    row = bench._row(case, machine(), DRIVE, measure_baseline(), tmp_path, steps=4)
    assert "failed" not in row
    assert abs(row["peak_error"]) <= 0.08
