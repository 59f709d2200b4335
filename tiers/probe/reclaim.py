"""Whether a hypervisor takes back what this machine has free, and how fast that comes again.

A virtual machine may report free huge pages to its host (free page reporting of Linux's balloon,
``mm/page_reporting.c``). So memory is filled, given back, left alone for longer than passes of
reporting are apart, and filled again: blocks that then take much longer had been taken back.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

from offload.tiers.machine import ComputeRate, Machine
from offload.tiers.memory import HostBuffer

_BLOCK_NBYTES = 64 << 20
_NBYTES = 2 << 30
_SHARE_OF_MEMORY = 4  # a quarter of what is free at most
_IDLE_S = 3.0  # more than the two seconds from pass to pass, less than two of these
_LATE = 3.0  # times as long as usual
_LEAST_BLOCKS = 4  # that are late; fewer are noise


def add_reclaimed(machine: Machine) -> Machine:
    """``machine``, which is this one, with what its hypervisor does, if it does it; by torch."""
    nbytes = min(_NBYTES, machine.tier("host").free_nbytes // _SHARE_OF_MEMORY)
    found = measure_reclaimed(nbytes)
    return machine if found is None else replace(machine, compute=(*machine.compute, found))


def measure_reclaimed(
    nbytes: int,
    *,
    fill: Callable[[int], list[float]] | None = None,
    sleep: Callable[[float], object] = time.sleep,
) -> ComputeRate | None:
    """How fast memory comes that was taken back, and as size how much is taken at once.

    Args:
        nbytes: to fill; no more can be seen to be taken.
        fill: fills so many blocks of fresh memory, gives them back, and returns the seconds that
            each took; replaced by tests, as ``sleep``.

    Returns:
        None where nothing is taken back.
    """
    fill, count = fill or _fill, nbytes // _BLOCK_NBYTES
    if count < _LEAST_BLOCKS:
        return None
    fill(count)  # it may come from the host
    usual_s = statistics.median(fill(count))
    sleep(_IDLE_S)
    taken_s = fill(count)
    late = [seconds for seconds in taken_s if seconds > _LATE * usual_s]
    if len(late) < _LEAST_BLOCKS:
        return None
    late_s = statistics.median(late)
    shares = ((seconds - usual_s) / (late_s - usual_s) for seconds in taken_s)
    blocks = sum(min(max(share, 0.0), 1.0) for share in shares)
    return ComputeRate(
        processor="cpu",
        work="reclaimed touch",
        dtype="float32",
        size=round(blocks * _BLOCK_NBYTES),
        per_s=_BLOCK_NBYTES / late_s,
    )


def _fill(count: int) -> list[float]:
    """As kernels fill their results: by all threads, which wait for the host beside each other."""
    import torch

    buffers, seconds = [], []
    for _ in range(count):
        buffer = HostBuffer(_BLOCK_NBYTES)
        buffers.append(buffer)
        block = buffer.tensor(torch.uint8, (_BLOCK_NBYTES,))
        began_s = time.perf_counter()
        block.fill_(1)
        seconds.append(time.perf_counter() - began_s)
        del block
    for buffer in buffers:
        buffer.release()
    return seconds
