"""Copies within main memory: by one thread and by all, and between its nodes."""

import ctypes
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

from offload.tiers import mempolicy
from offload.tiers.memory import HostBuffer
from offload.tiers.mempolicy import Mode
from offload.tiers.probe.files import fill_randomly
from offload.tiers.probe.pace import Effort, Pace, Route

COPY_NBYTES = 2 << 20  # one request of a copy: a huge page
CASES = 2  # shares of the time that a copy takes: its rate and its latency


@contextmanager
def open_copy(effort: Effort, threads: int, _pace: Pace) -> Iterator[tuple[Route]]:
    """The link ``host → host``: a copy by ``threads`` threads, each byte counted once."""
    with _buffers(effort) as (source, target), ThreadPoolExecutor(threads) as pool:
        by = pool if threads > 1 else None
        yield (_route("host", "host", source, target, by, threads),)


@contextmanager
def open_node_copy(
    effort: Effort, source: int, target: int, cpus: Sequence[int], _pace: Pace
) -> Iterator[tuple[Route]]:
    """The link between two nodes of memory, copied by threads on ``cpus`` (empty: anywhere).

    Raises:
        TierIOError: the kernel refused to place memory on a node.
    """
    threads = max(len(cpus), 1)
    with _buffers(effort, nodes=(source, target)) as (read, written):
        pin = partial(_stay_on, frozenset(cpus))
        with ThreadPoolExecutor(threads, initializer=pin) as pool:
            yield (_route(f"numa:{source}", f"numa:{target}", read, written, pool, threads),)


@contextmanager
def _buffers(
    effort: Effort, nodes: tuple[int, int] | None = None
) -> Iterator[tuple[HostBuffer, HostBuffer]]:
    nbytes = effort.memory_nbytes // 2
    source = HostBuffer(nbytes)
    try:
        target = HostBuffer(nbytes)
        try:
            if nodes is not None:
                for buffer, node in zip((source, target), nodes, strict=True):
                    # Not bound: on a full node a bound page fault would end this process.
                    mempolicy.mbind(buffer.address, buffer.nbytes, Mode.PREFERRED, [node])
            fill_randomly(source)
            ctypes.memset(target.address, 1, target.nbytes)  # no page fault is measured
            yield source, target
        finally:
            target.release()
    finally:
        source.release()


def _stay_on(cpus: frozenset[int]) -> None:
    if cpus:
        os.sched_setaffinity(0, cpus)  # of the calling thread


def _route(
    source: str,
    target: str,
    read: HostBuffer,
    written: HostBuffer,
    pool: ThreadPoolExecutor | None,
    threads: int,
) -> Route:
    def move(block_nbytes: int, count: int) -> None:
        def copy(worker: int) -> None:
            for number in range(worker, count, threads):
                at = number % (read.nbytes // block_nbytes) * block_nbytes
                ctypes.memmove(written.address + at, read.address + at, block_nbytes)

        if pool is None:
            copy(0)
        else:
            list(pool.map(copy, range(min(threads, count))))

    return Route(source=source, target=target, blocks=(COPY_NBYTES,), in_flight=threads, move=move)
