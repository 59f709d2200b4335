"""What is settled before a model computes on a device: which one, and the shares of its memory."""

import torch
from torch import nn
from torch.optim import Optimizer

from offload.allocator.errors import ConfigError
from offload.config import OffloadConfig
from offload.saving import device_of
from offload.swap.census import take_census
from offload.swap.device_plan import DevicePlan, make_device_plan
from offload.swap.ferry import CHUNK_NBYTES
from offload.swap.visits import VisitSize, beside_backward
from offload.tiers.accelerator import Accelerator
from offload.tiers.cuda import CudaAccelerator

LEAVING = 2  # gradients on their way at once
UNLIMITED = 1 << 62  # bytes of a device whose memory nobody knows
_AT_ONCE = 2  # copies that a thread waits for: the one that computes, and backward's
_WORKSPACES_NBYTES = 64 << 20  # of the libraries that compute on CUDA
_DEFAULT_SHARE = 0.9  # of the device's memory, where no budget is given


def accelerator_for(
    model: nn.Module, device: str | None, given: Accelerator | None
) -> Accelerator | None:
    """What ``model`` is to compute on; None: on the CPU.

    Raises:
        ConfigError: parameters are on a device, but it is to compute elsewhere.
        UnsupportedError: there is no such device.
    """
    if given is not None:
        return given
    present = device_of(model)
    if device is None:
        return present
    if device != "cpu":
        wanted = CudaAccelerator(device)
        if present is None or present.torch_device == wanted.torch_device:
            return wanted
    if present is None:
        return None
    raise ConfigError(
        f"device={device!r}, but parameters of the model are on {present.name}: leave device out "
        "to compute there, or call model.cpu() first"
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


def ferry_nbytes(config: OffloadConfig) -> int:
    """Bytes of the pinned buffers that everything passes through."""
    return ferry_buffers(config) * CHUNK_NBYTES


def ferry_buffers(config: OffloadConfig) -> int:
    """As many as there are threads that may want one at once."""
    paths = max(len(config.nvme), 1)
    return config.io_threads * (1 + 2 * paths) + LEAVING + _AT_ONCE


def plan_device(
    model: nn.Module,
    config: OffloadConfig,
    accelerator: Accelerator,
    stepping: VisitSize | None = None,
) -> DevicePlan:
    """The shares of the device budget.

    Args:
        stepping: what the optimizer's step takes of the device, if it steps there.

    Raises:
        BudgetError: the largest module does not fit, or no tile of the optimizer's step.
        UnsupportedError: the device has no arena, and one is asked for.
    """
    if config.device_arena:
        accelerator.step_arena()  # refused, if it is, before anything has moved
    budget = config.budget.get("device")
    if budget is None:
        total = accelerator.total_nbytes()
        budget = UNLIMITED if total is None else int(total * _DEFAULT_SHARE)
    fixed = sum(buffer.nbytes for buffer in model.buffers())
    fixed += _others_nbytes(model, accelerator)
    if isinstance(accelerator, CudaAccelerator):
        fixed += _WORKSPACES_NBYTES
    step_nbytes = 0
    if stepping is not None and config.step_in_backward:  # beside what backward computes
        fixed += beside_backward(stepping, budget) + stepping.temporaries_nbytes
    elif stepping is not None:
        step_nbytes = stepping.least_nbytes
    return make_device_plan(
        take_census(model, whole_tables=True),
        budget_nbytes=budget,
        fixed_nbytes=fixed,
        device=accelerator.name,
        step_nbytes=step_nbytes,
    )


def _others_nbytes(model: nn.Module, accelerator: Accelerator) -> int:
    """Bytes of the device that are held already, but not by ``model``, whose weights will leave."""
    own = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*model.parameters(), *model.buffers())
        if accelerator.owns(tensor)
    }
    return max(accelerator.held_nbytes() - sum(own.values()), 0)
