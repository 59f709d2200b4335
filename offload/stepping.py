"""How ``optimizer.step()`` becomes a streamed step without the script's knowing.

[Note: borrowed step] A step pre-hook runs the streamed step, then lends the optimizer an empty
list of groups, so that its own ``step`` finds nothing to do; a post-hook gives the groups back.
Whatever wraps ``step`` (schedulers, scalers, Accelerate) stays in place and sees a normal call.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from offload.swap.backward_step import BackwardStep
from offload.swap.forward_step import ForwardStep
from offload.swap.optimizer import StreamedOptimizer
from offload.swap.torch_seams import scale_on_host


class StepHooks:
    """Installs the step hooks of one optimizer; ``remove`` takes them off again.

    Args:
        before_step: called when the gradients are complete; may refuse the step.
        after_step: called with (seconds in the optimizer, seconds of it spent waiting).
        in_backward: has stepped most parameters by the time that ``step`` is called.
        in_forward: steps most parameters when ``step`` has returned.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        streamed: StreamedOptimizer,
        before_step: Callable[[], None],
        after_step: Callable[[float, float], None],
        in_backward: BackwardStep | None = None,
        in_forward: ForwardStep | None = None,
    ) -> None:
        self._optimizer = optimizer
        self._streamed = streamed
        self._before_step = before_step
        self._after_step = after_step
        self._in_backward = in_backward
        self._in_forward = in_forward
        self._groups: list[dict[str, Any]] | None = None
        self._times = (0.0, 0.0)
        self._stepping = False
        self._before = optimizer.register_step_pre_hook(self._borrow)
        self._after = optimizer.register_step_post_hook(self._give_back)

    def be_innermost(self) -> None:
        """Let the user's pre-hooks run before ours and their post-hooks after ours."""
        if self._stepping:
            return  # a closure's forward: the hooks are being iterated over
        before: Any = self._optimizer._optimizer_step_pre_hooks  # OrderedDicts, typed as dict
        after: Any = self._optimizer._optimizer_step_post_hooks
        before.move_to_end(self._before.id)
        after.move_to_end(self._after.id, last=False)

    def _borrow(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._stepping = True
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            args, kwargs = (
                (args[0], lambda: loss),
                {key: value for key, value in kwargs.items() if key != "closure"},
            )
        if self._in_forward is not None:
            self._in_forward.finish()
        self._before_step()
        scale_on_host(optimizer)
        journal = self._streamed.weights.journal
        began_s, waited_s = time.perf_counter(), journal.totals.stall_s
        self._streamed.weights.trace.end()
        self._streamed.gradients.poll()
        spent_s = stalled_s = 0.0
        inside = self._in_backward or self._in_forward
        if inside is None:
            self._streamed.weights.evict_streaming()
        else:
            inside.check_whole()
        # A step must not meet a fetch of its weight: old bytes would land over new ones.
        self._streamed.weights.settle()
        if inside is not None:
            spent_s, stalled_s = inside.end_step()
        self._streamed.step()
        self._times = (
            spent_s + time.perf_counter() - began_s,
            stalled_s + journal.totals.stall_s - waited_s,
        )
        self._groups, optimizer.param_groups = optimizer.param_groups, []
        return args, kwargs

    def _give_back(
        self, optimizer: Optimizer, _args: tuple[Any, ...], _kwargs: dict[str, Any]
    ) -> None:
        assert self._groups is not None
        self._stepping = False
        optimizer.param_groups, self._groups = self._groups, None
        self._after_step(*self._times)
        if self._in_forward is not None:
            self._in_forward.start()

    def remove(self) -> None:
        """Take the hooks off."""
        self._before.remove()
        self._after.remove()
