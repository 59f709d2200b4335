"""``attach``: checks what can be checked, plans, and hands over to an engine."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from offload.allocator.errors import ConfigError, UnsupportedError
from offload.attachment import attached_models
from offload.building import built_weight, runtime_of
from offload.computing import accelerator_for, ferry_nbytes, plan_device
from offload.config import OffloadConfig, make_config
from offload.engine import Engine
from offload.interrupts import deliver_lost_interrupts
from offload.runtime import Runtime
from offload.sharing import (
    check_optimizer,
    check_steps_in_forward,
    check_steps_on_host,
    move_states,
    size_on_device,
)
from offload.swap.census import take_census
from offload.swap.device_plan import DevicePlan
from offload.swap.optim_kinds import kind_of
from offload.swap.plan import make_plan
from offload.swap.uncompiled import forget_compiled, is_compiled, plain_module
from offload.tiers import hostmem
from offload.tiers.accelerator import Accelerator


def attach(
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    budget: str | int | Mapping[str, Any] | None = None,
    nvme: str | Path | Sequence[str | Path] | None = None,
    config: OffloadConfig | str | Path | Mapping[str, Any] | None = None,
    record: str | Path | None = None,
    resume: str | None = None,
    commit: str | None = None,
    device: str | None = None,
    accelerator: Accelerator | None = None,
) -> Engine:
    """Train ``model`` within a memory budget; the user's own loop stays as it is.

    Args:
        model: any module, on the CPU or on a GPU; built plainly, by ``offload.init``, or loaded
            by ``offload.load_pretrained``; on the CPU ``torch.compile``d or not.
        optimizer: over the model's parameters; ``None`` to evaluate only.
        budget: ``"host=4GiB"``, bytes, or a mapping. ``host`` bounds the process's peak
            resident set, ``device`` what torch's allocator holds on the device.
        nvme: directory of the store and the scratch file; several (a list, or separated by
            commas), always in the same order, are striped over.
        config: file or mapping with the same keys; arguments win over it.
        record: run directory for ``offload report``.
        resume: ``auto`` continues the store's last commit if there is one, ``never`` starts
            anew, ``must`` raises without one.
        commit: ``step`` makes every optimizer step durable, ``manual`` leaves it to
            ``Engine.commit``, ``never`` makes nothing durable and takes half the room on the
            drive.
        device: where the model computes, such as ``cuda``; by default where its parameters are.
            They are in host memory from now on, and visit the device while it computes.
        accelerator: the device, in the place of one that ``device`` names.

    Raises:
        BudgetError: the largest layer does not fit; names the smallest budget that does.
        ConfigError: wrong arguments, or settings that work on the CPU only.
        StoreError: the store is in use, damaged, or of another model.
        CapacityError: the disk has not enough room.
        UnsupportedError: a parameter or an optimizer that can't be handled exactly, or states
            that may not be kept in the precision that was asked for.
    """
    settings = make_config(
        config,
        budget=budget,
        nvme=nvme,
        record=record,
        resume=resume,
        commit=commit,
        device=device,
    )
    return attach_in(
        None, plain_module(model), optimizer, settings, accelerator=accelerator, called=model
    )


def attach_in(
    opened: Runtime | None,
    model: nn.Module,
    optimizer: Optimizer | None,
    settings: OffloadConfig,
    *,
    accelerator: Accelerator | None = None,
    called: nn.Module | None = None,
) -> Engine:
    """``attach`` with all settings known.

    Args:
        opened: holds the store already; closed on an error.
        accelerator: as for ``attach``.
        called: what the user's code calls, if it is not ``model`` itself.
    """
    if optimizer is not None:
        kind_of(optimizer)
    if model in attached_models:
        raise ConfigError("this model is attached already: detach its engine first")
    runtime = runtime_of(model) or opened
    if runtime is None:
        runtime = Runtime(settings)
    else:
        runtime.reconfigure(settings)
    try:
        if optimizer is not None:
            runtime.precision.check(optimizer)
        on_device = _plan_device(
            model if called is None else called, optimizer, runtime, accelerator
        )
        if runtime.config.step_in_forward:
            check_steps_in_forward(
                model if called is None else called, optimizer, on_device=on_device is not None
            )
        runtime.governor.shed()
        census = take_census(
            model, whole_gradients=is_compiled(model if called is None else called)
        )
        in_memory = sum(
            parameter.nbytes
            for parameter in set(model.parameters())
            if built_weight(parameter) is None and parameter.is_cpu
        )
        baseline = max(hostmem.resident_nbytes()[0] - in_memory, 0)
        if on_device is not None:
            baseline += ferry_nbytes(runtime.config)
        plan = make_plan(
            census,
            budget_nbytes=runtime.budget_nbytes,
            baseline_nbytes=baseline,
            chunk_numel=runtime.chunk_numel,
            step_in_backward=runtime.config.step_in_backward,
            step_in_forward=runtime.config.step_in_forward,
        )
        if on_device is not None:
            move_states(optimizer)
        engine = Engine(model, optimizer, runtime, plan, on_device)
        engine.weights.uncache(census.lookups)
    except BaseException:
        runtime.close()
        raise
    forget_compiled()
    deliver_lost_interrupts()
    return engine


def _plan_device(
    model: nn.Module,
    optimizer: Optimizer | None,
    runtime: Runtime,
    given: Accelerator | None,
) -> tuple[Accelerator, DevicePlan] | None:
    """The device to compute on, and its plan; None: on the CPU.

    Raises:
        BudgetError, ConfigError: as ``attach``.
        UnsupportedError: there is no such device, it can't step with this optimizer, or the model
            is compiled.
    """
    config = runtime.config
    accelerator = accelerator_for(model, config.device, given)
    if accelerator is None:
        check_steps_on_host(config)
        if config.device_arena:
            raise ConfigError(
                "device_arena needs a CUDA device, and the model computes on the CPU: set "
                "device='cuda', or leave device_arena out"
            )
        return None
    if is_compiled(model):
        raise UnsupportedError(
            "compiled models (made by torch.compile) compute on the CPU only with Offload: attach "
            f"the plain one to compute on {accelerator.name}, or compile functions that call none "
            "of its modules"
        )
    check_optimizer(optimizer)
    stepping = size_on_device(optimizer, runtime)
    return accelerator, plan_device(model, config, accelerator, stepping)
