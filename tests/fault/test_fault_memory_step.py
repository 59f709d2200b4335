"""Disks that fail under states in memory: nothing is lost, the last commit stays, a retry works."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import offload
from offload.allocator.errors import StepInterruptedError, TierIOError
from offload.swap import memory_step

if TYPE_CHECKING:
    from offload.engine import Engine


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 300), nn.GELU(), nn.Linear(300, 256))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 1e-3)


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        x = torch.randn(16, 256, generator=torch.Generator().manual_seed(step))
        F.mse_loss(model(x), x).backward()
        optimizer.step()
        optimizer.zero_grad()


def values(model: nn.Module, optimizer: Any) -> list[torch.Tensor]:
    states = [state[name] for state in optimizer.state.values() for name in sorted(state)]
    return [value.detach().clone() for value in (*model.parameters(), *states)]


def same(ones: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


def in_memory(steps: int) -> list[torch.Tensor]:
    model = make_model()
    optimizer = adamw(model)
    train(model, optimizer, range(steps))
    return values(model, optimizer)


class Broken:
    """Lets some calls pass, then fails."""

    def __init__(self, call: Callable[..., Any], passing: int) -> None:
        self.call, self.passing = call, passing

    def __call__(self, *args: Any) -> Any:
        self.passing -= 1
        if self.passing < 0:
            raise TierIOError(errno.EIO, "the disk is gone")
        return self.call(*args)


@pytest.mark.parametrize("passing", [0, 1, 5])
def test_a_commit_that_fails(passing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    optimizer = adamw(model)
    engine: Engine = offload.attach(model, optimizer, budget="8GiB", nvme=tmp_path, commit="manual")
    train(model, optimizer, range(2))
    engine.commit()
    committed = values(model, optimizer)
    train(model, optimizer, range(2, 4))
    file = engine.weights.store.tier.file
    with monkeypatch.context() as broken:
        broken.setattr(file, "write", Broken(file.write, passing))
        with pytest.raises(TierIOError, match="the disk is gone"):
            engine.commit()
    assert same(values(model, optimizer), in_memory(4))
    if passing == 1:  # the disk is back
        engine.commit()
        committed = values(model, optimizer)
        train(model, optimizer, range(4, 6))
        assert same(values(model, optimizer), in_memory(6))
    engine.detach()
    fresh = make_model()
    fresh_optimizer = adamw(fresh)
    with offload.attach(fresh, fresh_optimizer, budget="8GiB", nvme=tmp_path) as again:
        assert again.resumed
        assert same(values(fresh, fresh_optimizer), committed)


def test_states_that_can_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    optimizer = adamw(model)
    engine = offload.attach(model, optimizer, budget="8GiB", nvme=tmp_path, commit="manual")
    train(model, optimizer, range(1))
    x = torch.randn(16, 256, generator=torch.Generator().manual_seed(1))
    F.mse_loss(model(x), x).backward()
    before = values(model, optimizer)
    file = engine.weights.store.tier.file
    with monkeypatch.context() as broken:
        broken.setattr(file, "read", Broken(file.read, 2))
        with pytest.raises(TierIOError, match="the disk is gone"):
            optimizer.step()
    assert same(values(model, optimizer), before)  # nothing was stepped
    optimizer.step()
    assert same(values(model, optimizer), in_memory(2))
    engine.detach()


def test_a_step_that_is_interrupted_half_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody commits a half of a step."""
    monkeypatch.setattr("offload.runtime.choose_chunk_numel", lambda _budget: 64 * 160)
    model = make_model()
    optimizer = adamw(model)
    engine = offload.attach(model, optimizer, budget="8GiB", nvme=tmp_path, commit="manual")
    train(model, optimizer, range(3))
    engine.commit()
    with monkeypatch.context() as broken:
        interrupted = Broken(memory_step.step_on, 3)
        broken.setattr(memory_step, "step_on", interrupted)
        with pytest.raises(TierIOError):
            train(model, optimizer, range(3, 4))
    for use in (engine.commit, optimizer.step):
        with pytest.raises(StepInterruptedError, match="continues from the last commit"):
            use()
    engine.detach()
    fresh = make_model()
    fresh_optimizer = adamw(fresh)
    with offload.attach(fresh, fresh_optimizer, budget="8GiB", nvme=tmp_path):
        assert same(values(fresh, fresh_optimizer), in_memory(3))
