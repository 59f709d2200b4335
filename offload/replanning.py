"""The plan of a run, held against the peaks that its steps show: one for each bucket of batches.

[Note: plans by buckets] The first step tells what its batch needs, and what is spare is handed out.
Other batches need more or less (``swap.buckets`` [Note: buckets]), so what stays in memory is
decided anew before each forward: by the bucket's own plan, once its passes have been measured;
before that by the plan of any batch that bounds it, less all that this one may need more. So a
budget holds for lengths that were never seen. What has to leave memory leaves before the forward,
and what the next batch has room for comes back as it is used: a weight that stays for short batches
only is read once for each change, not three times a step.

A peak below an earlier one is known by the governor's glances alone, a hundred a second. So a
bucket has a larger plan than the one that bounds it only after the highest of several passes.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from offload.allocator.errors import BudgetError
from offload.allocator.units import format_nbytes
from offload.swap.buckets import (
    Form,
    Taken,
    fitting_form,
    least_nbytes,
    most_nbytes,
)
from offload.swap.census import Census
from offload.swap.governor import Governor
from offload.swap.plan import (
    MARGIN_NBYTES,
    OVERHEAD_NBYTES,
    VARIATION_NBYTES,
    Plan,
    enough_nbytes,
    grow,
    shrink,
    streaming,
)
from offload.swap.weights import WeightSwapper

if TYPE_CHECKING:
    from offload.swap.activations import ActivationCache
    from offload.swap.memory_step import MemoryStep

_WORKSPACES_NBYTES = 64 << 20  # what libraries take at their first calls, with room to spare
_GLANCED_PASSES = 3  # before a peak that the kernel has not measured is believed


class Replanner:
    """Keeps resident, and lets move ahead, what the measured peaks leave room for.

    Args:
        apply: called with each new plan: sets the limits of what moves.

    Attributes:
        plan: the shares of the budget, as they are now.
        memory: keeps gradients and states; None where nothing is stepped.
        activations: saved tensors in host memory; None where they are elsewhere.
        bucket: of the largest pass since the last step.
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
        self.activations: ActivationCache | None = None
        self.bucket = Form()
        self._states_nbytes: Mapping[str, int] = {}  # known when the first step has made them
        self._plans: dict[Form, Plan] = {}  # by bucket, as is what was taken
        self._taken: dict[Form, Taken] = {}
        self._step_nbytes = sys.maxsize  # the least that a step took, its optimizer's part included
        self._allowed_nbytes: dict[Form, int] = {}  # that part, where it is more than a batch takes
        self._now: Form | None = None  # the pass that is measured
        self._is_proven = False  # the present step's batches are known to fit
        self._peak_nbytes = 0  # of the present step's passes, with nothing resident
        self._steps = 0
        self._may_grow = True
        self._is_untypical = False

    @property
    def bucket_name(self) -> str:
        """Of the largest batch since the last step; empty where it is not known."""
        return str(self.bucket) if self.bucket.shapes else ""

    # Before a pass.

    def begin_pass(self, form: Form) -> None:
        """A pass with a batch of ``form`` begins: the plan is its bucket's from now on.

        Raises:
            BudgetError: such a batch can't fit; nothing was computed, and smaller ones go on.
            TierIOError: what has to leave memory could not be written.
        """
        self._end_pass()
        if self._steps and self._may_grow:
            self._refuse(form)
            self._change_to(self._plan_of(form))
        self._is_proven &= self._is_bounded(form)
        if form.trains and form.nbytes >= self.bucket.nbytes:
            self.bucket = form.rounded()
        self._now = form

    def tell_form(self, form: Form) -> None:
        """The pass that has begun is one of a batch of ``form``, which was not known then."""
        self._now, self.bucket = form, form.rounded()

    def _plan_of(self, form: Form) -> Plan:
        """See [Note: plans by buckets]."""
        bucket = form.rounded()
        if bucket in self._plans and self._taken[bucket].form.covers(form):
            return self._plans[bucket]
        bounding = [
            plan for bucket, plan in self._plans.items() if self._taken[bucket].form.covers(form)
        ]
        if bounding:
            return max(bounding, key=lambda plan: plan.kept_nbytes + plan.ahead_nbytes)
        baseline = self.plan.baseline_nbytes
        known = [
            (most_nbytes(taken, form, baseline), taken, plan)
            for bucket, plan in self._plans.items()
            if (taken := self._taken[bucket]).form.is_like(form)
        ]
        if not known:
            return self._first
        most, taken, plan = min(known, key=lambda item: item[0])
        return shrink(
            plan,
            self._census,
            excess_nbytes=max(most - taken.nbytes, 0),
            states_nbytes=self._states_nbytes,
        )

    def _refuse(self, form: Form) -> None:
        """Raise if by [Note: bounds] of ``buckets`` no plan has room for a batch of ``form``."""
        least, taken = self._least_of(form)
        budget, baseline = self.plan.budget_nbytes, self.plan.baseline_nbytes
        if taken is None or least <= budget:
            return
        needed = least + VARIATION_NBYTES
        raise BudgetError(
            f"the host budget of {format_nbytes(budget)} is too small for a batch of {form} "
            f"({form.nbytes} bytes of inputs): it takes {format_nbytes(least)} ({least} bytes) or "
            f"more, for {taken.form} took {format_nbytes(taken.least_nbytes)} with no "
            f"activations kept. Nothing was computed. Batches up to "
            f"{fitting_form(taken, form, baseline, budget)} fit in any case; or "
            f"take a budget of host={_mib_ceil(needed)}MiB or more",
            needed_nbytes=needed,
            budget_nbytes=budget,
        )

    def _least_of(self, form: Form) -> tuple[int, Taken | None]:
        """What ``form`` takes at least, and the batch that tells; nothing, if none does."""
        own = self._taken.get(form.rounded())
        if own is not None and form.covers(own.form):
            return own.least_nbytes, own
        if self._is_bounded(form):
            return 0, None
        none = Taken(form=Form(), nbytes=self._fixed_nbytes, least_nbytes=0)
        known = [taken for taken in self._taken.values() if form.covers(taken.form)]
        bounds = [
            (least_nbytes(smaller, taken, form), taken)
            for taken in known
            for smaller in (none, *known)
            if 2 * smaller.form.nbytes <= taken.form.nbytes
            and (smaller is none or taken.form.covers(smaller.form))
        ]
        return max(bounds, key=lambda bound: bound[0], default=(0, None))

    def _is_bounded(self, form: Form) -> bool:
        """Whether a batch that needs no less than one of ``form`` has run."""
        return any(taken.form.covers(form) for taken in self._taken.values())

    @property
    def _fixed_nbytes(self) -> int:
        """More than a batch of no bytes would take with nothing resident."""
        plan = self._first
        moving = plan.working_nbytes + plan.ahead_nbytes + plan.staging_nbytes
        return plan.baseline_nbytes + OVERHEAD_NBYTES + moving + _WORKSPACES_NBYTES

    def _change_to(self, plan: Plan) -> None:
        if plan != self.plan:
            self._use(plan, pending=True)
            self._governor.restart_peak()  # the last plan's is none of this batch

    # What passes take.

    def check_fits(self) -> None:
        """Passes of batches like none before have shown what they need: stop if it is too much.

        No step has been made of them, so nothing is lost.

        Raises:
            BudgetError: naming a budget that fits.
        """
        self._note_peak()
        peak, budget = self._peak_nbytes, self.plan.budget_nbytes
        if not self._is_proven and peak + VARIATION_NBYTES > budget:
            self._end_pass()
            self._is_proven, self._peak_nbytes = self._steps > 0, 0
            needed = enough_nbytes(self.plan, peak)
            raise BudgetError(
                f"the host budget of {format_nbytes(budget)} is too small: with this batch, "
                f"forward and backward took {format_nbytes(peak)}. Take a smaller batch, or a "
                f"budget of host={_mib_ceil(needed)}MiB",
                needed_nbytes=needed,
                budget_nbytes=budget,
            )

    def finish_step(self) -> None:
        """A step has ended: its peak tells what can stay resident."""
        form, self._now = self._now or Form(), None
        self._is_proven, self.bucket = True, Form()
        if self._is_untypical:
            self._is_untypical, self._peak_nbytes = False, 0
            self._governor.restart_peak()
            return
        self._steps += 1
        if self._steps == 1 and self.memory is not None:
            self._states_nbytes = self.memory.nbytes()
        taken = self._measure(form)
        self._step_nbytes = min(self._step_nbytes, taken.nbytes)
        if not self._may_grow:
            return
        self._peak_nbytes = 0
        self._learn(form.rounded(), taken)
        if self._steps == 1:  # of micro-batches there may be several buckets
            for bucket in [bucket for bucket in self._taken if bucket not in self._plans]:
                self._learn(bucket, self._taken[bucket])
        plan = self._plans.get(form.rounded(), self.plan)
        if plan != self.plan:
            self._use(plan)

    def _end_pass(self) -> None:
        """Another pass begins: what was measured until now is what the last one takes."""
        form, self._now = self._now, None
        if form is None:
            return
        taken = self._measure(form)
        if self._steps and self._may_grow:
            self._learn(form.rounded(), taken)

    def _measure(self, form: Form) -> Taken:
        """What a batch of ``form`` has taken since the measurement of the peak began."""
        peak, is_exact = self._governor.peak()
        self._note_peak()
        self._governor.restart_peak()
        taken = peak - self._held_nbytes()
        kept = self.activations.take_peak() if self.activations is not None else 0
        now = Taken(
            form=form,
            nbytes=taken,
            least_nbytes=max(taken - kept - self.plan.ahead_nbytes, 0),
            is_exact=is_exact,
        )
        bucket = form.rounded()
        known = self._taken.get(bucket)
        self._taken[bucket] = now if known is None else known.joined(now)
        return now

    def _note_peak(self) -> None:
        if not self.plan.resident:
            self._peak_nbytes = max(self._peak_nbytes, self._governor.peak_nbytes)

    def _held_nbytes(self) -> int:
        """Bytes in memory because the plan keeps them there."""
        weights = self._weights.weights.values()
        held = sum(weight.nbytes for weight in weights if weight.resident and weight.in_memory)
        return held + (self.memory.held_nbytes() if self.memory is not None else 0)

    def _learn(self, bucket: Form, now: Taken) -> None:
        """Make the plan of ``bucket``, or change it, by its last pass, which took ``now``."""
        most, states = self.plan.budget_nbytes - MARGIN_NBYTES // 2, self._states_nbytes
        plan = self._plans.get(bucket)
        if plan is None or self._step_nbytes < self._allowed_nbytes.get(bucket, 0):
            taken = self._taken[bucket]
            is_over = now.nbytes + self.plan.kept_nbytes > most
            is_known = taken.is_exact or taken.passes >= _GLANCED_PASSES
            if not (is_over or is_known or self._steps == 1):
                return
            peak = max(taken.nbytes, self._step_nbytes)
            self._allowed_nbytes[bucket] = peak if peak > taken.nbytes else 0
            plan = grow(streaming(self.plan), self._census, peak_nbytes=peak, states_nbytes=states)
        ahead = max(plan.ahead_nbytes - self.plan.ahead_nbytes, 0)
        if self._steps > 1 and (excess := now.nbytes + plan.kept_nbytes + ahead - most) > 0:
            plan = shrink(plan, self._census, excess_nbytes=excess, states_nbytes=states)
        self._plans[bucket] = plan

    def _use(self, plan: Plan, *, pending: bool = False) -> None:
        self.plan = plan
        self._apply(plan)
        self._keep(plan.resident, plan.resident_states, pending=pending)

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
        self.plan, self._first, *plans = (
            dataclasses.replace(plan, in_turns_nbytes=nbytes)
            for plan in (self.plan, self._first, *self._plans.values())
        )
        self._plans = dict(zip(self._plans, plans, strict=True))
        if is_new and self._steps and self._may_grow:
            self._plans.clear()
            self._allowed_nbytes.clear()
            self._taken.clear()
            self._steps, self._step_nbytes = 0, sys.maxsize
            self._use(self._first)

    def leave_out(self) -> None:
        """The present step is none like those to come: its peak tells nothing."""
        self._is_untypical = True

    def keep_streaming(self) -> None:
        """Keep nothing resident from now on, whatever the budget has to spare."""
        self._may_grow = False
        self._keep((), ())

    def _keep(
        self, weights: Iterable[str], states: Iterable[str], *, pending: bool = False
    ) -> None:
        if self.memory is not None:
            self.memory.keep(states, pending=pending)
        self._weights.keep(weights)
        if pending:  # what the last plan kept has to leave before the pass, not within it
            self._weights.give_up(self._weights.streaming_nbytes - self._weights.window_nbytes)


def _mib_ceil(nbytes: int) -> int:
    return -(-nbytes // (1 << 20))
