"""Training whose optimizer's step is on the device, in tiles: in memory, and under Offload."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from device_runs import computing_on
from exact_models import Net, accumulating_loop, loss_of, tokens_of
from torch import nn
from torch.nn import functional as F

import offload
from offload.engine import Engine
from offload.tiers.cpudevice import CpuAccelerator

STEPS = 4


CHUNK = 4096  # elements of a tile: most weights of the model have several


FACTOR = 1 + 2.0**-10


IN_BACKWARD: dict[str, Any] = {"step_in_backward": True}


loop = partial(accumulating_loop, steps=STEPS, most_passes=3)


def unclipped(
    model: Any, optimizer: Any, _engine: Engine | None, *, passes: int = 1, steps: int = STEPS
) -> list[float]:
    values = []
    for _ in range(steps):
        for _ in range(passes):
            loss = loss_of(model, tokens_of(4, 32))
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(loss.item())
    return values


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def weights_and_states(loop: Any, engine: Engine | None, model: Any, optimizer: Any) -> list[float]:
    """The loop with weights and states streaming, then with all that can be in memory."""
    values: list[float] = loop(model, optimizer, engine)
    if engine is not None:
        engine.weights.keep(engine.weights.weights)
        memory = engine._optimizing.streamed.memory
        memory.keep(memory.nbytes())
    return [*values, *loop(model, optimizer, engine)]


class Elsewhere:
    """An optimizer in memory whose every step is that of the other kernels."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)

    def step(self) -> None:
        self.optimizer.step()
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data.mul_(FACTOR)


def attach(model: nn.Module, optimizer: Any, nvme: Path, **options: Any) -> Engine:
    options.setdefault("accelerator", CpuAccelerator())
    options.setdefault("config", {"optimizer_device": "device"})
    return offload.attach(model, optimizer, budget="8GiB", nvme=nvme, **options)


def train(
    nvme: Path, who: str | float, *, steps: int = STEPS, keeps: int = 0, **options: Any
) -> tuple[list[float], dict[str, torch.Tensor], Engine]:
    """Losses and weights; from step ``keeps`` on, all that can be is in memory."""
    torch.manual_seed(0)
    model, accelerator = Net(), CpuAccelerator()
    optimizer = torch.optim.AdamW(trained(model), 1e-3)
    engine = offload.attach(
        model,
        optimizer,
        budget="host=8GiB,device=1GiB",
        nvme=nvme,
        accelerator=accelerator,
        config={"optimizer_device": who},
        **options,
    )
    engine.keep_streaming()
    losses = []
    with engine, computing_on(accelerator, engine):
        while engine.step < steps:
            if engine.step == keeps:
                engine.weights.keep(engine.weights.weights)
                engine._optimizing.streamed.memory.keep(engine._optimizing.streamed.memory.nbytes())
            torch.manual_seed(engine.step)
            tokens = tokens_of(4, 32)
            loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(1).flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses, copy.deepcopy(model.state_dict()), engine


class Wide(nn.Module):
    """Layers of 64 KiB, so that a tile of the step is larger than a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(128, 128) for _ in range(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def fit(
    tmp_path: Path, budget: int, held: int = 0, *, in_backward: bool = False
) -> tuple[nn.Module, CpuAccelerator, list[float]]:
    torch.manual_seed(0)
    model, accelerator = Wide(), CpuAccelerator()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    engine = offload.attach(
        model,
        optimizer,
        budget=f"host=8GiB,device={budget}",
        nvme=tmp_path / str(budget),
        accelerator=accelerator,
        config={"optimizer_device": "device", "step_in_backward": in_backward},
    )
    losses = []
    with engine, computing_on(accelerator, engine):
        mine = accelerator.allocate(held) if held else None
        for _ in range(3):
            loss = model(torch.ones(4, 128)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        del mine
    return model, accelerator, losses
