"""How fast fresh memory comes, by how much is taken and for how long it was free.

    python tools/bench_first_touch.py

A virtual machine may report what was free for two seconds to its host, which takes it back (free
page reporting of the balloon: ``mm/page_reporting.c`` of Linux). Then the first touch brings it
from there. So memory is filled by blocks, each for the first time, given back, and left alone for
some seconds: with huge pages, as torch's CPU allocator asks for them here, and with small ones.
"""

import mmap
import sys
import time
from collections.abc import Callable

import torch

from benchlib import Result, arguments, finish, quantiles
from offload.tiers.memory import HostBuffer

_BLOCK_NBYTES = 64 << 20
_NBYTES, _QUICK_NBYTES = 2 << 30, 256 << 20
_IDLE_S = (0.0, 3.0)
_ROUNDS = 4  # of which the first one is not counted
_PARTS = 4
_GIB = 1 << 30


def _huge(nbytes: int) -> tuple[torch.Tensor, Callable[[], None]]:
    buffer = HostBuffer(nbytes)
    return buffer.tensor(torch.uint8, (nbytes,)), buffer.release


def _small(nbytes: int) -> tuple[torch.Tensor, Callable[[], None]]:
    taken = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    taken.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(taken, dtype=torch.uint8), lambda: None  # goes with its last tensor


PAGES = {"huge": _huge, "small": _small}


def fill(pages: str, nbytes: int) -> list[float]:
    """Seconds of each block's first touch; all are held until the last, then given back."""
    seconds, held = [], []
    for _ in range(nbytes // _BLOCK_NBYTES):
        block, give_back = PAGES[pages](_BLOCK_NBYTES)
        began_s = time.perf_counter()
        block.fill_(1)
        seconds.append(time.perf_counter() - began_s)
        held.append((block, give_back))
    while held:
        block, give_back = held.pop()
        del block
        give_back()
    return seconds


def measure(result: Result, pages: str, idle_s: float, nbytes: int) -> None:
    """Some rounds of filling, with so many seconds between them."""
    rounds = []
    for _ in range(_ROUNDS):
        rounds.append(fill(pages, nbytes))
        time.sleep(idle_s)
    size = nbytes // _BLOCK_NBYTES // _PARTS
    figures = {}
    for part in range(_PARTS):
        blocks = slice(part * size, (part + 1) * size)
        rates = [size * _BLOCK_NBYTES / sum(each[blocks]) for each in rounds[1:]]
        upto = (part + 1) * nbytes / _PARTS / _GIB
        figures[f"up_to_{upto:.3g}_gib_bytes_per_s"] = quantiles(rates)
    result.add(pages=pages, idle_s=idle_s, **figures)


def main() -> int:
    """Measure and print."""
    options = arguments(__doc__ or "").parse_args()
    result = Result("First touch of memory, by how much is held (min / median / max)")
    for pages in PAGES:
        for idle_s in _IDLE_S:
            measure(result, pages, idle_s, _QUICK_NBYTES if options.quick else _NBYTES)
    return finish(result, options.json)


if __name__ == "__main__":
    sys.exit(main())
