"""Models that compute on a device give the bits they give in memory, whatever they look like."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from device_runs import moved_roles, train_both
from exact_models import (
    TRANSFORMERS,
    VOCABULARY,
    Net,
    accumulating_loop,
    adamw,
    crossed_loop,
    labelled_loop,
    loss_of,
    tokens_of,
)
from torch import nn
from torch.nn import functional as F

from offload.engine import Engine
from offload.tiers.cpudevice import CpuAccelerator

STEPS = 6
plain_loop = partial(accumulating_loop, steps=STEPS, most_passes=3)


class Strays(nn.Module):
    """Reads other modules' weights, lists of parameters, and a module that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, 128, max_norm=3.0)
        self.scales = nn.ParameterList([torch.ones(128), torch.full((128, 128), 0.01)])
        self.attention = nn.MultiheadAttention(128, 4, batch_first=True)
        self.memory = nn.GRU(128, 128, batch_first=True)
        self.nothing = nn.Parameter(torch.empty(0, 128))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens) * self.scales[0]
        x = x + self.attention(x, x, x, need_weights=False)[0] @ self.scales[1]
        x = x + self.memory(x)[0]
        x = torch.cat([x, self.nothing.expand(x.shape[0], 0, 128)], 1)
        return F.linear(x, self.table.weight)


class Scaled(torch.autograd.Function):
    """A custom Function over a parameter, as kernels of other libraries are."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return gradient @ weight.t(), x.flatten(0, -2).t() @ gradient.flatten(0, -2)


class LowRank(nn.Module):
    """LoRA: a frozen base and two small trained matrices, the larger one by a custom Function."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 256).requires_grad_(False)
        self.base = nn.Linear(256, 256).requires_grad_(False)
        self.down = nn.Parameter(torch.randn(256, 128) / 16)
        self.up = nn.Parameter(torch.zeros(128, 256))
        self.head = nn.Linear(256, VOCABULARY).requires_grad_(False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        return self.head(self.base(x) + Scaled.apply(x @ self.down, self.up))


@pytest.fixture
def same(tmp_path: Path) -> Callable[..., tuple[Engine, CpuAccelerator]]:
    """Trains in memory and on a device of its own; nothing may differ."""

    def run(
        make_model: Callable[[], nn.Module],
        make_optimizer: Callable[[nn.Module], Any] = adamw,
        loop: Any = plain_loop,
        **options: Any,
    ) -> tuple[Engine, CpuAccelerator]:
        accelerator = CpuAccelerator()
        engine = train_both(
            make_model, make_optimizer, loop, accelerator, tmp_path / "nvme", **options
        )
        return engine, accelerator

    return run


@pytest.mark.parametrize("recompute", [None, False, True], ids=["keep", "checkpoint", "reentrant"])
def test_a_network_with_everything(recompute: bool | None, same: Any) -> None:
    engine, accelerator = same(lambda: Net(recompute))
    assert moved_roles(engine, accelerator) == {"weight", "gradient", "activation"}


def test_weights_that_no_module_of_their_own_uses(same: Any) -> None:
    same(Strays)


def test_frozen_weights_with_small_trained_ones(same: Any) -> None:
    same(LowRank)


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, 1e-3, amsgrad=True),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, 1e-2),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, 1e-2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name: str, same: Any) -> None:
    def make(model: nn.Module) -> Any:
        return OPTIMIZERS[name]([p for p in model.parameters() if p.requires_grad])

    same(Net, make)


def test_two_forwards_one_backward_and_the_same_graph_twice(same: Any) -> None:
    same(Net, loop=partial(crossed_loop, steps=STEPS, set_to_none=False))


def test_double_backward(same: Any) -> None:
    def make_model() -> nn.Module:
        return nn.Sequential(nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, 200))

    def loop(model: Any, optimizer: Any, _engine: Engine | None) -> list[float]:
        values = []
        for _ in range(STEPS):
            loss = model(torch.randn(64, 200)).square().mean()
            slopes = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
            (loss + sum(slope.square().sum() for slope in slopes)).backward()
            optimizer.step()
            optimizer.zero_grad()
            values.append(loss.item())
        return values

    same(make_model, lambda model: torch.optim.AdamW(model.parameters(), 1e-3), loop)


