"""A tile's way to its staging memory and back: what is laid out there, and the requests for it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from offload.swap.copying import write_jobs
from offload.swap.gradients import GradientSwapper
from offload.swap.optim_kinds import unscales
from offload.swap.step_targets import Target
from offload.swap.tile_parts import Move, Part
from offload.swap.tiles import Piece
from offload.tiers.filetier import FileTier
from offload.tiers.hostmem import page_ceil
from offload.tiers.journal import Label
from offload.tiers.lanes import Job, Transfer
from offload.tiers.mapped import MappedTensor
from offload.tiers.memory import HostBuffer
from offload.tiers.pieces import move_jobs
from offload.tiers.store import checksum


@dataclass(frozen=True, slots=True)
class WaitingTile:
    """A tile that is not read yet: pieces of ``targets``.

    Attributes:
        on_device: a device is to step it.
        beside: it may be stepped beside kernels (``beside`` [Note: beside kernels]).
    """

    group: Mapping[str, Any]
    targets: Sequence[Target]
    pieces: Sequence[Piece]
    on_device: bool
    beside: bool

    def staging_nbytes(self) -> int:
        """Bytes that it takes."""
        return sum(sum(self.targets[piece.index].staging(piece)) for piece in self.pieces)


@dataclass(slots=True, eq=False)
class Tile:
    """Parts in flight and the staging buffer under them; None once it is promised to another."""

    group: Mapping[str, Any]
    parts: list[Part]
    buffer: HostBuffer | None
    transfer: Transfer
    on_device: bool
    beside: bool

    def tell_stepped(self) -> None:
        """It has been stepped, and its writes are on their way."""
        for part in self.parts:
            part.release_gradient()


class TileMoves:
    """Issues reads and writes of tiles.

    Args:
        tier: the store's.
    """

    def __init__(self, tier: FileTier, gradients: GradientSwapper) -> None:
        self._tier = tier
        self._gradients = gradients

    def read(self, waiting: WaitingTile, buffer: HostBuffer, after: Transfer | None = None) -> Tile:
        """Lay out a tile in ``buffer`` and issue its reads, to begin when ``after`` has ended."""
        parts: list[Part] = []
        jobs: list[Job] = []
        offset = nbytes = 0
        for piece in waiting.pieces:
            target = waiting.targets[piece.index]
            part = Part.place(target, piece, buffer, offset)
            parts.append(part)
            offset += sum(target.staging(piece))
            if target.home is not None:
                jobs += self._gradients.places.read_jobs(target.home, piece.start, part.source)
                nbytes += part.source.nbytes
            for move in part.reads():
                jobs += self._read_jobs(move)
                nbytes += move.staged.nbytes
        label = self._label(parts, reading=True)
        transfer = self._tier.lanes.reads.submit(jobs, label, nbytes, after=after)
        return Tile(waiting.group, parts, buffer, transfer, waiting.on_device, waiting.beside)

    def _read_jobs(self, move: Move) -> list[Job]:
        current, staged = move.version.stored.current, move.staged
        assert current is not None
        file, nbytes = self._tier.file, page_ceil(staged.nbytes)
        base = current.extent.offset + move.at
        return move_jobs(file, file.read, base, staged.data_ptr(), nbytes)

    def write(self, tile: Tile, optimizer: Optimizer) -> None:
        """Issue the writes of what ``optimizer`` has stepped."""
        moves = [move for part in tile.parts for move in part.writes()]
        jobs = [job for move in moves for job in self._write_jobs(move)]
        nbytes = sum(move.staged.nbytes for move in moves)
        if unscales(optimizer):
            for part in tile.parts:
                if part.target.home is not None and part.gradient is None:
                    jobs += self._gradient_jobs(part, part.target.home)
                    nbytes += part.source.nbytes
        label = self._label(tile.parts, reading=False)
        tile.transfer = self._tier.lanes.writes.submit(jobs, label, nbytes)

    def _gradient_jobs(self, part: Part, home: MappedTensor) -> list[Job]:
        """The step has unscaled the gradient, which ``p.grad`` is to show as in memory."""
        gradient, file = part.source, self._gradients.scratch.file
        assert home.block is not None
        if not part.piece.start:
            home.shed()  # pages that nobody maps are dropped by the writes at no cost
            self._gradients.norms.forget(home)
            torch.autograd.graph.increment_version(part.target.gradient)
        at = part.piece.start * gradient.element_size()
        return write_jobs(file, home.block, gradient.data_ptr(), gradient.nbytes, at)

    def _write_jobs(self, move: Move) -> list[Job]:
        version, data = move.version, move.staged
        file, address = self._tier.file, data.data_ptr()

        def write(offset: int, source: int, nbytes: int) -> None:
            file.write(offset, source, nbytes)
            if source == address:  # once for all the pieces of the chunk
                chunk = move.at // version.stored.chunk_nbytes
                version.checksums[chunk] = checksum(address, data.nbytes)

        base = version.target.extent.offset + move.at
        return move_jobs(file, write, base, address, page_ceil(data.nbytes))

    def _label(self, parts: Sequence[Part], *, reading: bool) -> Label:
        ends = (self._tier.spec.name, "host")
        source, destination = ends if reading else ends[::-1]
        return Label(parts[0].target.weight.name, "state", source, destination)
