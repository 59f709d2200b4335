"""An optimizer that was taken over: it steps by tiles, with its states in the store."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from offload.allocator.errors import ConfigError, StepInterruptedError
from offload.progress import pack_groups, restore_groups
from offload.runtime import Runtime
from offload.sharing import pack_share, settle_share, unpack_share
from offload.stepping import StepHooks
from offload.swap.backward_step import BackwardStep
from offload.swap.device_step import DeviceStep
from offload.swap.forward_step import ForwardStep
from offload.swap.gradients import GradientSwapper
from offload.swap.loading import ExactLoading
from offload.swap.masters import master_of
from offload.swap.optimizer import StreamedOptimizer
from offload.swap.plan import Plan
from offload.swap.states import StateKeeper
from offload.swap.weights import Weight, WeightSwapper

if TYPE_CHECKING:
    from fractions import Fraction


class Optimizing:
    """The optimizer of one model, until ``remove`` and ``abandon``.

    Args:
        by_parameter: the weight behind each parameter.
        steps: finished so far.
        check_step: called when the gradients are complete, or the first is; may refuse the step.
        before_step: called when they are complete; checks, too.
        after_step: called with (seconds in the optimizer, seconds of it spent waiting).
        tables: weights of which modules look single rows up.
        device: steps the share of the tiles that ``settle_share`` gives it.

    Attributes:
        keeper: of the states.
        streamed: steps by tiles, and in memory what the plan keeps there.
        in_backward: steps while backward runs; None unless that was asked for.
        in_forward: steps while the next forward runs; None unless that was asked for.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        runtime: Runtime,
        plan: Plan,
        weights: WeightSwapper,
        gradients: GradientSwapper,
        by_parameter: dict[nn.Parameter, Weight],
        *,
        steps: Callable[[], int],
        check_step: Callable[[], None],
        before_step: Callable[[], None],
        after_step: Callable[[float, float], None],
        tables: frozenset[str],
        device: DeviceStep | None = None,
    ) -> None:
        self.optimizer = optimizer
        self._runtime = runtime
        config = runtime.config
        names = {
            parameter: weight.name
            for parameter, weight in by_parameter.items()
            if parameter is weight.parameters[0]
        }
        self.keeper = StateKeeper(
            runtime.store,
            runtime.governor,
            optimizer,
            names,
            runtime.chunk_numel,
            precision=runtime.precision,
            steps=steps,
        )
        self.streamed = StreamedOptimizer(
            optimizer,
            weights,
            by_parameter,
            gradients,
            self.keeper,
            runtime.journal,
            chunk_numel=runtime.chunk_numel,
            staging_nbytes=plan.staging_nbytes,
            gradients_wait=not config.step_in_backward or config.accumulation_steps > 1,
            device=device,
        )
        self._kept_share: Fraction | None = None  # that of the commit which is continued
        self._loading = ExactLoading(optimizer, runtime.precision.has_master)
        self.in_backward: BackwardStep | None = None
        if config.step_in_backward:
            self.in_backward = gradients.stepper = BackwardStep(
                self.streamed,
                accumulation_steps=config.accumulation_steps,
                limit_nbytes=plan.gradients_nbytes,
                room=runtime.governor.room,
                before_step=check_step,
            )
        self.in_forward: ForwardStep | None = None
        if config.step_in_forward:
            self.in_forward = ForwardStep(self.streamed, tables=tables)
        self._hooks = StepHooks(
            optimizer,
            self.streamed,
            before_step,
            after_step,
            self.in_backward,
            self.in_forward,
        )

    def set_limits(self, plan: Plan) -> None:
        """Let tiles and gradients wait as ``plan`` has room for them."""
        self.streamed.pipeline.staging.limit_nbytes = plan.staging_nbytes
        if self.in_backward is not None:
            self.in_backward.limit_nbytes = plan.gradients_nbytes

    def before_pass(self, *, trains: bool) -> None:
        """A pass begins, one with gradients if it ``trains``.

        Raises:
            StepInterruptedError: backward was interrupted in its steps.
        """
        self._check_inside()
        if self.in_forward is not None:
            self.in_forward.begin_pass(trains=trains)
        self._hooks.be_innermost()

    def check_whole(self) -> None:
        """Raise unless every parameter is of the same step.

        Raises:
            StepInterruptedError: the last step, or backward in its steps, was interrupted.
        """
        self._check_inside()
        self.streamed.memory.check_whole()

    def is_whole(self) -> bool:
        """Whether every parameter is of the same step."""
        try:
            self.check_whole()
        except StepInterruptedError:
            return False
        return True

    def _check_inside(self) -> None:
        if (inside := self.in_backward or self.in_forward) is not None:
            inside.check_whole()

    @property
    def is_pending(self) -> bool:
        """Whether a step has been put off until the next forward, and is not finished."""
        return self.in_forward is not None and self.in_forward.is_pending

    def finish(self) -> None:
        """Finish a step that was put off.

        Raises:
            TierIOError: a read or write failed.
        """
        if self.in_forward is not None:
            self.in_forward.finish()

    def settings(self) -> dict[str, Any]:
        """Write the states that the store has not; returns what a commit keeps beside states."""
        self.keeper.absorb_all()
        return {"groups": pack_groups(self.optimizer), **pack_share(self.streamed)}

    def states(self) -> dict[str, Any]:
        """What a commit keeps of states, all of which the store has."""
        return {"optimizer": self.keeper.record()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from the entries of a commit record."""
        self.keeper.restore(state["optimizer"])
        restore_groups(self.optimizer, state["groups"])
        self.streamed.masters.adopt()
        self._kept_share = unpack_share(state)

    def settle_share(self) -> None:
        """Choose who steps which tiles, once; call it behind ``restore``.

        Raises:
            CapacityError: the device has no room for the tiles that it is measured with.
        """
        settle_share(self.streamed, self._runtime, self._kept_share)

    def master(self, name: str, weight: nn.Parameter | None) -> torch.Tensor:
        """The float32 master of ``weight``, whose name is ``name``, as a copy.

        Raises:
            ConfigError: no masters are kept, or none of that weight.
        """
        halves = self.low_halves()
        if weight is None or weight.data_ptr() not in halves:
            raise ConfigError(f"{name!r} is no bfloat16 parameter with a master")
        return master_of(weight, halves[weight.data_ptr()])

    def low_halves(self) -> Mapping[int, torch.Tensor | None]:
        """The lower halves of masters, by the address of the weight.

        Raises:
            ConfigError: no masters are kept.
        """
        if self._runtime.precision.masters == "none":
            raise no_masters()
        return self.streamed.masters.low_halves()

    def remove(self) -> None:
        """Let the optimizer step by itself again."""
        if self.in_forward is not None:
            self.in_forward.remove()
        self._hooks.remove()
        self._loading.remove()

    def abandon(self) -> None:
        """No backward steps any more: what waits for its step stays a gradient."""
        if self.in_backward is not None:
            self.in_backward.abandon()


def no_masters() -> ConfigError:
    """Masters were asked for that nobody keeps."""
    return ConfigError("no masters are kept: attach with config={'master_weights': 'fp32'}")
