"""What visits a device for the optimizer's step: how it lies there, and how much it takes.

[Note: one run of bytes] Gradient, parameter and states of a tile lie one behind the other in one
piece of the device's memory, so that what arrives is one run of bytes and what leaves another:

    gradients | parameters | states that exist | states that this step makes
    ------------- arrives --------------------
                ------------------- leaves ----------------------------------

Gradients leave, too, where a fused step divides a loss scale out of them, which it does in place.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch.optim import Optimizer

from offload.swap.masters import MASTER_LOW
from offload.swap.optim_kinds import state_specs
from offload.swap.state_precision import Precision
from offload.tiers.accelerator import DeviceMemory

TILES = 3  # on their way at once, where there is room: one arrives, one is stepped, one leaves
_GRID_NBYTES = 512  # on which torch's own allocator places tensors
_SMALL_SHARE = 8  # of a device's budget
_PADDING = 1.125  # at most, of pieces of 1024 elements and more on that grid
_TEMPORARIES = 4  # tensors of a tile's size that an optimizer which is not fused may make

State: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class HostPart:
    """A piece of a parameter and what its step needs: 1-D contiguous tensors in host memory.

    Attributes:
        name: of the weight.
        parameter: is changed, and so are ``states``.
        before: its state; counters are copies that the step may change.
        states: where per-element states are, and where those that are not yet come to be.
    """

    name: str
    parameter: torch.Tensor
    gradient: torch.Tensor
    before: Mapping[str, Any]
    states: Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class VisitSize:
    """Bytes of the device that stepping takes.

    Attributes:
        tile_nbytes: gradient, parameter and states of the largest tile.
        temporaries_nbytes: what its kernels make beside these.
    """

    tile_nbytes: int
    temporaries_nbytes: int

    @property
    def least_nbytes(self) -> int:
        """What one tile needs."""
        return self.tile_nbytes + self.temporaries_nbytes


def visit_size(optimizer: Optimizer, precision: Precision, chunk_numel: int) -> VisitSize:
    """What tiles of ``chunk_numel`` elements take of a device."""
    total = tile = temporaries = 0
    for group in optimizer.param_groups:
        trained = [one for one in group["params"] if one.requires_grad and one.numel()]
        total += sum(one.numel() for one in trained)
        by_type = {precision.step_dtype(one): one for one in trained}
        for dtype, one in by_type.items():
            specs = [
                spec
                for spec in state_specs(optimizer, group, one, precision)
                if spec.name != MASTER_LOW
            ]
            tile = max(tile, dtype.itemsize * (2 + len(specs)))
            made = len(specs)  # in a first step, before they go where they stay
            made += 0 if group.get("fused") else _TEMPORARIES
            temporaries = max(temporaries, dtype.itemsize * made)
    numel = min(chunk_numel, total)
    return VisitSize(
        tile_nbytes=int(numel * tile * _PADDING) + (1 << 16),
        temporaries_nbytes=numel * temporaries,
    )


def beside_backward(size: VisitSize, budget_nbytes: int) -> int:
    """Bytes of tiles that are on their way at once while backward computes, too."""
    ample = TILES * size.tile_nbytes
    return ample if ample <= budget_nbytes // _SMALL_SHARE else size.tile_nbytes


@dataclass(frozen=True, slots=True)
class Segment:
    """Host memory, and where its bytes are on the device."""

    offset: int
    host: torch.Tensor

    @property
    def stop(self) -> int:
        """Where they end there."""
        return self.offset + self.host.nbytes

    def view(self, memory: DeviceMemory) -> torch.Tensor:
        """These bytes there, in the shape that they have here."""
        return memory.view(self.offset, self.host.dtype, self.host.shape)


@dataclass(slots=True)
class Layout:
    """Where the parts of a tile are on the device. See [Note: one run of bytes].

    Attributes:
        leaving_at: where what leaves begins.
        arriving_nbytes: what arrives, from the beginning on.
    """

    gradients: list[Segment] = field(default_factory=list)
    parameters: list[Segment] = field(default_factory=list)
    states: list[dict[str, Segment]] = field(default_factory=list)
    leaving_at: int = 0
    arriving_nbytes: int = 0
    nbytes: int = 0

    @classmethod
    def of(cls, parts: Sequence[HostPart], *, gradients_leave: bool) -> "Layout":
        """That of a tile of ``parts``."""
        layout = cls()
        layout.gradients = [layout._place(part.gradient) for part in parts]
        layout.leaving_at = 0 if gradients_leave else layout.nbytes
        layout.parameters = [layout._place(part.parameter) for part in parts]
        layout.states = [{} for _ in parts]
        for exists in (True, False):
            for part, placed in zip(parts, layout.states, strict=True):
                for name, state in part.states.items():
                    if (name in part.before) is exists:
                        placed[name] = layout._place(state)
            if exists:
                layout.arriving_nbytes = layout.nbytes
        return layout

    def _place(self, host: torch.Tensor) -> Segment:
        segment = Segment(self.nbytes, host)
        self.nbytes = -(-segment.stop // _GRID_NBYTES) * _GRID_NBYTES
        return segment

    def arriving(self) -> list[Segment]:
        """What is on the way there, and the states that will be."""
        states = [segment for placed in self.states for segment in placed.values()]
        return [*self.gradients, *self.parameters, *states]

    def leaving(self, afters: Sequence[State]) -> list[Segment]:
        """What is wanted of what is on the way back, of the new states ``afters``."""
        states = [
            segment
            for placed, after in zip(self.states, afters, strict=True)
            for name, segment in placed.items()
            if name in after
        ]
        gradients = self.gradients if self.leaving_at == 0 else []
        return [*gradients, *self.parameters, *states]


def carry(
    segments: Sequence[Segment],
    base: int,
    copy: Callable[[int, int, int, int], None],
    at: int,
    address: int,
    nbytes: int,
) -> None:
    """A ``Mover`` of bytes ``at`` from ``base`` on that belong to several pieces of host memory."""
    begin = base + at
    for segment in segments:
        start, stop = max(segment.offset, begin), min(segment.stop, begin + nbytes)
        if start < stop:
            copy(
                segment.host.data_ptr(),
                start - segment.offset,
                address + start - begin,
                stop - start,
            )
