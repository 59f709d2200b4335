"""Memory of chosen NUMA nodes: a node of CXL memory, or several nodes in proportion.

[Note: bound without a killer] Under ``MPOL_BIND`` a page fault on a full node ends in the kernel
killing the process. So a block's pages are first *preferred* on their node and touched, which
spills to other nodes instead; then the range is bound with ``MPOL_MF_MOVE``, which moves strays as
far as there is room (reclaiming page cache for them) and never kills. Where there is none, Linux
6.12 splits a huge page on the way and drops its pages of zeros, so a page that is absent by then
is as homeless as a stray: if the node has no room for both, that is a ``CapacityError``; if it
has, the range is touched again. What has strayed all the same is told by a notice.

[Note: stripes] Several nodes share a block by whole stripes of 2 MiB pages, each with a policy of
its own. The kernel's ``MPOL_WEIGHTED_INTERLEAVE`` would take one mapping instead, but its weights
belong to the whole machine and to root, it came with Linux 6.9, and it deals out a whole weight
before it goes to the next node: a block of 64 MiB at 76:24 lands on one node. Stripes are at most
``_MOST_STRIPES`` for each block: the kernel bounds a process's mappings (``vm.max_map_count``).
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from offload.allocator.errors import CapacityError, ConfigError
from offload.allocator.units import format_nbytes
from offload.tiers import hostmem, mempolicy
from offload.tiers.base import Block
from offload.tiers.hostmem import HUGE_PAGE, PAGE
from offload.tiers.journal import Journal
from offload.tiers.memory import HostBuffer
from offload.tiers.mempolicy import Mode, Placement
from offload.tiers.ram import RamTier
from offload.tiers.topology import Topology, read_topology

_MOST_STRIPES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Landing:
    """Where a block was asked to be, and where its pages are; bytes by node."""

    nbytes: int
    asked: Mapping[int, int]
    got: Placement

    @property
    def short_nbytes(self) -> dict[int, int]:
        """Bytes that are not on the node where they were asked; absent ones count."""
        short = {
            node: nbytes - self.got.nbytes_by_node.get(node, 0)
            for node, nbytes in self.asked.items()
        }
        return {node: nbytes for node, nbytes in short.items() if nbytes > 0}

    @property
    def strayed(self) -> bool:
        """Whether pages are on other nodes than asked; absent ones (swapped out) are not."""
        return sum(self.short_nbytes.values()) > self.got.absent_nbytes

    def __str__(self) -> str:
        """``asked node 1, got 98 % node 1, 2 % node 0``."""
        asked = _shares(self.asked, self.nbytes, alone=True)
        got = _shares(self.got.nbytes_by_node, self.nbytes)
        parts = [f"asked {asked}", f"got {got or 'nothing'}"]
        if self.got.absent_nbytes:
            parts.append(f"{_percent(self.got.absent_nbytes, self.nbytes)} absent")
        return ", ".join(parts)


class NumaTier(RamTier):
    """A byte-bounded pool of memory on one node, or on several in proportion to their weights.

    Blocks are 2 MiB-aligned, huge-page advised, touched and verified before ``allocate`` returns.

    Args:
        nodes: a node, or weights by node such as ``{0: 3, 1: 1}``.
        capacity: bytes of all living blocks.
        journal: is told when pages are not where they were asked.

    Raises:
        ConfigError: a node that does not exist, has no memory, or is outside the cpuset.
        CapacityError: the nodes have less memory than ``capacity``.
        TierIOError: the kernel, or the container's profile, refuses memory policies.
    """

    def __init__(
        self,
        nodes: int | Mapping[int, int],
        capacity: int,
        *,
        journal: Journal | None = None,
        topology: Topology | None = None,
    ) -> None:
        self.weights = {nodes: 1} if isinstance(nodes, int) else dict(sorted(nodes.items()))
        super().__init__(capacity, name=f"numa:{'+'.join(map(str, self.weights))}")
        if not self.weights or any(weight <= 0 for weight in self.weights.values()):
            raise ConfigError(f"node weights are positive whole numbers, not {nodes}")
        self._journal = journal or Journal()
        self._check(topology or read_topology())
        self._map(PAGE).release()  # meets a missing permission now, not in the middle of a step

    def landing(self, block: Block) -> Landing:
        """Where the pages of ``block`` are now; tells the journal when they have strayed.

        Ask again after memory was registered with a GPU, which may move pages: those of
        ``ZONE_MOVABLE`` memory always.
        """
        return self._look(self.address(block), block.extent.nbytes)

    def _check(self, topology: Topology) -> None:
        known = [topology.node(index) for index in self.weights] if topology.nodes else []
        sizes = [node.memory_nbytes for node in known]
        total = sum(size for size in sizes if size is not None)
        if known and None not in sizes and self.spec.capacity > total:
            raise CapacityError(
                f"{self.spec.name} has {format_nbytes(total)} of memory, "
                f"{format_nbytes(self.spec.capacity)} ({self.spec.capacity} bytes) were asked: "
                f"give it at most {total} bytes"
            )
        for node in known:
            if node.pin_warning:
                self._journal.notice(self.spec.name, node.pin_warning)

    def _map(self, nbytes: int) -> HostBuffer:
        buffer = HostBuffer(nbytes)
        try:
            self._place(buffer.address, nbytes)
        except BaseException:
            buffer.release()
            raise
        return buffer

    def _place(self, address: int, nbytes: int) -> None:
        """Bind and touch fresh memory; see [Note: bound without a killer]."""
        for start, size, node in self._stripes(address, nbytes):
            mempolicy.mbind(start, size, Mode.PREFERRED, (node,))
        hostmem.touch(address, nbytes)
        for start, size, node in self._stripes(address, nbytes):
            mempolicy.mbind(start, size, Mode.BIND, (node,), move=True)
        landing = self._look(address, nbytes)
        for node, short in landing.short_nbytes.items():
            error = mempolicy.stuck_on_the_way(node, short, landing.asked[node])
            if isinstance(error, CapacityError):
                raise error
        if landing.got.absent_nbytes:
            hostmem.touch(address, nbytes)

    def _look(self, address: int, nbytes: int) -> Landing:
        asked = Counter[int]()
        for _, size, node in self._stripes(address, nbytes):
            asked[node] += size
        landing = Landing(nbytes=nbytes, asked=asked, got=mempolicy.placement(address, nbytes))
        if landing.strayed:
            self._journal.notice(self.spec.name, f"{format_nbytes(nbytes)}: {landing}")
        return landing

    def _stripes(self, address: int, nbytes: int) -> Iterator[tuple[int, int, int]]:
        """Ranges (address, nbytes, node), adjacent ones of a node joined; see [Note: stripes]."""
        step = -(-nbytes // (_MOST_STRIPES * HUGE_PAGE)) * HUGE_PAGE
        count = -(-nbytes // step)
        owners = list(_deal(self.weights, count))
        first = 0
        for at in range(1, count + 1):
            if at == count or owners[at] != owners[first]:
                start, end = first * step, min(at * step, nbytes)
                yield address + start, end - start, owners[first]
                first = at


def _deal(weights: Mapping[int, int], count: int) -> Iterator[int]:
    """``count`` nodes in the proportion of their weights, as evenly spread as can be."""
    total = sum(weights.values())
    dealt = dict.fromkeys(weights, 0)
    for at in range(1, count + 1):
        node = max(weights, key=lambda node: (weights[node] * at - dealt[node] * total, -node))
        dealt[node] += 1
        yield node


def _shares(nbytes_by_node: Mapping[int, int], total: int, *, alone: bool = False) -> str:
    if alone and len(nbytes_by_node) == 1:
        return f"node {next(iter(nbytes_by_node))}"
    ordered = sorted(nbytes_by_node.items(), key=lambda pair: (-pair[1], pair[0]))
    return ", ".join(f"{_percent(nbytes, total)} node {node}" for node, nbytes in ordered)


def _percent(nbytes: int, total: int) -> str:
    """Never 100 % of what is short of it, never 0 % of what is there."""
    percent = 100 * nbytes / total
    rounded = min(max(round(percent), 1), 99) if 0 < nbytes < total else round(percent)
    return f"{rounded} %"
