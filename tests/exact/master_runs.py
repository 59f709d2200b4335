"""Training with float32 masters of bfloat16 weights: in memory, plainly, and under Offload."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from state_runs import train as train_with
from test_exact_optimizers import make_model
from torch import nn
from torch.nn import functional as F

from offload.engine import Engine
from offload.swap.masters import MASTER_LOW

MASTERS = {"master_weights": "fp32"}
IN_BACKWARD = {**MASTERS, "step_in_backward": True}
BOTH = pytest.mark.parametrize("config", [MASTERS, IN_BACKWARD], ids=["behind", "in backward"])
STEPS = 8


def half_model() -> Any:
    """Bfloat16, but for one weight and a bias."""
    model = make_model().bfloat16()
    model[2].bias = nn.Parameter(torch.linspace(0, 1, 300))
    model.register_parameter("wide", nn.Parameter(torch.linspace(-1, 1, 4000)))
    return model


def truncated(values: torch.Tensor) -> torch.Tensor:
    """The bfloat16 numbers of which ``values`` are the continuation."""
    return (values.view(torch.int32) & -65536).view(torch.float32).bfloat16()


class InMemory:
    """What Offload is held against: an optimizer over float32 copies of all weights."""

    def __init__(self, model: Any, make_optimizer: Callable[[Any], Any]) -> None:
        self.pairs = [
            (one, nn.Parameter(one.detach().float()) if one.dtype == torch.bfloat16 else one)
            for one in model.parameters()
        ]
        self.optimizer = make_optimizer([master for _, master in self.pairs])

    def step(self) -> None:
        for parameter, master in self.pairs:
            if master is not parameter:
                master.grad = None if parameter.grad is None else parameter.grad.float()
        self.optimizer.step()
        with torch.no_grad():
            for parameter, master in self.pairs:
                if master is not parameter:
                    parameter.copy_(truncated(master))

    def zero_grad(self) -> None:
        for parameter, _ in self.pairs:
            parameter.grad = None


def loss_of(model: Any, step: int) -> torch.Tensor:
    x = torch.randn(32, 300, generator=torch.Generator().manual_seed(step)).bfloat16()
    hidden = F.linear(model[1](model[0](x)), model[2].weight).float() + model[2].bias
    return F.mse_loss(hidden * model.scale, x.float()) + model.wide.square().mean()


train = partial(train_with, loss_of)


def master(parameter: Any, optimizer: Any) -> torch.Tensor:
    """Both halves put together, plainly."""
    high = parameter.detach().view(torch.int16).int() << 16
    low = optimizer.state.get(parameter, {}).get(MASTER_LOW)
    return (high if low is None else high | (low.int() & 0xFFFF)).view(torch.float32)


def assert_same(plain: InMemory, model: Any, optimizer: Any) -> None:
    """Weights, masters and states have the same bits, and states the same order."""
    for (one, whole), twin in zip(plain.pairs, model.parameters(), strict=True):
        assert torch.equal(one, twin)
        kept, shown = plain.optimizer.state.get(whole, {}), dict(optimizer.state.get(twin, {}))
        if one.dtype == torch.bfloat16:
            assert torch.equal(whole, master(twin, optimizer))
            assert shown.pop(MASTER_LOW, torch.empty(0, dtype=torch.int16)).dtype == torch.int16
        assert list(kept) == list(shown)
        for name, value in kept.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, shown[name].to(value.dtype)), name
            else:
                assert value == shown[name]


def run_both(
    starve: Any,
    make_optimizer: Callable[[Any], Any],
    config: dict[str, Any],
    *,
    between: Callable[[Any], None] = lambda _model: None,
    steps: int = STEPS,
) -> tuple[Engine, Any, Any]:
    torch.manual_seed(0)
    twin: Any = half_model()
    model = copy.deepcopy(twin)
    plain = InMemory(twin, make_optimizer)
    expected = train(twin, plain, range(steps))
    optimizer = make_optimizer(list(model.parameters()))
    engine = starve(model, optimizer, config=config)
    assert train(model, optimizer, range(steps), lambda _step: between(model)) == expected
    assert_same(plain, model, optimizer)
    lows = [state[MASTER_LOW] for state in optimizer.state.values() if MASTER_LOW in state]
    assert len(lows) >= 4
    assert all(low.any() for low in lows if low.numel() > 1)
    return engine, model, optimizer


def overwrite(model: Any) -> None:
    """Some elements get other values, some the same again."""
    with torch.no_grad():
        for parameter in (model[0].weight, model[0].bias):
            written = parameter.clone()
            written.view(-1)[:100] += 1
            written.view(-1)[200:] *= 1
            parameter.copy_(written)
