"""How many pages of a mapped file a second are looked at, or written, for the first time.

Rows of a table that is on the drive are looked up through its mapping, and the gradient of a lookup
gets home through another: row by row, each in another page. Those that are looked up are asked for
together first, those that are near to each other with what lies between. A home is zeroed
before its rows are written, by its extents alone, of which each row written in the last step has
made some. So the farther apart the pages, the more each takes.
"""

import mmap
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from offload.swap.looked_up import page_spans
from offload.tiers.hostmem import PAGE, zero_range
from offload.tiers.machine import Work

_PAGES, _REPEATS = 8192, 3  # pages of the file
_NBYTES = _PAGES * PAGE
_WRITTEN_EVERY = (1, 8, 64, 512)  # which of them
_READ_EVERY = (16, 64, 512, 2048)  # nearer ones come in together in any case
_LEAST_S = 1e-9


def measure_mapped_pages(directory: Path) -> dict[Work, dict[int, float]]:
    """Pages a second, on the file system of ``directory``, by how many pages they are apart."""
    with tempfile.TemporaryFile(dir=directory) as file:
        fd = file.fileno()
        os.truncate(fd, _NBYTES)
        written = {every: _pages_per_s(fd, every, _write) for every in _WRITTEN_EVERY}
        with mmap.mmap(fd, _NBYTES) as pages:
            pages.write(random.Random(0).randbytes(_NBYTES))
        looked_at = {every: _pages_per_s(fd, every, _look) for every in _READ_EVERY}
    return {"page writes": written, "page reads": looked_at}


def _pages_per_s(fd: int, every: int, seconds: Callable[[int, Sequence[int]], float]) -> float:
    offsets = range(0, _NBYTES, every * PAGE)
    seconds(fd, offsets)  # leaves the file as the next time finds it
    return len(offsets) / statistics.median(seconds(fd, offsets) for _ in range(_REPEATS))


def _write(fd: int, offsets: Sequence[int]) -> float:
    """Seconds of zeroing the file and writing to pages."""
    began_s = time.perf_counter()
    zero_range(fd, 0, _NBYTES)  # where it can't, pages are only cheaper
    with mmap.mmap(fd, _NBYTES) as pages:
        for offset in offsets:
            pages[offset] = 1
        taken_s = time.perf_counter() - began_s
    os.fdatasync(fd)  # as the step's reads have it written
    return max(taken_s, _LEAST_S)


def _look(fd: int, offsets: Sequence[int]) -> float:
    """Seconds of looking at pages in any order, none of which is in memory."""
    os.fdatasync(fd)  # what is not written can't be dropped
    os.posix_fadvise(fd, 0, _NBYTES, os.POSIX_FADV_DONTNEED)
    shuffled, ascending = random.Random(0).sample(offsets, len(offsets)), np.array(offsets)
    with mmap.mmap(fd, _NBYTES, prot=mmap.PROT_READ) as pages:
        began_s = time.perf_counter()
        for span in page_spans(ascending, PAGE):  # as ``swap/looked_up`` does
            pages.madvise(mmap.MADV_WILLNEED, *span)
        for offset in shuffled:
            pages[offset]
        return max(time.perf_counter() - began_s, _LEAST_S)
