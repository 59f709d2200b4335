"""What a rehearsal of training adds to a machine's rates, and what they do to a prediction."""

from dataclasses import replace
from pathlib import Path

import pytest
from planning_models import BASELINE, DRIVE, machine, settings, trace

from offload.allocator.errors import OffloadError
from offload.planner import mapped_pages, rehearsal
from offload.planner.mapped_pages import measure_mapped_pages
from offload.planner.recoding import measure_recoding
from offload.planner.rehearsal import _solved, _Step, _with, add_rehearsal
from offload.swap.planning.cost import Costs
from offload.swap.planning.predict import predict

MACHINE = machine()


def step(tokens: int, compute_s: float, moved: int) -> _Step:
    return _Step(tokens, compute_s, moved, optimizer_s=1.0, commit_s=0.01)


@pytest.mark.parametrize(("slowness", "lost_s"), [(1.0, 0.0), (1.3, 2e-9), (1.9, 5e-10)])
def test_two_lengths_tell_slowness_and_loss(slowness: float, lost_s: float) -> None:
    few = step(128, slowness * 0.2 + lost_s * 4e8, int(4e8))
    many = step(512, slowness * 0.9 + lost_s * 6e8, int(6e8))
    assert _solved(few, 0.2, many, 0.9) == pytest.approx((slowness, lost_s), abs=1e-12)


def test_a_disturbed_measurement_is_bounded() -> None:
    slowness, _ = _solved(step(128, 0.2, 1 << 28), 0.2, step(512, 9.0, 1 << 28), 0.9)
    assert slowness == rehearsal._MOST_SLOWNESS
    slowness, _ = _solved(step(128, 0.9, 1 << 28), 0.2, step(512, 0.9, 1 << 28), 0.9)
    assert slowness == 1.0


def test_a_new_rehearsal_replaces_the_former_one() -> None:
    once = _with(MACHINE, {"flush": 50.0, "moves": 1e9})
    twice = _with(once, {"flush": 80.0})
    assert [rate.per_s for rate in twice.compute if rate.work == "flush"] == [80.0]
    assert not [rate for rate in twice.compute if rate.work == "moves"]


def test_slower_kernels_change_no_other_rate() -> None:
    slower = _with(MACHINE, {}, 1.5)
    for before, after in zip(MACHINE.compute, slower.compute, strict=True):
        expected = before.per_s / 1.5 if before.work in rehearsal._KERNELS else before.per_s
        assert after == replace(before, per_s=expected)


def test_each_rate_makes_a_prediction_slower_and_moves_as_many_bytes() -> None:
    program = trace()
    plain = predict(program, MACHINE, settings(400), BASELINE)
    slower_machines = (
        _with(MACHINE, {"moves": 1e8}),
        _with(MACHINE, {"tiles": 1e8}),
        _with(MACHINE, {"flush": 1.0}),
    )
    for slower_machine in slower_machines:
        slower = predict(program, slower_machine, settings(400), BASELINE)
        assert slower.step_s > plain.step_s
        one, other = slower.last.finished, plain.last.finished
        assert (one.read_nbytes, one.written_nbytes) == (other.read_nbytes, other.written_nbytes)


def test_a_drive_is_not_faster_beside_the_optimizer_than_alone() -> None:
    faster = _with(MACHINE, {"tiles": 1e13})
    assert Costs(faster, DRIVE).together == Costs(MACHINE, DRIVE).together


def test_a_quick_rehearsal_has_steps_of_both_lengths_behind_the_warm_ones() -> None:
    assert set(rehearsal._QUICK_STEPS) == set(rehearsal._STEPS)
    for tokens, count in rehearsal._QUICK_STEPS.items():
        assert rehearsal._WARM < count < rehearsal._STEPS[tokens]


def test_pages_of_a_mapped_file_are_read_and_written_at_some_rate(tmp_path: Path) -> None:
    found = measure_mapped_pages(tmp_path)
    assert set(found) == {*rehearsal.MAPPED}
    for rates in found.values():
        assert list(rates) == sorted(rates)
        assert all(per_s > 0 for per_s in rates.values())
    assert not list(tmp_path.iterdir())


def test_zeroing_the_home_of_rows_takes_of_the_time_of_their_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 0.0

    def zero(_fd: int, _offset: int, _nbytes: int) -> bool:
        nonlocal now_s
        now_s += 2.0
        return True

    monkeypatch.setattr(mapped_pages, "zero_range", zero)
    monkeypatch.setattr(mapped_pages.time, "perf_counter", lambda: now_s)
    rates = measure_mapped_pages(tmp_path)["page writes"]
    assert rates == {every: 8192 / every / 2.0 for every in (1, 8, 64, 512)}


def test_a_failing_rehearsal_says_where_and_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearsal.sys, "executable", "/bin/false")
    with pytest.raises(OffloadError, match=f"rehearsal of training in {tmp_path} failed"):
        add_rehearsal(MACHINE, tmp_path, DRIVE)
    assert not list(tmp_path.iterdir())


def test_each_form_of_a_state_has_its_rate() -> None:
    rates = measure_recoding()
    assert set(rates) == {"bf16 states", "8bit states", "masters"}
    assert all(per_s > 0 for per_s in rates.values())


@pytest.mark.slow
def test_a_real_rehearsal(tmp_path: Path) -> None:
    found = add_rehearsal(MACHINE, tmp_path, DRIVE)
    rates = {rate.work for rate in found.compute}
    assert {*rehearsal.REHEARSED} - {"moves"} <= rates
    assert not list(tmp_path.iterdir())
