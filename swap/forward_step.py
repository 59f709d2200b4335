"""The optimizer steps inside the next forward: each weight right before it is used there.

[Note: step in forward] A step behind backward keeps the drive busy and computes next to nothing;
forward computes, and moves little. So ``optimizer.step()`` only takes down what it is to do, and
the next forward does it (GreedySnake, arXiv 2512.17570), in the order in which it uses weights:
before a module computes, its weights have been stepped, written and published, while the tiles of
the next ones are on their way. Forward fetches a weight anyway; it is stepped where it arrives, so
the step does not read it once more. What is computed is what ``step`` would have computed: the
settings of groups are those of the moment of the call, so are states, gradients and weights, which
nobody can change before.

For all of these are *guarded* (``guards``) until they are new: whoever uses one outside of the
modules' calls, in whatever way torch knows of, has the whole step finished first. What a guard
can't see is never put off: a parameter whose bytes somebody else holds, as a view, in numpy or in
a graph, is stepped at once. So is what forward was not seen to use by its hooks, tables in which
rows are looked up, small parameters, first steps, and what a loss scale of a fused step concerns.
Gradients are free to be dropped, by ``zero_grad()``: the step holds them.

Where the forward of the outermost module ends, everything has been stepped, so backward never
meets a half of a step; one without gradients finishes the step before it begins.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from offload.allocator.errors import StepInterruptedError
from offload.swap.copying import storage_use_count
from offload.swap.guards import GuardedState, Guards
from offload.swap.optim_kinds import shadow_of, state_specs
from offload.swap.optimizer import StreamedOptimizer
from offload.swap.states import is_large
from offload.swap.step_targets import Target

_PROBE = 1  # an owner that the question itself is


@dataclass(slots=True, eq=False)
class _Put:
    """The step of one parameter, put off.

    Attributes:
        version: of its gradient, as far as we know of changes.
        lined_up: its tiles are in the pipeline.
    """

    group: Mapping[str, Any]
    target: Target
    version: int
    lined_up: bool = False


class ForwardStep:
    """Puts steps off until the next forward; called by one thread at any moment.

    Args:
        tables: weights of which a module reads single rows, past all hooks.

    Attributes:
        guards: of what is old until its step is finished.
        finished: called when all of a step has been stepped and written.
    """

    def __init__(self, streamed: StreamedOptimizer, *, tables: frozenset[str]) -> None:
        self._streamed = streamed
        self._weights = streamed.weights
        self._journal = streamed.weights.journal
        self._pipeline = streamed.pipeline
        self._tables = tables
        self.finished: Callable[[], None] = lambda: None
        self._lock = threading.RLock()
        self.guards = Guards(self.finish)
        self._seen: dict[str, None] = {}  # weights that forward used since the last step
        self._put: dict[str, _Put] = {}  # by weight; what is not written yet
        self._line: deque[_Put] = deque()  # not lined up yet, in the order of their use
        self._is_begun = self._is_failed = self._trains = False
        streamed.optimizer.state = GuardedState(streamed.optimizer.state, self.guards)
        self._spent_s = self._stalled_s = 0.0
        streamed.put_off = self.take
        streamed.gradients.before_backward = self.finish
        self._loading = streamed.optimizer.register_load_state_dict_pre_hook(
            lambda _optimizer, _states: self.finish()
        )

    @property
    def is_pending(self) -> bool:
        """Whether a step has been put off and is not finished."""
        return bool(self._put) or self._is_begun

    # The step.

    def take(
        self, group: dict[str, Any], parameters: Sequence[nn.Parameter]
    ) -> Sequence[nn.Parameter]:
        """Put off the step of what can wait of ``parameters``; returns the others."""
        if getattr(self._streamed.optimizer, "grad_scale", None) is not None:
            return parameters
        waiting = [one for one in parameters if self._can_wait(group, one)]
        kept = {key: _kept(value) for key, value in group.items() if key != "params"}
        for parameter in waiting:
            target = self._streamed.target(kept, parameter, self._written)
            target.stepped = _drop_gradient
            target.arrive = partial(self._weights.arrive, target.weight)
            self._put[target.weight.name] = _Put(kept, target, target.gradient._version)
        chosen = set(waiting)
        return [one for one in parameters if one not in chosen]

    def _can_wait(self, group: Mapping[str, Any], parameter: nn.Parameter) -> bool:
        """See [Note: step in forward]."""
        name = self._streamed.name_of(parameter)
        if name not in self._seen or name in self._tables or name in self._put:
            return False
        weight = self._weights.weights[name]
        if any(type(one) is not nn.Parameter for one in weight.parameters):
            return False
        mapped = weight.mapped.tensor
        owners = 1 + (mapped._base is not None) + len(weight.parameters) + _PROBE
        return (
            storage_use_count(mapped) == owners
            and type(parameter.grad) is torch.Tensor
            and self._streamed.gradients.is_alone(parameter)
            and self._has_states(group, parameter)
        )

    def _has_states(self, group: Mapping[str, Any], parameter: nn.Parameter) -> bool:
        """Whether the step of ``parameter`` makes no state that was not there."""
        optimizer, keeper = self._streamed.optimizer, self._streamed.keeper
        if state := optimizer.state.get(parameter):
            return all(type(one) is torch.Tensor for one in _large(state))
        return not state_specs(optimizer, group, parameter, keeper.precision)

    def start(self) -> None:
        """``optimizer.step()`` is about to return: guard what is old from now on.

        Raises:
            TierIOError: a read or write failed.
        """
        if not self._put:
            self._seen.clear()
            return
        places = {name: place for place, name in enumerate(self._seen)}
        self._line.extend(sorted(self._put.values(), key=lambda put: places[_name_of(put)]))
        self._seen.clear()
        self._is_begun = True
        optimizer = self._streamed.optimizer
        self._pipeline.optimizer = shadow_of(optimizer)
        with self._stepping():
            if type(optimizer.state) is not GuardedState:  # it was loaded
                optimizer.state = GuardedState(optimizer.state, self.guards)
            for put in self._line:
                self._guard(put.target)
            self._line_up()
            self._pipeline.advance()

    def _guard(self, target: Target) -> None:
        torch.autograd.graph.increment_version(target.weight.parameters)
        assert target.parameter.grad is not None
        self.guards.put_on(target.parameter.grad)
        for tensor in (*target.weight.parameters, *_large(target.before)):
            self.guards.put_on(tensor)

    def _unguard(self, target: Target) -> None:
        gradient = target.parameter.grad
        held = [] if gradient is None else [gradient]
        for tensor in (*target.weight.parameters, *_large(target.before), *held):
            self.guards.take_off(tensor)

    # Forward.

    def begin_pass(self, *, trains: bool) -> None:
        """A pass begins, one with gradients if it ``trains``; else it finds the step finished.

        Raises:
            TierIOError: a read or write failed.
        """
        self._trains = trains
        if not trains:
            self.finish()

    def need(self, names: Sequence[str]) -> None:
        """A module is about to use the weights ``names``: have them stepped.

        Raises:
            StepInterruptedError: the step has failed.
            TierIOError: a read or write failed.
        """
        if self._trains:
            self._seen.update(dict.fromkeys(names))
        if not self._put or not any(name in self._put for name in names):
            return
        with self._stepping():
            for name in names:
                put = self._put.get(name)
                if put is None:
                    continue
                if not put.lined_up:
                    self._weights.bring(put.target.weight, wait=False)
                    self._line.remove(put)
                    self._add(put)
                self._pipeline.finish_target(put.target)

    def go_on(self) -> None:
        """A module is about to compute: have the next weights' tiles on their way meanwhile.

        Raises:
            TierIOError: a read or write failed.
        """
        if self._put:
            with self._stepping():
                self._line_up()
                self._pipeline.advance()

    def _line_up(self) -> None:
        """Tiles of weights that memory has room for; of others only where the lanes would rest.

        These are read and written in staging memory, and their weight is read again for its use.
        """
        while self._line:
            is_near = self._weights.fetch_ahead(self._line[0].target.weight)
            if not is_near and self._pipeline.is_waiting:
                return
            self._add(self._line.popleft())

    def _add(self, put: _Put) -> None:
        put.lined_up = True
        self._weights.hold(put.target.weight, wait=False)
        self._pipeline.add(put.group, [put.target])

    def _written(self, target: Target) -> None:
        self._streamed.publish(target)
        self._weights.let_go(target.weight)
        self._unguard(target)
        del self._put[target.weight.name]

    def finish(self) -> None:
        """Step, write and publish what is left of the step, if anything is.

        Raises:
            TierIOError: a read or write failed.
        """
        with self._lock:
            if not self._is_begun:
                return
            with self._stepping():
                while self._line:
                    self._add(self._line.popleft())
                self._pipeline.finish()
                self._end()
            with self.guards.aside():
                self.finished()

    def _end(self) -> None:
        self._pipeline.optimizer = self._streamed.optimizer
        self._is_begun = False

    @contextmanager
    def _stepping(self) -> Iterator[None]:
        """Around what works on the step; counts to what ``end_step`` returns."""
        with self._lock, self.guards.aside():
            self.check_whole()
            began_s, stalled_s = time.perf_counter(), self._journal.totals.stall_s
            try:
                self._check_gradients()
                yield
                self._note_gradients()
            except BaseException:
                self._fail()
                raise
            self._spent_s += time.perf_counter() - began_s
            self._stalled_s += self._journal.totals.stall_s - stalled_s

    def _check_gradients(self) -> None:
        """Raise if a backward that no forward came before has added to a gradient."""
        for put in self._put.values():
            if put.target.unstepped_numel and put.target.gradient._version != put.version:
                name, shape = _name_of(put), tuple(put.target.parameter.shape)
                raise StepInterruptedError(
                    f"backward added to the gradient of {name} {shape}, whose step had been put "
                    "off until the next forward: call optimizer.zero_grad() behind "
                    "optimizer.step(), or set step_in_forward=False"
                )

    def _note_gradients(self) -> None:
        """Some optimizers change gradients in their step."""
        for put in self._put.values():
            if put.lined_up and put.target.unstepped_numel:
                put.version = put.target.gradient._version

    def _fail(self) -> None:
        """The step can't be finished: its weights stay held, so that nobody stores them."""
        self._is_failed = True
        self._pipeline.abandon()
        for put in self._put.values():
            self._unguard(put.target)
        self._put.clear()
        self._line.clear()
        self._end()

    def check_whole(self) -> None:
        """Raise if the step has failed.

        Raises:
            StepInterruptedError: it has, after it had stepped some parameters.
        """
        if self._is_failed:
            raise StepInterruptedError(
                "the optimizer's step, which was put off until this forward, did not end, but "
                "some weights had been stepped: they are of no step now. Start the process again: "
                "it continues from the last commit"
            )

    def end_step(self) -> tuple[float, float]:
        """``optimizer.step()`` begins; the seconds spent in forward since the last one.

        Returns:
            Seconds in all, and those of it spent waiting for lanes.
        """
        self._put.clear()  # of a step that raised before it began
        spent = self._spent_s, self._stalled_s
        self._spent_s = self._stalled_s = 0.0
        return spent

    def remove(self) -> None:
        """``finish`` has been called, and nothing is put off any more."""
        self._streamed.put_off = lambda _group, parameters: parameters
        self._streamed.gradients.before_backward = lambda: None
        self._loading.remove()
        optimizer = self._streamed.optimizer
        if type(optimizer.state) is GuardedState:
            optimizer.state = optimizer.state.copy()


def _name_of(put: _Put) -> str:
    return put.target.weight.name


def _drop_gradient(target: Target) -> None:
    """Nobody reads it any more."""
    target.gradient = torch.empty(0)


def _large(state: Mapping[str, Any]) -> list[torch.Tensor]:
    return [one for one in state.values() if isinstance(one, torch.Tensor) and is_large(one)]


def _kept(value: Any) -> Any:
    """A setting of a group, as it is now."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    return tuple(map(_kept, value)) if isinstance(value, tuple) else value
