"""All links of a machine, in both directions, within one fixed time."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import TypeAlias

from offload.allocator.errors import CapacityError, OffloadError
from offload.allocator.units import format_nbytes
from offload.tiers.machine import Link
from offload.tiers.probe import cuda, files, memory
from offload.tiers.probe.pace import Clock, Effort, Pace, Route, measure_route

Progress: TypeAlias = Callable[[str], None]

_SHARE_OF_MEMORY = 8  # buffers take an eighth of what is available at most
_LEAST_NBYTES = 8 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is to be measured.

    Attributes:
        files: directories by the names of their tiers.
        nodes: the cores of each node of memory; empty for a node without any.
        devices: whether to look for CUDA devices, which imports torch.
        threads: of the copy by all threads.
    """

    files: Mapping[str, Path]
    nodes: Mapping[int, Sequence[int]]
    devices: bool
    threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A tier whose links could not be measured, and why."""

    tier: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a probe found."""

    links: tuple[Link, ...]
    failures: tuple[Failure, ...]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Links that share buffers, opened only while they are measured."""

    tier: str
    cases: int
    routes: Callable[[Pace], AbstractContextManager[Sequence[Route]]]


def measure_links(
    wanted: Wanted,
    *,
    available_nbytes: int,
    effort: Effort,
    progress: Progress = lambda _text: None,
    clock: Clock = time.monotonic,
) -> Measured:
    """Measure every link within ``effort.seconds`` (``pace`` [Note: time budget]).

    Args:
        wanted: the links.
        available_nbytes: memory that the machine has to spare; buffers take a part of it.
        effort: what may be spent.
        progress: is told what is measured next.
        clock: replaced by tests.

    Returns:
        The links; a tier that fails is named among the failures, and the others go on.

    Raises:
        CapacityError: there is not even memory for the buffers.
    """
    began_s = clock()
    effort = _within_memory(effort, available_nbytes)
    pace = Pace(seconds=effort.seconds, clock=clock)
    groups = tuple(_groups(wanted, effort))
    links: list[Link] = []
    failures: list[Failure] = []
    for index, group in enumerate(groups):
        pace.cases = sum(later.cases for later in groups[index:])
        progress(f"opening {group.tier}")
        try:
            with group.routes(pace) as routes:
                for route in routes:
                    progress(f"{route.source} → {route.target}")
                    links += measure_route(route, effort, pace)
        except (OffloadError, RuntimeError) as error:  # torch raises RuntimeError
            failures.append(Failure(tier=group.tier, message=str(error)))
    return Measured(links=tuple(links), failures=tuple(failures), seconds=clock() - began_s)


def _within_memory(effort: Effort, available_nbytes: int) -> Effort:
    """The same effort with buffers that the machine can spare."""
    room = available_nbytes // _SHARE_OF_MEMORY
    if room < _LEAST_NBYTES:
        raise CapacityError(
            f"{format_nbytes(available_nbytes)} of memory are available, measuring needs "
            f"{format_nbytes(_LEAST_NBYTES * _SHARE_OF_MEMORY)}: end other programs, or raise "
            "the limit of the control group"
        )
    return replace(effort, memory_nbytes=min(effort.memory_nbytes, room))


def _groups(wanted: Wanted, effort: Effort) -> Iterator[_Group]:
    for threads in sorted({1, wanted.threads}):
        yield _Group(
            tier="host", cases=memory.CASES, routes=partial(memory.open_copy, effort, threads)
        )
    for source, target in permutations(wanted.nodes, 2):
        cpus = wanted.nodes[source] or wanted.nodes[target]
        yield _Group(
            tier=f"numa:{target}",
            cases=memory.CASES,
            routes=partial(memory.open_node_copy, effort, source, target, cpus),
        )
    for name, directory in wanted.files.items():
        yield _Group(
            tier=name,
            cases=files.count_cases(effort),
            routes=partial(files.open_file, directory, name, effort),
        )
    for index in range(cuda.count_devices() if wanted.devices else 0):
        yield _Group(
            tier=f"device:{index}",
            cases=cuda.CASES,
            routes=partial(cuda.open_device, effort, index),
        )


def copy_threads(cpus: float | None) -> int:
    """Threads for a copy by all: the cores of this process, a control group's quota respected."""
    cores = len(os.sched_getaffinity(0))
    return max(1, min(cores, int(cpus) if cpus is not None else cores))
