"""What Offload knows about an optimizer: whether its step may be cut into tiles.

[Note: tiles] An elementwise optimizer updates each element from that element's own parameter,
gradient and states, so its step on a slice is the same slice of its step. torch's fused kernels
round differently in their vector body and scalar tail, so slices are cut on a 64-element grid.
Every other optimizer runs its own ``step`` on one whole parameter at a time.
"""

import collections
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch.optim import Optimizer

from offload.allocator.errors import UnsupportedError
from offload.swap.masters import MASTER_LOW
from offload.swap.state_precision import EXACT, Precision

_ELEMENTWISE = frozenset(
    {
        torch.optim.SGD,
        torch.optim.Adam,
        torch.optim.AdamW,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.Adamax,
        torch.optim.Adadelta,
        torch.optim.Adagrad,
        torch.optim.RMSprop,
        torch.optim.Rprop,
        torch.optim.ASGD,
    }
)
_PROBE_NUMEL = 64


class Kind(Enum):
    """How the step of an optimizer may be cut."""

    ELEMENTWISE = "tiles of a parameter"
    PER_PARAMETER = "whole parameters"


@dataclass(frozen=True, slots=True, kw_only=True)
class StateSpec:
    """One per-element state of an elementwise optimizer."""

    name: str
    dtype: torch.dtype


def kind_of(optimizer: Optimizer) -> Kind:
    """How the step of ``optimizer`` may be cut.

    Raises:
        UnsupportedError: its step can't be cut at all.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        raise UnsupportedError(
            "torch.optim.LBFGS keeps up to history_size flat copies of all parameters and "
            "evaluates the model inside its step, so it can't be cut: use an optimizer that "
            "updates parameters one by one, such as AdamW"
        )
    if type(optimizer) in _ELEMENTWISE:
        return Kind.ELEMENTWISE
    return Kind.PER_PARAMETER


def unhooked_step(optimizer: Optimizer) -> Callable[..., Any]:
    """The ``step`` of the optimizer's class without the hooks that torch wraps it in."""
    step = type(optimizer).step
    if getattr(step, "hooked", False):
        return getattr(step, "__wrapped__", step)
    return step


def shadow_of(optimizer: Optimizer) -> Optimizer:
    """An optimizer of the same class and settings, with no groups and no state of its own."""
    shadow: Optimizer = object.__new__(type(optimizer))
    shadow.__dict__.update(optimizer.__dict__)
    shadow.state = collections.defaultdict(dict)
    shadow.param_groups = []
    return shadow


def step_on(
    optimizer: Optimizer,
    group: Mapping[str, Any],
    parameters: Sequence[torch.Tensor],  # any shapes, each with ``.grad``
    states: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """Run the optimizer's own step on ``parameters`` in place; returns their new states."""
    shadow = shadow_of(optimizer)
    shadow.param_groups = [{**group, "params": list(parameters)}]
    for parameter, state in zip(parameters, states, strict=True):
        if state:
            shadow.state[parameter] = dict(state)
    with torch.no_grad():
        unhooked_step(optimizer)(shadow)
    return [dict(shadow.state.get(parameter, {})) for parameter in parameters]


def unscales(optimizer: Optimizer) -> bool:
    """Whether the step that runs divides gradients by a loss scale, in place, as fused ones do.

    ``GradScaler`` tells it so by attributes; where it has found an infinity nothing is changed.
    """
    scale, found_inf = (getattr(optimizer, name, None) for name in ("grad_scale", "found_inf"))
    return scale is not None and not (found_inf is not None and bool(found_inf))


def probe_states(
    optimizer: Optimizer, group: Mapping[str, Any], dtype: torch.dtype
) -> tuple[StateSpec, ...]:
    """The per-element states that a parameter of ``dtype`` gets, found by one small step."""
    parameter = torch.zeros(_PROBE_NUMEL, dtype=dtype)
    parameter.grad = torch.zeros_like(parameter)
    (state,) = step_on(optimizer, group, [parameter], [{}])
    return tuple(
        StateSpec(name=name, dtype=value.dtype)
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and value.shape == parameter.shape
    )


def state_specs(
    optimizer: Optimizer,
    group: Mapping[str, Any],
    parameter: torch.Tensor,
    precision: Precision = EXACT,
) -> tuple[StateSpec, ...]:
    """The per-element states of ``parameter``: those it has, or those it will get.

    The lower half of its master is the last of them.
    """
    shown = {
        name: value
        for name, value in optimizer.state.get(parameter, {}).items()
        if name != MASTER_LOW
    }
    if shown:
        specs = tuple(
            StateSpec(name=name, dtype=value.dtype)
            for name, value in shown.items()
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape
        )
    else:
        specs = probe_states(optimizer, group, precision.step_dtype(parameter))
    if precision.has_master(parameter):
        specs += (StateSpec(name=MASTER_LOW, dtype=torch.int16),)
    return specs


def state_nbytes(
    optimizer: Optimizer,
    taken_by: Callable[[int], int] = int,
    *,
    precision: Precision = EXACT,
) -> int:
    """Bytes of all per-element states in the store, as far as known before the first step.

    ``taken_by`` says what a state of so many bytes takes of its tier, where that is asked for.
    """
    if kind_of(optimizer) is not Kind.ELEMENTWISE:
        return 0
    return sum(
        taken_by(precision.stored_nbytes(parameter, spec.name, spec.dtype))
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.requires_grad and parameter.numel()
        for spec in state_specs(optimizer, group, parameter, precision)
    )
