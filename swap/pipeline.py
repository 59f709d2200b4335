"""Tiles in flight: read ahead, step, write behind, within a bound on staging memory.

Tiles that a device takes (``device_step``) go there when they have been read, and are written when
they are back.

[Note: a buffer goes on] While kernels run, the training thread comes by seldom. So the buffer of a
tile that is being written is promised to the next one at once: its read follows the write on the
lanes (``lanes`` [Note: one after the other]), and the drive need not wait for the training thread.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from offload.swap.copying import write_jobs
from offload.swap.device_step import DeviceStep, HostPart
from offload.swap.gradients import GradientSwapper
from offload.swap.masters import MASTER_LOW, StagedGradient, StagedMaster
from offload.swap.optim_kinds import step_on, unscales
from offload.swap.staged_states import (
    Rounding,
    StagedPacked,
    StagedRounded,
    rounded_staging_nbytes,
)
from offload.swap.staging import Staging
from offload.swap.tiles import Piece, cut
from offload.swap.weights import Weight
from offload.tiers.base import Block
from offload.tiers.filetier import FileTier
from offload.tiers.hostmem import page_ceil
from offload.tiers.journal import Journal, Label
from offload.tiers.lanes import Job, Transfer
from offload.tiers.mapped import MappedTensor
from offload.tiers.memory import HostBuffer
from offload.tiers.pieces import move_jobs
from offload.tiers.store import StoredTensor, checksum


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
    rounding: Mapping[str, Rounding] = field(default_factory=dict)
    after: dict[str, Any] = field(default_factory=dict)
    unstepped_numel: int = field(init=False)
    unwritten_numel: int = field(init=False)

    def __post_init__(self) -> None:
        self.unstepped_numel = self.unwritten_numel = self.gradient.numel()

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
        weight = 0 if self.weight.in_memory else self.parameter.element_size()
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


@dataclass(slots=True, eq=False)
class _Part:
    """One piece of a tile in memory: 1-D tensors of the piece's elements.

    Attributes:
        parameter: what the optimizer steps: ``weight`` itself, or its master.
        gradient: of what ``parameter.grad`` is made, if that is more than a slice.
        states: what the optimizer sees of per-element states.
    """

    piece: Piece
    target: Target
    weight: torch.Tensor
    parameter: torch.Tensor
    gradient: StagedGradient | None
    master: StagedMaster | None
    states: dict[str, torch.Tensor]
    rounded: dict[str, StagedRounded | StagedPacked]

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

    def take(self, after: Mapping[str, Any]) -> None:
        """Keep what the optimizer made of the state."""
        for name, value in after.items():
            staged = self.states.get(name)
            if staged is None:
                self.target.after[name] = value
                continue
            self.target.after.setdefault(name, None)
            if value.data_ptr() != staged.data_ptr():
                staged.copy_(value)  # made afresh: the first step, or an out-of-place one

    def widen(self) -> None:
        """What is narrower in the store has been read: make it what the optimizer computes with."""
        if self.master is not None:  # first: the gradient takes the weight's place
            self.master.combine(has_low=MASTER_LOW in self.target.before)
        if self.gradient is not None:
            self.gradient.widen()
        for name, staged in self.rounded.items():
            if name in self.target.before:
                staged.widen()

    def narrow(self) -> None:
        """It has been stepped: make what is narrower in the store what the store keeps."""
        if self.master is not None:  # the gradient goes
            self.master.split()
            self.target.after.setdefault(MASTER_LOW, None)
        for name, staged in self.rounded.items():
            staged.round(self.target.rounding[name].key, self.piece.start)

    def stored(self, name: str) -> torch.Tensor:
        """What is written of a state."""
        if name == MASTER_LOW:
            assert self.master is not None
            return self.master.written
        return self.rounded[name].written if name in self.rounded else self.states[name]


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A tile that is not read yet: pieces of ``targets``, which a device is to step or not."""

    group: Mapping[str, Any]
    targets: Sequence[Target]
    pieces: Sequence[Piece]
    on_device: bool

    def staging_nbytes(self) -> int:
        return sum(sum(self.targets[piece.index].staging(piece)) for piece in self.pieces)


@dataclass(slots=True, eq=False)
class _Tile:
    """Parts in flight and the staging buffer under them; None once it is promised to another."""

    group: Mapping[str, Any]
    parts: list[_Part]
    buffer: HostBuffer | None
    transfer: Transfer
    on_device: bool


