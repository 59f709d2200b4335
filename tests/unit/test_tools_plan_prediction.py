"""``tools/plan_prediction``: what it predicts and trains is the same job, and the peak is met."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from planning_models import BASELINE, DRIVE, machine, settings, trace

import plan_prediction as bench
from offload.swap.planning.predict import Prediction, predict
from offload.tiers.machine import Machine
from plan_cases import FULL, QUICK, Case, program_of, spread, throttled


def test_a_throttled_drive_shares_its_rate() -> None:
    slow = throttled(machine(), DRIVE, 1e8)
    assert slow.link(DRIVE, "host").bytes_per_s == 1e8
    assert slow.link("host", DRIVE).bytes_per_s == 1e8
    assert slow.link("host", "host") == machine().link("host", "host")
    assert throttled(machine(), DRIVE, None) == machine()


def test_the_full_run_spans_what_it_promises() -> None:
    assert len(FULL) >= 24
    assert len(QUICK) == 3
    assert {case.sequence for case in FULL} >= {64, 4096}
    assert any(case.bytes_per_s for case in FULL)


def test_directories_of_one_drive_share_it() -> None:
    one, two = (spread(machine(), DRIVE, paths) for paths in (1, 2))
    assert one == (machine(), DRIVE)
    for ends in (("host", two[1]), (two[1], "host")):
        alone = tuple(DRIVE if end == two[1] else end for end in ends)
        assert two[0].link(*ends).bytes_per_s == machine().link(*alone).bytes_per_s


def test_every_setting_that_is_predicted_is_among_the_configurations() -> None:
    assert {case.states for case in FULL} == {"exact", "bf16", "8bit"}
    assert {case.masters for case in FULL} == {"none", "fp32"}
    assert {case.paths for case in FULL} == {1, 2}
    assert {case.in_backward for case in FULL} == {False, True}
    assert {case.in_forward for case in FULL} == {False, True}
    assert {case.micro_batches for case in FULL} == {1, 4}
    assert FULL[0].settings == "-"
    mixed = next(case for case in FULL if case.masters == "fp32" and case.in_backward)
    assert mixed.settings == "dtype=bfloat16, states=8bit, masters=fp32, in backward"
    assert program_of(mixed).stepping.state_precision == "8bit"


def test_every_configuration_is_of_one_kind() -> None:
    kinds = [case.kind for case in FULL]
    assert kinds.count("usual") == 27
    assert {"usual", "rebuilt", "others"} == {*kinds}
    assert all((case.alpha is not None) == (case.kind == "rebuilt") for case in FULL)
    assert all(case.settings != "-" for case in FULL if case.kind == "others")


def test_the_median_of_the_runs_is_held_against_that_of_the_predictions() -> None:
    found = predict(trace(), machine(), settings(600), BASELINE)
    predicted = [_taking(found, step_s) for step_s in (1.0, 0.6, 0.25)]
    runs = [bench.Run(step_s, peak) for step_s, peak in ((0.5, 100), (2.0, 300), (0.4, 200))]
    row = bench.held_against(predicted, runs)
    assert (row["predicted_s"], row["step_s"]) == (0.6, 0.5)
    assert row["step_error"] == pytest.approx(0.2)
    assert row["before_error"] == pytest.approx(1.0)  # what the first rates alone gave
    assert row["peak_nbytes"] == 300  # the highest, in whatever run it was
    assert row["runs"] == "0.4 / 0.5 / 2"


def _taking(found: Prediction, step_s: float) -> Prediction:
    last = replace(found.last, finished=replace(found.last.finished, step_s=step_s))
    return replace(found, steps=(*found.steps[:-1], last))


@pytest.mark.parametrize(("repeats", "order"), [(1, "rm"), (2, "rmrm"), (3, "rmrrm")])
def test_rates_are_measured_between_the_runs_and_behind_them(
    repeats: int, order: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def run(*_arguments: object) -> bench.Run:
        seen.append("r")
        return bench.Run(1.0, 1)

    def measured() -> Machine:
        seen.append("m")
        return machine()

    monkeypatch.setattr(bench, "run_once", run)
    monkeypatch.setattr(bench, "measure_baseline", lambda **_products: BASELINE)
    trial = bench.Trial(QUICK[0], DRIVE, machine())
    trial.repeat(repeats, tmp_path, measured)
    assert "".join(seen) == order


@pytest.mark.slow
@pytest.mark.parametrize("case", QUICK[:2], ids=str)
def test_the_kernel_sees_the_peak_that_was_predicted(case: Case, tmp_path: Path) -> None:
    trial = bench.Trial(case, DRIVE, machine())
    trial.repeat(2, tmp_path, machine)
    assert abs(trial.told()["peak_error"]) <= 0.08
