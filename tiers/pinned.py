"""The pinned pool: host memory that a device copies from and to at full speed, in exact sizes.

[Note: the way back] A block that is released may still be read or written by a copy: the transfers
that were told of by ``guard`` stand beside it, and its bytes return to the pool only when all of
them have ended. They are looked at when somebody allocates. If there is no room, the allocation
waits for the oldest block on its way back that would make some; with none on its way nobody will
ever make room, and the pool says so at once. So the pool neither grows nor hangs.

The memory is one private mapping, aligned to huge pages and pinned once (``pinning`` [Note:
registration]). Tensors are made over it by address; ``tensor.pin_memory()`` is never called, for
torch rounds its blocks up to a power of two.
"""

import ctypes
import math
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from offload.allocator.errors import CapacityError, ConfigError, StaleBlockError
from offload.allocator.extent import Extent
from offload.allocator.tlsf import TLSF
from offload.allocator.units import format_nbytes
from offload.tiers.accelerator import POISON
from offload.tiers.base import Block, TierSpec
from offload.tiers.hostmem import PAGE, page_ceil
from offload.tiers.journal import Journal
from offload.tiers.lanes import Transfer
from offload.tiers.memory import HostBuffer, tensor_at
from offload.tiers.pinning import PAGEABLE_COST, Pinner, PinRefusedError
from offload.tiers.ram import HostTier

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class SizeClass:
    """Room for ``count`` blocks of ``nbytes`` at once, kept for them alone."""

    nbytes: int
    count: int

    @property
    def held_nbytes(self) -> int:
        """Bytes of the pool that the class takes."""
        return page_ceil(self.nbytes) * self.count


@dataclass(frozen=True, slots=True, kw_only=True)
class _Returning:
    """Bytes of a released block, and the transfers that still use them."""

    extent: Extent
    guards: tuple[Transfer, ...]

    def done(self) -> bool:
        """Whether nothing uses the bytes any more."""
        return all(guard.done() for guard in self.guards)


