"""The disk's own limit: plain threads with direct reads and writes of large aligned blocks.

Nothing of Offload's is used, so the figure can serve as its ceiling: no checksums, no mappings,
no scheduling, the same block size and number of requests in flight. The blocks hold random
bytes, as weights do: some drives and virtual machines are faster on zeros.
"""

import ctypes
import mmap
import os
import threading
import time
from pathlib import Path

BLOCK_NBYTES = 16 << 20
_HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE = 14


class DiskLimit:
    """A preallocated file of ``nbytes`` in ``directory`` to read from and write to."""

    def __init__(self, directory: Path, nbytes: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "iolimit.bin"
        self.blocks = max(2, nbytes // BLOCK_NBYTES)
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT | os.O_TRUNC, 0o600)
        path.unlink()
        os.posix_fallocate(self.fd, 0, self.blocks * BLOCK_NBYTES)
        self._content = os.urandom(BLOCK_NBYTES)
        self.run(0, self.blocks)  # blocks that were never written would read as zeros, too fast

    def run(self, reads: int, writes: int, threads: int = 2) -> float:
        """Seconds for so many block reads and writes, ``threads`` of each at once.

        Reads go over the first part of the file and writes over the rest, both in order.
        """
        split = self.blocks * reads // max(reads + writes, 1)
        kinds = (
            (os.preadv, reads, 0, max(split, 1)),
            (os.pwritev, writes, split, max(self.blocks - split, 1)),
        )
        began = threading.Barrier(1 + threads * sum(1 for _, count, _, _ in kinds if count))
        workers = [
            threading.Thread(
                target=self._work, args=(began, call, range(index, count, threads), first, length)
            )
            for call, count, first, length in kinds
            if count
            for index in range(threads)
        ]
        for worker in workers:
            worker.start()
        began.wait()  # every buffer is there and filled
        began_s = time.perf_counter()
        for worker in workers:
            worker.join()
        return time.perf_counter() - began_s

    def _work(
        self, began: threading.Barrier, call: object, numbers: range, first: int, length: int
    ) -> None:
        assert callable(call)
        buffer = mmap.mmap(-1, BLOCK_NBYTES + _HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        buffer.madvise(_MADV_HUGEPAGE)
        start = -ctypes.addressof(ctypes.c_char.from_buffer(buffer)) % _HUGE_PAGE
        view = memoryview(buffer)[start : start + BLOCK_NBYTES]
        view[:] = self._content
        began.wait()
        for number in numbers:
            offset = (first + number % length) * BLOCK_NBYTES
            if call(self.fd, [view], offset) != BLOCK_NBYTES:
                raise OSError(f"short transfer at byte {offset}")

    def mixed_bytes_per_s(self, read_share: float, nbytes: int) -> float:
        """Total rate of a mix of which ``read_share`` of the bytes are reads."""
        total = max(2, nbytes // BLOCK_NBYTES)
        reads = round(total * read_share)
        seconds = self.run(reads, total - reads)
        return total * BLOCK_NBYTES / seconds

    def close(self) -> None:
        """Give the disk space back."""
        os.close(self.fd)
