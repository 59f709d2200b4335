"""Forward and backward of a simulated step: what the runtime does at each moment of a program."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from offload.swap.gradients import MIN_NBYTES
from offload.swap.planning.compiled import Moment
from offload.swap.planning.cost import Costs
from offload.swap.planning.program import Lookup, Program, What
from offload.swap.planning.sim_backward import SimBackwardStep
from offload.swap.planning.sim_forward import SimForwardStep
from offload.swap.planning.sim_gradients import SimGradients
from offload.swap.planning.sim_saved import SimSaved
from offload.swap.planning.sim_weights import SimWeight, SimWeights
from offload.swap.planning.world import World
from offload.tiers.hostmem import PAGE

# What one look at a mapped file maps: the kernel maps the pages around it, too, if they have been
# read (debugfs fault_around_bytes: 64 KiB), and what lies between near rows is read with them
# (``looked_up``). How long that takes is measured (``Costs.page_read_s``).
_FAULT_AROUND_NBYTES = 64 << 10


class _Gradient(NamedTuple):
    """What is known of a weight's gradient.

    Attributes:
        rows_nbytes: if it is made of rows alone.
        pages: of its home, in which there are such rows.
        is_used: making it uses the weight, as other than a table.
    """

    weight: SimWeight
    rows_nbytes: int | None
    pages: float
    is_used: bool


class SimPass:
    """Hands the moments of a program to the parts that act.

    A step has a pass for each micro-batch: gradients of the first are new, later ones are added to
    them, and a step in backward is one in the last.

    Args:
        micro_batches: of a step.
        backward: of a step in backward.
        forward: of a step in the next forward.

    Attributes:
        forwards: of the last pass.
    """

    def __init__(
        self,
        world: World,
        program: Program,
        costs: Costs,
        *,
        weights: SimWeights,
        saved: SimSaved,
        gradients: SimGradients,
        backward: SimBackwardStep | None,
        forward: SimForwardStep | None,
        micro_batches: int = 1,
    ) -> None:
        self._world = world
        self._program = program
        self._costs = costs
        self._weights = weights
        self._saved = saved
        self._gradients = gradients
        self._backward = backward
        self._forward = forward
        by_name = weights.weights
        self._uses = [[by_name[name] for name in names] for names in program.uses]
        self._of_weights = [
            _gradient_of(by_name[weight.name], program) for weight in program.census.weights
        ]
        self._looked_up: dict[str, int] = {}
        self._last = micro_batches - 1
        self._number = 0
        self.forwards = 0

    def go_through(self, moments: Iterable[Moment], number: int) -> None:
        """Forward and backward of a micro-batch; its ``number`` in the step."""
        self.forwards = 0
        self._number = number
        self._world.go_through(moments, self._handlers())

    def end(self) -> None:
        """The step is over."""
        for name in list(self._looked_up):  # a new version is mapped afresh
            self._world.memory.add_pages(-self._looked_up.pop(name))

    def _handlers(self) -> tuple[Callable[[int], None], ...]:
        """What each kind of moment does, in the order of ``What``."""
        saved = self._saved
        by_kind: Mapping[What, Callable[[int], None]] = {
            What.USE: self._use if self._forward is None else self._step_and_use,
            What.LOOKUP: self._look_up,
            What.FREE: saved.let_go,
            What.SAVE: saved.save,
            What.UNSAVE: saved.unsave,
            What.FORGET: saved.forget,
            What.BORROW: saved.borrow,
            What.PREFETCH: self._prefetch,
            What.GRADIENT: self._add_gradient if self._number else self._take_gradient,
            What.FORWARD: self._begin,
            What.STEP: self._end_backward,
            What.RETURN: self._end_forward,
        }
        return tuple(by_kind.get(what, _do_nothing) for what in What)

    def _begin(self, _which: int) -> None:
        self.forwards += 1
        self._gradients.poll()
        self._weights.begin_pass()
        self._saved.begin(first=not self._number)
        if self._forward is not None:
            self._forward.begin()

    def _end_forward(self, _which: int) -> None:
        if self._forward is not None:
            self._forward.end_forward()

    def _use(self, which: int) -> None:
        self._weights.use(self._uses[which])

    def _step_and_use(self, which: int) -> None:
        assert self._forward is not None
        weights = self._uses[which]
        self._forward.need(weights)
        self._weights.use(weights)
        self._forward.go_on()

    def _prefetch(self, which: int) -> None:
        self._saved.prefetch(self._program.prefetches[which])

    def _take_gradient(self, which: int) -> None:
        weight, rows_nbytes, pages, is_used = self._of_weights[which]
        stepping = self._backward if self._number == self._last else None
        if rows_nbytes is not None and weight.name not in self._gradients.kept:
            self._world.compute(self._costs.fresh_s(rows_nbytes))
            apart = weight.nbytes / PAGE / pages
            self._world.compute(pages * self._costs.page_write_s(apart))
            self._gradients.take_rows(weight.name, rows_nbytes)
            if stepping is not None:
                stepping.take(weight, gradient_nbytes=0)
        elif stepping is not None and weight.nbytes >= MIN_NBYTES:
            stepping.take(weight, gradient_nbytes=weight.nbytes)
        else:
            self._gradients.take(weight.name, weight.nbytes)
        if is_used:
            self._weights.trace.use(weight.number)

    def _add_gradient(self, which: int) -> None:
        """As ``_take_gradient``, to that of the micro-batches before."""
        weight, rows_nbytes, pages, is_used = self._of_weights[which]
        gradients, name, nbytes = self._gradients, weight.name, weight.nbytes
        if rows_nbytes is not None and name not in gradients.kept:
            self._world.compute(pages * self._costs.page_write_s(1.0))
            gradients.add_rows(name, rows_nbytes, nbytes)
            mapped_nbytes = 0
        else:
            mapped_nbytes = gradients.add(name, nbytes)
        if self._backward is not None and nbytes >= MIN_NBYTES:
            mapped_nbytes = self._step_inside(self._backward, weight, mapped_nbytes)
        if mapped_nbytes:
            self._world.memory.add_pages(-mapped_nbytes)
        if is_used:
            self._weights.trace.use(weight.number)

    def _step_inside(self, backward: SimBackwardStep, weight: SimWeight, mapped_nbytes: int) -> int:
        """Have ``weight`` stepped if its gradient is complete; bytes of it left to give back."""
        gradients, name, nbytes = self._gradients, weight.name, weight.nbytes
        gradients.settle(name)
        if self._number < self._last:
            return mapped_nbytes
        if name in gradients.kept:
            gradients.give(name, nbytes)
            backward.take(weight, gradient_nbytes=nbytes)
        else:
            backward.take_at_home(weight, mapped_nbytes=mapped_nbytes)
        return 0

    def _end_backward(self, _which: int) -> None:
        if self._backward is not None:
            self._backward.end_backward()

    def _look_up(self, which: int) -> None:
        lookup = self._program.lookups[which]
        weight = self._weights.weights[lookup.weight]
        if weight.in_memory:
            return
        known, table = self._looked_up.get(lookup.weight, 0), weight.nbytes
        nbytes = max(known, self._seen_nbytes(lookup))
        self._world.memory.add_pages(nbytes - known)
        # A row that an earlier look brought in, with what is around it, is there.
        looks = (nbytes - known) / _FAULT_AROUND_NBYTES
        apart = table / PAGE / max(looks, 1.0)
        self._world.compute(looks * self._costs.page_read_s(apart))
        self._looked_up[lookup.weight] = nbytes

    def _seen_nbytes(self, lookup: Lookup) -> int:
        """What the rows of all passes until now have brought in of a table."""
        table = self._weights.weights[lookup.weight].nbytes
        # Rows are as good as random: how much of the table is around one of them.
        rows = lookup.rows * (self._number + 1)  # each micro-batch looks up others
        return int(-math.expm1(-rows * _FAULT_AROUND_NBYTES / table) * table)

    def look_up_again(self, passes: int) -> None:
        """So many passes more have looked up rows of their own."""
        self._number += passes
        for lookup in self._program.lookups:
            known = self._looked_up.get(lookup.weight)
            if known is not None and (seen := self._seen_nbytes(lookup)) > known:
                self._world.memory.add_pages_beside(seen - known)
                self._looked_up[lookup.weight] = seen


def _gradient_of(weight: SimWeight, program: Program) -> _Gradient:
    name = weight.name
    rows_nbytes = program.row_gradients.get(name)
    pages = 0.0
    if rows_nbytes is not None:  # they are as good as random
        rows = sum(lookup.rows for lookup in program.lookups if lookup.weight == name)
        touched, pages = max(rows, rows_nbytes / PAGE), weight.nbytes / PAGE
        pages *= -math.expm1(-touched / pages)
    return _Gradient(weight, rows_nbytes, pages, name not in program.census.lookups)


def _do_nothing(_which: int) -> None:
    """Behind backward: memory comes and goes."""
