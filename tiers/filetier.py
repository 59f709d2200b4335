"""The file tier: extents of one preallocated file, moved by direct I/O on two lanes."""

from pathlib import Path

from offload.allocator.adaptors import StatisticsAdaptor
from offload.allocator.errors import CapacityError
from offload.allocator.extent import Extent
from offload.allocator.tlsf import TLSF
from offload.tiers.base import Block, Tier, TierSpec
from offload.tiers.engines.base import EngineFactory
from offload.tiers.engines.threads import ThreadsEngine
from offload.tiers.file import TierFile
from offload.tiers.hostmem import PAGE, page_ceil
from offload.tiers.journal import Journal, Label
from offload.tiers.lanes import Lane, Transfer
from offload.tiers.pieces import BlockFile, move_jobs

LARGE_NBYTES = 16 << 20  # blocks from here on begin and end where the file likes best
_GROW_NBYTES = 64 << 20


class Lanes:
    """The two directed links between host memory and files; shared by all files of a run.

    Args:
        workers: requests in flight in each direction, for each path.
        paths: directories that files are striped over.
        engine: makes the engine by which the bytes of a file travel.
    """

    def __init__(
        self,
        journal: Journal,
        workers: int = 2,
        paths: int = 1,
        *,
        engine: EngineFactory = ThreadsEngine,
    ) -> None:
        self.journal = journal
        self.engine = engine
        self.reads = Lane("file→host", workers, journal, paths)
        self.writes = Lane("host→file", workers, journal, paths)

    def drain(self) -> None:
        """Wait for both lanes; raises what a transfer that nobody waited for raised."""
        self.writes.drain()
        self.reads.drain()

    def settle(self) -> None:
        """Wait for both lanes; errors stay with their transfers, and for ``drain``."""
        self.writes.settle()
        self.reads.settle()

    def close(self) -> None:
        """Finish what is queued and end the workers."""
        self.writes.close()
        self.reads.close()


class FileTier(Tier):
    """Blocks are page-aligned extents of ``directory/name`` (``None``: unlinked scratch).

    The file grows as blocks are allocated, by preallocation: a full disk is met by
    ``allocate``, not by a write in the middle of a step.

    Args:
        file: the file to cut into blocks, if it is not ``directory/name`` alone.
    """

    def __init__(
        self, directory: Path, name: str | None, lanes: Lanes, *, file: BlockFile | None = None
    ) -> None:
        self.file: BlockFile = file or TierFile(directory, name, lanes.engine)
        self.lanes = lanes
        self.arena = StatisticsAdaptor(TLSF(self.file.nbytes // PAGE * PAGE))
        self._closed = False
        self.spec = TierSpec(
            name=f"file:{directory}", kind="file", capacity=self.arena.capacity, align=PAGE
        )

    def room_nbytes(self) -> int:
        """Bytes that blocks may take in all, as the disk is now."""
        return self.arena.capacity + self.file.growth_nbytes()

    def reserve_room(self, nbytes: int) -> None:
        """Preallocate so that extents of ``nbytes`` in all fit besides those that live.

        Raises:
            CapacityError: the disk has not enough room.
        """
        nbytes += self.file.block_align - PAGE  # what may be lost before the first large block
        free = self.arena.capacity - self.arena.current_nbytes
        if nbytes > free:
            self._grow(nbytes - free)

    def extent_nbytes(self, nbytes: int) -> int:
        """What a block of ``nbytes`` takes of the file."""
        align = self._align(nbytes)
        return -(-max(nbytes, 1) // align) * align

    def _align(self, nbytes: int) -> int:
        return self.file.block_align if nbytes >= LARGE_NBYTES else PAGE

    def allocate(self, nbytes: int) -> Block:
        asked, align = self.extent_nbytes(nbytes), self._align(nbytes)
        try:
            extent = self.arena.allocate(asked, align=align)
        except CapacityError:
            self._grow_for(asked + align - PAGE)
            extent = self.arena.allocate(asked, align=align)
        return Block(self, extent, nbytes)

    def adopt(self, extent: Extent, nbytes: int) -> Block:
        """The block of an extent that an earlier run wrote."""
        if extent.end > self.arena.capacity:
            raise CapacityError(
                f"{self.file.label} holds {self.arena.capacity} bytes, "
                f"its record names byte {extent.end}"
            )
        self.arena.reserve(extent)
        return Block(self, extent, nbytes)

    def clear(self, block: Block) -> None:
        """Make the bytes of ``block`` zeros, without writing them where the disk can do so."""
        self.file.clear(block.extent.offset, block.extent.nbytes)

    def _grow_for(self, nbytes: int) -> None:
        """Grow by as much again, within bounds; on a nearly full disk by what is missing only."""
        missing = nbytes - self.arena.last_free_nbytes
        generous = max(nbytes, min(_GROW_NBYTES, self.arena.capacity))
        try:
            self._grow(generous)
        except CapacityError:
            self._grow(missing)

    def _grow(self, nbytes: int) -> None:
        total = page_ceil(self.arena.capacity + nbytes)
        self.file.grow(total)
        self.arena.grow(total - self.arena.capacity)

    def _move(
        self, block: Block, address: int, offset: int, nbytes: int, label: Label, *, reading: bool
    ) -> Transfer:
        call = self.file.read if reading else self.file.write
        lane = self.lanes.reads if reading else self.lanes.writes
        jobs = move_jobs(self.file, call, block.extent.offset + offset, address, nbytes)
        return lane.submit(jobs, label, nbytes)

    def _release(self, block: Block) -> None:
        self.arena.free(block.extent)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self.lanes.settle()
            self.file.close()
