"""Training through ``attach`` on a real GPU; the cases are those of ``tools/gpu_attach.py``."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import gpu_attach
import gpu_checks
import gpu_decoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
FEW = replace(gpu_decoder.REAL, layers=4, steps=3, budget_nbytes=400 << 20)


@pytest.mark.parametrize(
    "shape",
    [
        FEW,
        replace(FEW, dtype=torch.bfloat16),
        replace(FEW, checkpointed=True),
        replace(FEW, place_first=True),
    ],
    ids=["float32", "bfloat16", "checkpointed", "on the device before"],
)
def test_training_is_exact(shape, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = gpu_attach.training_is_exact(shape, gpu_checks.Cuda())
    assert outcome.holds, outcome.result


def test_streams_that_are_held_up_change_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shape = replace(gpu_decoder.SMALL, steps=2, budget_nbytes=160 << 20)
    outcome = gpu_attach.no_race_in(shape, gpu_checks.Cuda(), range(5))
    assert outcome.holds, outcome.result


@pytest.mark.parametrize("fused", [False, True])
def test_a_loss_scale_is_exact(fused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shape = replace(FEW, steps=16, budget_nbytes=2 * FEW.budget_nbytes)
    outcome = gpu_attach.scaled_training_is_exact(shape, gpu_checks.Cuda(), fused=fused)
    assert outcome.holds, outcome.result


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_rebuilt_rows_are_exact(alpha, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shape = replace(FEW, budget_nbytes=2 * FEW.budget_nbytes)
    outcome = gpu_attach.rebuilding_is_exact(shape, gpu_checks.Cuda(), alpha)
    assert outcome.holds, outcome.result
