"""Models of every shape, streamed, give the bits they give in memory."""

from functools import partial
from typing import Any

import pytest
import torch
from exact_models import (
    TRANSFORMERS,
    VOCABULARY,
    Net,
    accumulating_loop,
    adamw,
    crossed_loop,
    labelled_loop,
    tokens_of,
)
from torch import nn

from offload.engine import Engine

STEPS = 20
plain_loop = partial(accumulating_loop, steps=STEPS)


@pytest.mark.parametrize("recompute", [None, False, True], ids=["keep", "checkpoint", "reentrant"])
def test_a_network_with_everything(recompute: bool | None, compare: Any) -> None:
    same = compare(lambda: Net(recompute), adamw, plain_loop)
    assert same.moved_roles() >= {"weight", "gradient", "state", "activation"}


def test_residency_that_grows_changes_no_bit(compare: Any) -> None:
    def growing(model: Any, optimizer: Any, engine: Engine | None) -> list[float]:
        if engine is not None:
            engine.weights.keep([name for name in engine.weights.weights if "0" in name])
        return plain_loop(model, optimizer, engine)

    same = compare(Net, adamw, growing)
    assert any(weight.in_memory for weight in same.engine.weights.weights.values())


def test_several_backwards_and_forwards(compare: Any) -> None:
    compare(Net, adamw, partial(crossed_loop, steps=STEPS))


def test_double_backward(compare: Any) -> None:
    def make_model() -> nn.Module:
        return nn.Sequential(nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, 200))

    def loop(model: Any, optimizer: Any, _engine: Engine | None) -> list[float]:
        values = []
        for _ in range(STEPS):
            x = torch.randn(128, 200, requires_grad=True)
            (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
            penalty = (slope.norm() - 1) ** 2
            penalty.backward()
            optimizer.step()
            optimizer.zero_grad()
            values.append(penalty.item())
        return values

    compare(make_model, lambda model: torch.optim.AdamW(model.parameters(), 1e-3), loop)


def test_saved_tensor_changed_in_place_raises_as_plain_autograd_does(starve: Any) -> None:
    model = nn.Sequential(nn.Linear(256, 256), nn.Sigmoid())
    starve(model, torch.optim.SGD(model.parameters(), 0.1))
    output = model(torch.randn(256, 256))
    with torch.no_grad():
        output.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.complex64])
def test_other_types(dtype: torch.dtype, compare: Any) -> None:
    def loop(model: Any, optimizer: Any, _engine: Engine | None) -> list[float]:
        values = []
        for _ in range(STEPS):
            output = model(torch.randn(64, 256, dtype=dtype))
            loss = output.abs().float().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            values.append(loss.item())
        return values

    same = compare(
        lambda: nn.Linear(256, 256, dtype=dtype),
        lambda model: torch.optim.Adam(model.parameters(), 1e-3),
        loop,
    )
    assert same.moved_roles() >= {"weight", "gradient", "state"}


def test_sparse_gradients(compare: Any) -> None:
    def loop(model: Any, optimizer: Any, _engine: Engine | None) -> list[float]:
        values = []
        for _ in range(STEPS):
            loss = model(tokens_of(8)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            values.append(loss.item())
        return values

    compare(
        lambda: nn.Embedding(VOCABULARY, 128, sparse=True),
        lambda model: torch.optim.SparseAdam(list(model.parameters()), 1e-2),
        loop,
    )


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name: str, compare: Any) -> None:
    same = compare(TRANSFORMERS[name], adamw, partial(labelled_loop, steps=STEPS))
    assert same.moved_roles() >= {"weight", "gradient", "state", "activation"}
