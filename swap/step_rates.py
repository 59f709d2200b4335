"""How fast the host and a device take the optimizer's steps, measured on tiles of nobody's."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from offload.swap.device_step import DeviceStep
from offload.swap.masters import MASTER_LOW
from offload.swap.optim_kinds import step_on
from offload.swap.state_precision import Precision
from offload.swap.states import SMALL_NUMEL
from offload.swap.tile_share import StepRates
from offload.swap.visits import TILES, HostPart, State

_ROUNDS = 3


def measure_rates(
    optimizer: Optimizer,
    precision: Precision,
    device: DeviceStep,
    chunk_numel: int,
    clock: Callable[[], float] = time.perf_counter,
) -> StepRates | None:
    """Seconds for an element by either; None if all parameters are small.

    Takes ``TILES`` tiles of host memory for a moment. They are stepped as the largest parameter
    that is trained would be; neither it nor its state changes.

    Raises:
        CapacityError: the device has no room for a tile.
        TierIOError: a copy failed.
    """
    trained = [
        (group, one)
        for group in optimizer.param_groups
        for one in group["params"]
        if one.requires_grad and one.numel() > SMALL_NUMEL
    ]
    if not trained:
        return None
    group, parameter = max(trained, key=lambda pair: pair[1].numel())
    tiles = [_tile(optimizer, group, parameter, precision, chunk_numel) for _ in range(TILES)]

    def on_host() -> None:
        for tile in tiles:
            step_on(optimizer, group, [tile.parameter], [tile.before])

    def on_device() -> None:
        for tile in tiles:
            device.send(group, [tile], _take_nothing)
        device.finish()

    seconds = [_least_s(call, clock) / (TILES * chunk_numel) for call in (on_host, on_device)]
    return StepRates(host_s=seconds[0], device_s=seconds[1])


def _tile(
    optimizer: Optimizer,
    group: Mapping[str, Any],
    parameter: torch.Tensor,
    precision: Precision,
    numel: int,
) -> HostPart:
    """One of zeros, with states as ``parameter`` has or will get them."""
    values = torch.zeros(numel, dtype=precision.step_dtype(parameter))
    values.grad = torch.zeros_like(values)
    before: State = {
        name: _stretched(value, parameter, numel)
        for name, value in optimizer.state.get(parameter, {}).items()
        if name != MASTER_LOW
    }
    if not before:
        (before,) = step_on(optimizer, group, [values], [{}])
    return HostPart(
        name="(measuring)",
        parameter=values,
        gradient=values.grad,
        before=before,
        states={
            name: value
            for name, value in before.items()
            if isinstance(value, torch.Tensor) and value.shape == values.shape
        },
    )


def _stretched(value: Any, parameter: torch.Tensor, numel: int) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if value.shape == parameter.shape:
        return torch.zeros(numel, dtype=value.dtype)
    return value.clone()


def _least_s(call: Callable[[], None], clock: Callable[[], float]) -> float:
    """Seconds of a call, the fastest of some after a first one."""
    call()
    seconds = []
    for _ in range(_ROUNDS):
        began_s = clock()
        call()
        seconds.append(clock() - began_s)
    return min(seconds)


def _take_nothing(_afters: list[State]) -> None:
    """Nobody wants the result."""
