"""Links between memory and the files of a directory, by the lanes and the engine of a run.

The file has no name, so nothing is left whatever happens. Its bytes are random, for some drives
and virtual machines are faster on zeros. It is filled once, by steps whose number the time
decides, and then overwritten and read: overwriting is what training does to its store. Reads
never count the page cache: before each measurement the file is flushed and its cached pages are
dropped. Where direct I/O is refused, a write counts only when it is flushed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from offload.allocator.errors import CapacityError
from offload.allocator.units import format_nbytes
from offload.tiers.filesystem import free_nbytes
from offload.tiers.filetier import FileTier, Lanes
from offload.tiers.hostmem import PAGE
from offload.tiers.journal import Journal
from offload.tiers.lanes import Transfer
from offload.tiers.memory import HostBuffer
from offload.tiers.probe.pace import Effort, Pace, Route, timed

if TYPE_CHECKING:
    from offload.tiers.base import Block

_SHARE_OF_FREE = 4  # a quarter of the free space at most
_FILL_CASES = 2  # shares of the time that filling takes
_COPY_CASES = 2  # and both directions at once
_COPY_NBYTES = 8 << 20  # of one request then, or the next smaller size


def count_cases(effort: Effort) -> int:
    """Shares of the time that a directory takes: filling, both directions, both at once."""
    return _FILL_CASES + 2 * (len(effort.blocks) + 1) + _COPY_CASES


@contextmanager
def open_file(
    directory: Path, name: str, effort: Effort, pace: Pace
) -> Iterator[tuple[Route, Route, Route]]:
    """The links into and out of a file of ``directory``, the tier ``name``; filled already.

    And both at once: from the tier to itself, by way of memory.

    Raises:
        CapacityError: less free space than the smallest measurement needs.
        TierIOError: the directory can't be written.
    """
    blocks = tuple(
        block for block in effort.blocks if block * effort.in_flight <= effort.memory_nbytes
    )
    buffer = HostBuffer(blocks[-1] * effort.in_flight)
    try:
        fill_randomly(buffer.view())
        lanes = Lanes(Journal(), effort.in_flight)
        try:
            with FileTier(directory, None, lanes) as tier:
                probe = _FileProbe(directory, tier, buffer, blocks, effort)
                probe.fill(pace)
                yield probe.routes(name)
        finally:
            lanes.close()
    finally:
        buffer.release()


def fill_randomly(memory: memoryview) -> None:
    """Fill ``memory`` with bytes that no drive can compress."""
    generator = np.random.default_rng(0)
    words = np.frombuffer(memory, dtype=np.uint64)
    step = 1 << 20
    for at in range(0, len(words), step):
        part = words[at : at + step]
        part[:] = generator.integers(0, 1 << 64, size=len(part), dtype=np.uint64)


class _FileProbe:
    """An unlinked file that is filled, then measured in both directions."""

    def __init__(
        self,
        directory: Path,
        tier: FileTier,
        buffer: HostBuffer,
        blocks: tuple[int, ...],
        effort: Effort,
    ) -> None:
        self._directory = directory
        self._tier = tier
        self._buffer = buffer
        self._blocks = blocks
        self._effort = effort
        self._pieces: list[Block] = []
        self._next = 0

    def fill(self, pace: Pace) -> None:
        """Write the file for the first time, as much of it as the time and the disk allow.

        Raises:
            CapacityError: not even the smallest measurement has room.
            TierIOError: the disk reported an error.
        """
        until_s = max(pace.share() for _ in range(_FILL_CASES))
        room = min(self._effort.file_nbytes, free_nbytes(self._directory) // _SHARE_OF_FREE)
        least = self._effort.in_flight * self._blocks[0]
        piece = min(self._blocks[-1], room // PAGE * PAGE)
        if room < least:
            raise CapacityError(
                f"{self._directory} has {format_nbytes(room * _SHARE_OF_FREE)} free, "
                f"measuring needs {format_nbytes(least * _SHARE_OF_FREE)} "
                f"({least * _SHARE_OF_FREE} bytes): free that much, or name another directory"
            )
        slowest_s = 0.0
        for _ in range(room // piece):
            filled = len(self._pieces) * piece
            if filled >= least and pace.clock() + slowest_s > until_s:
                break
            slowest_s = max(slowest_s, timed(pace.clock, lambda: self._fill_piece(piece)))

    def _fill_piece(self, nbytes: int) -> None:
        self._tier.reserve_room(nbytes)
        block = self._tier.allocate(nbytes)
        self._tier.write(block, self._buffer.address).wait()
        self._pieces.append(block)

    def routes(self, name: str) -> tuple[Route, Route, Route]:
        """The link into the file, the one out of it, and both at once."""
        held = len(self._pieces) * self._pieces[0].nbytes
        blocks = tuple(
            block
            for block in self._blocks
            if block <= self._pieces[0].nbytes and block * self._effort.in_flight <= held
        )
        write = Route(
            source="host",
            target=name,
            blocks=blocks,
            in_flight=self._effort.in_flight,
            move=self._write,
        )
        read = Route(
            source=name,
            target="host",
            blocks=blocks,
            in_flight=self._effort.in_flight,
            move=self._read,
            prepare=self._uncache,
        )
        copy = Route(
            source=name,
            target=name,
            blocks=(max([block for block in blocks if block <= _COPY_NBYTES] or blocks[:1]),),
            in_flight=self._effort.in_flight,
            move=self._copy,
            prepare=self._uncache,
        )
        return write, read, copy

    def _write(self, block_nbytes: int, count: int) -> None:
        self._move(block_nbytes, count, reading=False)
        if not self._tier.file.direct:
            self._tier.file.sync()

    def _read(self, block_nbytes: int, count: int) -> None:
        self._move(block_nbytes, count, reading=True)

    def _copy(self, block_nbytes: int, count: int) -> None:
        """Read ``count`` requests and write as many others at once; nothing depends on which."""
        reads = self._begin(block_nbytes, count, reading=True)
        writes = self._begin(block_nbytes, count, reading=False)
        for transfer in (*reads, *writes):
            transfer.wait()
        if not self._tier.file.direct:
            self._tier.file.sync()

    def _move(self, block_nbytes: int, count: int, *, reading: bool) -> None:
        """Move ``count`` requests one after the other through the file, from where it stands."""
        for transfer in self._begin(block_nbytes, count, reading=reading):
            transfer.wait()

    def _begin(self, block_nbytes: int, count: int, *, reading: bool) -> list[Transfer]:
        call = self._tier.read if reading else self._tier.write
        in_piece = self._pieces[0].nbytes // block_nbytes
        in_buffer = self._buffer.nbytes // block_nbytes
        transfers = []
        for number in range(self._next, self._next + count):
            piece = self._pieces[number // in_piece % len(self._pieces)]
            address = self._buffer.address + number % in_buffer * block_nbytes
            offset = number % in_piece * block_nbytes
            transfers.append(call(piece, address, offset=offset, nbytes=block_nbytes))
        self._next += count
        return transfers

    def _uncache(self) -> None:
        file = self._tier.file
        file.sync()
        file.uncache(0, file.nbytes)