class TilePipeline:
    """Streams tiles through the optimizer's own step: ``add`` them, then ``advance`` or ``finish``.

    Called on the training thread only.

    Args:
        tier: the store's, which parameters and states are read from and written to.
        staging_nbytes: bytes of tiles in flight; one tile may always be.
        device: steps its share of the tiles.
    """

    def __init__(
        self,
        tier: FileTier,
        gradients: GradientSwapper,
        journal: Journal,
        optimizer: Optimizer,
        *,
        chunk_numel: int,
        staging_nbytes: int,
        device: DeviceStep | None = None,
    ) -> None:
        self.tier = tier
        self.gradients = gradients
        self.journal = journal
        self.optimizer = optimizer
        self.chunk_numel = chunk_numel
        self.staging = Staging(staging_nbytes)
        self.device = device
        self._waiting: deque[_Waiting] = deque()
        self._reading: deque[_Tile] = deque()
        self._visiting: deque[_Tile] = deque()  # the device
        self._writing: deque[_Tile] = deque()

    @property
    def landing_nbytes(self) -> int:
        """Bytes of tiles in flight that the resident set may not show yet."""
        return self.staging.landing_nbytes

    @property
    def is_busy(self) -> bool:
        """Whether any tile is not written yet."""
        return bool(self._waiting or self._reading or self._visiting or self._writing)

    def add(self, group: Mapping[str, Any], targets: Sequence[Target]) -> None:
        """Line up the tiles of ``targets``, all of the optimizer's ``group``."""
        parameters = [target.parameter for target in targets]
        taken: Sequence[Piece] = ()
        for pieces in cut([target.gradient.numel() for target in targets], self.chunk_numel):
            here: Sequence[Piece] = pieces
            if self.device is not None:
                taken, here = self.device.share.split(parameters, pieces)
            for some, on_device in ((taken, True), (here, False)):
                if some:
                    self._waiting.append(_Waiting(group, targets, some, on_device))

    def advance(self) -> None:
        """Read, step and write what can be without waiting for a lane.

        Raises:
            TierIOError: a read or write failed.
        """
        self._move_on()
        while self._has_read() and not (self._reading[0].on_device and self._is_full()):
            self._step_first()
            self._move_on()

    def advance_one(self) -> None:
        """Wait for the tile that is nearest to its end, and step it or let it go.

        Raises:
            TierIOError: a read or write failed.
        """
        self._move_on()
        if self.device is not None and self._visiting and not self._has_read():
            self.device.advance_one()
        elif self._reading:
            self._step_first()
        elif self._writing:  # room is needed, or the step is ending
            self._retire()

    def finish(self) -> None:
        """Return when every tile has been written; no staging is kept.

        Raises:
            TierIOError: a read or write failed.
        """
        while self.is_busy:
            self.advance_one()
        self.staging.close()

    def trim(self) -> None:
        """Give back the staging that no tile is in."""
        self.staging.close()

    def abandon(self) -> None:
        """After an error: wait until no lane uses a buffer, and forget all tiles."""
        self._waiting.clear()
        if self.device is not None:
            self.device.abandon()
        for tile in (*self._reading, *self._visiting, *self._writing):
            tile.transfer.settle()
            self._give_back(tile)
        self._reading.clear()
        self._visiting.clear()
        self._writing.clear()
        self.staging.close()

    def _move_on(self) -> None:
        """Let written tiles go and begin to read others, as far as staging reaches."""
        if self.device is not None:
            self.device.advance()
        while self._writing and self._writing[0].transfer.done():
            self._retire()
        while self._waiting and (buffer := self.staging.take(self._waiting[0].staging_nbytes())):
            self._reading.append(self._read(self._waiting.popleft(), buffer))

    def _has_read(self) -> bool:
        return bool(self._reading) and self._reading[0].transfer.done()

    def _is_full(self) -> bool:
        return self.device is not None and self.device.is_full

    def _step_first(self) -> None:
        tile = self._reading[0]
        self._await(tile.transfer, "late")
        if tile.on_device:
            self._send(tile)
            return
        self._compute(tile)
        self._write(tile)
        self._release_gradients(tile)
        self._writing.append(self._reading.popleft())
        self._follow(tile)

    def _release_gradients(self, tile: _Tile) -> None:
        for part in tile.parts:
            part.parameter.grad = part.gradient = None
            part.target.unstepped_numel -= part.piece.numel
            if not part.target.unstepped_numel:
                part.target.stepped(part.target)

    def _follow(self, tile: _Tile) -> None:
        """Have the next tile read where ``tile`` is written from ([Note: a buffer goes on])."""
        buffer = tile.buffer
        assert buffer is not None
        if self._waiting and self._waiting[0].staging_nbytes() <= buffer.nbytes:
            self.staging.pass_on(buffer)
            tile.buffer = None
            self._reading.append(self._read(self._waiting.popleft(), buffer, after=tile.transfer))

    def _send(self, tile: _Tile) -> None:
        """Have the first tile that has been read stepped by the device."""
        assert self.device is not None
        with _one_thread():
            for part in tile.parts:
                part.widen()
        self._visiting.append(self._reading.popleft())
        parts = [part.for_device() for part in tile.parts]
        self.device.send(tile.group, parts, partial(self._came_back, tile))

    def _came_back(self, tile: _Tile, afters: Sequence[Mapping[str, Any]]) -> None:
        with _one_thread():
            for part, after in zip(tile.parts, afters, strict=True):
                part.take(after)
                part.narrow()
        self._write(tile)
        self._release_gradients(tile)
        self._visiting.remove(tile)
        self._writing.append(tile)
        self._follow(tile)

    def _retire(self) -> None:
        tile = self._writing[0]
        self._await(tile.transfer, "full")
        self._writing.popleft()
        self._give_back(tile)
        for part in tile.parts:
            part.target.unwritten_numel -= part.piece.numel
            if not part.target.unwritten_numel:
                part.target.written(part.target)

    def _give_back(self, tile: _Tile) -> None:
        if tile.buffer is not None:
            self.staging.give_back(tile.buffer)

    def _await(self, transfer: Transfer, reason: str) -> None:
        if not transfer.done():
            label = transfer.label
            with self.journal.stall(label.key, label.role, f"{label.src}→{label.dst}", reason):
                transfer.settle()
        transfer.wait()

    def _read(self, waiting: _Waiting, buffer: HostBuffer, after: Transfer | None = None) -> _Tile:
        """Lay out the staging of a tile and issue its reads."""
        parts: list[_Part] = []
        jobs: list[Job] = []
        offset = 0
        for piece in waiting.pieces:
            target = waiting.targets[piece.index]
            parts.append(self._part(target, piece, buffer, offset, jobs))
            offset += sum(target.staging(piece))
        transfer = self.tier.lanes.reads.submit(
            jobs,
            self._label(parts, reading=True),
            sum(_read_nbytes(part) for part in parts),
            after=after,
        )
        return _Tile(waiting.group, parts, buffer, transfer, waiting.on_device)

    def _part(
        self, target: Target, piece: Piece, buffer: HostBuffer, offset: int, jobs: list[Job]
    ) -> _Part:
        weight_nbytes, gradient_nbytes, *state_nbytes = target.staging(piece)
        if target.weight.in_memory:  # stepped in place: memory is the newest copy
            weight = target.weight.mapped.tensor.view(-1)[piece.start : piece.stop]
        else:
            weight = buffer.tensor(target.parameter.dtype, (piece.numel,), offset=offset)
            at = piece.start * weight.element_size()
            jobs += self._read_jobs(target.version.stored, at, weight)
        part = _Part(piece, target, weight, weight, None, None, {}, {})
        offset += weight_nbytes
        gradient = self._gradient(part, buffer, offset, jobs)
        offset += gradient_nbytes
        for (name, version), nbytes in zip(target.states.items(), state_nbytes, strict=True):
            staged = self._state(part, name, version, buffer, offset)
            if name in target.before:
                jobs += self._read_jobs(version.stored, target.place_of(name, piece), staged)
            offset += nbytes
        part.parameter.grad = gradient
        return part

    def _gradient(
        self, part: _Part, buffer: HostBuffer, offset: int, jobs: list[Job]
    ) -> torch.Tensor:
        """What ``parameter.grad`` becomes, once it is read and widened."""
        target, piece = part.target, part.piece
        source = target.gradient[piece.start : piece.stop]
        if target.widens_gradient:
            there = None if target.home is not None else source
            part.gradient = StagedGradient.place(there, buffer, offset, piece.numel)
            gradient, source = part.gradient.values, part.gradient.source
        elif target.home is not None:
            gradient = source = buffer.tensor(source.dtype, (piece.numel,), offset=offset)
        else:
            gradient = source
        if target.home is not None:
            jobs += self.gradients.places.read_jobs(target.home, piece.start, source)
        return gradient

    def _state(
        self, part: _Part, name: str, version: Version, buffer: HostBuffer, offset: int
    ) -> torch.Tensor:
        """Lay out a state; returns where it is read to."""
        numel = part.piece.numel
        if name == MASTER_LOW:
            part.master = StagedMaster.place(part.weight, buffer, offset)
            part.parameter = part.master.values
            return part.master.read
        if name in part.target.rounding:
            rounded = part.rounded[name] = part.target.rounding[name].place(buffer, offset, numel)
            part.states[name] = rounded.values
            return rounded.read
        staged = buffer.tensor(version.stored.dtype, (numel,), offset=offset)
        part.states[name] = staged
        return staged

    def _read_jobs(self, stored: StoredTensor, at: int, staged: torch.Tensor) -> list[Job]:
        assert stored.current is not None
        base = stored.current.extent.offset + at
        file, nbytes = self.tier.file, page_ceil(staged.nbytes)
        return move_jobs(file, file.read, base, staged.data_ptr(), nbytes)

    def _compute(self, tile: _Tile) -> None:
        with _one_thread():
            for part in tile.parts:
                part.widen()
            afters = step_on(
                self.optimizer,
                tile.group,
                [part.parameter for part in tile.parts],
                [part.state_before() for part in tile.parts],
            )
            for part, after in zip(tile.parts, afters, strict=True):
                part.take(after)
                part.narrow()

    def _write(self, tile: _Tile) -> None:
        jobs: list[Job] = []
        nbytes = 0
        shows_unscaled = unscales(self.optimizer)
        for part in tile.parts:
            if shows_unscaled and part.target.home is not None and part.gradient is None:
                jobs += self._gradient_jobs(part, part.target.home)
                nbytes += part.piece.numel * part.target.gradient.element_size()
            at = part.piece.start * part.weight.element_size()
            written = [(part.target.version, at, part.weight)]
            written += [
                (version, part.target.place_of(name, part.piece), part.stored(name))
                for name, version in part.target.states.items()
                if name in part.target.after
            ]
            for version, at, data in written:
                jobs += self._write_jobs(version, at, data)
                nbytes += data.nbytes
        label = self._label(tile.parts, reading=False)
        tile.transfer = self.tier.lanes.writes.submit(jobs, label, nbytes)

    def _gradient_jobs(self, part: _Part, home: MappedTensor) -> list[Job]:
        """The step has unscaled the gradient, which ``p.grad`` is to show as in memory."""
        gradient, file = part.parameter.grad, self.gradients.scratch.file
        assert gradient is not None
        assert home.block is not None
        if not part.piece.start:
            home.shed()  # pages that nobody maps are dropped by the writes at no cost
            self.gradients.norms.forget(home)
            torch.autograd.graph.increment_version(part.target.gradient)
        at = part.piece.start * gradient.element_size()
        return write_jobs(file, home.block, gradient.data_ptr(), gradient.nbytes, at)

    def _write_jobs(self, version: Version, at: int, data: torch.Tensor) -> list[Job]:
        file, base, address = self.tier.file, version.target.extent.offset + at, data.data_ptr()

        def write(offset: int, source: int, nbytes: int) -> None:
            file.write(offset, source, nbytes)
            if source == address:  # once for all the pieces of the chunk
                chunk = at // version.stored.chunk_nbytes
                version.checksums[chunk] = checksum(address, data.nbytes)

        return move_jobs(file, write, base, address, page_ceil(data.nbytes))

    def _label(self, parts: Sequence[_Part], *, reading: bool) -> Label:
        ends = (self.tier.spec.name, "host")
        source, destination = ends if reading else ends[::-1]
        return Label(parts[0].target.weight.name, "state", source, destination)


@contextmanager
def _one_thread() -> Iterator[None]:
    """The step is bound by the disk.

    More threads would only wait, busily, for one another, on cores that the lanes want.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _read_nbytes(part: _Part) -> int:
    target, nbytes = part.target, 0
    if not target.weight.in_memory:
        nbytes += part.weight.nbytes
    if target.home is not None:
        nbytes += part.piece.numel * target.gradient.element_size()
    return nbytes + sum(part.stored(name).nbytes for name in target.states if name in target.before)


def _copied(value: Any) -> Any:
    """Each tile steps its own copy of a counter, so that a step counts once."""
    return value.clone() if isinstance(value, torch.Tensor) else value
