"""Tiles that visit the device for the step take no more than its budget."""

from pathlib import Path

import pytest
from device_runs import assert_same
from device_steps import (
    fit,
)

from offload.allocator.errors import (
    BudgetError,
    CapacityError,
)


def test_a_step_in_backward_keeps_the_device_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offload.runtime.choose_chunk_numel", lambda _budget: 1 << 16)
    ample, _, right = fit(tmp_path / "ample", 64 << 20, in_backward=True)
    with pytest.raises(BudgetError, match="the largest layer") as refusal:
        fit(tmp_path / "none", 1 << 20, in_backward=True)
    least = (-(-refusal.value.needed_nbytes // (1 << 20)) << 20) + (1 << 20)
    tight, accelerator, losses = fit(tmp_path / "tight", least, in_backward=True)
    assert accelerator.peak_nbytes() <= least
    assert losses == right
    assert_same(tight.state_dict(), ample.state_dict())


def test_the_device_budget_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload.runtime.choose_chunk_numel", lambda _budget: 1 << 16)
    ample, accelerator, right = fit(tmp_path, 64 << 20)
    with pytest.raises(BudgetError, match="a tile of the optimizer's step, which") as refusal:
        fit(tmp_path, 1 << 20)
    least = -(-refusal.value.needed_nbytes // (1 << 20)) << 20
    assert f"device={least >> 20}MiB" in str(refusal.value)
    tight, accelerator, losses = fit(tmp_path, least)
    assert accelerator.peak_nbytes() <= least
    assert losses == right
    assert_same(tight.state_dict(), ample.state_dict())


def test_a_device_that_the_user_fills_gets_fewer_tiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offload.runtime.choose_chunk_numel", lambda _budget: 1 << 16)
    _, _, right = fit(tmp_path / "ample", 64 << 20)
    _, accelerator, losses = fit(tmp_path / "filled", 8 << 20, held=5 << 20)
    assert losses == right
    assert accelerator.peak_nbytes() <= 8 << 20
    with pytest.raises(CapacityError, match="may hold"):
        fit(tmp_path / "full", 16 << 20, held=15 << 20)
