"""The optimizer's step of tiles on a device: they travel there, are stepped, and travel back.

[Note: a tile's visit] A tile lies in one piece of the device's memory (``visits`` [Note: one run of
bytes]). It passes through the ferry's pinned buffers (``ferry``), chunk by chunk, on the lanes that
weights and gradients use in forward and backward. When the host has seen the end of its arrival it
calls the optimizer's own step on views of that memory: kernels go to the stream that computes, and
the copy back waits for their event. Two or three tiles are on their way at once, so that one
arrives, one is stepped and one leaves.

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
from typing import Any

import torch
from torch.optim import Optimizer

from offload.allocator.errors import CapacityError
from offload.swap.ferry import Cargo, Ferry, copy_from, copy_to
from offload.swap.optim_kinds import step_on
from offload.swap.tile_share import TileShare
from offload.swap.visits import TILES, HostPart, Layout, State, VisitSize, carry
from offload.tiers.accelerator import DeviceMemory
from offload.tiers.journal import Journal, Label
from offload.tiers.lanes import Lane, Transfer


@dataclass(slots=True, eq=False)
class _Visit:
    """A tile on its way."""

    group: Mapping[str, Any]
    parts: Sequence[HostPart]
    layout: Layout
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
        layout = Layout.of(parts, gradients_leave=scaled)
        while self.busy and self._held_nbytes() + layout.nbytes > self.limit_nbytes:
            self.advance_one()
        cargo = Cargo(self._allocate(layout.nbytes))
        nbytes = layout.arriving_nbytes
        fill = partial(carry, layout.arriving(), 0, copy_from)
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
            there = {name: segment.view(memory) for name, segment in placed.items()}
            states.append(there)
            parameters.append(parameter.view(memory))
            parameters[-1].grad = gradient.view(memory)
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
        drain = partial(carry, layout.leaving(visit.afters), layout.leaving_at, copy_to)
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


def _at_home(value: Any) -> Any:
    """A counter in host memory."""
    return value.to("cpu") if isinstance(value, torch.Tensor) else value
