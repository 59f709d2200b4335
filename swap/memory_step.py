"""The optimizer's step on what the plan keeps in memory: in place, without files or copies.

[Note: steps in memory] The weight, the gradient and the states of such a parameter are in memory
when its step begins, and it is the optimizer's own step on the parameter itself, on many
parameters at a time and with all of torch's threads: nothing here waits for a disk. What it
changed is dirty from before the step begins, so that nobody ever takes the store for the newest
copy; it is stored at a commit, and when its memory is given back.

Optimizers that are not fused make temporaries as large as what one call steps. A call therefore
gets no more elements than a tile, larger parameters by slices on the tiles' grid (``optim_kinds``
[Note: tiles]): the peak that the plan was made from holds the temporaries of a tile.

Tiles that a device takes (``device_step``) go there from memory, and come back to it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from offload.allocator.errors import StepInterruptedError
from offload.swap.device_step import DeviceStep
from offload.swap.gradients import MIN_NBYTES, GradientSwapper
from offload.swap.optim_kinds import Kind, StateSpec, state_specs, step_on
from offload.swap.states import State, StateKeeper
from offload.swap.tiles import Piece, cut
from offload.swap.visits import HostPart
from offload.swap.weights import Weight, WeightSwapper
from offload.tiers.hostmem import page_ceil
from offload.tiers.journal import Label
from offload.tiers.lanes import Transfer, wait_for_all

# In one call, whose fixed cost is half a millisecond; a fused one makes no temporaries.
_FUSED_TILES = 32


class MemoryStep:
    """Keeps gradients and states of chosen parameters in memory, and steps them there.

    Called on the training thread only.

    Args:
        by_parameter: the parameters whose weights Offload moves.
        chunk_numel: elements of one tile.
        gradients_wait: gradients exist as long as their step has not come; False where a step in
            backward uses each up at once.
        device: steps its share of the tiles.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        kind: Kind,
        weights: WeightSwapper,
        gradients: GradientSwapper,
        keeper: StateKeeper,
        by_parameter: Mapping[nn.Parameter, Weight],
        *,
        chunk_numel: int,
        gradients_wait: bool = True,
        device: DeviceStep | None = None,
    ) -> None:
        self._optimizer = optimizer
        self._kind = kind
        self._weights = weights
        self._gradients = gradients
        self._keeper = keeper
        self._by_parameter = by_parameter
        self._chunk_numel = chunk_numel
        self._gradients_wait = gradients_wait
        self._device = device
        self._kept: frozenset[nn.Parameter] = frozenset()
        self._is_whole = True  # no step has begun that did not end

    def end_step(self) -> None:
        """All parameters of the step have been stepped, those that stream, too."""
        self._is_whole = True

    def check_whole(self) -> None:
        """Raise unless the last step that changed anything in place ended.

        Raises:
            StepInterruptedError: it did not.
        """
        if not self._is_whole:
            raise StepInterruptedError(
                "the optimizer's step did not end, but it had changed weights and states in "
                "memory: they are of no step now. Start the process again: it continues from "
                "the last commit"
            )

    def nbytes(self) -> dict[str, int]:
        """Bytes of the gradient and the states of each weight, by its name.

        Those that its first step will make count, too. A weight of which they can't be known is
        left out.
        """
        return {
            self._by_parameter[parameter].name: self._kept_nbytes(group, parameter)
            for group in self._optimizer.param_groups
            for parameter in group["params"]
            if self._can_keep(parameter)
        }

    def _can_keep(self, parameter: nn.Parameter) -> bool:
        weight = self._by_parameter.get(parameter)
        if weight is None or weight.parameters[0] is not parameter or not parameter.requires_grad:
            return False
        if not self._keeper.precision.keeps_in_memory(parameter):
            return False
        return self._kind is Kind.ELEMENTWISE or bool(self._optimizer.state.get(parameter))

    def _kept_nbytes(self, group: Mapping[str, Any], parameter: nn.Parameter) -> int:
        moves = self._gradients_wait and parameter.nbytes >= MIN_NBYTES
        gradient = page_ceil(parameter.nbytes) if moves else 0
        if self._kind is Kind.ELEMENTWISE:
            specs = state_specs(self._optimizer, group, parameter)
            sizes = [parameter.numel() * spec.dtype.itemsize for spec in specs]
        else:
            shown = self._optimizer.state[parameter].values()
            sizes = [value.nbytes for value in shown if _is_plain(value)]
        return gradient + sum(map(page_ceil, sizes))

    def held_nbytes(self) -> int:
        """Bytes of the kept gradients and states that are in memory."""
        gradients = (parameter.grad for parameter in self._kept)
        return self._keeper.held_nbytes() + sum(
            gradient.nbytes for gradient in gradients if gradient is not None
        )

    def keep(self, names: Iterable[str], *, pending: bool = False) -> None:
        """Keep gradients and states of the weights ``names``, and of these alone.

        States come into memory at their next step; those of others are stored and leave now.

        Args:
            pending: gradients wait for their step: those of others leave, too.

        Raises:
            TierIOError: a write failed.
        """
        wanted = frozenset(self._weights.weights[name].parameters[0] for name in names)
        if wanted == self._kept:
            return
        given_up = self._kept - wanted
        for parameter in given_up:
            self._give_back(parameter)
        self._kept = wanted
        self._gradients.keep(wanted)
        if pending:
            self._gradients.release(given_up)

    def _give_back(self, parameter: nn.Parameter) -> None:
        self._keeper.absorb(parameter)
        for state in self._keeper.shown(parameter) or ():
            if state.held:
                self._keeper.show(state)

    def takes(self, parameter: nn.Parameter) -> bool:
        """Whether the step of ``parameter``, which has a gradient, is one in memory."""
        gradient = parameter.grad
        return (
            parameter in self._kept
            and self._by_parameter[parameter].resident
            and gradient is not None
            and gradient.layout is torch.strided
        )

    def step(
        self,
        group: Mapping[str, Any],
        parameters: Sequence[nn.Parameter],
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:
        """Step ``parameters``, all of the optimizer's ``group``, in place; then ``end_step``.

        Args:
            meanwhile: called before each call of the optimizer's own step; may move other bytes.

        Raises:
            TierIOError: what is not yet in memory could not be read.
        """
        meanwhile()
        if not parameters:
            return
        states = self._fetch(parameters)
        self._is_whole = False
        for one in parameters:
            self._weights.changed(self._by_parameter[one])
        for state in states:
            state.dirty = True
        stepped = [_Stepped(one, self._optimizer.state.get(one, {})) for one in parameters]
        for pieces, on_device in self._calls(group, parameters):
            meanwhile()
            if on_device:
                self._send(group, stepped, pieces)
                continue
            parts = [stepped[piece.index].part(piece) for piece in pieces]
            afters = step_on(
                self._optimizer, group, [part for part, _ in parts], [state for _, state in parts]
            )
            for piece, after in zip(pieces, afters, strict=True):
                stepped[piece.index].take(piece, after)
        if self._device is not None:
            self._device.finish()
        for done in stepped:
            if done.after:
                self._optimizer.state[done.parameter] = done.after

    def _calls(
        self, group: Mapping[str, Any], parameters: Sequence[nn.Parameter]
    ) -> Iterator[tuple[Sequence[Piece], bool]]:
        """What each call of the optimizer's own step gets, and whether on the device."""
        numels = [parameter.numel() for parameter in parameters]
        if self._kind is Kind.PER_PARAMETER:
            yield from (((Piece(index, 0, numel),), False) for index, numel in enumerate(numels))
            return
        if self._device is None or not self._device.share.share:
            tiles = _FUSED_TILES if group.get("fused") else 1
            yield from ((pieces, False) for pieces in cut(numels, self._chunk_numel * tiles))
            return
        for pieces in cut(numels, self._chunk_numel):
            taken, here = self._device.share.split(parameters, pieces)
            if taken:
                yield taken, True
            if here:
                yield here, False

    def _send(
        self, group: Mapping[str, Any], stepped: "Sequence[_Stepped]", pieces: Sequence[Piece]
    ) -> None:
        """Have pieces stepped by the device; it fills what is in memory, and ``stepped``."""
        assert self._device is not None
        specs = [
            state_specs(self._optimizer, group, stepped[piece.index].parameter) for piece in pieces
        ]
        parts = [
            stepped[piece.index].for_device(
                self._by_parameter[stepped[piece.index].parameter].name, piece, found
            )
            for piece, found in zip(pieces, specs, strict=True)
        ]

        def done(afters: Sequence[Mapping[str, Any]]) -> None:
            for piece, after in zip(pieces, afters, strict=True):
                stepped[piece.index].take_part(piece, after)

        self._device.send(group, parts, done)

    def _fetch(self, parameters: Sequence[nn.Parameter]) -> list[State]:
        """Have weights and states in memory: once, for they stay; their large states."""
        found: list[State] = []
        for parameter in parameters:
            weight = self._by_parameter[parameter]
            self._weights.bring(weight)
            states = self._keeper.shown(parameter)
            if states is None or not all(state.held for state in states):
                self._keeper.absorb(parameter)  # what is read must be the newest
                states = self._keeper.shown(parameter)
            found += states or ()
        if missing := [state for state in found if not state.held]:
            self._read(missing)
        return found

    def _read(self, states: Sequence[State]) -> None:
        tier, journal = self._weights.store.tier, self._weights.journal
        transfers: list[Transfer] = []
        for state in states:
            assert state.mapped is not None
            label = Label(state.stored.name, "state", tier.spec.name, "host")
            jobs = state.mapped.hold_jobs()
            transfers.append(tier.lanes.reads.submit(jobs, label, state.stored.nbytes))
        with journal.stall(states[0].stored.name, "state", tier.lanes.reads.name, "cold"):
            try:
                wait_for_all(transfers)
            except BaseException:
                for transfer in transfers:
                    transfer.settle()  # an interrupt leaves them on their way
                for state in states:
                    self._keeper.show(state)
                raise


class _Stepped:
    """One parameter in its step.

    Attributes:
        before: ``optimizer.state[parameter]`` as the step began; empty before its first one.
        after: the new state's entries in the optimizer's own order.
        made: states that a step on the device is to fill for the first time.
    """

    __slots__ = ("after", "before", "made", "parameter")

    def __init__(self, parameter: nn.Parameter, before: Mapping[str, Any]) -> None:
        self.parameter = parameter
        self.before = dict(before)
        self.after: dict[str, Any] = {}
        self.made: dict[str, torch.Tensor] = {}

    def part(self, piece: Piece) -> tuple[torch.Tensor, dict[str, Any]]:
        """What the optimizer sees of a piece: the parameter itself, or 1-D slices."""
        parameter = self.parameter
        if self._is_whole(piece):
            return parameter, self.before
        assert parameter.grad is not None
        part = parameter.detach().view(-1)[piece.start : piece.stop]
        part.grad = parameter.grad.detach().reshape(-1)[piece.start : piece.stop]
        return part, {name: self._slice(value, piece) for name, value in self.before.items()}

    def for_device(self, name: str, piece: Piece, specs: Sequence[StateSpec]) -> HostPart:
        """What the device sees of a piece of the weight ``name``; ``specs`` of its states."""
        parameter = self.parameter
        assert parameter.grad is not None
        torch.autograd.graph.increment_version(parameter)  # its bytes change past torch
        for spec in specs:
            if spec.name not in self.before and spec.name not in self.made:
                self.made[spec.name] = torch.empty(parameter.shape, dtype=spec.dtype)
        before = {key: self._slice(value, piece) for key, value in self.before.items()}
        return HostPart(
            name=name,
            parameter=parameter.detach().view(-1)[piece.start : piece.stop],
            gradient=parameter.grad.detach().reshape(-1)[piece.start : piece.stop],
            before=before,
            states={
                spec.name: before[spec.name]
                if spec.name in before
                else self.made[spec.name].view(-1)[piece.start : piece.stop]
                for spec in specs
            },
        )

    def _is_whole(self, piece: Piece) -> bool:
        return piece.numel == self.parameter.numel()

    def _slice(self, value: Any, piece: Piece) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if value.shape == self.parameter.shape:
            return value.view(-1)[piece.start : piece.stop]
        return value.clone()  # each slice steps its own copy of a counter, so it counts once

    def take(self, piece: Piece, after: Mapping[str, Any]) -> None:
        """Keep what the optimizer made of the state of a piece."""
        if self._is_whole(piece):
            self._take_whole(after)
        else:
            self.take_part(piece, after)

    def take_part(self, piece: Piece, after: Mapping[str, Any]) -> None:
        """Keep what the optimizer made of the state of a piece in 1-D slices."""
        for name, value in after.items():
            if not isinstance(value, torch.Tensor) or value.shape != (piece.numel,):
                self.after[name] = value
                continue
            whole = self.after.setdefault(name, self.before.get(name, self.made.get(name)))
            if whole is None:  # its first step
                whole = self.after[name] = value.new_empty(self.parameter.shape)
            kept = whole.view(-1)[piece.start : piece.stop]
            if kept.data_ptr() != value.data_ptr():
                kept.copy_(value)

    def _take_whole(self, after: Mapping[str, Any]) -> None:
        """States that were made afresh go where the old ones were, which is where they stay."""
        self.after = dict(after)
        if all(value is self.before.get(name) for name, value in after.items()):
            return
        old = {name: value for name, value in self.before.items() if _is_plain(value)}
        addresses = {value.data_ptr() for value in old.values()}
        fresh = {
            name: value
            for name, value in after.items()
            if name in old
            and _is_plain(value)
            and value.data_ptr() != old[name].data_ptr()
            and (value.shape, value.dtype) == (old[name].shape, old[name].dtype)
        }
        # An optimizer may exchange its states: all are read before any is written.
        fresh = {
            name: value.clone() if value.data_ptr() in addresses else value
            for name, value in fresh.items()
        }
        for name, value in fresh.items():
            old[name].copy_(value)
            self.after[name] = old[name]


def _is_plain(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout is torch.strided
