"""Copies within main memory: by one thread and by all, and between its nodes."""

import ctypes
import os
import platform
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

from offload.allocator.errors import TierIOError
from offload.tiers.memory import HostBuffer
from offload.tiers.probe.files import fill_randomly
from offload.tiers.probe.pace import Effort, Pace, Route

COPY_NBYTES = 2 << 20  # one request of a copy: a huge page
CASES = 2  # shares of the time that a copy takes: its rate and its latency

_MBIND = {"x86_64": 237, "aarch64": 235, "riscv64": 235}
_MPOL_PREFERRED = 1
_NODES = 1024  # bits of a node mask

_libc = ctypes.CDLL(None, use_errno=True)


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
                prefer(source, nodes[0])
                prefer(target, nodes[1])
            fill_randomly(source)
            ctypes.memset(target.address, 1, target.nbytes)  # no page fault is measured
            yield source, target
        finally:
            target.release()
    finally:
        source.release()


def prefer(buffer: HostBuffer, node: int) -> None:
    """Take the pages of ``buffer``, not yet touched, from ``node`` while it has room.

    Preferred, not bound: on a full node a bound page fault would end in the kernel killing us.

    Raises:
        TierIOError: the kernel refused.
    """
    mask = (ctypes.c_uint64 * (_NODES // 64))()
    mask[node // 64] = 1 << node % 64
    number = _MBIND.get(platform.machine())
    arguments = (buffer.address, buffer.nbytes, _MPOL_PREFERRED, ctypes.addressof(mask), _NODES, 0)
    if number is None or _libc.syscall(number, *map(ctypes.c_ulong, arguments)):
        code = ctypes.get_errno()
        raise TierIOError(
            code, f"can't put {buffer.nbytes} bytes on memory node {node}: {os.strerror(code)}"
        )


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