class PinnedTier(HostTier):
    """A pool of ``capacity`` bytes, rounded up to whole pages.

    Args:
        capacity: bytes in all; by default those of ``classes``.
        classes: blocks of these sizes have room of their own, so they never meet a pool in
            fragments; other sizes share the rest.
        pinners: ways to pin, best first; the first that works is taken. With none, or if all
            are refused, the memory is pageable: works everywhere, slower.
        journal: told of refusals, and of waits for room.
        checked: fill blocks with ``POISON`` when they are handed out and come back, for tests.

    Raises:
        ConfigError: ``classes`` need more than ``capacity``, or a size is not positive.
    """

    def __init__(
        self,
        capacity: int | None = None,
        *,
        classes: Sequence[SizeClass] = (),
        pinners: Sequence[Pinner] = (),
        journal: Journal | None = None,
        name: str = "pinned",
        checked: bool = False,
    ) -> None:
        capacity = _checked_capacity(capacity, classes)
        largest = max((page_ceil(size.nbytes) for size in classes), default=PAGE)
        pieces = [pinner.piece_nbytes for pinner in pinners if pinner.piece_nbytes is not None]
        # At each border of two pieces a page, and at most the room of a block, can't be used.
        capacity += sum(largest for _ in _borders(capacity, min(pieces, default=None)))
        self.spec = TierSpec(name=name, kind="host", capacity=capacity, align=PAGE)
        self.journal = journal or Journal()
        self._poisons = checked
        self._lock = threading.Lock()
        self._guards: dict[int, list[Transfer]] = {}  # by generation: of living blocks
        self._returning: list[_Returning] = []  # oldest first. See [Note: the way back]
        self._buffer: HostBuffer | None = HostBuffer(capacity)
        self._base = self._buffer.address
        self._pinner = self._pin(pinners)
        self._arena = TLSF(capacity)
        for border in _borders(capacity, self._pinner.piece_nbytes if self._pinner else None):
            self._arena.reserve(Extent(border, PAGE))  # so no block lies on both sides
        self._slots: dict[int, list[Extent]] = {}  # free room of each class, by its bytes
        self._slot_offsets: set[int] = set()
        self._counts: Counter[int] = Counter()
        for size in sorted(classes, reverse=True):
            for _ in range(size.count):
                slot = self._arena.allocate(page_ceil(size.nbytes), align=PAGE)
                self._slots.setdefault(slot.nbytes, []).append(slot)
                self._slot_offsets.add(slot.offset)
                self._counts[slot.nbytes] += 1

    def _pin(self, pinners: Sequence[Pinner]) -> Pinner | None:
        for pinner in pinners:
            try:
                pinner.pin(self._base, self.spec.capacity)
            except PinRefusedError as error:
                self.journal.notice(
                    f"{self.spec.name} pool", f"not {pinner.name}: {error}; {PAGEABLE_COST}"
                )
            else:
                return pinner
        return None

    @property
    def memory(self) -> str:
        """What the pool is made of: registered | locked | pageable."""
        return self._pinner.name if self._pinner else "pageable"

    def allocate(self, nbytes: int) -> Block:
        """A block of ``nbytes``, rounded up to whole pages; may wait. See [Note: the way back].

        Raises:
            CapacityError: there is no room, and none on its way back.
            StaleBlockError: the pool is closed.
        """
        asked = page_ceil(max(nbytes, 1))
        while True:
            with self._lock:
                if self._buffer is None:
                    raise StaleBlockError(
                        f"{self.spec.name} pool of {self.spec.capacity} bytes is closed"
                    )
                self._take_back()
                extent = self._take(asked)
                awaited = None if extent else self._oldest(asked)
            if extent is not None:
                return self._hand_out(extent, nbytes)
            if awaited is None:
                raise CapacityError(self._full(asked))
            with self.journal.stall(self.spec.name, "buffer", "pool", "full"):
                for guard in awaited.guards:
                    guard.settle()

    def _take(self, asked: int) -> Extent | None:
        if asked in self._slots:
            return self._slots[asked].pop() if self._slots[asked] else None
        try:
            return self._arena.allocate(asked, align=PAGE)
        except CapacityError:
            return None

    def _hand_out(self, extent: Extent, nbytes: int) -> Block:
        block = Block(self, extent, nbytes)
        self._guards[block.generation] = []
        self._poison(extent)
        return block

    def _take_back(self) -> None:
        """Put the bytes whose transfers have ended back into the pool."""
        still: list[_Returning] = []
        for returning in self._returning:
            if returning.done():
                self._put_back(returning.extent)
            else:
                still.append(returning)
        self._returning = still

    def _put_back(self, extent: Extent) -> None:
        self._poison(extent)
        if extent.offset in self._slot_offsets:
            self._slots[extent.nbytes].append(extent)
        else:
            self._arena.free(extent)

    def _poison(self, extent: Extent) -> None:
        if self._poisons:
            ctypes.memset(self._base + extent.offset, POISON, extent.nbytes)

    def _oldest(self, asked: int) -> _Returning | None:
        """The first block on its way back that can make room: a class is helped by its own."""
        wanted = asked in self._slots
        return next(
            (
                returning
                for returning in self._returning
                if (returning.extent.nbytes == asked or not wanted)
                and (returning.extent.offset in self._slot_offsets) == wanted
            ),
            None,
        )

    def _full(self, asked: int) -> str:
        free = self._arena.capacity - self._arena.current_nbytes
        room = (
            f"all {self._counts[asked]} blocks of that size class are in use"
            if asked in self._slots
            else f"{free} bytes are free beside the size classes, at most "
            f"{self._arena.largest_free_nbytes} in one piece"
        )
        return (
            f"{self.spec.name} pool of {format_nbytes(self.spec.capacity)} has no room for "
            f"{asked} bytes, and none on its way back: {room}. Release a block first, or raise "
            f"the pool by {format_nbytes(asked)}"
        )

    def guard(self, block: Block, transfer: Transfer) -> None:
        """Keep the bytes of ``block`` out of the pool until ``transfer`` has ended.

        Raises:
            StaleBlockError: the block was released before: its bytes may be another's by now.
        """
        block.check(0, 0)
        with self._lock:
            guards = self._guards_of(block)
            guards[:] = [*_open(guards), transfer]

    def guards(self, block: Block) -> tuple[Transfer, ...]:
        """Transfers told of by ``guard`` that have not ended, or failed and nobody knows."""
        block.check(0, 0)
        with self._lock:
            return tuple(_open(self._guards_of(block)))

    def _guards_of(self, block: Block) -> list[Transfer]:
        guards = self._guards.get(block.generation)
        if guards is None:
            raise self._outlived(block)
        return guards

    def address(self, block: Block) -> int:
        block.check(0, 0)
        self._guards_of(block)
        return self._base + block.extent.offset

    def tensor(self, block: Block, dtype: "torch.dtype", shape: Sequence[int]) -> "torch.Tensor":
        """A contiguous tensor over the block from its first byte on; the block outlives it.

        Waits for the transfers with the block, so that the host reads and writes after them.

        Raises:
            StaleBlockError: the block was released, or outlived the pool.
            ValueError: the tensor leaves the block.
        """
        block.check(0, math.prod(shape) * dtype.itemsize)
        self._before_copy(block)
        return tensor_at(self.address(block), dtype, shape)

    def _before_copy(self, block: Block) -> None:
        if self._buffer is not None:
            for guard in self.guards(block):
                guard.wait()

    def _release(self, block: Block) -> None:
        with self._lock:
            guards = self._guards.pop(block.generation, None)
            if guards is None or self._buffer is None:
                return  # the pool is closed
            self._returning.append(_Returning(extent=block.extent, guards=tuple(guards)))
            self._take_back()

    def close(self) -> None:
        """Wait for transfers with the memory, unpin and unmap it.

        Raises:
            TierIOError: it could not be unpinned, and stays mapped.
        """
        with self._lock:
            if self._buffer is None:
                return
            living = [guard for guards in self._guards.values() for guard in guards]
            for guard in (*living, *(g for back in self._returning for g in back.guards)):
                guard.settle()
            self._guards.clear()
            self._returning.clear()
            buffer, self._buffer = self._buffer, None
            if self._pinner is not None:
                self._pinner.unpin(self._base, self.spec.capacity)
            buffer.release()


