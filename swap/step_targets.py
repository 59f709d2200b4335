"""What the step of one parameter reads and writes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from offload.swap.masters import MASTER_LOW
from offload.swap.staged_states import Rounding, rounded_staging_nbytes
from offload.swap.tiles import Piece
from offload.swap.weights import Weight
from offload.tiers.base import Block
from offload.tiers.hostmem import page_ceil
from offload.tiers.mapped import MappedTensor
from offload.tiers.store import StoredTensor


@dataclass(slots=True, eq=False)
class Version:
    """The next version of a stored tensor while its tiles are written."""

    stored: StoredTensor
    target: Block
    checksums: list[int]

    def publish(self) -> None:
        """Every chunk has been written: make it the current version."""
        self.stored.publish(self.target, self.checksums)


@dataclass(slots=True, eq=False)
class Target:
    """What the step of one parameter reads and writes.

    Attributes:
        gradient: 1-D, in ordinary memory or in the mapping ``home``.
        before: ``optimizer.state[parameter]``, empty before its first step.
        states: the next versions of its per-element states, by name; with ``MASTER_LOW`` among
            them it is stepped in float32 (``masters`` [Note: split masters]).
        rounding: of states that the store has in less bits than the optimizer computes with.
        after: the new state's entries in the optimizer's own order; per-element ones stand for
            themselves only by name, their bytes go to ``states``.
        written: called when all its tiles are written, not yet published.
        stepped: called when all its tiles are stepped: nobody reads its gradient any more.
        arrive: called before a tile is stepped: has a weight in memory that is still on its way.
    """

    parameter: nn.Parameter
    weight: Weight
    version: Version
    gradient: torch.Tensor
    home: MappedTensor | None
    before: Mapping[str, Any]
    states: dict[str, Version]
    written: Callable[["Target"], None]
    stepped: Callable[["Target"], None] = lambda _target: None
    arrive: Callable[[], None] = lambda: None
    rounding: Mapping[str, Rounding] = field(default_factory=dict)
    after: dict[str, Any] = field(default_factory=dict)
    unstepped_numel: int = field(init=False)
    unwritten_numel: int = field(init=False)

    def __post_init__(self) -> None:
        self.unstepped_numel = self.unwritten_numel = self.gradient.numel()

    @property
    def in_place(self) -> bool:
        """Whether the weight is stepped where it is, or will be, in memory."""
        return self.weight.in_memory or self.weight.is_coming

    @property
    def has_master(self) -> bool:
        """Whether it is stepped in float32, though it is bfloat16."""
        return MASTER_LOW in self.states

    @property
    def widens_gradient(self) -> bool:
        """Whether its gradient is to be made float32."""
        return self.has_master and self.gradient.dtype != torch.float32

    def staging(self, piece: Piece) -> list[int]:
        """Staging bytes of a piece: its parameter, its gradient, each per-element state."""
        weight = 0 if self.in_place else self.parameter.element_size()
        gradient = 0 if self.home is None else self.gradient.element_size()
        sizes = [page_ceil(piece.numel * itemsize) for itemsize in (weight, gradient)]
        if self.widens_gradient:  # where it will be widened to is the weight before and after
            sizes = [0, rounded_staging_nbytes(piece.numel)]
        return sizes + [self._state_staging(name, piece.numel) for name in self.states]

    def _state_staging(self, name: str, numel: int) -> int:
        if name == MASTER_LOW:
            return rounded_staging_nbytes(numel)
        if name in self.rounding:
            return self.rounding[name].staging_nbytes(numel)
        return page_ceil(numel * self.states[name].stored.dtype.itemsize)

    def place_of(self, name: str, piece: Piece) -> int:
        """Where the piece of a state begins in the store, in bytes from its beginning."""
        if name in self.rounding:
            return self.rounding[name].stored_nbytes(piece.start)
        return piece.start * self.states[name].stored.dtype.itemsize
