"""Shares of a device's budget for each bucket of batches, as ``buckets`` tells them apart. Pure.

[Note: the device's bounds] What is on a device in a pass is fixed, or allowed by the plan, or made
by kernels of the batch. The last grows by no more than ``Form.growth_over`` tells, whatever part of
a peak it is: so a peak, with all but what is fixed taken for the batch's, bounds a larger batch. A
batch that none before covers has room by that bound before its forward, at worst that of the plan
with which the first step began. One that a batch before covers has its plan: it fits that one.

The peak is the highest since the beginning, for a measurement that begins anew would take the
user's own from ``torch.cuda.max_memory_allocated``. So a bucket that is seen late grows by less.
"""

from dataclasses import dataclass

from offload.swap.buckets import Form
from offload.swap.census import Census
from offload.swap.device_plan import DevicePlan, grow

_GROWING_STEPS = 4  # each hands out half of what the one before has left


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """What steps of one bucket have shown.

    Attributes:
        form: of the largest batch.
        peak_nbytes: when the first step with it had ended, of all until then.
        steps: that have ended, of those that may grow the plan.
    """

    form: Form
    peak_nbytes: int
    plan: DevicePlan
    steps: int = 1


class DeviceBuckets:
    """Plans of a device by bucket: ``plan_for`` each pass, ``tell`` it of each step.

    Args:
        first: the plan before any peak is known.
    """

    def __init__(self, first: DevicePlan, census: Census) -> None:
        self._first = first
        self._census = census
        self._known: dict[Form, _Known] = {}
        self._passed: dict[Form, tuple[Form, DevicePlan]] = {}  # in the present step

    def plan_for(self, form: Form) -> DevicePlan:
        """The plan of a pass with a batch of ``form`` that begins. See [Note: the device's bounds].

        More room than a smaller batch that is known has is never given to a larger one.
        """
        plan = self._plan_of(form)
        before, _ = self._passed.get(form.rounded(), (form, plan))
        if form.nbytes >= before.nbytes:
            self._passed[form.rounded()] = form, plan
        return plan

    def _plan_of(self, form: Form) -> DevicePlan:
        known = self._known.values()
        if covering := [one.plan for one in known if one.form.covers(form)]:
            return max(covering, key=lambda plan: plan.window_nbytes + plan.activations_nbytes)
        needed = [self._needed_nbytes(one, form) for one in known if one.form.is_like(form)]
        if not needed:
            return self._first
        return grow(self._first, self._census, peak_nbytes=min(needed))

    def _needed_nbytes(self, known: _Known, form: Form) -> int:
        """What a batch of ``form`` takes at most with the first plan."""
        growth = known.form.joined(form).growth_over(known.form)
        return known.peak_nbytes + int(
            (growth - 1) * (known.peak_nbytes - self._first.fixed_nbytes)
        )

    def tell(self, peak_nbytes: int) -> DevicePlan | None:
        """A step has ended, and until then the device has held ``peak_nbytes`` at most.

        Returns:
            The plan of its last bucket from now on; None where no pass has begun.
        """
        plan = None
        for bucket, (form, used) in self._passed.items():
            known = self._known.get(bucket)
            if known is None or not known.form.covers(form):
                grown = grow(used, self._census, peak_nbytes=peak_nbytes)
                known = _Known(form=form, peak_nbytes=peak_nbytes, plan=grown)
            elif known.steps < _GROWING_STEPS:
                grown = grow(used, self._census, peak_nbytes=peak_nbytes)
                known = _Known(
                    form=known.form,
                    peak_nbytes=known.peak_nbytes,
                    plan=grown,
                    steps=known.steps + 1,
                )
            self._known[bucket] = known
            plan = known.plan
        self._passed.clear()
        return plan
