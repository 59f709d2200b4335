"""The default engine: ``preadv`` and ``pwritev`` from the lanes' own threads.

Two to eight threads with requests of 8 to 32 MiB to huge-page-backed memory reach the limit of the
disk, at the least processor time of the engines here (``tools/bench_io.py``, docs/benchmarks.md).
"""

import os

from offload.tiers.engines.base import FileEngine, OpenFile
from offload.tiers.memory import memory_at


class ThreadsEngine(FileEngine):
    """Blocking direct I/O; buffered where the file system refuses ``O_DIRECT``."""

    name = "threads"

    def __init__(self, file: OpenFile) -> None:
        self._fd = file.fd if file.direct_fd is None else file.direct_fd

    def read(self, offset: int, address: int, nbytes: int) -> int:
        return os.preadv(self._fd, [memory_at(address, nbytes)], offset)

    def write(self, offset: int, address: int, nbytes: int) -> int:
        return os.pwritev(self._fd, [memory_at(address, nbytes)], offset)

    def close(self) -> None:
        self._fd = -1  # never a number that the next file opened by anyone may get
