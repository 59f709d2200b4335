"""The kernel's memory policy calls, through ctypes alone: no libnuma, no compiler.

Where pages of a range shall come from (``mbind``, ``set_mempolicy``), where they are
(``placement``), and moving them (``move_pages``). Errors instead of return codes. Addresses are
page-aligned. See mbind(2), set_mempolicy(2), move_pages(2) and
Documentation/admin-guide/mm/numa_memory_policy.rst.
"""

import ctypes
import errno as errno_codes
import os
import platform
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from offload.allocator.errors import CapacityError, ConfigError, TierIOError
from offload.allocator.units import format_nbytes
from offload.tiers import hostmem
from offload.tiers.hostmem import PAGE
from offload.tiers.topology import parse_list, read_topology

_NUMBERS = {
    "x86_64": {"mbind": 237, "set_mempolicy": 238, "get_mempolicy": 239, "move_pages": 279},
    "aarch64": {"mbind": 235, "get_mempolicy": 236, "set_mempolicy": 237, "move_pages": 239},
}
_MASK_WORDS = 16  # 1024 nodes: what CONFIG_NODES_SHIFT allows at most
_MASK_BITS = ctypes.c_ulong(64 * _MASK_WORDS + 1)  # the kernel reads one bit fewer than it is told
_MF_MOVE = 1 << 1
_F_ADDR = 1 << 1
_MODE_FLAGS = 0xE000  # bits of a mode that are flags
_BATCH = 1 << 16  # addresses per move_pages call
WEIGHTS = Path("/sys/kernel/mm/mempolicy/weighted_interleave")
_LARGEST_WEIGHT = 255

_Addresses: TypeAlias = NDArray[np.uint64]
_Nodes: TypeAlias = NDArray[np.int32]

_libc = ctypes.CDLL(None, use_errno=True)


class Mode(IntEnum):
    """Where new pages come from, as include/uapi/linux/mempolicy.h numbers it."""

    DEFAULT = 0
    PREFERRED = 1  # one node first, then any
    BIND = 2  # these nodes only: the kernel kills the process rather than take another
    INTERLEAVE = 3  # page by page in turn
    LOCAL = 4
    PREFERRED_MANY = 5  # these nodes first, then any (Linux 5.15)
    WEIGHTED_INTERLEAVE = 6  # by the system's weight of each node (Linux 6.9)


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """The mode in force; ``note`` says why where it is not the one that was asked."""

    mode: Mode
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where the pages of a range are, in bytes.

    Attributes:
        nbytes_by_node: of each node that holds some, in the order of the nodes.
        absent_nbytes: never touched, swapped out, or read as zeros only.
        huge_nbytes: of the range, what the kernel maps by 2 MiB pages; None before Linux 6.7.
    """

    nbytes_by_node: Mapping[int, int]
    absent_nbytes: int
    huge_nbytes: int | None

    @property
    def pages_by_node(self) -> dict[int, int]:
        """Base pages of each node: a 2 MiB page counts as the 512 that it stands for."""
        return {node: -(-nbytes // PAGE) for node, nbytes in self.nbytes_by_node.items()}


def mbind(
    address: int, nbytes: int, mode: Mode, nodes: Collection[int], *, move: bool = False
) -> Applied:
    """Set the policy of a range; with ``move``, pages elsewhere are moved as far as there is room.

    ``WEIGHTED_INTERLEAVE`` becomes ``INTERLEAVE`` on a kernel before 6.9, and the answer says so.

    Raises:
        ConfigError: a node that does not exist, has no memory, or is outside the cpuset.
        TierIOError: the kernel refused; the message says what mends it.
    """
    _check_nodes(mode, nodes)
    flags = ctypes.c_uint(_MF_MOVE if move else 0)

    def call(mode: Mode) -> None:
        number = _number("mbind")
        if _libc.syscall(
            number, ctypes.c_void_p(address), ctypes.c_ulong(nbytes), mode, _mask(nodes),
            _MASK_BITS, flags,
        ):  # fmt: skip
            raise _refusal("mbind", nbytes, mode, nodes)

    return _with_fallback(call, mode)


def set_mempolicy(mode: Mode, nodes: Collection[int] = ()) -> Applied:
    """Set the policy of the calling thread, for ranges without one of their own.

    Raises:
        ConfigError, TierIOError: as ``mbind``.
    """
    _check_nodes(mode, nodes)

    def call(mode: Mode) -> None:
        if _libc.syscall(_number("set_mempolicy"), mode, _mask(nodes), _MASK_BITS):
            raise _refusal("set_mempolicy", 0, mode, nodes)

    return _with_fallback(call, mode)


def get_mempolicy(address: int | None = None) -> tuple[Mode, tuple[int, ...]]:
    """Mode and nodes of the range at ``address``, or of the calling thread.

    Raises:
        TierIOError: the kernel refused; EFAULT where nothing is mapped at ``address``.
    """
    mode, mask = ctypes.c_int(), _mask(())
    flags = 0 if address is None else _F_ADDR
    if _libc.syscall(
        _number("get_mempolicy"), ctypes.byref(mode), mask, _MASK_BITS,
        ctypes.c_void_p(address), ctypes.c_ulong(flags),
    ):  # fmt: skip
        raise _refusal("get_mempolicy", 0, None, ())
    nodes = tuple(
        64 * word + bit for word in range(_MASK_WORDS) for bit in range(64) if mask[word] >> bit & 1
    )
    return Mode(mode.value & ~_MODE_FLAGS), nodes


def move_pages(address: int, nbytes: int, node: int) -> None:
    """Move the touched pages of a range to ``node``; huge pages move whole.

    Raises:
        CapacityError: the node has no room for them; those that fitted were moved.
        ConfigError, TierIOError: as ``mbind``.
    """
    _check_nodes(Mode.BIND, (node,))
    touched = nbytes - placement(address, nbytes).absent_nbytes
    for pages, _ in _batches(address, nbytes):
        _move(pages, np.full(len(pages), node, dtype=np.int32), nbytes, node)
    # Pages that the kernel could not move keep a stale status: so look where they are.
    stuck = touched - placement(address, nbytes).nbytes_by_node.get(node, 0)
    if stuck > 0:
        raise stuck_on_the_way(node, stuck, nbytes)


def stuck_on_the_way(node: int, stuck_nbytes: int, nbytes: int) -> CapacityError | TierIOError:
    """The error of pages that should have come to ``node``: it is full, or they can't move."""
    topology = read_topology()
    free_nbytes = topology.node(node).free_nbytes if topology.nodes else None
    what = f"{format_nbytes(stuck_nbytes)} ({stuck_nbytes} bytes) of {format_nbytes(nbytes)}"
    if free_nbytes is None or free_nbytes < stuck_nbytes:
        free = "an unknown number" if free_nbytes is None else format_nbytes(free_nbytes)
        return CapacityError(
            f"node {node} is full: {what} found no room there, {free} are free. Free memory of "
            "that node (numastat -m shows what holds it), or lower the budget of "
            f"numa:{node} by {stuck_nbytes} bytes"
        )
    return TierIOError(
        errno_codes.EBUSY,
        f"{what} did not come to node {node}: pages that are registered or pinned can't move. "
        "Place memory before it is registered",
    )


