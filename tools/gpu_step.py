"""The optimizer's step on a device, against plain training whose model and optimizer are there."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import torch

from gpu_attached import (
    attached,
    differences,
    forget,
    moves_there,
    no_race,
    open_device,
    place_of,
)
from gpu_decoder import MIB, REAL, SMALL, Shape, batches, make_model
from gpu_report import Outcome, Report
from gpu_training import UnderTest
from offload.tiers.accelerator import Accelerator

_LIMIT_S = 20.0  # of all seeds
MakeOptimizer: TypeAlias = Callable[[Sequence[torch.Tensor]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, MakeOptimizer] = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, 1e-3),
    "AdamW, fused": lambda parameters: torch.optim.AdamW(parameters, 1e-3, fused=True),
    "SGD, momentum": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """Losses, weights and states; what Offload said; tiles that the device stepped."""

    results: list[torch.Tensor]
    notices: list[str]
    tiles: int


def train_plainly(shape: Shape, device: torch.device, make: MakeOptimizer) -> list[torch.Tensor]:
    """Losses, weights and states of an ordinary loop on ``device``."""
    model = make_model(shape).to(device)
    optimizer, losses = make(list(model.parameters())), []
    data = iter(batches(shape, 2 * shape.steps))
    for _ in range(shape.steps):
        for _ in range(2):
            loss = model(next(data).to(device))
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach().cpu())
    return [*losses, *_weights_and_states(model, optimizer)]


def _weights_and_states(model: Any, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    found = [parameter.detach() for parameter in model.parameters()]
    for parameter in model.parameters():
        state = optimizer.state[parameter]
        found += [value for value in state.values() if isinstance(value, torch.Tensor)]
    return [value.to("cpu", copy=True) for value in found]


def train_attached(
    shape: Shape,
    accelerator: Accelerator,
    make: MakeOptimizer,
    *,
    who: str | float = "device",
    streams: bool = False,
) -> _Run:
    """The same loop through ``offload.attach``; ``streams``: nothing is kept in host memory."""
    model = make_model(shape)
    optimizer, losses = make(list(model.parameters())), []
    config = {"optimizer_device": who}
    with attached(model, optimizer, shape, accelerator, config) as engine:
        if streams:
            engine.keep_streaming()
        data: Any = iter(batches(shape, 2 * shape.steps))
        for _ in range(shape.steps):
            for _ in range(2):
                loss = model(next(data))
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(torch.tensor(loss.item()))
        del loss
        found = _weights_and_states(model, optimizer)
    return _Run(
        results=[*losses, *found],
        notices=engine.notices,
        tiles=moves_there(engine, "state", accelerator),
    )


def run_checks(report: Report, device: UnderTest, *, quick: bool) -> None:
    """Every check of this kind; nothing where ``offload.attach`` can't be imported."""
    try:
        import offload.attaching  # noqa: F401
    except ImportError:
        return  # ``gpu_attach`` has told it
    on_cuda = device.name != "simulated"
    small = replace(SMALL, steps=2, budget_nbytes=64 * MIB)
    shape = replace(REAL, layers=6, steps=4) if on_cuda else small
    for name, make in OPTIMIZERS.items():
        report.run("step", name, partial(step_is_exact, shape, device, make, streams=False))
    adamw = OPTIMIZERS["AdamW"]
    report.run("step", "streaming", partial(step_is_exact, shape, device, adamw, streams=True))
    half = replace(shape, dtype=torch.bfloat16)
    report.run("step", "bfloat16", partial(step_is_exact, half, device, adamw, streams=False))
    held_up = replace(SMALL, width=256, inner=512, steps=2, budget_nbytes=160 * MIB)
    seeds = range(2 if quick else 20)
    report.run("step", "streams held up", partial(no_race_in, held_up, device, seeds))
    report.run("step", "rates", partial(rates_are_told, shape, device))


def step_is_exact(
    shape: Shape, device: UnderTest, make: MakeOptimizer, *, streams: bool
) -> Outcome:
    """The bits of plain training on the device, losses, weights and states."""
    forget()
    right = train_plainly(shape, place_of(device), make)
    forget()
    began_s = time.perf_counter()
    got = train_attached(shape, open_device(device), make, streams=streams)
    step_s = (time.perf_counter() - began_s) / shape.steps
    forget()
    wrong = differences(got.results, right)
    told = (
        f"{wrong} of {len(right)} tensors differ; {got.tiles} tiles stepped on the device, "
        f"{step_s:.2f} s a step"
    )
    return Outcome(told, holds=wrong == 0 and got.tiles > 0, value=wrong, target="0")


def no_race_in(shape: Shape, device: UnderTest, seeds: Sequence[int]) -> Outcome:
    """The same bits however the streams are held up."""
    make = OPTIMIZERS["AdamW"]
    forget()
    right = train_plainly(shape, place_of(device), make)

    def train(accelerator: Accelerator) -> list[torch.Tensor]:
        return train_attached(shape, accelerator, make).results

    return no_race(train, right, device, seeds, _LIMIT_S)


def rates_are_told(shape: Shape, device: UnderTest) -> Outcome:
    """What ``auto`` measures and chooses here, and what repeats it."""
    forget()
    make = OPTIMIZERS["AdamW, fused"]
    got = train_attached(replace(shape, steps=1), open_device(device), make, who="auto")
    forget()
    notices = [text for text in got.notices if "optimizer_device" in text]
    return Outcome("; ".join(notices), holds=len(notices) == 1)
