"""The plan of a run, held against the peaks that its steps show."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from offload.allocator.errors import BudgetError
from offload.allocator.units import format_nbytes
from offload.swap.census import Census
from offload.swap.governor import Governor
from offload.swap.plan import (
    MARGIN_NBYTES,
    VARIATION_NBYTES,
    Plan,
    enough_nbytes,
    grow,
    shrink,
)
from offload.swap.weights import WeightSwapper

if TYPE_CHECKING:
    from offload.swap.memory_step import MemoryStep


class Replanner:
    """Keeps resident, and lets move ahead, what the measured peaks leave room for.

    Args:
        apply: called with each new plan: sets the limits of what moves.

    Attributes:
        plan: the shares of the budget, as they are now.
        memory: keeps gradients and states; None where nothing is stepped.
    """

    def __init__(
        self,
        plan: Plan,
        census: Census,
        weights: WeightSwapper,
        governor: Governor,
        apply: Callable[[Plan], None],
    ) -> None:
        self.plan = self._first = plan
        self._apply = apply
        self._census = census
        self._weights = weights
        self._governor = governor
        self.memory: MemoryStep | None = None
        self._states_nbytes: Mapping[str, int] = {}  # known when the first step has made them
        self._steps = 0
        self._may_grow = True
        self._is_untypical = False

    def check_fits(self) -> None:
        """The first passes have shown what activations and kernels need: stop if it is too much.

        Nothing has been committed yet, so nothing is lost.

        Raises:
            BudgetError: naming a budget that fits.
        """
        peak, budget = self._governor.peak_nbytes, self.plan.budget_nbytes
        if not self._steps and peak + VARIATION_NBYTES > budget:
            needed = enough_nbytes(self.plan, peak)
            raise BudgetError(
                f"the host budget of {format_nbytes(budget)} is too small: with this batch, "
                f"forward and backward took {format_nbytes(peak)}. Take a smaller batch, or a "
                f"budget of host={-(-needed // (1 << 20))}MiB",
                needed_nbytes=needed,
                budget_nbytes=budget,
            )

    def finish_step(self) -> None:
        """A step has ended: its peak tells what can stay resident."""
        if self._is_untypical:
            self._is_untypical = False
            self._governor.restart_peak()
            return
        self._steps += 1
        peak = self._governor.peak_nbytes
        self._governor.restart_peak()
        if not self._may_grow:
            return
        if self._steps == 1:
            if self.memory is not None:
                self._states_nbytes = self.memory.nbytes()
            self.plan = grow(
                self.plan, self._census, peak_nbytes=peak, states_nbytes=self._states_nbytes
            )
        elif (excess := peak - self.plan.budget_nbytes + MARGIN_NBYTES // 2) > 0:
            self.plan = shrink(
                self.plan, self._census, excess_nbytes=excess, states_nbytes=self._states_nbytes
            )
        self._apply(self.plan)
        self._keep(self.plan.resident, self.plan.resident_states)

    @property
    def is_settled(self) -> bool:
        """Whether a step has been measured."""
        return self._steps > 0

    def reserve_in_turns(self, nbytes: int) -> None:
        """Micro-batches use weights of ``nbytes`` in turns: have room for them when there is.

        Steps that were measured before took other peaks: the next one is the first again.
        """
        is_new = not self.plan.in_turns_nbytes
        if nbytes <= self.plan.in_turns_nbytes:
            return
        self.plan = dataclasses.replace(self.plan, in_turns_nbytes=nbytes)
        if is_new and self._steps and self._may_grow:
            self.plan = dataclasses.replace(self._first, in_turns_nbytes=nbytes)
            self._steps = 0
            self._apply(self.plan)
            self._keep((), ())

    def leave_out(self) -> None:
        """The present step is none like those to come: its peak tells nothing."""
        self._is_untypical = True

    def keep_streaming(self) -> None:
        """Keep nothing resident from now on, whatever the budget has to spare."""
        self._may_grow = False
        self._keep((), ())

    def _keep(self, weights: Iterable[str], states: Iterable[str]) -> None:
        if self.memory is not None:
            self.memory.keep(states)
        self._weights.keep(weights)