def placement(address: int, nbytes: int) -> Placement:
    """Where each page of a range is; asks once per 2 MiB page where the kernel tells which are.

    Raises:
        TierIOError: the kernel refused.
    """
    found = Counter[int]()
    absent = 0
    for pages, sizes in _batches(address, nbytes):
        status = _move(pages, None, nbytes, None)
        for node in np.unique(status):
            held = int(sizes[status == node].sum())
            if node >= 0:
                found[int(node)] += held
            else:
                absent += held
    huge = hostmem.huge_ranges(address, nbytes)
    return Placement(
        nbytes_by_node=dict(sorted(found.items())),
        absent_nbytes=absent,
        huge_nbytes=None if huge is None else sum(end - start for start, end in huge),
    )


def interleave_weights() -> dict[int, int] | None:
    """The system's weight of each node for ``WEIGHTED_INTERLEAVE``; None before Linux 6.9."""
    try:
        files = sorted(WEIGHTS.glob("node[0-9]*"))
        return {int(file.name[4:]): int(file.read_text()) for file in files} if files else None
    except OSError:
        return None


def set_interleave_weights(weights: Mapping[int, int]) -> None:
    """Set the weights of nodes, for every process of the machine; 1 to 255.

    Raises:
        ConfigError: a weight out of range.
        TierIOError: an older kernel, a node that does not exist, or no permission.
    """
    for node, weight in weights.items():
        if not 1 <= weight <= _LARGEST_WEIGHT:
            raise ConfigError(f"node {node}'s weight is {weight}: give 1 to {_LARGEST_WEIGHT}")
    for node, weight in weights.items():
        file = WEIGHTS / f"node{node}"
        try:
            file.write_text(f"{weight}\n")
        except OSError as error:
            raise TierIOError(
                error.errno,
                f"can't set the interleave weight of node {node}: {error.strerror}. As root, on "
                f"Linux 6.9 or newer: echo {weight} > {file}",
            ) from error


def allowed_nodes() -> tuple[int, ...]:
    """The nodes that have memory and that this process's cpuset allows; empty where unknown."""
    try:
        has_memory = Path("/sys/devices/system/node/has_memory").read_text()
        status = Path("/proc/self/status").read_text()
    except OSError:
        return ()
    nodes = set(parse_list(has_memory))
    for line in status.splitlines():
        if line.startswith("Mems_allowed_list:"):
            nodes &= set(parse_list(line.split()[1]))
    return tuple(sorted(nodes))


