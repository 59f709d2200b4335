"""Copies within main memory: by one thread and by all, and between its nodes."""

import ctypes
import errno
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial

from offload.allocator.errors import TierIOError
from offload.tiers.hostmem import page_ceil
from offload.tiers.memory import HostBuffer, memory_at
from offload.tiers.numa import NumaTier
from offload.tiers.probe.files import fill_randomly
from offload.tiers.probe.pace import Effort, Pace, Route

COPY_NBYTES = 2 << 20  # one request of a copy: a huge page
CASES = 2  # shares of the time that a copy takes: its rate and its latency


@contextmanager
def open_copy(effort: Effort, threads: int, _pace: Pace) -> Iterator[tuple[Route]]:
    """The link ``host → host``: a copy by ``threads`` threads, each byte counted once."""
    with ExitStack() as opened:
        nbytes = effort.memory_nbytes // 2
        source, target = (HostBuffer(nbytes) for _ in range(2))
        opened.callback(source.release)
        opened.callback(target.release)
        fill_randomly(source.view())
        ctypes.memset(target.address, 1, nbytes)  # no page fault is measured
        by = opened.enter_context(ThreadPoolExecutor(threads)) if threads > 1 else None
        yield (_route("host", "host", (source.address, target.address), nbytes, by, threads),)


@contextmanager
def open_node_copy(
    effort: Effort, source: int, target: int, cpus: Sequence[int], _pace: Pace
) -> Iterator[tuple[Route]]:
    """The link between two nodes of memory, copied by threads on ``cpus`` (empty: anywhere).

    Raises:
        CapacityError: a node has no room for the buffer.
        TierIOError: the kernel refused to place memory on a node, or placed it elsewhere.
    """
    threads = max(len(cpus), 1)
    nbytes = effort.memory_nbytes // 2
    with ExitStack() as opened:
        addresses = [_on_node(opened, node, nbytes) for node in (source, target)]
        fill_randomly(memory_at(addresses[0], nbytes))
        pin = partial(_stay_on, frozenset(cpus))
        pool = opened.enter_context(ThreadPoolExecutor(threads, initializer=pin))
        names = f"numa:{source}", f"numa:{target}"
        yield (_route(*names, (addresses[0], addresses[1]), nbytes, pool, threads),)


def _on_node(opened: ExitStack, node: int, nbytes: int) -> int:
    """The address of a buffer whose pages were seen on ``node``."""
    tier = opened.enter_context(NumaTier(node, page_ceil(nbytes)))
    block = tier.allocate(nbytes)
    landing = tier.landing(block)
    if landing.strayed:
        raise TierIOError(
            errno.ENOMEM, f"{nbytes} bytes to measure with: {landing}; free memory of node {node}"
        )
    return tier.address(block)


def _stay_on(cpus: frozenset[int]) -> None:
    if cpus:
        os.sched_setaffinity(0, cpus)  # of the calling thread


def _route(
    source: str,
    target: str,
    ends: tuple[int, int],
    nbytes: int,
    pool: ThreadPoolExecutor | None,
    threads: int,
) -> Route:
    read, written = ends

    def move(block_nbytes: int, count: int) -> None:
        def copy(worker: int) -> None:
            for number in range(worker, count, threads):
                at = number % (nbytes // block_nbytes) * block_nbytes
                ctypes.memmove(written + at, read + at, block_nbytes)

        if pool is None:
            copy(0)
        else:
            list(pool.map(copy, range(min(threads, count))))

    return Route(source=source, target=target, blocks=(COPY_NBYTES,), in_flight=threads, move=move)
