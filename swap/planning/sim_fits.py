"""Whether a simulated run fits its budget, and what a refusal says."""

from offload.allocator.errors import BudgetError, CapacityError
from offload.allocator.units import format_nbytes
from offload.swap.plan import VARIATION_NBYTES, Plan, enough_nbytes

# A run may take so much more than is simulated, and what is said to fit must fit.
_UNSURE = 0.02


def fits(plan: Plan, peak_nbytes: int) -> bool:
    """Whether a first pass that is simulated to take so much surely fits."""
    return _unsure(peak_nbytes) + VARIATION_NBYTES <= plan.budget_nbytes


def check_fits(plan: Plan, peak_nbytes: int) -> None:
    """Raise unless a first pass that is simulated to take so much surely fits.

    Raises:
        BudgetError: it may not.
    """
    if not fits(plan, peak_nbytes):
        raise too_small(plan, peak_nbytes, _unsure(peak_nbytes))


def too_small(plan: Plan, peak_nbytes: int, unsure_nbytes: int = 0) -> BudgetError:
    """What is said of a step that takes ``peak_nbytes``, or maybe ``unsure_nbytes``."""
    budget = plan.budget_nbytes
    needed = enough_nbytes(plan, max(peak_nbytes, unsure_nbytes))
    return BudgetError(
        f"the host budget of {format_nbytes(budget)} is too small: with this batch, "
        f"forward and backward take {format_nbytes(peak_nbytes)}. Take a smaller batch, or a "
        f"budget of host={-(-needed // (1 << 20))}MiB",
        needed_nbytes=needed,
        budget_nbytes=budget,
    )


def refused(plan: Plan, room_nbytes: int, refusal: CapacityError) -> BudgetError:
    """What is said where something found no memory, of which ``room_nbytes`` are left."""
    budget = plan.budget_nbytes
    return BudgetError(
        f"the host budget of {format_nbytes(budget)} is too small: {refusal}",
        needed_nbytes=budget - room_nbytes,
        budget_nbytes=budget,
    )


def _unsure(peak_nbytes: int) -> int:
    """What a run may take that is simulated to take so much."""
    return peak_nbytes + int(peak_nbytes * _UNSURE)