def _check_nodes(mode: Mode, nodes: Collection[int]) -> None:
    """The kernel ignores nodes that it does not have as long as one is right: so ask first."""
    if mode in {Mode.DEFAULT, Mode.LOCAL}:
        return
    if not nodes:
        raise ConfigError(f"{mode.name} needs at least one node")
    known = allowed_nodes()
    missing = sorted(set(nodes) - set(known)) if known else []
    if missing:
        raise ConfigError(
            f"memory node {', '.join(map(str, missing))} does not exist, has no memory, or is "
            f"outside this process's cpuset: choose from {', '.join(map(str, known))} "
            "(lsmem and /proc/self/status, Mems_allowed_list, show why)"
        )


def _with_fallback(call: Callable[[Mode], None], mode: Mode) -> Applied:
    try:
        call(mode)
    except TierIOError as error:
        if mode is not Mode.WEIGHTED_INTERLEAVE or error.errno != errno_codes.EINVAL:
            raise
        call(Mode.INTERLEAVE)
        return Applied(
            mode=Mode.INTERLEAVE,
            note=f"Linux {platform.release()} has no weighted interleave (6.9 and newer do): "
            "pages are interleaved evenly",
        )
    return Applied(mode=mode)


def _number(call: str) -> int:
    machine = platform.machine()
    if machine not in _NUMBERS:
        raise TierIOError(
            errno_codes.ENOSYS,
            f"{call}: its number is known on {' and '.join(_NUMBERS)}, not on {machine}: use the "
            "host tier",
        )
    return _NUMBERS[machine][call]


def _mask(nodes: Collection[int]) -> "ctypes.Array[ctypes.c_uint64]":
    words = [0] * _MASK_WORDS
    for node in nodes:
        words[node // 64] |= 1 << node % 64
    return (ctypes.c_uint64 * _MASK_WORDS)(*words)


def _refusal(call: str, nbytes: int, mode: Mode | None, nodes: Collection[int]) -> TierIOError:
    code = ctypes.get_errno()
    what = f"{call} of {format_nbytes(nbytes)} ({nbytes} bytes)" if nbytes else call
    if nodes:
        what += f" on node {', '.join(map(str, sorted(nodes)))}"
    if mode is not None:
        what += f" ({mode.name})"
    mends = {
        errno_codes.EPERM: "a container's seccomp profile forbids it: start the container with "
        "--cap-add SYS_NICE",
        errno_codes.ENOSYS: "this kernel was built without CONFIG_NUMA: use the host tier",
        errno_codes.ENOMEM: "the process has too many mappings: sysctl -w vm.max_map_count=1048576",
        errno_codes.EINVAL: f"Linux {platform.release()} does not know the mode, or the range is "
        "not whole pages",
    }
    mend = mends.get(code)
    return TierIOError(
        code, f"{what} failed: {os.strerror(code)}" + (f"; {mend}" if mend is not None else "")
    )


def _move(pages: _Addresses, targets: _Nodes | None, nbytes: int, node: int | None) -> _Nodes:
    """The status of each page: its node, or a negative errno."""
    status = np.empty(len(pages), dtype=np.int32)
    answer = _libc.syscall(
        _number("move_pages"), 0, ctypes.c_ulong(len(pages)),
        ctypes.c_void_p(pages.ctypes.data),
        ctypes.c_void_p(None if targets is None else targets.ctypes.data),
        ctypes.c_void_p(status.ctypes.data), _MF_MOVE if targets is not None else 0,
    )  # fmt: skip
    full = targets is not None and ctypes.get_errno() == errno_codes.ENOMEM
    if answer < 0 and not full:
        raise _refusal("move_pages", nbytes, None, () if node is None else (node,))
    return status


def _batches(address: int, nbytes: int) -> Iterator[tuple[_Addresses, _Addresses]]:
    """Addresses of pages, and the bytes that each stands for: huge pages are named once."""
    cursor, end = address, address + hostmem.page_ceil(nbytes)
    pieces: list[tuple[int, int, int]] = []
    for start, stop in hostmem.huge_ranges(address, nbytes) or ():
        pieces += [(cursor, start, PAGE), (start, stop, hostmem.HUGE_PAGE)]
        cursor = stop
    pieces.append((cursor, end, PAGE))
    for start, stop, step in pieces:
        for first in range(start, stop, step * _BATCH):
            last = min(stop, first + step * _BATCH)
            bounds = np.arange(first // step * step, last, step, dtype=np.uint64)
            bounds[0] = first  # a range may begin inside a huge page
            yield bounds, np.diff(bounds, append=np.uint64(last))
