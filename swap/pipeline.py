"""Tiles in flight: read ahead, step, write behind, within a bound on staging memory."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from offload.swap.gradients import GradientSwapper
from offload.swap.optim_kinds import step_on
from offload.swap.staging import Staging
from offload.swap.step_targets import Target
from offload.swap.tile_parts import Move, Part
from offload.swap.tiles import Piece, cut
from offload.tiers.filetier import FileTier
from offload.tiers.hostmem import page_ceil
from offload.tiers.journal import Journal, Label
from offload.tiers.lanes import Job, Transfer
from offload.tiers.memory import HostBuffer
from offload.tiers.pieces import move_jobs
from offload.tiers.store import checksum


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A tile that is not read yet: pieces of ``targets``."""

    group: Mapping[str, Any]
    targets: Sequence[Target]
    pieces: Sequence[Piece]

    def staging_nbytes(self) -> int:
        return sum(sum(self.targets[piece.index].staging(piece)) for piece in self.pieces)


@dataclass(slots=True, eq=False)
class _Tile:
    """Parts in flight and the staging buffer under them."""

    group: Mapping[str, Any]
    parts: list[Part]
    buffer: HostBuffer
    transfer: Transfer


class TilePipeline:
    """Streams tiles through the optimizer's own step: ``add`` them, then ``advance`` or ``finish``.

    Called on the training thread only.

    Args:
        tier: the store's, which parameters and states are read from and written to.
        staging_nbytes: bytes of tiles in flight; one tile may always be.
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
    ) -> None:
        self.tier = tier
        self.gradients = gradients
        self.journal = journal
        self.optimizer = optimizer
        self.chunk_numel = chunk_numel
        self.staging = Staging(staging_nbytes)
        self._waiting: deque[_Waiting] = deque()
        self._reading: deque[_Tile] = deque()
        self._writing: deque[_Tile] = deque()

    @property
    def landing_nbytes(self) -> int:
        """Bytes of tiles in flight that the resident set may not show yet."""
        return self.staging.landing_nbytes

    def add(self, group: Mapping[str, Any], targets: Sequence[Target]) -> None:
        """Line up the tiles of ``targets``, all of the optimizer's ``group``."""
        tiles = cut([target.gradient.numel() for target in targets], self.chunk_numel)
        self._waiting += [_Waiting(group, targets, pieces) for pieces in tiles]

    def advance(self) -> None:
        """Read, step and write what can be without waiting for a lane.

        Raises:
            TierIOError: a read or write failed.
        """
        self._move_on()
        while self._reading and self._reading[0].transfer.done():
            self._step_first()
            self._move_on()

    def advance_one(self) -> None:
        """Wait for the tile that is nearest to its end, and step it or let it go.

        Raises:
            TierIOError: a read or write failed.
        """
        self._move_on()
        if self._reading:
            self._step_first()
        elif self._writing:  # room is needed, or the step is ending
            self._retire()

    def finish(self) -> None:
        """Return when every tile has been written; no staging is kept.

        Raises:
            TierIOError: a read or write failed.
        """
        while self._waiting or self._reading or self._writing:
            self.advance_one()
        self.staging.close()

    def trim(self) -> None:
        """Give back the staging that no tile is in."""
        self.staging.close()

    def abandon(self) -> None:
        """After an error: wait until no lane uses a buffer, and forget all tiles."""
        self._waiting.clear()
        for tile in (*self._reading, *self._writing):
            tile.transfer.settle()
            self.staging.give_back(tile.buffer)
        self._reading.clear()
        self._writing.clear()
        self.staging.close()

    def _move_on(self) -> None:
        """Let written tiles go and begin to read others, as far as staging reaches."""
        while self._writing and self._writing[0].transfer.done():
            self._retire()
        while self._waiting and (buffer := self.staging.take(self._waiting[0].staging_nbytes())):
            self._reading.append(self._read(self._waiting.popleft(), buffer))

    def _step_first(self) -> None:
        tile = self._reading[0]
        self._await(tile.transfer, "late")
        self._compute(tile)
        self._write(tile)
        self._writing.append(self._reading.popleft())

    def _retire(self) -> None:
        tile = self._writing[0]
        self._await(tile.transfer, "full")
        self._writing.popleft()
        self.staging.give_back(tile.buffer)
        for part in tile.parts:
            part.target.unwritten_numel -= part.piece.numel
            if not part.target.unwritten_numel:
                part.target.written(part.target)

    def _await(self, transfer: Transfer, reason: str) -> None:
        if not transfer.done():
            label = transfer.label
            with self.journal.stall(label.key, label.role, f"{label.src}→{label.dst}", reason):
                transfer.settle()
        transfer.wait()

    def _read(self, waiting: _Waiting, buffer: HostBuffer) -> _Tile:
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
        transfer = self.tier.lanes.reads.submit(jobs, label, nbytes)
        return _Tile(waiting.group, parts, buffer, transfer)

    def _read_jobs(self, move: Move) -> list[Job]:
        current, staged = move.version.stored.current, move.staged
        assert current is not None
        file, nbytes = self.tier.file, page_ceil(staged.nbytes)
        base = current.extent.offset + move.at
        return move_jobs(file, file.read, base, staged.data_ptr(), nbytes)

    def _compute(self, tile: _Tile) -> None:
        threads = torch.get_num_threads()
        # The step is bound by the disk. More threads would only wait, busily, for one another,
        # on cores that the lanes want.
        torch.set_num_threads(1)
        try:
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
        finally:
            torch.set_num_threads(threads)

    def _write(self, tile: _Tile) -> None:
        moves = [move for part in tile.parts for move in part.writes()]
        jobs = [job for move in moves for job in self._write_jobs(move)]
        nbytes = sum(move.staged.nbytes for move in moves)
        label = self._label(tile.parts, reading=False)
        tile.transfer = self.tier.lanes.writes.submit(jobs, label, nbytes)

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
