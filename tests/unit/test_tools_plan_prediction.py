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


def test_directories_of_one_drive_share_it() -> None:
    one, two = (bench.spread(machine(), DRIVE, paths) for paths in (1, 2))
    assert one == (machine(), DRIVE)
    for ends in (("host", two[1]), (two[1], "host")):
        alone = tuple(DRIVE if end == two[1] else end for end in ends)
        assert two[0].link(*ends).bytes_per_s == machine().link(*alone).bytes_per_s


def test_every_setting_that_is_predicted_is_among_the_configurations() -> None:
    assert {case.states for case in bench.FULL} == {"exact", "bf16", "8bit"}
    assert {case.masters for case in bench.FULL} == {"none", "fp32"}
    assert {case.paths for case in bench.FULL} == {1, 2}
    assert {case.in_backward for case in bench.FULL} == {False, True}
    assert bench.FULL[0].settings == "-"
    mixed = next(case for case in bench.FULL if case.masters == "fp32" and case.in_backward)
    assert mixed.settings == "dtype=bfloat16, states=8bit, masters=fp32, in backward"
    assert bench.program_of(mixed).stepping.state_precision == "8bit"


@pytest.mark.slow
@pytest.mark.parametrize("case", bench.QUICK[:2], ids=str)
def test_the_kernel_sees_the_peak_that_was_predicted(case: bench.Case, tmp_path: Path) -> None:
    row = bench.Trial(case, measure_baseline(), DRIVE).run(machine(), tmp_path, steps=4)
    assert "failed" not in row
    assert abs(row["peak_error"]) <= 0.08
