"""How the bytes of a device are shared out, decided before the first step. Pure, as ``plan``."""

import dataclasses
from dataclasses import dataclass

from offload.allocator.errors import BudgetError
from offload.allocator.units import format_nbytes
from offload.swap.census import Census

_MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicePlan:
    """Shares of the device budget, in bytes; what is left is for the kernels' own tensors.

    Attributes:
        budget_nbytes: the hard limit on what the device's allocator holds.
        fixed_nbytes: what is there all the time: buffers, the user's own tensors, and the
            libraries' workspaces.
        working_nbytes: the largest module's weights and gradients, or a tile of the step.
        window_nbytes: weights that may be on the device at once, the working set's included.
        gradients_nbytes: gradients that may be on their way to the host, beside the working set's.
        activations_nbytes: saved activations kept on the device before they are swapped.
    """

    budget_nbytes: int
    fixed_nbytes: int
    working_nbytes: int
    window_nbytes: int
    gradients_nbytes: int
    activations_nbytes: int


def make_device_plan(
    census: Census, *, budget_nbytes: int, fixed_nbytes: int, device: str, step_nbytes: int = 0
) -> DevicePlan:
    """Share ``budget_nbytes`` of ``device`` out for the first step.

    What activations and kernels need is not known before a step has run; ``grow`` hands out
    what turned out to be spare.

    Args:
        census: with lookup tables as weights that are used whole.
        step_nbytes: what one tile of the optimizer's step takes of the device.

    Raises:
        BudgetError: the largest module does not fit, or no tile of the step; names what does not,
            and the smallest budget that does.
    """
    working = max(census.working_set_nbytes(), step_nbytes)
    needed = fixed_nbytes + working
    if budget_nbytes < needed:
        by_module = census.module_nbytes()
        largest = max(by_module, key=lambda name: by_module[name], default="none")
        raise BudgetError(
            f"the device budget of {format_nbytes(budget_nbytes)} is too small: on {device}, "
            f"buffers, workspaces and what was there before hold {format_nbytes(fixed_nbytes)} "
            f"({fixed_nbytes} bytes), "
            f"and {_claim(largest, working, step_nbytes)}. The smallest budget that fits is "
            f"device={-(-needed // _MIB)}MiB, and activations come on top",
            needed_nbytes=needed,
            budget_nbytes=budget_nbytes,
        )
    spare = budget_nbytes - needed
    largest_weight = max((weight.nbytes for weight in census.weights), default=0)
    sizes = {weight.name: weight.nbytes for weight in census.weights}
    weights = max(
        (sum(sizes[name] for name in info.weights) for info in census.modules),
        default=largest_weight,
    )
    return DevicePlan(
        budget_nbytes=budget_nbytes,
        fixed_nbytes=fixed_nbytes,
        working_nbytes=working,
        window_nbytes=weights + min(spare // 6, 2 * weights),
        gradients_nbytes=min(spare // 12, largest_weight),
        activations_nbytes=spare // 4,
    )


def _claim(largest: str, working: int, step_nbytes: int) -> str:
    size = f"{format_nbytes(working)} ({working} bytes)"
    if working == step_nbytes:
        return f"a tile of the optimizer's step, which optimizer_device has there, needs {size}"
    return f"the largest layer ({largest}) needs {size} for weights and gradients"


def grow(plan: DevicePlan, census: Census, *, peak_nbytes: int) -> DevicePlan:
    """The plan after a step whose measured peak was ``peak_nbytes``.

    Half of what was spare holds more weights, and what is left when it holds all, activations.
    The other half stays free: batches differ, and the next step may need more than this one.
    """
    more = max(plan.budget_nbytes - peak_nbytes, 0) // 2
    weights = min(more, max(census.weight_nbytes - plan.window_nbytes, 0))
    return dataclasses.replace(
        plan,
        window_nbytes=plan.window_nbytes + weights,
        activations_nbytes=plan.activations_nbytes + more - weights,
    )
