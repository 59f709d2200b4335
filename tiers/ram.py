"""The host tier: a byte-bounded pool of page-aligned RAM."""

from abc import abstractmethod
from typing import Literal

from offload.allocator.errors import CapacityError, StaleBlockError, TierIOError
from offload.allocator.extent import Extent
from offload.allocator.units import format_nbytes
from offload.tiers.base import Block, Tier, TierSpec
from offload.tiers.engines.base import FileEngine
from offload.tiers.engines.memory import MemoryEngine
from offload.tiers.hostmem import PAGE, page_ceil
from offload.tiers.journal import Label
from offload.tiers.lanes import Transfer
from offload.tiers.memory import HostBuffer
from offload.tiers.moving import move_whole


class HostTier(Tier):
    """A tier in host memory: the CPU moves its bytes, so a transfer is over when it is made."""

    engine: FileEngine = MemoryEngine()  # what copies

    @abstractmethod
    def address(self, block: Block) -> int:
        """Where the bytes of ``block`` stand in memory.

        Raises:
            StaleBlockError: the block was released, or outlived its tier.
        """

    def _before_copy(self, block: Block) -> None:
        """Wait for what else moves bytes of ``block``; nothing does, in plain memory."""

    def _move(
        self, block: Block, address: int, offset: int, nbytes: int, label: Label, *, reading: bool
    ) -> Transfer:
        self._before_copy(block)
        at = self.address(block) + offset
        verb: Literal["read", "write"] = "read" if reading else "write"
        call = self.engine.read if reading else self.engine.write
        transfer = Transfer(label, nbytes, 0)
        try:
            move_whole(verb, call, f"the {self.spec.name} tier", at, address, nbytes)
        except TierIOError as error:
            transfer.error = error
        return transfer

    def _outlived(self, block: Block) -> StaleBlockError:
        return StaleBlockError(
            f"block {block.generation} ({block.nbytes} bytes) outlived its tier, {self.spec.name}"
        )


class RamTier(HostTier):
    """Blocks are private huge-page-advised mappings, returned to the kernel on release.

    ``capacity`` bounds the bytes of all living blocks, each rounded up to whole pages: exact
    sizes, never powers of two.

    Args:
        engine: what copies; by default the processor.
    """

    def __init__(
        self, capacity: int, *, name: str = "host", engine: FileEngine | None = None
    ) -> None:
        if engine is not None:
            self.engine = engine
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
