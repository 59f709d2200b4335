"""One piece of a tile in staging memory: what is read, stepped and written of one parameter."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import torch

from offload.swap.masters import MASTER_LOW, StagedGradient, StagedMaster
from offload.swap.staged_states import StagedPacked, StagedRounded
from offload.swap.step_targets import Target, Version
from offload.swap.tiles import Piece
from offload.swap.visits import HostPart
from offload.tiers.memory import HostBuffer


class Move(NamedTuple):
    """A piece of a stored tensor that travels.

    Attributes:
        at: where the piece begins in the stored tensor, in bytes.
        staged: where it is in memory.
    """

    version: Version
    at: int
    staged: torch.Tensor


@dataclass(slots=True, eq=False)
class Part:
    """One piece of a tile in memory: 1-D tensors of the piece's elements.

    Attributes:
        weight: in staging, or where it is in memory.
        parameter: what the optimizer steps: ``weight`` itself, or its master.
        source: the gradient as autograd made it: where it is in memory, or is read to.
        gradient: of what ``parameter.grad`` is made, if that is more than ``source``.
        states: what the optimizer sees of per-element states.
        rounded: those of them that the store has in less bits.
        by_blocks: those of ``rounded`` that may be widened and rounded in parts (``tile_blocks``).
    """

    piece: Piece
    target: Target
    weight: torch.Tensor
    parameter: torch.Tensor
    source: torch.Tensor
    gradient: StagedGradient | None = None
    master: StagedMaster | None = None
    states: dict[str, torch.Tensor] = field(default_factory=dict)
    rounded: dict[str, StagedRounded | StagedPacked] = field(default_factory=dict)
    by_blocks: dict[str, StagedRounded] = field(default_factory=dict)

    @classmethod
    def place(cls, target: Target, piece: Piece, buffer: HostBuffer, offset: int) -> Self:
        """Lay it out in ``buffer`` from ``offset`` on, as ``target.staging`` counts."""
        weight_nbytes, gradient_nbytes, *state_nbytes = target.staging(piece)
        if target.in_place:  # stepped in place: memory is the newest copy
            weight = target.weight.mapped.tensor.view(-1)[piece.start : piece.stop]
        else:
            weight = buffer.tensor(target.parameter.dtype, (piece.numel,), offset=offset)
        source = target.gradient[piece.start : piece.stop]
        part = cls(piece, target, weight, weight, source)
        offset += weight_nbytes
        values = part._place_gradient(buffer, offset)
        offset += gradient_nbytes
        for name, nbytes in zip(target.states, state_nbytes, strict=True):
            part._place_state(name, buffer, offset)
            offset += nbytes
        part.parameter.grad = values
        return part

    def _place_gradient(self, buffer: HostBuffer, offset: int) -> torch.Tensor:
        """What ``parameter.grad`` becomes, once it is read and widened."""
        home, numel = self.target.home, self.piece.numel
        if self.target.widens_gradient:
            there = None if home is not None else self.source
            self.gradient = StagedGradient.place(there, buffer, offset, numel)
            self.source = self.gradient.source
            return self.gradient.values
        if home is not None:
            self.source = buffer.tensor(self.source.dtype, (numel,), offset=offset)
        return self.source

    def _place_state(self, name: str, buffer: HostBuffer, offset: int) -> None:
        numel = self.piece.numel
        if name == MASTER_LOW:
            self.master = StagedMaster.place(self.weight, buffer, offset)
            self.parameter = self.master.values
        elif name in self.target.rounding:
            staged = self.target.rounding[name].place(buffer, offset, numel)
            self.rounded[name], self.states[name] = staged, staged.values
            if isinstance(staged, StagedRounded):
                self.by_blocks[name] = staged
        else:
            dtype = self.target.states[name].stored.dtype
            self.states[name] = buffer.tensor(dtype, (numel,), offset=offset)

    def reads(self) -> Iterator[Move]:
        """What is read from the store; the gradient is not of it."""
        target, piece = self.target, self.piece
        if not target.in_place:
            yield Move(target.version, piece.start * self.weight.element_size(), self.weight)
        for name, version in target.states.items():
            if name in target.before:
                yield Move(version, target.place_of(name, piece), self._read_to(name))

    def _read_to(self, name: str) -> torch.Tensor:
        if name == MASTER_LOW:
            assert self.master is not None
            return self.master.read
        return self.rounded[name].read if name in self.rounded else self.states[name]

    def writes(self) -> Iterator[Move]:
        """What is written to the store when it has been stepped."""
        target, piece = self.target, self.piece
        yield Move(target.version, piece.start * self.weight.element_size(), self.weight)
        for name, version in target.states.items():
            if name in target.after:
                yield Move(version, target.place_of(name, piece), self._written_from(name))

    def _written_from(self, name: str) -> torch.Tensor:
        if name == MASTER_LOW:
            assert self.master is not None
            return self.master.written
        return self.rounded[name].written if name in self.rounded else self.states[name]

    def state_before(self) -> dict[str, Any]:
        """The state that the optimizer sees: staged slices, and copies of counters."""
        return {
            name: self.states[name] if name in self.states else _copied(value)
            for name, value in self.target.before.items()
            if name != MASTER_LOW
        }

    def for_device(self) -> HostPart:
        """The same, to be stepped there."""
        assert self.parameter.grad is not None
        return HostPart(
            name=self.target.weight.name,
            parameter=self.parameter,
            gradient=self.parameter.grad,
            before=self.state_before(),
            states=self.states,
        )

    def take(self, after: Mapping[str, Any], start: int = 0, stop: int | None = None) -> None:
        """Keep what the optimizer made of the state, of these elements of the piece."""
        for name, value in after.items():
            staged = self.states.get(name)
            if staged is None:
                self.target.after[name] = value
                continue
            self.target.after.setdefault(name, None)
            staged = staged[start:stop]
            if value.data_ptr() != staged.data_ptr():
                staged.copy_(value)  # made afresh: the first step, or an out-of-place one

    @property
    def makes_states(self) -> bool:
        """Whether this step makes states of its elements, as a first one does."""
        return any(name not in self.target.before for name in self.states)

    def widen(self, *, by_blocks: bool = False) -> None:
        """What is narrower in the store has been read: make it what the optimizer computes with.

        ``by_blocks``: but for the states that ``tile_blocks`` widens.
        """
        if self.master is not None:  # first: the gradient takes the weight's place
            self.master.combine(has_low=MASTER_LOW in self.target.before)
        if self.gradient is not None:
            self.gradient.widen()
        for name, staged in self.rounded.items():
            if name in self.target.before and not (by_blocks and name in self.by_blocks):
                staged.widen()

    def narrow(self, *, by_blocks: bool = False) -> None:
        """It has been stepped: make what is narrower in the store what the store keeps.

        ``by_blocks``: but for the states that ``tile_blocks`` has rounded.
        """
        if self.master is not None:  # the gradient goes
            self.master.split()
            self.target.after.setdefault(MASTER_LOW, None)
        for name, staged in self.rounded.items():
            if not (by_blocks and name in self.by_blocks):
                staged.round(self.target.rounding[name].key, self.piece.start)

    def release_gradient(self) -> None:
        """It has been stepped, and what goes home of the gradient is on its way."""
        self.parameter.grad = self.gradient = None
        self.source = torch.empty(0)
        self.target.unstepped_numel -= self.piece.numel
        if not self.target.unstepped_numel:
            self.target.stepped(self.target)


def _copied(value: Any) -> Any:
    """Each tile steps its own copy of a counter, so that a step counts once."""
    return value.clone() if isinstance(value, torch.Tensor) else value
