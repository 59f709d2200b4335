"""How many pages of a file a second are written for the first time, through its mapping.

So the gradient of a lookup gets home: row by row, each to another page that the kernel has to
provide and to find a place for.
"""

import mmap
import statistics
import tempfile
import time
from pathlib import Path

from offload.tiers.hostmem import PAGE, zero_range

_PAGES, _REPEATS = 512, 3
_EVERY = 8  # of the pages


def measure_page_writes(directory: Path) -> float:
    """Pages a second, on the file system of ``directory``."""
    nbytes = _PAGES * _EVERY * PAGE
    taken: list[float] = []
    with tempfile.TemporaryFile(dir=directory) as file:
        file.truncate(nbytes)
        for _ in range(_REPEATS):
            zero_range(file.fileno(), 0, nbytes)  # where it can't, pages are only cheaper
            with mmap.mmap(file.fileno(), nbytes) as pages:
                began_s = time.perf_counter()
                for offset in range(0, nbytes, _EVERY * PAGE):
                    pages[offset] = 1
                taken.append(time.perf_counter() - began_s)
    return _PAGES / max(statistics.median(taken), 1e-9)
