"""The optimizer step: which parameters go by tiles, which whole, which are stepped in memory.

[Note: a step is all or nothing] New versions go to blocks that the last commit does not name
(``tiers.store`` [Note: alternating slots]), so an error or an interrupt in the middle of a step
leaves the last commit whole; the training process itself can't go on from there.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from offload.allocator.errors import UnsupportedError
from offload.swap.consumed import ConsumedGradient
from offload.swap.device_step import DeviceStep
from offload.swap.gradients import GradientSwapper
from offload.swap.master_keeper import MasterKeeper
from offload.swap.masters import MASTER_LOW
from offload.swap.memory_step import MemoryStep
from offload.swap.optim_kinds import Kind, kind_of, state_specs, step_on
from offload.swap.pipeline import TilePipeline
from offload.swap.states import SMALL_NUMEL, StateKeeper, is_large
from offload.swap.step_targets import Target, Version
from offload.swap.visits import HostPart, State
from offload.swap.weights import Weight, WeightSwapper
from offload.tiers.journal import Journal


class StreamedOptimizer:
    """Runs the step of any optimizer on weights, gradients and states that live on files.

    Args:
        optimizer: the user's, whose groups are read anew at each step.
        by_parameter: the parameters whose weights Offload moves.
        chunk_numel: elements of one tile.
        staging_nbytes: bytes of tiles in flight.
        gradients_wait: as in ``MemoryStep``.
        device: steps its share of the tiles, and if that is all of them, small parameters, too.

    Attributes:
        memory: steps in memory what the plan keeps there.
        masters: keeps those of bfloat16 weights.
        put_off: takes parameters whose tiles it steps later; returns those to be stepped now.

    Raises:
        UnsupportedError: the optimizer's step can't be cut, or its states not be rounded.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        weights: WeightSwapper,
        by_parameter: dict[nn.Parameter, Weight],
        gradients: GradientSwapper,
        keeper: StateKeeper,
        journal: Journal,
        *,
        chunk_numel: int,
        staging_nbytes: int,
        gradients_wait: bool = True,
        device: DeviceStep | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.device = device
        self.kind = kind_of(optimizer)
        self.weights = weights
        self.gradients = gradients
        self.keeper = keeper
        self.masters = MasterKeeper(keeper, weights)
        self._by_parameter = by_parameter
        self._known: set[torch.Tensor] | None = None  # had a state as the step began
        self.put_off: Callable[[dict[str, Any], list[nn.Parameter]], Sequence[nn.Parameter]] = (
            lambda _group, parameters: parameters
        )
        self.pipeline = TilePipeline(
            weights.store.tier,
            gradients,
            journal,
            optimizer,
            chunk_numel=chunk_numel,
            staging_nbytes=staging_nbytes,
            device=device,
        )
        self.memory = MemoryStep(
            optimizer,
            self.kind,
            weights,
            gradients,
            keeper,
            by_parameter,
            chunk_numel=chunk_numel,
            gradients_wait=gradients_wait,
            device=device,
        )
        if self.kind is Kind.PER_PARAMETER:
            journal.notice(
                type(optimizer).__name__,
                "not known to be elementwise: its own step runs on one whole parameter at a time",
            )
        if keeper.precision.masters == "none" and any(
            one.dtype == torch.bfloat16 and self.streams(one)
            for group in optimizer.param_groups
            for one in group["params"]
        ):
            journal.notice(
                "bfloat16",
                "weights are stepped in bfloat16, where a step that adds less than "
                "0.4 % to one is lost: master_weights='fp32' keeps float32 masters",
            )

    def begin(self) -> None:
        """A step begins: now, or as backward produces its first gradient."""
        if self._known is not None:
            return
        self._known = set(self.optimizer.state)
        if self.device is not None:
            self.device.share.number(
                (parameter, parameter.numel())
                for group in self.optimizer.param_groups
                for parameter in group["params"]
                if self.streams(parameter)
            )

    def check_states(self) -> None:
        """Raise if a state can't be its parameter's, or be kept as the settings ask.

        Raises:
            UnsupportedError: naming the state and both shapes, what can't be rounded, or what the
                device can't step.
        """
        self.keeper.precision.check(self.optimizer)
        self.masters.check()
        if self._is_all_on_device:
            self._check_gradients()
        if self.kind is not Kind.ELEMENTWISE:
            return  # factored states, say, have shapes of their own
        for parameter, weight in self._by_parameter.items():
            shape = parameter.shape
            for name, value in self.optimizer.state.get(parameter, {}).items():
                is_other = isinstance(value, torch.Tensor) and value.shape != shape
                if is_other and is_large(value):
                    raise UnsupportedError(
                        f"the optimizer's state {name} of {weight.name} has the shape "
                        f"{tuple(value.shape)}, the parameter has {tuple(shape)}, so no "
                        "step was taken: load the state_dict that belongs to this model"
                    )

    @property
    def _is_all_on_device(self) -> bool:
        return self.device is not None and self.device.share.is_all

    def _check_gradients(self) -> None:
        for parameter, weight in self._by_parameter.items():
            if parameter.grad is not None and parameter.grad.layout is not torch.strided:
                raise UnsupportedError(
                    f"the gradient of {weight.name} {tuple(parameter.shape)} is sparse, and "
                    "optimizer_device='device' steps dense ones only, so no step was taken: make "
                    "it dense (sparse=False), or set optimizer_device='host'"
                )

    def step(self) -> None:
        """One optimizer step over all groups; gradients must be complete.

        Parameters whose gradients a step in backward has used up are done already.

        Raises:
            TierIOError: a read or write failed; the last commit stays whole.
            StepInterruptedError: an earlier step did not end.
        """
        self.memory.check_whole()
        self.begin()
        for group in self.optimizer.param_groups:
            held, streamed, others = self._sorted(group["params"])
            if self.kind is Kind.ELEMENTWISE:
                self._step_tiled(group, self.put_off(group, streamed), held)
            else:
                for parameter in streamed:
                    self._step_whole(group, parameter)
                self.memory.step(group, held)
            if self._is_all_on_device:
                self._step_here(group, [one for one in others if one in self._by_parameter], True)
                others = [one for one in others if one not in self._by_parameter]
            self._step_here(group, others)
        self._order_first_states()
        self.memory.end_step()

    def _sorted(
        self, parameters: Sequence[nn.Parameter]
    ) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
        """Of those with a gradient: which are stepped in memory, which by tiles, which otherwise.

        One look at each: a step in memory takes little longer than torch's own.
        """
        held, streamed, others = [], [], []
        for parameter in parameters:
            gradient = parameter.grad
            if gradient is None or type(gradient) is ConsumedGradient:
                continue
            if self.memory.takes(parameter):
                held.append(parameter)
            elif gradient.layout is torch.strided and self.streams(parameter):
                streamed.append(parameter)
            else:
                others.append(parameter)
        return held, streamed, others

    def _order_first_states(self) -> None:
        """First states stand in the order of the parameters, whatever the order of steps."""
        known, self._known = self._known, None
        assert known is not None
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter not in known and parameter in self.optimizer.state:
                    self.optimizer.state[parameter] = self.optimizer.state.pop(parameter)

    def name_of(self, parameter: nn.Parameter) -> str:
        """The name of the weight behind ``parameter``."""
        return self._by_parameter[parameter].name

    def streams(self, parameter: nn.Parameter) -> bool:
        """Whether a parameter is large enough for its step to be streamed."""
        return parameter in self._by_parameter and parameter.numel() > SMALL_NUMEL

    def _step_whole(self, group: dict[str, Any], parameter: nn.Parameter) -> None:
        """One parameter in place, at its stable address."""
        self.weights.use([self._by_parameter[parameter].name])
        self._step_here(group, [parameter])
        self.weights.evict_streaming()
        home = self.gradients.home_of(parameter)
        if home is not None:
            home.shed()

    def step_in_memory(self, group: dict[str, Any], parameter: nn.Parameter) -> None:
        """One parameter whose weight and gradient are in memory now.

        Raises:
            TierIOError: a write failed.
        """
        weight = self._by_parameter[parameter]
        self.weights.hold(weight)
        self._step_here(group, [parameter])
        self.weights.let_go(weight)
        home = self.gradients.home_of(parameter)
        if home is not None:
            home.shed()

    def _step_here(
        self, group: dict[str, Any], parameters: list[nn.Parameter], on_device: bool = False
    ) -> None:
        """The optimizer's own step on whole parameters; what it changed is then stored."""
        if not parameters:
            return
        whole = [
            self.masters.begin_whole(one) if self.keeper.precision.has_master(one) else None
            for one in parameters
        ]
        states = [
            self.keeper.computed(parameter, self.optimizer.state.get(parameter, {}))
            for parameter in parameters
        ]
        stepped = [
            one if master is None else master.stepped
            for one, master in zip(parameters, whole, strict=True)
        ]
        if on_device:
            after = self._step_there(group, parameters, stepped, states)
        else:
            after = step_on(self.optimizer, group, stepped, states)
        for parameter, state, master in zip(parameters, after, whole, strict=True):
            if master is not None:
                state[MASTER_LOW] = self.masters.end_whole(parameter, master)
            if state:
                self.optimizer.state[parameter] = state
            weight = self._by_parameter.get(parameter)
            if weight is not None:
                self.weights.store_new(weight)
                self.keeper.absorb(parameter)

    def _step_there(
        self,
        group: dict[str, Any],
        parameters: Sequence[nn.Parameter],
        stepped: Sequence[nn.Parameter],
        states: Sequence[Mapping[str, Any]],
    ) -> list[State]:
        """The device steps what stands for ``parameters``; their new ``states``."""
        assert self.device is not None
        parts = [
            HostPart(
                name=self.name_of(parameter),
                parameter=one.detach().view(-1),
                gradient=_flat_gradient(one),
                before={name: _flat(value, one) for name, value in state.items()},
                states={
                    spec.name: _flat(state[spec.name], one)
                    if spec.name in state
                    else torch.empty(one.numel(), dtype=spec.dtype)
                    for spec in state_specs(self.optimizer, group, parameter, self.keeper.precision)
                    if spec.name != MASTER_LOW
                },
            )
            for parameter, one, state in zip(parameters, stepped, states, strict=True)
        ]
        return [
            {
                name: value.view(one.shape) if name in part.states else value
                for name, value in after.items()
            }
            for one, part, after in zip(
                stepped, parts, self.device.step_now(group, parts), strict=True
            )
        ]

    def _step_tiled(
        self,
        group: dict[str, Any],
        parameters: Iterable[nn.Parameter],
        held: Sequence[nn.Parameter],
    ) -> None:
        """Tiles of ``parameters``, and those ``held`` in memory while tiles are on their way."""
        try:
            targets = [self.target(group, one, _not_yet) for one in parameters]
            self.pipeline.add(group, targets)
            self.memory.step(group, held, meanwhile=self.pipeline.advance)
            self.pipeline.finish()
        except BaseException:
            self.pipeline.abandon()
            raise
        for target in targets:  # all or, after an error, none
            self.publish(target)

    def target(
        self,
        group: dict[str, Any],
        parameter: nn.Parameter,
        written: Callable[[Target], None],
        *,
        stays: bool = False,
    ) -> Target:
        """What a tiled step of ``parameter`` reads and writes.

        Args:
            written: as in ``Target``.
            stays: if its weight is in memory now, it is there until it has been written. So the
                step takes what the user wrote to it from there, and the store gets it with the
                step: its bytes, which may be many, are compared with the store's only where they
                came from the drive and may be damaged.
        """
        weight = self._by_parameter[parameter]
        is_newest = stays and weight.in_memory and weight.mapped.held and not weight.dirty
        if not (is_newest and weight.proved) or self.keeper.precision.has_master(parameter):
            self.weights.absorb(weight)
            weight.proved = weight.in_memory and weight.mapped.held
        self.keeper.absorb(parameter)
        shown = self.optimizer.state.get(parameter, {})
        states = {
            spec.name: self.keeper.large(parameter, spec.name, spec.dtype)
            for spec in state_specs(self.optimizer, group, parameter, self.keeper.precision)
        }
        assert parameter.grad is not None
        return Target(
            weight=weight,
            gradient=parameter.grad.detach().reshape(-1),
            home=self.gradients.home_of(parameter),
            before=dict(shown),
            parameter=parameter,
            version=self._version(weight.stored),
            states={name: self._version(state.stored) for name, state in states.items()},
            written=written,
            rounding={
                name: self.keeper.rounding(state)
                for name, state in states.items()
                if state.form != "plain"
            },
        )

    def _version(self, stored: Any) -> Version:
        return Version(stored, stored.target(self.weights.store.tier), [0] * len(stored.chunks()))

    def publish(self, target: Target) -> None:
        """Make the versions that the pipeline wrote the current ones."""
        target.version.publish()
        self.weights.replaced(target.weight)
        shown = {}
        for name, value in target.after.items():
            if name in target.states:
                target.states[name].publish()
                state = self.keeper.states[target.parameter][name]
                shown[name] = self.keeper.show(state)
            else:
                assert not isinstance(value, torch.Tensor) or not is_large(value)
                shown[name] = value
        if shown:
            self.optimizer.state[target.parameter] = shown


def _flat_gradient(parameter: nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad.detach().reshape(-1)


def _flat(value: Any, parameter: torch.Tensor) -> Any:
    """A per-element state in one dimension; others as they are."""
    if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
        return value.detach().reshape(-1)
    return value


def _not_yet(_target: Target) -> None:
    """It is published with the others."""
