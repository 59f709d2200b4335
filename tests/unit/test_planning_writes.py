"""A write budget and a full drive in a simulated run: what they refuse, what stays in memory."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planning_models import BASELINE, DRIVE, MIB, machine, model_in, settings, trace
from real_runs import both, check_moved

import offload
from offload.allocator.errors import BudgetError
from offload.swap.homes import SPARE_NBYTES
from offload.swap.planning import predict as predicting
from offload.swap.planning.predict import Prediction, drive_use, least_budget, predict
from offload.swap.planning.program import Program
from offload.swap.planning.sim_writes import must_write_nbytes
from offload.tiers.events import ListRecorder, Move
from offload.tiers.machine import Machine

PROGRAM = trace()
MUST = must_write_nbytes(PROGRAM)
LONG = trace(length=1024)
ROOMY = least_budget(LONG, machine(), settings(1), BASELINE).settings.budget_nbytes // MIB


def bounded(mib: int, write_budget_nbytes: int | None) -> Prediction:
    within = dataclasses.replace(settings(mib), write_budget_nbytes=write_budget_nbytes)
    return predict(LONG, machine(), within, BASELINE)


@pytest.mark.parametrize("allowance", [0, 300 << 10, 1 << 20, 64 << 20])
def test_it_moves_the_bytes_that_a_real_run_moves_within_the_same_budget(
    tmp_path: Path, allowance: int
) -> None:
    real, virtual = both(PROGRAM, tmp_path, nvme_write_budget=MUST + allowance)
    assert virtual["activation", "written"] == real["activation", "written"] > 0
    written = sum(nbytes for (_, way), nbytes in virtual.items() if way == "written")
    assert written <= MUST + allowance  # lookups write fewer rows than they must be let
    check_moved(real, virtual, in_backward=False)


@pytest.mark.parametrize("room_nbytes", [0, 512 << 10, 1 << 20, 64 << 20])
def test_a_full_drive_takes_the_bytes_that_it_takes_of_a_real_run(
    tmp_path: Path, room_nbytes: int
) -> None:
    real, virtual = both(PROGRAM, tmp_path, drive_nbytes=room_nbytes)
    assert virtual["activation", "written"] == real["activation", "written"]
    assert (real["activation", "written"] > 0) == (room_nbytes > 0)
    check_moved(real, virtual, in_backward=False)


def test_what_a_step_must_write_is_what_attach_says(tmp_path: Path) -> None:
    import torch

    model = model_in(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    config = {"nvme_write_budget": MUST - 1}
    with pytest.raises(BudgetError, match="is too small: weights") as refusal:
        offload.attach(model, optimizer, budget="host=8GiB", nvme=tmp_path, config=config)
    assert refusal.value.needed_nbytes == MUST
    with pytest.raises(BudgetError) as predicted:
        bounded(ROOMY + 64, MUST - 1)
    assert str(predicted.value) == str(refusal.value)
    less = dataclasses.replace(settings(1), write_budget_nbytes=MUST - 1)
    with pytest.raises(BudgetError, match="is too small: weights"):
        least_budget(PROGRAM, machine(), less, BASELINE)


@given(more=st.integers(0, 40 << 20))
def test_no_step_writes_more_than_its_budget(more: int) -> None:
    recorder = ListRecorder()
    within = dataclasses.replace(settings(ROOMY + 160), write_budget_nbytes=MUST + more)
    found = predict(LONG, machine(), within, BASELINE, recorder=recorder)
    assert all(step.finished.written_nbytes <= MUST + more for step in found.steps)
    moves = [event for event in recorder.events if isinstance(event, Move)]
    assert sum(step.finished.written_nbytes for step in found.steps) == sum(
        move.nbytes for move in moves if move.dst.startswith("file")
    )


def test_what_may_not_be_written_takes_memory() -> None:
    free = bounded(ROOMY + 60, None)
    assert free.drive.activations_nbytes > 0
    none = bounded(ROOMY + 60, MUST)
    assert none.drive.activations_nbytes < free.drive.activations_nbytes
    assert none.steps[0].spilled_nbytes == 0
    assert none.steps[0].finished.peak_nbytes > free.steps[0].finished.peak_nbytes


def test_where_memory_has_no_room_for_it_the_refusal_names_both() -> None:
    bounded(ROOMY + 4, None)
    with pytest.raises(BudgetError, match="raise nvme_write_budget by") as refusal:
        bounded(ROOMY + 4, MUST)
    assert refusal.value.budget_nbytes == (ROOMY + 4) * MIB
    assert refusal.value.needed_nbytes > (ROOMY + 4) * MIB
    within = dataclasses.replace(settings(1), write_budget_nbytes=MUST)
    least = least_budget(LONG, machine(), within, BASELINE)
    assert least.settings.budget_nbytes > ROOMY * MIB
    assert least.settings.drive == DRIVE


def with_room(program: Program, nbytes: int) -> Machine:
    """A machine whose drive has room for ``nbytes`` of saved activations."""
    free_nbytes = drive_use(program, settings(1), 0).nbytes + SPARE_NBYTES + nbytes
    tiers = (
        dataclasses.replace(tier, free_nbytes=free_nbytes) if tier.name == DRIVE else tier
        for tier in machine().tiers
    )
    return dataclasses.replace(machine(), tiers=tuple(tiers))


def test_what_a_full_drive_does_not_take_stays_in_memory() -> None:
    free, least = bounded(ROOMY + 60, None), settings(ROOMY + 60)
    spilled_nbytes = free.drive.activations_nbytes
    same = predict(LONG, with_room(LONG, spilled_nbytes), least, BASELINE)
    assert (same.peak_nbytes, same.step_s) == (free.peak_nbytes, free.step_s)
    half = predict(LONG, with_room(LONG, spilled_nbytes // 2), least, BASELINE)
    assert 0 < half.drive.activations_nbytes <= spilled_nbytes // 2
    assert half.steps[0].finished.peak_nbytes > free.steps[0].finished.peak_nbytes


def test_where_memory_has_no_room_either_the_refusal_names_the_drive() -> None:
    bounded(ROOMY + 4, None)
    full = with_room(LONG, 3 * MIB)
    with pytest.raises(BudgetError, match=r"has room for 3.00 MiB of them.*free more") as found:
        predict(LONG, full, settings(ROOMY + 4), BASELINE)
    assert found.value.budget_nbytes == (ROOMY + 4) * MIB


@pytest.mark.parametrize(("length", "room_mib"), [(4096, 0), (1 << 20, 8), (1 << 30, 64)])
def test_the_least_budget_beside_a_full_drive_is_found_in_few_predictions(
    length: int, room_mib: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From 100 MiB to terabytes are missing, and each refusal names what the next unit takes."""
    program, tried = trace(length=length), []
    full = with_room(program, room_mib * MIB)
    plain = predicting._predict

    def counted(*words: Any, **options: Any) -> Prediction:
        tried.append(words)
        assert len(tried) <= 64
        return plain(*words, **options)

    monkeypatch.setattr(predicting, "_predict", counted)
    found = least_budget(program, full, settings(1), BASELINE)
    assert found.drive.activations_nbytes <= room_mib * MIB
    assert found.settings.budget_nbytes < 1.2 * found.peak_nbytes
    less = dataclasses.replace(settings(1), budget_nbytes=found.settings.budget_nbytes - MIB)
    with pytest.raises(BudgetError):
        predict(program, full, less, BASELINE)