def _open(guards: Sequence[Transfer]) -> list[Transfer]:
    return [
        guard
        for guard in guards
        if not guard.done() or (guard.error is not None and not guard.observed)
    ]


def _borders(capacity: int, piece_nbytes: int | None) -> range:
    """Offsets inside the pool where one registered piece ends and the next begins."""
    return range(piece_nbytes, capacity, piece_nbytes) if piece_nbytes else range(0)


def _checked_capacity(capacity: int | None, classes: Sequence[SizeClass]) -> int:
    """Bytes of the pool, in whole pages.

    Raises:
        ConfigError: naming every fault.
    """
    problems = [
        f"a size class needs positive numbers, not {size.count} blocks of {size.nbytes} bytes"
        for size in classes
        if size.nbytes <= 0 or size.count <= 0
    ]
    needed = sum(size.held_nbytes for size in classes)
    asked = needed if capacity is None else page_ceil(capacity)
    if asked < needed:
        problems.append(
            f"the size classes need {format_nbytes(needed)} ({needed} bytes), the pool has "
            f"{format_nbytes(asked)}: give it {needed - asked} bytes more"
        )
    if asked <= 0:
        problems.append("a pinned pool needs a capacity or size classes: it would have 0 bytes")
    if problems:
        raise ConfigError(*problems)
    return asked
