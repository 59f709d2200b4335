"""``attach``: checks what can be checked, plans, and hands over to an engine."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from offload.allocator.errors import ConfigError
from offload.building import built_weight, runtime_of
from offload.config import OffloadConfig, make_config
from offload.engine import Engine, attached_models
from offload.interrupts import deliver_lost_interrupts
from offload.runtime import Runtime
from offload.swap.census import take_census
from offload.swap.optim_kinds import kind_of
from offload.swap.plan import make_plan
from offload.swap.uncompiled import forget_compiled, plain_module
from offload.tiers import hostmem


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
) -> Engine:
    """Train ``model`` within a memory budget; the user's own loop stays as it is.

    Args:
        model: any module on the CPU; built plainly, by ``offload.init``, or loaded by
            ``offload.load_pretrained``; ``torch.compile``d or not.
        optimizer: over the model's parameters; ``None`` to evaluate only.
        budget: ``"host=4GiB"``, bytes, or a mapping. ``host`` bounds the process's peak
            resident set.
        nvme: directory of the store and the scratch file; several (a list, or separated by
            commas), always in the same order, are striped over.
        config: file or mapping with the same keys; arguments win over it.
        record: run directory for ``offload report``.
        resume: ``auto`` continues the store's last commit if there is one, ``never`` starts
            anew, ``must`` raises without one.
        commit: ``step`` makes every optimizer step durable, ``manual`` leaves it to
            ``Engine.commit``, ``never`` makes nothing durable and takes half the room on the
            drive.

    Raises:
        BudgetError: the largest layer does not fit; names the smallest budget that does.
        ConfigError: wrong arguments.
        StoreError: the store is in use, damaged, or of another model.
        CapacityError: the disk has not enough room.
        UnsupportedError: a parameter or an optimizer that can't be handled exactly, or states
            that may not be kept in the precision that was asked for.
    """
    settings = make_config(
        config, budget=budget, nvme=nvme, record=record, resume=resume, commit=commit
    )
    return attach_in(None, plain_module(model), optimizer, settings)


def attach_in(
    opened: Runtime | None, model: nn.Module, optimizer: Optimizer | None, settings: OffloadConfig
) -> Engine:
    """``attach`` with all settings known.

    Args:
        opened: holds the store already; closed on an error.
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
        runtime.governor.shed()
        census = take_census(model)
        in_memory = sum(
            parameter.nbytes
            for parameter in set(model.parameters())
            if built_weight(parameter) is None
        )
        baseline = max(hostmem.resident_nbytes()[0] - in_memory, 0)
        plan = make_plan(
            census,
            budget_nbytes=runtime.budget_nbytes,
            baseline_nbytes=baseline,
            chunk_numel=runtime.chunk_numel,
            step_in_backward=runtime.config.step_in_backward,
        )
        engine = Engine(model, optimizer, runtime, plan)
    except BaseException:
        runtime.close()
        raise
    forget_compiled()
    deliver_lost_interrupts()
    return engine
