"""The host tier: a byte-bounded pool of page-aligned RAM."""

import ctypes
from abc import abstractmethod

from offload.allocator.errors import CapacityError, StaleBlockError
from offload.allocator.extent import Extent
from offload.allocator.units import format_nbytes
from offload.tiers.base import Block, Tier, TierSpec
from offload.tiers.hostmem import PAGE, page_ceil
from offload.tiers.journal import Label
from offload.tiers.lanes import Transfer
from offload.tiers.memory import HostBuffer


class HostTier(Tier):
    """A tier in host memory: the CPU moves its bytes, so a transfer is over when it is made."""

    @abstractmethod
    def address(self, block: Block) -> int:
        """Where the bytes of ``block`` stand in memory.

        Raises:
            StaleBlockError: the block was released, or outlived its tier.
        """

    def _before_copy(self, block: Block) -> None:
        """Wait for what else moves bytes of ``block``; nothing does, in plain memory."""

    def read(
        self,
        block: Block,
        address: int,
        *,
        offset: int = 0,
        nbytes: int | None = None,
        label: Label | None = None,
    ) -> Transfer:
        nbytes = self._checked(block, offset, nbytes)
        ctypes.memmove(address, self.address(block) + offset, nbytes)
        return Transfer(label or Label("", "", "host", "host"), nbytes, 0)

    def write(
        self,
        block: Block,
        address: int,
        *,
        offset: int = 0,
        nbytes: int | None = None,
        label: Label | None = None,
    ) -> Transfer:
        nbytes = self._checked(block, offset, nbytes)
        ctypes.memmove(self.address(block) + offset, address, nbytes)
        return Transfer(label or Label("", "", "host", "host"), nbytes, 0)

    def _checked(self, block: Block, offset: int, nbytes: int | None) -> int:
        nbytes = block.nbytes - offset if nbytes is None else nbytes
        block.check(offset, nbytes)
        self._before_copy(block)
        return nbytes

    def _outlived(self, block: Block) -> StaleBlockError:
        return StaleBlockError(
            f"block {block.generation} ({block.nbytes} bytes) outlived its tier, {self.spec.name}"
        )


class RamTier(HostTier):
    """Blocks are private huge-page-advised mappings, returned to the kernel on release.

    ``capacity`` bounds the bytes of all living blocks, each rounded up to whole pages: exact
    sizes, never powers of two.
    """

    def __init__(self, capacity: int, *, name: str = "host") -> None:
        self.spec = TierSpec(name=name, kind="host", capacity=capacity, align=PAGE)
        self.used_nbytes = 0
        self._buffers: dict[int, HostBuffer] = {}  # by generation of the block

    def allocate(self, nbytes: int) -> Block:
        asked = page_ceil(max(nbytes, 1))
        if self.used_nbytes + asked > self.spec.capacity:
            free = self.spec.capacity - self.used_nbytes
            raise CapacityError(
                f"{self.spec.name} tier of {format_nbytes(self.spec.capacity)} has "
                f"{format_nbytes(free)} free, {format_nbytes(asked)} ({asked} bytes) were asked: "
                f"raise the budget by {format_nbytes(asked - free)}"
            )
        buffer = self._map(asked)
        block = Block(self, Extent(buffer.address, asked), nbytes)
        self._buffers[block.generation] = buffer
        self.used_nbytes += asked
        return block

    def _map(self, nbytes: int) -> HostBuffer:
        """Fresh memory for a block; tiers that choose where its pages come from override it."""
        return HostBuffer(nbytes)

    def address(self, block: Block) -> int:
        block.check(0, 0)
        buffer = self._buffers.get(block.generation)
        if buffer is None:
            raise self._outlived(block)
        return buffer.address

    def _release(self, block: Block) -> None:
        buffer = self._buffers.pop(block.generation, None)
        if buffer is not None:  # else the tier is closed
            self.used_nbytes -= buffer.nbytes
            buffer.release()

    def close(self) -> None:
        for buffer in self._buffers.values():
            buffer.release()
        self._buffers.clear()
        self.used_nbytes = 0
