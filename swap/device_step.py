"""The optimizer's step of tiles on a device: they travel there, are stepped, and travel back.

[Note: a tile's visit] Gradient, parameter and states of a tile lie one behind the other in one
piece of the device's memory, so that what arrives is one run of bytes and what leaves another:

    gradients | parameters | states that exist | states that this step makes
    ------------- arrives --------------------
                ------------------- leaves ----------------------------------

Gradients leave, too, where a fused step divides a loss scale out of them, which it does in place.
It passes through the ferry's pinned buffers (``ferry``), chunk by chunk, on the lanes that weights
and gradients use in forward and backward. When the host has seen the end of its arrival it calls
the optimizer's own step on views of that memory: kernels go to the stream that computes, and the
copy back waits for their event. Two or three tiles are on their way at once, so that one arrives,
one is stepped and one leaves.

[Note: the device's own bits] A step on the device runs what the same optimizer runs on parameters
that live there: the implementation that torch chooses for that device, elementwise, so that a tile
gives the bits of the whole (``optim_kinds`` [Note: tiles]). Counters, states without dimensions,
are where such an optimizer has them: beside the parameter if it is fused (and for ``ASGD``), in
host memory otherwise.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from torch.optim import Optimizer

from offload.allocator.errors import CapacityError
from offload.swap.ferry import Cargo, Ferry, copy_from, copy_to
from offload.swap.masters import MASTER_LOW
from offload.swap.optim_kinds import state_specs, step_on
from offload.swap.state_precision import Precision
from offload.swap.tile_share import TileShare
from offload.tiers.accelerator import DeviceMemory
from offload.tiers.journal import Journal, Label
from offload.tiers.lanes import Lane, Transfer

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
class _Segment:
    """Host memory, and where its bytes are on the device."""

    offset: int
    host: torch.Tensor

    @property
    def stop(self) -> int:
        return self.offset + self.host.nbytes


@dataclass(slots=True)
class _Layout:
    """Where the parts of a tile are on the device. See [Note: a tile's visit].

    Attributes:
        leaving_at: where what leaves begins.
        arriving_nbytes: what arrives, from the beginning on.
    """

    gradients: list[_Segment] = field(default_factory=list)
    parameters: list[_Segment] = field(default_factory=list)
    states: list[dict[str, _Segment]] = field(default_factory=list)
    leaving_at: int = 0
    arriving_nbytes: int = 0
    nbytes: int = 0

    @classmethod
    def of(cls, parts: Sequence[HostPart], *, gradients_leave: bool) -> "_Layout":
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

    def _place(self, host: torch.Tensor) -> _Segment:
        segment = _Segment(self.nbytes, host)
        self.nbytes = -(-segment.stop // _GRID_NBYTES) * _GRID_NBYTES
        return segment

    def arriving(self) -> list[_Segment]:
        """What is on the way there, and the states that will be."""
        states = [segment for placed in self.states for segment in placed.values()]
        return [*self.gradients, *self.parameters, *states]

    def leaving(self, afters: Sequence[State]) -> list[_Segment]:
        """What is wanted of what is on the way back, of the new states ``afters``."""
        states = [
            segment
            for placed, after in zip(self.states, afters, strict=True)
            for name, segment in placed.items()
            if name in after
        ]
        gradients = self.gradients if self.leaving_at == 0 else []
        return [*gradients, *self.parameters, *states]


@dataclass(slots=True, eq=False)
class _Visit:
    """A tile on its way."""

    group: Mapping[str, Any]
    parts: Sequence[HostPart]
    layout: _Layout
    cargo: Cargo
    transfer: Transfer
    done: Callable[[list[State]], None]
    afters: list[State] = field(default_factory=list)


class DeviceStep:
    """Steps tiles on a device: ``send`` them, then ``advance`` or ``finish``.

    Called on the training thread only. Tiles end in the order in which they were sent.

    Args:
        arriving: the lane to the device; ``leaving`` that back.
        make_room: called where the device has none; gives up what can be fetched again.

    Attributes:
        share: which tiles are stepped here.
        size: what a tile takes.
        limit_nbytes: bytes of tiles on their way; one, of any size, may always be.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        ferry: Ferry,
        arriving: Lane,
        leaving: Lane,
        journal: Journal,
        *,
        share: TileShare,
        size: VisitSize,
        make_room: Callable[[], None],
    ) -> None:
        self.share = share
        self.size = size
        self.limit_nbytes = TILES * size.tile_nbytes
        self._optimizer = optimizer
        self._ferry = ferry
        self._accelerator = ferry.accelerator
        self._lanes = arriving, leaving
        self._journal = journal
        self._make_room = make_room
        self._arriving: deque[_Visit] = deque()
        self._leaving: deque[_Visit] = deque()

    @property
    def busy(self) -> bool:
        """Whether any tile is on its way."""
        return bool(self._arriving or self._leaving)

    @property
    def is_full(self) -> bool:
        """Whether one more tile may have to wait for another."""
        return self.busy and self._held_nbytes() + self.size.tile_nbytes > self.limit_nbytes

    def send(
        self,
        group: Mapping[str, Any],
        parts: Sequence[HostPart],
        done: Callable[[list[State]], None],
    ) -> None:
        """Have a tile stepped, all of the optimizer's ``group``.

        Args:
            done: called on this thread, in a later call, with the new state of each part:
                per-element ones are the tensors of ``HostPart.states``, which hold them by then.

        Raises:
            CapacityError: the device has no room for the tile.
            TierIOError: a copy failed.
        """
        scaled = getattr(self._optimizer, "grad_scale", None) is not None  # by GradScaler
        layout = _Layout.of(parts, gradients_leave=scaled)
        while self.busy and self._held_nbytes() + layout.nbytes > self.limit_nbytes:
            self.advance_one()
        cargo = Cargo(self._allocate(layout.nbytes))
        nbytes = layout.arriving_nbytes
        fill = partial(_carry, layout.arriving(), 0, copy_from)
        transfer = self._lanes[0].submit(
            self._ferry.jobs_in(cargo, nbytes, fill), self._label(parts, inwards=True), nbytes
        )
        self._arriving.append(_Visit(group, parts, layout, cargo, transfer, done))
        self.advance()

    def step_now(self, group: Mapping[str, Any], parts: Sequence[HostPart]) -> list[State]:
        """Have a tile stepped, and wait for it; its new states, as ``send`` gives them.

        Raises:
            CapacityError, TierIOError: as ``send``.
        """
        found: list[State] = []
        self.send(group, parts, found.extend)
        self.finish()
        return found

    def advance(self) -> None:
        """Step what has arrived and end what is back, without waiting.

        Raises:
            TierIOError: a copy failed.
        """
        while self._arriving and self._arriving[0].transfer.done():
            self._step_first()
        while self._leaving and self._leaving[0].transfer.done():
            self._end_first()

    def advance_one(self) -> None:
        """Wait for the tile that is nearest to its end.

        Raises:
            TierIOError: a copy failed.
        """
        if self._leaving:
            self._end_first()
        elif self._arriving:
            self._step_first()
        self.advance()

    def finish(self) -> None:
        """Return when every tile is back.

        Raises:
            TierIOError: a copy failed.
        """
        while self.busy:
            self.advance_one()

    def abandon(self) -> None:
        """After an error: wait until no lane uses anybody's memory, and forget all tiles."""
        for visit in (*self._arriving, *self._leaving):
            visit.transfer.settle()
            visit.cargo.let_go()
        self._arriving.clear()
        self._leaving.clear()

    def _held_nbytes(self) -> int:
        return sum(visit.layout.nbytes for visit in (*self._arriving, *self._leaving))

    def _allocate(self, nbytes: int) -> DeviceMemory:
        while self.busy:
            try:
                return self._accelerator.allocate(nbytes)
            except CapacityError:  # kernels of the user's own hold more than was planned with
                self.advance_one()
        try:
            return self._accelerator.allocate(nbytes)
        except CapacityError:
            self._make_room()
        return self._accelerator.allocate(nbytes)

    def _step_first(self) -> None:
        visit = self._arriving[0]
        self._await(visit.transfer, "late")
        memory, layout = visit.cargo.memory, visit.layout
        assert memory is not None
        parameters, states = [], []
        for parameter, gradient, placed in zip(
            layout.parameters, layout.gradients, layout.states, strict=True
        ):
            there = {name: _view(memory, segment) for name, segment in placed.items()}
            states.append(there)
            parameters.append(_view(memory, parameter))
            parameters[-1].grad = _view(memory, gradient)
        visit.afters = step_on(
            self._optimizer,
            visit.group,
            parameters,
            [
                self._state_before(visit.group, part, there)
                for part, there in zip(visit.parts, states, strict=True)
            ],
        )
        for after, there in zip(visit.afters, states, strict=True):
            for name in there.keys() & after.keys():
                if after[name].data_ptr() != there[name].data_ptr():
                    there[name].copy_(after[name])  # made afresh: a first or out-of-place step
                after[name] = None  # from now on it is where it was laid out
        self._send_back(visit, memory)
        self._leaving.append(self._arriving.popleft())

    def _state_before(
        self, group: Mapping[str, Any], part: HostPart, there: Mapping[str, torch.Tensor]
    ) -> State:
        """See [Note: the device's own bits]."""
        beside = bool(group.get("fused")) or isinstance(self._optimizer, torch.optim.ASGD)
        return {
            name: there[name]
            if name in there
            else value.to(self._accelerator.torch_device)
            if beside and isinstance(value, torch.Tensor)
            else value
            for name, value in part.before.items()
        }

    def _send_back(self, visit: _Visit, memory: DeviceMemory) -> None:
        layout = visit.layout
        visit.cargo.let_go()
        nbytes = layout.nbytes - layout.leaving_at
        visit.cargo = Cargo(
            DeviceMemory(
                tensor=memory.bytes_at(layout.leaving_at, nbytes),
                ready=self._accelerator.current_stream().record(),
            )
        )
        drain = partial(_carry, layout.leaving(visit.afters), layout.leaving_at, copy_to)
        visit.transfer = self._lanes[1].submit(
            self._ferry.jobs_out(visit.cargo, nbytes, drain),
            self._label(visit.parts, inwards=False),
            nbytes,
        )

    def _end_first(self) -> None:
        visit = self._leaving[0]
        self._await(visit.transfer, "full")
        self._leaving.popleft()
        visit.cargo.let_go()
        visit.done(
            [
                {
                    name: part.states[name] if name in part.states else _at_home(value)
                    for name, value in after.items()
                }
                for part, after in zip(visit.parts, visit.afters, strict=True)
            ]
        )

    def _await(self, transfer: Transfer, reason: str) -> None:
        if not transfer.done():
            label = transfer.label
            with self._journal.stall(label.key, label.role, f"{label.src}→{label.dst}", reason):
                transfer.settle()
        transfer.wait()

    def _label(self, parts: Sequence[HostPart], *, inwards: bool) -> Label:
        ends = ("host", self._accelerator.name)
        source, destination = ends if inwards else ends[::-1]
        return Label(parts[0].name, "state", source, destination)


def _view(memory: DeviceMemory, segment: _Segment) -> torch.Tensor:
    return memory.view(segment.offset, segment.host.dtype, segment.host.shape)


def _at_home(value: Any) -> Any:
    """A counter in host memory."""
    return value.to("cpu") if isinstance(value, torch.Tensor) else value


def _carry(
    segments: Sequence[_Segment],
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
