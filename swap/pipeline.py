"""Tiles in flight: read ahead, step, write behind, within a bound on staging memory.

Tiles that a device takes (``device_step``) go there when they have been read, and are written when
they are back.

[Note: a buffer goes on] While kernels run, the training thread comes by seldom. So the buffer of a
tile that is being written is promised to the next one at once: its read follows the write on the
lanes (``lanes`` [Note: one after the other]), and the drive need not wait for the training thread.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from offload.swap.copying import write_jobs
from offload.swap.device_step import DeviceStep
from offload.swap.gradients import GradientSwapper
from offload.swap.optim_kinds import step_on, unscales
from offload.swap.staging import Staging
from offload.swap.step_targets import Target
from offload.swap.tile_blocks import BlockStep
from offload.swap.tile_parts import Move, Part
from offload.swap.tiles import Piece, cut
from offload.tiers.filetier import FileTier
from offload.tiers.hostmem import page_ceil
from offload.tiers.journal import Journal, Label
from offload.tiers.lanes import Job, Transfer
from offload.tiers.mapped import MappedTensor
from offload.tiers.memory import HostBuffer
from offload.tiers.pieces import move_jobs
from offload.tiers.store import checksum


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
    parts: list[Part]
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
        self._blocks = BlockStep(optimizer, chunk_numel)
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

    @property
    def is_waiting(self) -> bool:
        """Whether a tile waits for staging memory to be read to."""
        return bool(self._waiting)

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

    def finish_target(self, target: Target) -> None:
        """Return when all tiles of ``target`` are written; others go on as far as they are read.

        Raises:
            TierIOError: a read or write failed.
        """
        while True:
            self._move_on()
            if not target.unwritten_numel:
                return
            if target.unstepped_numel or self._has_read():
                self.advance_one()
            else:
                self._retire()

    def finish(self) -> None:
        """Return when every tile has been written; no staging is kept.

        Raises:
            TierIOError: a read or write failed.
        """
        while self.is_busy:
            self.advance_one()
        self.trim()

    def trim(self) -> None:
        """Give back the staging that no tile is in."""
        self.staging.close()
        self._blocks.close()

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
        self.trim()

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
        for part in tile.parts:
            part.target.arrive()
        if tile.on_device:
            self._send(tile)
            return
        self._compute(tile)
        self._reading.popleft()
        self._send_home(tile)

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
            self._take(tile, afters)
            for part in tile.parts:
                part.narrow()
        self._visiting.remove(tile)
        self._send_home(tile)

    def _send_home(self, tile: _Tile) -> None:
        """It has been stepped: write it, and have the next tile read where it is written from."""
        self._write(tile)
        self._writing.append(tile)
        for part in tile.parts:
            part.release_gradient()
        buffer = tile.buffer
        assert buffer is not None
        if self._waiting and self._waiting[0].staging_nbytes() <= buffer.nbytes:
            self.staging.pass_on(buffer)
            tile.buffer = None  # [Note: a buffer goes on]
            self._reading.append(self._read(self._waiting.popleft(), buffer, after=tile.transfer))

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
        parts: list[Part] = []
        jobs: list[Job] = []
        offset = nbytes = 0
        for piece in waiting.pieces:
            target = waiting.targets[piece.index]
            part = Part.place(target, piece, buffer, offset)
            parts.append(part)
            offset += sum(target.staging(piece))
            if target.home is not None:
                jobs += self.gradients.places.read_jobs(target.home, piece.start, part.source)
                nbytes += part.source.nbytes
            for move in part.reads():
                jobs += self._read_jobs(move)
                nbytes += move.staged.nbytes
        label = self._label(parts, reading=True)
        transfer = self.tier.lanes.reads.submit(jobs, label, nbytes, after=after)
        return _Tile(waiting.group, parts, buffer, transfer, waiting.on_device)

    def _read_jobs(self, move: Move) -> list[Job]:
        current, staged = move.version.stored.current, move.staged
        assert current is not None
        file, nbytes = self.tier.file, page_ceil(staged.nbytes)
        base = current.extent.offset + move.at
        return move_jobs(file, file.read, base, staged.data_ptr(), nbytes)

    def _compute(self, tile: _Tile) -> None:
        with _one_thread():
            by_blocks = any(part.by_blocks or part.makes_states for part in tile.parts)
            for part in tile.parts:
                part.widen(by_blocks=by_blocks)
            if by_blocks:
                self._blocks.step(tile.group, tile.parts)
            else:
                self._take(tile, self._step_whole(tile))
            for part in tile.parts:
                part.narrow(by_blocks=by_blocks)

    def _step_whole(self, tile: _Tile) -> Sequence[Mapping[str, Any]]:
        return step_on(
            self.optimizer,
            tile.group,
            [part.parameter for part in tile.parts],
            [part.state_before() for part in tile.parts],
        )

    def _take(self, tile: _Tile, afters: Sequence[Mapping[str, Any]]) -> None:
        for part, after in zip(tile.parts, afters, strict=True):
            part.take(after)

    def _write(self, tile: _Tile) -> None:
        moves = [move for part in tile.parts for move in part.writes()]
        jobs = [job for move in moves for job in self._write_jobs(move)]
        nbytes = sum(move.staged.nbytes for move in moves)
        if unscales(self.optimizer):
            for part in tile.parts:
                if part.target.home is not None and part.gradient is None:
                    jobs += self._gradient_jobs(part, part.target.home)
                    nbytes += part.source.nbytes
        label = self._label(tile.parts, reading=False)
        tile.transfer = self.tier.lanes.writes.submit(jobs, label, nbytes)

    def _gradient_jobs(self, part: Part, home: MappedTensor) -> list[Job]:
        """The step has unscaled the gradient, which ``p.grad`` is to show as in memory."""
        gradient, file = part.source, self.gradients.scratch.file
        assert home.block is not None
        if not part.piece.start:
            home.shed()  # pages that nobody maps are dropped by the writes at no cost
            self.gradients.norms.forget(home)
            torch.autograd.graph.increment_version(part.target.gradient)
        at = part.piece.start * gradient.element_size()
        return write_jobs(file, home.block, gradient.data_ptr(), gradient.nbytes, at)

    def _write_jobs(self, move: Move) -> list[Job]:
        version, data = move.version, move.staged
        file, address = self.tier.file, data.data_ptr()

        def write(offset: int, source: int, nbytes: int) -> None:
            file.write(offset, source, nbytes)
            if source == address:  # once for all the pieces of the chunk
                chunk = move.at // version.stored.chunk_nbytes
                version.checksums[chunk] = checksum(address, data.nbytes)

        base = version.target.extent.offset + move.at
        return move_jobs(file, write, base, address, page_ceil(data.nbytes))

    def _label(self, parts: Sequence[Part], *, reading: bool) -> Label:
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
