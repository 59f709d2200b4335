"""Models and optimizers that change after attach: what works, and what is refused unharmed."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import offload
from offload.allocator.errors import UnsupportedError
from offload.engine import Engine

MODES = pytest.mark.parametrize("way", ["behind", "step_in_backward", "step_in_forward"])


def make_model(hidden: int = 300) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, hidden), nn.GELU(), nn.Linear(hidden, 256))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 1e-3)


def attach(model: nn.Module, optimizer: Any, directory: Path, *, way: str) -> Engine:
    config = {} if way == "behind" else {way: True}
    return offload.attach(model, optimizer, budget="8GiB", nvme=directory, config=config)


def train(model: nn.Module, optimizer: Any, steps: int = 2) -> None:
    for step in range(steps):
        x = torch.randn(16, 256, generator=torch.Generator().manual_seed(step))
        F.mse_loss(model(x), x).backward()
        optimizer.step()
        optimizer.zero_grad()


def same(one: nn.Module, other: nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())


@MODES
def test_a_group_that_is_added_later(way: str, tmp_path: Path) -> None:
    """Layers that are unfrozen one after the other, say."""
    plain = make_model()
    twin = copy.deepcopy(plain)
    for model in (plain, twin):
        optimizer = torch.optim.AdamW(model[2].parameters(), 1e-3)
        if model is twin:
            engine = attach(model, optimizer, tmp_path, way=way)
        train(model, optimizer)
        model.zero_grad()
        optimizer.add_param_group({"params": model[0].parameters(), "lr": 1e-2})
        train(model, optimizer)
    assert same(plain, twin)
    engine.detach()


def _replace(model: Any, optimizer: Any) -> None:
    old = model[0].weight
    model[0].weight = nn.Parameter(old.detach().clone())
    parameters = optimizer.param_groups[0]["params"]
    parameters[[one is old for one in parameters].index(True)] = model[0].weight


def _extend(model: Any, optimizer: Any) -> None:
    model.append(nn.Linear(256, 256))
    optimizer.add_param_group({"params": model[3].parameters()})


def _point_elsewhere(model: Any, _optimizer: Any) -> None:
    model[0].weight.data = model[0].weight.data.clone()


CHANGES: dict[str, tuple[Callable[[Any, Any], None], str]] = {
    "replaced": (_replace, r"0\.weight \(300, 256\) \(307200 bytes\) is new; 0\.weight is gone"),
    "new": (_extend, r"3\.weight .*is new"),
    "elsewhere": (_point_elsewhere, r"\.data of 0\.weight was replaced \(copy into it"),
}


@pytest.mark.parametrize("change", CHANGES)
@MODES
def test_other_parameters_are_refused_before_the_step(
    change: str, way: str, tmp_path: Path
) -> None:
    model = make_model()
    optimizer = adamw(model)
    engine = attach(model, optimizer, tmp_path, way=way)
    train(model, optimizer)
    finished = copy.deepcopy(make_model().state_dict() | model.state_dict())
    make_change, message = CHANGES[change]
    make_change(model, optimizer)
    with pytest.raises(UnsupportedError, match=message):
        train(model, optimizer, 1)
    engine.detach()
    fresh = make_model()
    with attach(fresh, adamw(fresh), tmp_path, way=way) as again:
        assert again.step == 2
        assert all(torch.equal(value, finished[k]) for k, value in fresh.state_dict().items())


@MODES
def test_a_state_of_another_model(way: str, tmp_path: Path) -> None:
    foreign = make_model(hidden=200)
    its_optimizer = adamw(foreign)
    train(foreign, its_optimizer)
    model = make_model()
    optimizer = adamw(model)
    engine = attach(model, optimizer, tmp_path, way=way)
    train(model, optimizer)
    own = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(its_optimizer.state_dict())
    with pytest.raises(UnsupportedError, match=r"exp_avg of 0\.weight has the shape \(200, 256\)"):
        train(model, optimizer, 1)
    optimizer.zero_grad()
    optimizer.load_state_dict(own)  # nothing was stepped: training goes on
    train(model, optimizer)
    plain = make_model()
    plain_optimizer = adamw(plain)
    train(plain, plain_optimizer)
    train(plain, plain_optimizer)
    assert same(plain, model)
    engine.detach()


@MODES
def test_sparse_gradients_where_the_optimizer_takes_none(way: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Embedding(300, 256, sparse=True)
    optimizer = torch.optim.Adam(model.parameters())
    with attach(model, optimizer, tmp_path, way=way):
        model(torch.arange(5)).sum().backward()
        with pytest.raises(RuntimeError, match="Adam does not support sparse gradients"):
            optimizer.step()


@MODES
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none(value: float, way: str, tmp_path: Path) -> None:
    """They go where they go in memory."""
    plain = make_model()
    twin = copy.deepcopy(plain)
    for model in (plain, twin):
        optimizer = adamw(model)
        if model is twin:
            engine = attach(model, optimizer, tmp_path, way=way)
        (model(torch.ones(4, 256)) * value).sum().backward()
        optimizer.step()
    mine, theirs = (torch.cat([p.flatten() for p in one.parameters()]) for one in (plain, twin))
    assert torch.equal(mine.isnan(), theirs.isnan())
    assert torch.equal(mine.nan_to_num(), theirs.nan_to_num())
    engine.detach()
