"""A write budget in a simulated run: what it refuses, and what it leaves in memory."""

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
from offload.swap.planning import predict as predicting
from offload.swap.planning.predict import Prediction, drive_use, least_budget, predict
from offload.swap.planning.sim_writes import must_write_nbytes
from offload.tiers.events import ListRecorder, Move

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


@pytest.mark.parametrize(("length", "free_mib"), [(4096, 8), (1 << 20, 8), (1 << 30, 64)])
def test_a_drive_without_room_for_what_is_saved_is_found_out_in_few_predictions(
    length: int, free_mib: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a drive names no memory that would do: from 100 MiB to petabytes are missing."""
    program, tried = trace(length=length), []
    taken_nbytes = drive_use(program, settings(1), 0).nbytes
    full = dataclasses.replace(
        machine(),
        tiers=tuple(
            dataclasses.replace(tier, free_nbytes=taken_nbytes + free_mib * MIB)
            if tier.name == DRIVE
            else tier
            for tier in machine().tiers
        ),
    )
    plain = predicting._predict

    def counted(*words: Any, **options: Any) -> Prediction:
        tried.append(words)
        assert len(tried) <= 64
        return plain(*words, **options)

    monkeypatch.setattr(predicting, "_predict", counted)
    found = least_budget(program, full, settings(1), BASELINE)
    assert found.drive.nbytes <= taken_nbytes + free_mib * MIB
    less = dataclasses.replace(settings(1), budget_nbytes=found.settings.budget_nbytes - MIB)
    with pytest.raises(BudgetError):
        predict(program, full, less, BASELINE)