def test_gradients_that_are_asked_for(same: Any) -> None:
    def loop(model: Any, optimizer: Any, _engine: Engine | None) -> list[float]:
        values = []
        trained = [p for p in model.parameters() if p.requires_grad and p.shape != (200, 200)]
        trained = [p for p in trained if p.shape != (200,)]
        for _ in range(STEPS):
            found = torch.autograd.grad(loss_of(model, tokens_of(2, 32)), trained)
            values += [gradient.norm().item() for gradient in found]
            assert all(p.grad is None for p in trained)
            loss_of(model, tokens_of(2, 32)).backward(inputs=trained[:1])
            assert trained[1].grad is None
            values.append(trained[0].grad.norm().item())
            optimizer.step()
            optimizer.zero_grad()
        return values

    same(Net, loop=loop)


def test_hooks_on_parameters(same: Any) -> None:
    def loop(model: Any, optimizer: Any, _engine: Engine | None) -> list[float]:
        values: list[float] = []
        weight, other = model.embedding.weight, model.blocks[0][1].weight
        weight.register_hook(lambda gradient: gradient * 2)
        other.register_post_accumulate_grad_hook(lambda p: values.append(p.grad.norm().item()))
        return values + plain_loop(model, optimizer, None)

    same(Net, loop=loop)


def test_a_penalty_on_the_parameters_themselves(same: Any) -> None:
    def loop(model: Any, optimizer: Any, _engine: Engine | None) -> list[float]:
        values = []
        for _ in range(STEPS):
            loss = loss_of(model, tokens_of(4, 32))
            penalty = sum(1e-3 * parameter.square().sum() for parameter in model.parameters())
            torch.autograd.backward([loss, penalty])  # the one on the device, the other is not
            optimizer.step()
            optimizer.zero_grad()
            values.append(loss.item())
        return values

    same(Net, loop=loop)


def test_what_the_users_code_writes_is_computed_with(same: Any) -> None:
    def loop(model: Any, optimizer: Any, _engine: Engine | None) -> list[float]:
        values = []
        for step in range(STEPS):
            with torch.no_grad():
                model.head.weight.data.clamp_(-0.1, 0.1)  # past the version counter
                model.blocks[1][1].weight.numpy()[0] = step
                model.blocks[0][3].bias.add_(0.1)
            loss = loss_of(model, tokens_of(4, 32))
            loss.backward()
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.data.mul_(0.5)
            values += [p.grad.norm().item() for p in model.parameters() if p.grad is not None]
            optimizer.step()
            optimizer.zero_grad()
            values += [loss.item(), *(p.norm().item() for p in model.parameters())]
        return values

    same(Net, loop=loop)


def test_weights_in_host_memory_and_states_beside_them(same: Any) -> None:
    def loop(model: Any, optimizer: Any, engine: Engine | None) -> list[float]:
        values = plain_loop(model, optimizer, engine)
        if engine is not None:
            engine.weights.keep(engine.weights.weights)
            memory = engine._optimizing.streamed.memory
            memory.keep(memory.nbytes())
        return values + plain_loop(model, optimizer, engine)

    engine, _ = same(Net, loop=loop)
    assert all(weight.resident for weight in engine.weights.weights.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.complex64])
def test_other_types(dtype: torch.dtype, same: Any) -> None:
    def loop(model: Any, optimizer: Any, _engine: Engine | None) -> list[float]:
        values = []
        for step in range(STEPS):
            for _ in range(1 + step % 2):
                loss = model(torch.randn(64, 256, dtype=dtype)).abs().float().mean()
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            values.append(loss.item())
        return values

    same(
        lambda: nn.Linear(256, 256, dtype=dtype),
        lambda model: torch.optim.Adam(model.parameters(), 1e-3),
        loop,
    )


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "checkpoint"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_transformers(name: str, recompute: bool, same: Any) -> None:
    def make() -> Any:
        model = TRANSFORMERS[name]()
        if recompute:
            old = type(model).gradient_checkpointing_enable
            getattr(type(model), "activation_checkpointing_enable", old)(model)
        return model

    same(make, adamw, partial(labelled_loop, steps=STEPS))
