"""What an optimizer keeps for a model's weights, and in which form, before its first step."""

import torch
from torch import nn
from torch.optim import Optimizer

from offload.allocator.errors import UnsupportedError
from offload.swap.census import named_weights
from offload.swap.masters import MASTER_LOW
from offload.swap.optim_kinds import Kind, StateSpec, kind_of, state_specs
from offload.swap.planning.program import StateForm, Stepping
from offload.swap.state_precision import EXACT, Precision


def stepping_of(model: nn.Module, optimizer: Optimizer, precision: Precision = EXACT) -> Stepping:
    """What ``optimizer`` keeps for the weights of ``model``, which may be fake.

    Raises:
        UnsupportedError: its step can't be cut into tiles, so that nothing is known of its states
            before the first step; or what it keeps may not be kept with ``precision``.
    """
    if kind_of(optimizer) is not Kind.ELEMENTWISE:
        raise UnsupportedError(
            f"{type(optimizer).__name__} is not known to be elementwise: what its states take is "
            "not known before its first step. Plan with --optim adamw, or run it and read the "
            "report"
        )
    precision.check(optimizer)
    groups = {
        id(parameter): group for group in optimizer.param_groups for parameter in group["params"]
    }
    sizes: dict[str, tuple[int, ...]] = {}
    forms: dict[str, tuple[StateForm, ...]] = {}
    by_tile: set[str] = set()
    probed: dict[tuple[int, torch.dtype], tuple[StateSpec, ...]] = {}
    for name, (parameter, *_) in named_weights(model):
        group = groups.get(id(parameter))
        if group is None or not parameter.requires_grad:
            continue
        kind = id(group), parameter.dtype
        if kind not in probed:
            probed[kind] = state_specs(optimizer, group, parameter, precision)
        specs = probed[kind]
        sizes[name] = tuple(
            precision.stored_nbytes(parameter, spec.name, spec.dtype) for spec in specs
        )
        if not precision.keeps_in_memory(parameter):
            by_tile.add(name)
            forms[name] = tuple(_form(precision, parameter, spec) for spec in specs)
    return Stepping(
        name=type(optimizer).__name__,
        states_nbytes=sizes,
        fused=all(group.get("fused") for group in optimizer.param_groups),
        forms=forms,
        by_tile=frozenset(by_tile),
        state_precision=precision.states,
        master_weights=precision.masters,
    )


def _form(precision: Precision, parameter: torch.Tensor, spec: StateSpec) -> StateForm:
    if spec.name == MASTER_LOW:
        return "low"
    return precision.stored_as(parameter, spec.name, spec.dtype)[0]
