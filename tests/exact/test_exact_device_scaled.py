"""Autocast and loss scales of models that compute on a device: the bits of the plain loop."""

import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from device_runs import train_both
from exact_models import Net, loss_of, tokens_of
from scales import Cuda, OnDevice, give_scale
from torch import nn
from torch.nn.utils import clip_grad_norm_

from offload.engine import Engine
from offload.swap.torch_seams import scale_on_host
from offload.tiers.accelerator import Accelerator
from offload.tiers.cpudevice import CpuAccelerator
from offload.tiers.simulated.accelerator import SimulatedAccelerator

STEPS = 5
DTYPES = [torch.bfloat16, torch.float16]


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], 1e-3)


def fused(model: nn.Module) -> torch.optim.Optimizer:
    trained = [one for one in model.parameters() if one.requires_grad]
    return torch.optim.AdamW(trained, 1e-3, fused=True)


def digests(model: nn.Module) -> list[float]:
    """Of every gradient's bits, as the user's code sees them."""
    return [
        float(zlib.crc32(one.grad.contiguous().view(torch.uint8).numpy().tobytes()))
        for one in model.parameters()
        if one.grad is not None
    ]


@pytest.fixture
def same(tmp_path: Path) -> Callable[..., Engine]:
    """Trains in memory and on a device of its own; nothing may differ."""

    def run(
        make_model: Callable[[], nn.Module],
        make_optimizer: Callable[[nn.Module], Any],
        loop: Any,
        accelerator: Accelerator | None = None,
    ) -> Engine:
        accelerator = accelerator or CpuAccelerator()
        return train_both(make_model, make_optimizer, loop, accelerator, tmp_path / "nvme")

    return run


@pytest.mark.parametrize("recompute", [None, False, True], ids=["keep", "checkpoint", "reentrant"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_autocast(dtype: torch.dtype, recompute: bool | None, same: Any) -> None:
    def loop(model: Any, optimizer: Any, _engine: Engine | None) -> list[float]:
        values = []
        for step in range(STEPS):
            for _ in range(1 + step % 2):
                with torch.autocast("cpu", dtype):
                    loss = loss_of(model, tokens_of(4, 32))
                loss.backward()
                values.append(loss.item())
            model.eval()
            with torch.autocast("cpu", dtype), torch.no_grad():
                values.append(loss_of(model, tokens_of(2, 32)).item())
            model.train()
            values.append(clip_grad_norm_(model.parameters(), 0.5).item())
            optimizer.step()
            optimizer.zero_grad()
        return values

    same(lambda: Net(recompute), adamw, loop)


class Twice(nn.Module):
    """Casts a weight for each of its two uses, if torch does not remember the first."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(512, 128)
        self.middle = nn.Linear(128, 128)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        x = x + torch.tanh(self.middle(torch.tanh(self.middle(x))))
        return nn.functional.linear(x, self.table.weight)


def test_a_weight_that_is_used_twice_is_cast_twice(same: Any) -> None:
    """As by torch without its cache of casts, whose gradients are summed up before they widen."""

    def loop(model: Any, optimizer: Any, _engine: Engine | None) -> list[float]:
        values = []
        for _ in range(STEPS):
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                loss = loss_of(model, tokens_of(4, 32)) + loss_of(model, tokens_of(2, 32))
            loss.backward()
            values += [loss.item(), *digests(model)]
            optimizer.step()
            optimizer.zero_grad()
        return values

    same(Twice, adamw, loop)


def scaled_loop(
    make_scaler: Callable[[], torch.amp.GradScaler], *, clips: bool, skips: int = 3
) -> Callable[..., list[float]]:
    """As scripts train in float16; one step finds an infinity, and the scale grows."""

    def loop(model: Any, optimizer: Any, _engine: Engine | None) -> list[float]:
        scaler = make_scaler()
        values, scales = [], []
        for step in range(STEPS):
            for _ in range(1 + step % 2):
                with torch.autocast("cpu", torch.float16):
                    loss = loss_of(model, tokens_of(4, 32)) * (math.inf if step == skips else 1)
                scaler.scale(loss).backward()
            if clips:
                scaler.unscale_(optimizer)
                values.append(clip_grad_norm_(model.parameters(), 0.1).nan_to_num().item())
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
            values += digests(model)
            optimizer.zero_grad()
        assert scales[1:4] == [2.0**11, 2.0**11, 2.0**10]  # grown, kept, and halved by an infinity
        return [*values, *scales]

    return loop


@pytest.mark.parametrize("make", [adamw, fused])
@pytest.mark.parametrize("clips", [True, False])
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_loss_scale(
    kind: str, clips: bool, make: Any, same: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever device it is said to be of, its scale is where the loss is."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)

    def make_scaler() -> torch.amp.GradScaler:
        return torch.amp.GradScaler(kind, init_scale=2.0**10, growth_interval=2)

    same(Net, make, scaled_loop(make_scaler, clips=clips))


@pytest.mark.parametrize("seed", range(3))
def test_a_loss_scale_in_any_order_of_the_device(seed: int, same: Any) -> None:
    def make_scaler() -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)

    loop = scaled_loop(make_scaler, clips=bool(seed % 2))
    same(Net, fused if seed else adamw, loop, SimulatedAccelerator(seed))


@pytest.mark.parametrize("make", [adamw, fused])
@pytest.mark.parametrize("clips", [True, False])
def test_copies_of_a_scale_on_a_device_are_waited_for(clips: bool, make: Any, same: Any) -> None:
    """torch does not wait for them, and gradients are in host memory."""

    def loop(model: Any, optimizer: Any, engine: Engine | None) -> list[float]:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        if engine is None:
            scaler.scale(torch.ones(()))
        else:
            give_scale(scaler)
        values = []
        for step in range(STEPS):
            loss = loss_of(model, tokens_of(4, 32)) * (math.inf if step == 3 else 1)
            (loss * scaler.get_scale()).backward()
            with Cuda():
                if clips:
                    scaler.unscale_(optimizer)
                    values.append(clip_grad_norm_(model.parameters(), 0.1).nan_to_num().item())
                scaler.step(optimizer)
                scaler.update()
            values += [*digests(model), scaler.get_scale()]
            optimizer.zero_grad()
        return values

    same(Net, make, loop)


def test_without_an_engine_torch_does_not_wait() -> None:
    """What the test before relies on; if this fails, torch waits, and so need nobody else."""
    weight = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([weight], 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    give_scale(scaler)
    weight.grad = torch.full((4,), 8.0)
    with Cuda():
        scaler.unscale_(optimizer)
    assert weight.grad.isnan().all()


def test_what_a_fused_step_is_told_comes_to_the_host() -> None:
    optimizer: Any = torch.optim.SGD([nn.Parameter(torch.ones(4))], 0.1, fused=True)
    optimizer.grad_scale = OnDevice(torch.full((), 4.0))
    optimizer.found_inf = None
    scale_on_host(optimizer)
    assert optimizer.grad_scale.is_cpu
    assert optimizer.grad_scale.item() == 4.0
    assert optimizer.found_inf is None
