"""The optimizer steps inside backward: each parameter as soon as its gradient is complete.

[Note: step in backward] When autograd has accumulated the last part of a gradient, the weight and
the gradient are both in memory. Stepping there and then (LOMO, arXiv 2306.09782, section 3.1; the
optimizer's states come and go by tiles) saves the gradient's trip to the drive and back and one
read of the weight: 12 of 40 bytes that a parameter of an Adam-like step moves. And the moves hide
behind the backward of the layers before it.

Autograd has used a weight for the last time when its gradient is complete, so no kernel reads what
is stepped; a backward that does so all the same, of a detached alias of the weight, is refused. It
is stepped on the training thread, at the ends of accumulations, and on a thread of
ours while kernels run (``beside`` [Note: beside kernels]); lanes only move bytes. Where backward
ends, everything has been stepped, written and published: the user's code never meets a half of a
step. The price is that nothing may stand between backward and step: no clipping by a global norm,
no loss scale, no skipped step. What tries to meets a ``ConsumedGradient``, which says so.
"""

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from offload.allocator.errors import StepInterruptedError
from offload.swap.consumed import consumed_gradient
from offload.swap.optim_kinds import Kind
from offload.swap.optimizer import StreamedOptimizer
from offload.swap.step_targets import Target


class BackwardStep:
    """Steps parameters as their gradients arrive; called on the training thread only.

    Args:
        accumulation_steps: backward passes that make one step.
        limit_nbytes: bytes of gradients that may wait for their step, and of weights whose
            gradients are in scratch (back-pressure).
        room: bytes left until the budget, as the resident set shows it.
        before_step: called before the first parameter of a step; may refuse it.
    """

    def __init__(
        self,
        streamed: StreamedOptimizer,
        *,
        accumulation_steps: int,
        limit_nbytes: int,
        room: Callable[[], int],
        before_step: Callable[[], None],
    ) -> None:
        self._streamed = streamed
        self._weights = streamed.weights
        self._journal = streamed.weights.journal
        self._pipeline = streamed.pipeline
        self._accumulation_steps = accumulation_steps
        self.limit_nbytes = limit_nbytes
        self._room = room
        self._before_step = before_step
        self._arrived: Counter[nn.Parameter] = Counter()  # parts of the present gradient
        self._stepped: set[nn.Parameter] = set()  # since the last step
        self._stepped_names: set[str] = set()
        streamed.weights.before_use = self._check_use
        streamed.weights.is_stepped = self._is_stepped
        self._groups: dict[nn.Parameter, dict[str, Any]] = {}  # of the present step
        self._order: list[nn.Parameter] = []  # in which the present step's gradients came
        self._next: dict[nn.Parameter, nn.Parameter] = {}  # the gradient that came after, last time
        self._pending_nbytes = 0  # what waits in memory for parameters that are not stepped yet
        self._in_backward = False
        self._spent_s = self._stalled_s = 0.0

    def take(self, parameter: nn.Parameter, *, fresh: bool) -> bool:
        """A gradient has been accumulated; True if it was used up for the step.

        Args:
            fresh: there was none before: this is its first part.

        Raises:
            StepInterruptedError: one more than the step is made of.
            TierIOError: a read or write failed.
        """
        self.check_whole()
        self._arrived[parameter] = 1 if fresh else self._arrived[parameter] + 1
        name = self._streamed.name_of(parameter)
        if parameter in self._stepped:
            raise StepInterruptedError(
                f"a gradient of {name} {tuple(parameter.shape)} came before optimizer.step(), but "
                f"it was stepped already, after {self._accumulation_steps} of them: set "
                "accumulation_steps to the number of backward passes of one step, or "
                "step_in_backward=False"
            )
        if self._arrived[parameter] < self._accumulation_steps:
            with self._timed():
                self._pipeline.advance()
            return False
        group = self._group_of(parameter)
        if group is None or not self._streamed.streams(parameter):
            return False
        self._in_backward = True
        self._stepped.add(parameter)
        self._stepped_names.add(name)
        self._order.append(parameter)
        with self._timed():
            self._step(group, parameter, name)
            self._make_room(self._coming_nbytes(parameter))
        return True

    def _check_use(self, names: Sequence[str]) -> None:
        """Refuse what would read new values, or half of them, where memory has the old ones.

        Raises:
            StepInterruptedError: this backward has stepped one of ``names``.
        """
        for name in names:
            if self._is_stepped(name):
                raise StepInterruptedError(
                    f"backward reads {name} after it has stepped it: the model uses it without "
                    "its gradient, too, as with detach() or .data, before it is used with one. Set "
                    "step_in_backward=False"
                )

    def _is_stepped(self, name: str) -> bool:
        """Whether the backward that runs has begun to step it."""
        inside = self._in_backward and torch._C._current_graph_task_id() != -1
        return inside and name in self._stepped_names

    def _group_of(self, parameter: nn.Parameter) -> dict[str, Any] | None:
        if not self._groups:
            self._before_step()
            self._streamed.begin()
            self._groups = {
                parameter: group
                for group in self._streamed.optimizer.param_groups
                for parameter in group["params"]
            }
        return self._groups.get(parameter)

    def _step(self, group: dict[str, Any], parameter: nn.Parameter, name: str) -> None:
        if self._streamed.memory.takes(parameter):
            self._streamed.memory.step(group, [parameter])
            self._streamed.memory.end_step()
            parameter.grad = consumed_gradient(parameter, name)
            return
        if self._streamed.kind is Kind.PER_PARAMETER:
            self._streamed.step_in_memory(group, parameter)
            parameter.grad = consumed_gradient(parameter, name)
            return
        target = self._streamed.target(group, parameter, self._written, stays=True)
        self._weights.hold(target.weight)
        nbytes = _waiting_nbytes(target)
        target.stepped = partial(self._used_up, nbytes)
        self._pending_nbytes += nbytes
        self._pipeline.add(group, [target], beside=True)
        parameter.grad = consumed_gradient(parameter, name)
        self._pipeline.advance()
        while self._pending_nbytes > self.limit_nbytes:
            self._pipeline.advance_one()

    def _coming_nbytes(self, parameter: nn.Parameter) -> int:
        """Of the gradient that autograd makes next: nobody asks before it takes that memory."""
        if (coming := self._next.get(parameter)) is not None:
            return 0 if coming in self._streamed.gradients.rows.came else coming.nbytes
        unseen = self._groups.keys() - self._stepped if not self._next else ()
        return max((other.nbytes for other in unseen if other.requires_grad), default=0)

    def make_room(self, nbytes: int) -> None:
        """Have ``nbytes`` left in backward, as far as tiles that go on and weights reach.

        Raises:
            TierIOError: a read or write failed.
        """
        with self._timed():
            self._make_room(nbytes)

    def _make_room(self, nbytes: int) -> None:
        """Have ``nbytes`` left, by what costs the least time first.

        Raises:
            TierIOError: a read or write failed.
        """
        while (missing := nbytes - self._unclaimed_nbytes()) > 0 and self._pipeline.is_busy:
            self._pipeline.advance_one()
        if missing > 0:
            self._pipeline.trim()
            self._weights.give_up(nbytes - self._unclaimed_nbytes())

    def _unclaimed_nbytes(self) -> int:
        """Bytes left until the budget that no move on its way will take."""
        return self._room() - self._weights.landing_nbytes - self._pipeline.landing_nbytes

    def _used_up(self, nbytes: int, target: Target) -> None:
        self._pending_nbytes -= nbytes
        target.gradient = torch.empty(0)

    def _written(self, target: Target) -> None:
        self._streamed.publish(target)
        self._weights.let_go(target.weight)

    def end_backward(self) -> None:
        """Backward gives control to the user's code: finish what it began.

        Raises:
            TierIOError: a read or write failed.
        """
        if not self._in_backward:
            return
        with self._timed():
            self._pipeline.finish()
        self._in_backward = False

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Counts to what ``end_step`` returns."""
        began_s, stalled_s = time.perf_counter(), self._journal.totals.stall_s
        yield
        self._spent_s += time.perf_counter() - began_s
        self._stalled_s += self._journal.totals.stall_s - stalled_s

    def check_whole(self) -> None:
        """Raise unless the last backward ended.

        Raises:
            StepInterruptedError: it raised, after it had stepped some parameters.
        """
        if self._in_backward and torch._C._current_graph_task_id() == -1:
            raise StepInterruptedError(
                f"backward did not end, but {len(self._stepped)} weights had been stepped in it: "
                "they are of no step now. Start the process again: it continues from the last "
                "finished step"
            )

    def end_step(self) -> tuple[float, float]:
        """``optimizer.step()`` was called; the seconds spent in backward since the last one.

        Returns:
            Seconds in all, and those of it spent waiting for lanes.
        """
        spent = self._spent_s, self._stalled_s
        self._next = dict(itertools.pairwise(self._order))
        self._order.clear()
        self._arrived.clear()
        self._stepped.clear()
        self._stepped_names.clear()
        self._groups = {}
        self._spent_s = self._stalled_s = 0.0
        return spent

    def abandon(self) -> None:
        """Let go of what an error left in flight."""
        self._pipeline.abandon()


def _waiting_nbytes(target: Target) -> int:
    """What waits in memory for the step of ``target``: its gradient or, if that is at home, it."""
    if target.home is None:
        return target.gradient.nbytes
    streams = target.weight.in_memory and not target.weight.resident
    return target.weight.nbytes if streams else 0
