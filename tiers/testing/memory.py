"""What every suite of a contract uses: patterned bytes, and memory of any alignment for them."""

from typing import Self

from offload.tiers.base import Block, Tier
from offload.tiers.memory import HostBuffer, memory_at


def pattern(nbytes: int, seed: int = 1) -> bytes:
    """Bytes without a period that a page or a request could hide; ``seed`` tells them apart."""
    period = bytes((index * 167 + seed * 29) % 251 for index in range(251))
    return (period * (nbytes // 251 + 1))[:nbytes]


class Memory:
    """Host memory for one transfer, ``shift`` bytes off page alignment."""

    def __init__(self, nbytes: int, *, shift: int = 0) -> None:
        self.nbytes = nbytes
        self._buffer = HostBuffer(max(nbytes + shift, 1))
        self.address = self._buffer.address + shift

    @classmethod
    def of(cls, data: bytes, *, shift: int = 0) -> Self:
        """Memory that holds ``data``."""
        memory = cls(len(data), shift=shift)
        memory_at(memory.address, memory.nbytes)[:] = data
        return memory

    def data(self) -> bytes:
        """What the memory holds now."""
        return bytes(memory_at(self.address, self.nbytes))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._buffer.release()


def put(tier: Tier, block: Block, data: bytes, *, offset: int = 0, shift: int = 0) -> None:
    """Write ``data`` through the tier, and wait."""
    with Memory.of(data, shift=shift) as memory:
        tier.write(block, memory.address, offset=offset, nbytes=len(data)).wait()


def get(tier: Tier, block: Block, *, offset: int, nbytes: int, shift: int = 0) -> bytes:
    """Read through the tier, and wait."""
    with Memory(nbytes, shift=shift) as memory:
        tier.read(block, memory.address, offset=offset, nbytes=nbytes).wait()
        return memory.data()
