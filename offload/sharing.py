"""Who steps the optimizer's tiles where a model computes on a device: chosen once, then kept.

See ``swap.tile_share`` [Note: who steps a tile]. The share stands in every commit record, so that a
run that is continued steps as it did before.
"""

from collections.abc import Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from offload.allocator.errors import ConfigError, UnsupportedError
from offload.config import OffloadConfig
from offload.runtime import Runtime
from offload.swap.device_step import DeviceStep
from offload.swap.optim_kinds import Kind, kind_of
from offload.swap.optimizer import StreamedOptimizer
from offload.swap.step_rates import measure_rates
from offload.swap.tile_share import TileShare, best_share, parse_share
from offload.swap.uncompiled import is_compiled
from offload.swap.visits import VisitSize, beside_backward, visit_size

if TYPE_CHECKING:
    from offload.computing import Computing

_WHOLE = (("host", "no tile"), ("device", "all tiles"))  # setting and words, for 0 and 1
_SHARE = "optimizer_share"  # in the state of a commit; without it the host steps


def check_steps_on_host(config: OffloadConfig) -> None:
    """Raise if a device is asked to step, though the model computes on the CPU.

    Raises:
        ConfigError: naming the setting.
    """
    if config.optimizer_device not in ("host", "auto"):
        raise ConfigError(
            f"optimizer_device={config.optimizer_device!r} steps on the device that the model "
            "computes on, and this one computes on the CPU: set device='cuda', or leave it out"
        )


def check_optimizer(optimizer: Optimizer | None) -> None:
    """Raise if the optimizer can't step parameters in host memory.

    Raises:
        ConfigError: naming the setting that keeps it on the device.
    """
    for index, group in enumerate(optimizer.param_groups if optimizer is not None else ()):
        if group.get("capturable"):
            raise ConfigError(
                f"parameter group {index} of {type(optimizer).__name__} has capturable=True, which "
                "steps on the device; with Offload it steps in host memory: leave capturable out"
            )


def move_states(optimizer: Optimizer | None) -> None:
    """Bring the optimizer's states to host memory, where their parameters will be."""
    for state in optimizer.state.values() if optimizer is not None else ():
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                state[name] = value.to("cpu")


def check_steps_in_forward(
    model: nn.Module, optimizer: Optimizer | None, *, on_device: bool
) -> None:
    """Raise if the step of ``optimizer`` can't be put off until the next forward of ``model``.

    Raises:
        UnsupportedError: naming the reason.
    """
    if on_device:
        reason = "the model computes on a device, whose copies of weights are made before forward"
    elif is_compiled(model):
        reason = "the model is compiled, and compiled code takes weights as they are when it begins"
    elif optimizer is not None and kind_of(optimizer) is not Kind.ELEMENTWISE:
        reason = f"{type(optimizer).__name__} steps whole parameters, not tiles of them"
    else:
        return
    raise UnsupportedError(f"step_in_forward is not possible: {reason}. Leave it out")


def size_on_device(optimizer: Optimizer | None, runtime: Runtime) -> VisitSize | None:
    """What stepping takes of the device; None if it steps nothing.

    Raises:
        UnsupportedError: the device is to step, but the optimizer's step can't be cut into tiles.
    """
    wanted = runtime.config.optimizer_device
    if optimizer is None or wanted in ("host", 0.0):
        return None
    if kind_of(optimizer) is not Kind.ELEMENTWISE:
        name = type(optimizer).__name__
        if wanted != "auto":
            raise UnsupportedError(
                f"optimizer_device={wanted!r} has tiles stepped on the device, and {name} is not "
                "known to be elementwise, so its step can't be cut into tiles: set "
                "optimizer_device='host'"
            )
        runtime.journal.notice("optimizer_device", f"host: {name} is not known to be elementwise")
        return None
    return visit_size(optimizer, runtime.precision, runtime.chunk_numel)


def open_device_step(
    optimizer: Optimizer, computing: "Computing | None", runtime: Runtime
) -> DeviceStep | None:
    """What steps on the device, with no share of the tiles yet; None if nothing may."""
    if computing is None or (size := size_on_device(optimizer, runtime)) is None:
        return None
    computing.device_step = DeviceStep(
        optimizer,
        computing.ferry,
        computing.arriving,
        computing.leaving,
        runtime.journal,
        share=TileShare(runtime.chunk_numel),
        size=size,
        make_room=computing.weights.make_room,
    )
    if runtime.config.step_in_backward:
        computing.device_step.limit_nbytes = beside_backward(size, computing.plan.budget_nbytes)
    return computing.device_step


def pack_share(streamed: StreamedOptimizer) -> dict[str, str]:
    """The device's share, for the commit record."""
    return {} if streamed.device is None else {_SHARE: str(streamed.device.share.share)}


def unpack_share(state: Mapping[str, Any]) -> Fraction:
    """The device's share in the state of a commit."""
    return Fraction(state.get(_SHARE, 0))


def settle_share(streamed: StreamedOptimizer, runtime: Runtime, kept: Fraction | None) -> None:
    """Give the device its share of the tiles: what the settings say, the store, or rates.

    Args:
        kept: the share until now; None where no commit is continued.

    Raises:
        CapacityError: the device has no room for tiles to measure with.
    """
    device, wanted = streamed.device, runtime.config.optimizer_device
    if device is None:
        share = Fraction(0)
    elif wanted != "auto":
        share = parse_share(wanted)
    elif kept is not None:
        share = kept
    else:
        share = _measured(streamed, device, runtime)
    if device is not None:
        device.share.share = share
    if kept is not None and kept != share:
        runtime.journal.notice(
            "optimizer_device",
            f"until the last commit the device stepped {_told(kept)}, from now on {_told(share)}: "
            "the last bits may differ from those of a run that goes on as it began",
        )


def _measured(streamed: StreamedOptimizer, device: DeviceStep, runtime: Runtime) -> Fraction:
    rates = measure_rates(streamed.optimizer, runtime.precision, device, runtime.chunk_numel)
    if rates is None:
        return Fraction(0)
    share = best_share(rates)
    setting = _WHOLE[int(share)][0] if share.denominator == 1 else round(float(share), 4)
    runtime.journal.notice(
        "optimizer_device",
        f"the device steps {_told(share)}: an element takes {rates.host_s * 1e9:.2f} ns on the "
        f"host, and {rates.device_s * 1e9:.2f} ns there and back. optimizer_device={setting!r} "
        "chooses the same for another store",
    )
    return share


def _told(share: Fraction) -> str:
    return _WHOLE[int(share)][1] if share.denominator == 1 else f"{share} of the tiles"
