"""Operations on gradients that have left memory, by direct reads and writes of scratch.

Through the mapping behind ``p.grad`` every operation works, too, but a page at a time: the kernel
faults pages in while the training thread waits, and writes changed ones back when it likes. Here
gradients are read ahead and written behind on the lanes, within a bound on the memory that this
takes, and each is read and written once for all the changes of one call.

[Note: done when the call returns] A change is in scratch when the call that asked for it returns.
To keep it for the optimizer's step, which reads every gradient anyway, would save a read and a
write. But until then the mapping would show what the gradient was before the change, and who reads
memory (a kernel, numpy, a library that was given an address) asks nobody: no hook, no subclass and
no count of owners sees them all. A gradient that is wrong for a while is not worth any speed.

[Note: the same bits] A norm is taken by torch's own function of a whole gradient, of the same shape
and with the same threads: how a sum rounds depends on all of these. Changes are elementwise, so a
tile gets the bits of the whole.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from offload.swap.copying import write_jobs
from offload.swap.gradients import GradientSwapper
from offload.swap.staging import Staging
from offload.tiers.hostmem import page_ceil
from offload.tiers.journal import Label
from offload.tiers.lanes import Transfer
from offload.tiers.mapped import MappedTensor
from offload.tiers.memory import HostBuffer

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Change:
    """Something to do to a gradient in place, to each element by itself.

    Attributes:
        writes: False if it only looks, unless ``call`` returns True.
    """

    call: Callable[[torch.Tensor], object]
    writes: bool = True


@dataclass(frozen=True, slots=True)
class Filed:
    """A gradient in scratch, and the name of its parameter."""

    name: str
    home: MappedTensor


@dataclass(frozen=True, slots=True)
class _Piece:
    """Elements ``start`` to ``stop`` of a gradient."""

    filed: Filed
    changes: Sequence[Change]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return (self.stop - self.start) * self.filed.home.tensor.element_size()


@dataclass(slots=True, eq=False)
class _Tile:
    """A piece in memory."""

    piece: _Piece
    values: torch.Tensor  # 1-D
    buffer: HostBuffer
    transfer: Transfer


class GradientStream:
    """Reads and changes gradients in scratch; called on the training thread only.

    Args:
        chunk_numel: elements of one tile of a change.
        staging_nbytes: bytes of tiles, or of whole gradients, in flight. One may always be.
        make_room: asked to free so many bytes of the budget, if it can.
    """

    def __init__(
        self,
        gradients: GradientSwapper,
        *,
        chunk_numel: int,
        staging_nbytes: int,
        make_room: Callable[[int], None] = lambda _nbytes: None,
    ) -> None:
        self.gradients = gradients
        self.staging = Staging(staging_nbytes)
        self._chunk_numel = chunk_numel
        self._make_room = make_room
        self._reading: deque[_Tile] = deque()
        self._writing: deque[_Tile] = deque()

    def filed(self) -> list[Filed]:
        """The gradients in scratch now; those on their way there are still in memory.

        None where a write has failed: that is raised where its own engine goes on, not in a call
        that may be about other gradients.
        """
        if self.gradients.has_failed():
            return []
        with self.gradients.guard:
            self.gradients.poll()
        return [
            Filed(self.gradients.name_of(parameter), home)
            for parameter, home in self.gradients.homes.items()
            if home.shared  # others are, while backward runs, not what their mapping shows
        ]

    def measure(self, found: Sequence[Filed], call: Callable[[torch.Tensor], T]) -> list[T]:
        """What ``call`` says of each gradient, which it gets as a copy in its shape.

        Raises:
            TierIOError: a read failed.
        """
        pieces = [_Piece(one, (), 0, one.home.tensor.numel()) for one in found]
        measured: list[T] = []
        with torch.no_grad():
            for tile in self._read_ahead(pieces):
                measured.append(call(tile.values.view(tile.piece.filed.home.tensor.shape)))
                self.staging.give_back(tile.buffer)
        return measured

    def change(self, changes: Sequence[tuple[Filed, Sequence[Change]]]) -> None:
        """Apply its changes to each gradient, in order; all are in scratch when this returns.

        Raises:
            TierIOError: a read or write failed: some gradients are changed, others are not.
        """
        pieces: list[_Piece] = []
        for filed, made in changes:
            filed.home.shed()  # pages that nobody maps are dropped by the writes at no cost
            numel = filed.home.tensor.numel()
            pieces += [
                _Piece(filed, made, start, min(start + self._chunk_numel, numel))
                for start in range(0, numel, self._chunk_numel)
            ]
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # bound by the disk, as a tile of the step is (``pipeline``)
        try:
            with torch.no_grad():
                for tile in self._read_ahead(pieces):
                    changed = [
                        change.call(tile.values) is True or change.writes
                        for change in tile.piece.changes
                    ]
                    if any(changed):
                        self._write(tile)
                    else:
                        self.staging.give_back(tile.buffer)
        finally:
            torch.set_num_threads(threads)

    def _read_ahead(self, pieces: Sequence[_Piece]) -> Iterator[_Tile]:
        """Each piece in turn, and nothing in flight at the end, whatever ends it."""
        waiting = deque(pieces)
        try:
            while waiting or self._reading or self._writing:
                self._retire_written()
                while waiting and (buffer := self._take(waiting[0].nbytes)):
                    self._reading.append(self._read(waiting.popleft(), buffer))
                if self._reading:
                    self._await(self._reading[0], self.gradients.scratch.lanes.reads.name, "late")
                    yield self._reading.popleft()
                elif self._writing:
                    self._await(self._writing[0], self.gradients.scratch.lanes.writes.name, "full")
                    self._retire_written()
        finally:
            for tile in (*self._reading, *self._writing):
                tile.transfer.settle()
                self.staging.give_back(tile.buffer)
            self._reading.clear()
            self._writing.clear()
            self.staging.close()

    def _take(self, nbytes: int) -> HostBuffer | None:
        """Staging of ``nbytes``, or None as long as what is in flight has the room."""
        staging = self.staging
        room = self.gradients.governor.room() - staging.landing_nbytes + staging.free_nbytes
        if nbytes > room:
            if self._reading or self._writing:
                return None
            self._make_room(nbytes - room)
        return staging.take(page_ceil(nbytes))

    def _read(self, piece: _Piece, buffer: HostBuffer) -> _Tile:
        home, scratch = piece.filed.home, self.gradients.scratch
        values = buffer.tensor(home.tensor.dtype, (piece.stop - piece.start,))
        jobs = self.gradients.places.read_jobs(home, piece.start, values)
        label = Label(piece.filed.name, "gradient", scratch.spec.name, "host")
        transfer = scratch.lanes.reads.submit(jobs, label, values.nbytes)
        return _Tile(piece, values, buffer, transfer)

    def _write(self, tile: _Tile) -> None:
        home, scratch = tile.piece.filed.home, self.gradients.scratch
        assert home.block is not None
        offset = tile.piece.start * tile.values.element_size()
        jobs = write_jobs(
            scratch.file, home.block, tile.values.data_ptr(), tile.values.nbytes, offset
        )
        label = Label(tile.piece.filed.name, "gradient", "host", scratch.spec.name)
        tile.transfer = scratch.lanes.writes.submit(jobs, label, tile.values.nbytes)
        self._writing.append(tile)

    def _retire_written(self) -> None:
        while self._writing and self._writing[0].transfer.done():
            self._writing[0].transfer.wait()
            self.staging.give_back(self._writing.popleft().buffer)

    def _await(self, tile: _Tile, lane: str, reason: str) -> None:
        if not tile.transfer.done():
            with self.gradients.journal.stall(tile.piece.filed.name, "gradient", lane, reason):
                tile.transfer.settle()
        tile.transfer.wait()
