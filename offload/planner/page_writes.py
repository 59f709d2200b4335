"""How many pages of a file a second are written for the first time, through its mapping.

So the gradient of a lookup gets home: row by row, each to another page that the kernel has to
provide and to find a place for. It provides those around, too, as far as it reads ahead: the
farther apart the pages, the more each takes.
"""

import mmap
import statistics
import tempfile
import time
from pathlib import Path
from typing import IO

from offload.tiers.hostmem import PAGE, zero_range

_PAGES, _REPEATS = 8192, 3  # pages of the file
_EVERY = (1, 8, 64, 512)  # which of them


def measure_page_writes(directory: Path) -> dict[int, float]:
    """Pages a second, on the file system of ``directory``, by how many pages they are apart."""
    nbytes = _PAGES * PAGE
    with tempfile.TemporaryFile(dir=directory) as file:
        file.truncate(nbytes)
        return {
            every: _PAGES / every / statistics.median(_write(file, every) for _ in range(_REPEATS))
            for every in _EVERY
        }


def _write(file: IO[bytes], every: int) -> float:
    """Seconds of writing to pages so far apart."""
    nbytes = _PAGES * PAGE
    zero_range(file.fileno(), 0, nbytes)  # where it can't, pages are only cheaper
    with mmap.mmap(file.fileno(), nbytes) as pages:
        began_s = time.perf_counter()
        for offset in range(0, nbytes, every * PAGE):
            pages[offset] = 1
        return max(time.perf_counter() - began_s, 1e-9)
