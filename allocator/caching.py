"""A model of PyTorch's caching allocator for CUDA, to compare plans with.

It is a model: our own account of the documented policy (``torch.cuda``'s notes on memory
management, the comments and constants of c10's ``CUDACachingAllocator`` and ``AllocatorConfig``)
with its default settings, one stream, and a device that never runs out. ``tools/gpu_checks.py``
holds it against the real one:

- requests are rounded to 512 bytes. Those of up to 1 MiB come from a pool of 2 MiB segments,
  larger ones from a pool of their own, whose segments have 20 MiB for requests below 10 MiB, and
  whole 2 MiB otherwise;
- the smallest free block that is large enough is taken, of equal ones the one at the lowest
  address;
- what is left of it becomes a free block: in the small pool if it has 512 bytes, in the large one
  if it has more than 1 MiB. Otherwise all of it is handed out;
- a freed block merges with free neighbours in its segment. Segments are never given back.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

from offload.allocator.extent import align_up
from offload.allocator.lifetimes import Lifetime, events

_MIB = 1 << 20
_ROUND = 512
_SMALL = _MIB  # the largest request of the small pool
_SMALL_SEGMENT, _LARGE_SEGMENT = 2 * _MIB, 20 * _MIB
_OWN_SEGMENT = 10 * _MIB  # from here on a request gets a segment of its own size

LARGE_UNIT = _SMALL_SEGMENT
"""Segments of their request's size have whole multiples of this."""


def is_large(nbytes: int) -> bool:
    """Whether a request comes from the pool of large segments."""
    return align_up(nbytes, _ROUND) > _SMALL


@dataclass(slots=True, kw_only=True, eq=False)
class CachedBlock:
    """A part of a segment, in use or free."""

    address: int
    nbytes: int
    small: bool
    before: "CachedBlock | None" = None
    after: "CachedBlock | None" = None
    free: bool = False


class CachingModel:
    """Segments, blocks and their counts; see the module.

    Attributes:
        reserved_nbytes: of all segments; they only grow, so this is the peak.
        allocated_nbytes: of the blocks in use.
        peak_allocated_nbytes: the most that was in use at once.
    """

    def __init__(self) -> None:
        self.reserved_nbytes = self.allocated_nbytes = self.peak_allocated_nbytes = 0
        self._free: dict[bool, list[tuple[int, int]]] = {True: [], False: []}  # nbytes, address
        self._blocks: dict[int, CachedBlock] = {}  # free ones, by address

    def allocate(self, nbytes: int) -> CachedBlock:
        """A block of at least ``nbytes``.

        Raises:
            ValueError: ``nbytes`` is not positive.
        """
        if nbytes <= 0:
            raise ValueError(f"can't allocate {nbytes} bytes")
        size = align_up(nbytes, _ROUND)
        small = size <= _SMALL
        block = self._smallest_free(size, small=small) or self._new_segment(size, small=small)
        left = block.nbytes - size
        if left >= _ROUND if small else left > _SMALL:
            rest = CachedBlock(
                address=block.address + size,
                nbytes=left,
                small=small,
                before=block,
                after=block.after,
            )
            if block.after is not None:
                block.after.before = rest
            block.after, block.nbytes = rest, size
            self._keep(rest)
        self.allocated_nbytes += block.nbytes
        self.peak_allocated_nbytes = max(self.peak_allocated_nbytes, self.allocated_nbytes)
        return block

    def free(self, block: CachedBlock) -> None:
        """Give a block back.

        Raises:
            ValueError: it is free.
        """
        if block.free:
            raise ValueError(f"{block.nbytes} bytes at {block.address} are free")
        self.allocated_nbytes -= block.nbytes
        if (after := block.after) is not None and after.free:
            self._take(after)
            self._join(block, after)
        if (before := block.before) is not None and before.free:
            self._take(before)
            self._join(before, block)
            block.free = True  # no part of any segment any more
            block = before
        self._keep(block)

    def _smallest_free(self, size: int, *, small: bool) -> CachedBlock | None:
        pool = self._free[small]
        index = bisect_left(pool, (size, 0))
        if index == len(pool):
            return None
        block = self._blocks[pool[index][1]]
        self._take(block)
        return block

    def _new_segment(self, size: int, *, small: bool) -> CachedBlock:
        if small:
            nbytes = _SMALL_SEGMENT
        else:
            nbytes = _LARGE_SEGMENT if size < _OWN_SEGMENT else align_up(size, LARGE_UNIT)
        block = CachedBlock(address=self.reserved_nbytes, nbytes=nbytes, small=small)
        self.reserved_nbytes += nbytes
        return block

    def _keep(self, block: CachedBlock) -> None:
        block.free = True
        insort(self._free[block.small], (block.nbytes, block.address))
        self._blocks[block.address] = block

    def _take(self, block: CachedBlock) -> None:
        block.free = False
        pool = self._free[block.small]
        del pool[bisect_left(pool, (block.nbytes, block.address))]
        del self._blocks[block.address]

    @staticmethod
    def _join(left: CachedBlock, right: CachedBlock) -> None:
        left.nbytes += right.nbytes
        left.after = right.after
        if right.after is not None:
            right.after.before = left


@dataclass(frozen=True, slots=True, kw_only=True)
class CachingReplay:
    """What the model did with a trace.

    Attributes:
        reserved_nbytes: what the process holds of the device in the end: the peak.
        allocated_nbytes: the most in use at once, rounded as the allocator rounds.
    """

    reserved_nbytes: int
    allocated_nbytes: int

    @property
    def fragmentation(self) -> float:
        """Share of the reserved bytes that are not in use when most are."""
        return 1 - self.allocated_nbytes / self.reserved_nbytes if self.reserved_nbytes else 0.0


def replay(lifetimes: Sequence[Lifetime], *, steps: int = 3) -> CachingReplay:
    """So many steps of the same trace: what is cached after one serves the next."""
    model = CachingModel()
    for _ in range(steps):
        blocks: dict[int, CachedBlock] = {}
        for position, comes in events(lifetimes):
            if comes:
                blocks[position] = model.allocate(lifetimes[position].nbytes)
            else:
                model.free(blocks.pop(position))
    return CachingReplay(
        reserved_nbytes=model.reserved_nbytes, allocated_nbytes=model.peak_allocated_nbytes
    )
