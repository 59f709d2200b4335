"""The contract of a tier: a place that holds bytes.

A backend implements ``Tier``; ``offload.tiers.testing`` holds the suite that every backend
passes. Reads and writes never block: they return a ``Transfer``.
"""

import itertools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Self

from offload.allocator.errors import StaleBlockError
from offload.allocator.extent import Extent
from offload.tiers.journal import Label
from offload.tiers.lanes import Transfer

_generations = itertools.count(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class TierSpec:
    """What a tier is: ``name`` such as ``host`` or ``file:/data``, sizes in bytes."""

    name: str
    kind: str  # host | file | device
    capacity: int
    align: int


class Block:
    """An owned extent of a tier; ``generation`` tells it from later owners of the bytes."""

    __slots__ = ("extent", "generation", "nbytes", "released", "tier")

    def __init__(self, tier: "Tier", extent: Extent, nbytes: int) -> None:
        self.tier = tier
        self.extent = extent
        self.nbytes = nbytes
        self.generation = next(_generations)
        self.released = False

    def check(self, offset: int, nbytes: int) -> None:
        """Raise unless bytes ``offset`` to ``offset + nbytes`` may be used.

        Raises:
            StaleBlockError: the block was released.
            ValueError: the range leaves the block.
        """
        if self.released:
            raise StaleBlockError(
                f"block {self.generation} of {self.tier.spec.name} "
                f"({self.nbytes} bytes at {self.extent.offset}) was released"
            )
        if offset < 0 or nbytes < 0 or offset + nbytes > self.extent.nbytes:
            raise ValueError(
                f"bytes {offset}..{offset + nbytes} leave a block of {self.extent.nbytes} bytes"
            )

    def release(self) -> None:
        """Give the extent back to its tier.

        Raises:
            StaleBlockError: it was given back before.
        """
        self.check(0, 0)
        self.released = True
        self.tier._release(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if not self.released:
            self.release()


class Tier(ABC):
    """A place that holds bytes. Addresses name host memory that the caller keeps alive."""

    spec: TierSpec

    @abstractmethod
    def allocate(self, nbytes: int) -> Block:
        """A block of at least ``nbytes``.

        Raises:
            CapacityError: the tier is full.
        """

    def read(
        self,
        block: Block,
        address: int,
        *,
        offset: int = 0,
        nbytes: int | None = None,
        label: Label | None = None,
    ) -> Transfer:
        """Copy bytes of ``block`` from ``offset`` on to ``address``."""
        return self._checked_move(block, address, offset, nbytes, label, reading=True)

    def write(
        self,
        block: Block,
        address: int,
        *,
        offset: int = 0,
        nbytes: int | None = None,
        label: Label | None = None,
    ) -> Transfer:
        """Copy bytes from ``address`` into ``block`` from ``offset`` on."""
        return self._checked_move(block, address, offset, nbytes, label, reading=False)

    def _checked_move(
        self,
        block: Block,
        address: int,
        offset: int,
        nbytes: int | None,
        label: Label | None,
        *,
        reading: bool,
    ) -> Transfer:
        nbytes = block.nbytes - offset if nbytes is None else nbytes
        block.check(offset, nbytes)
        ends = (self.spec.name, "host") if reading else ("host", self.spec.name)
        label = label or Label("", "", *ends)
        return self._move(block, address, offset, nbytes, label, reading=reading)

    @abstractmethod
    def _move(
        self, block: Block, address: int, offset: int, nbytes: int, label: Label, *, reading: bool
    ) -> Transfer:
        """Copy ``nbytes`` between ``block`` from ``offset`` on, where they lie, and ``address``."""

    @abstractmethod
    def close(self) -> None:
        """End transfers and give everything back; safe to call twice."""

    @abstractmethod
    def _release(self, block: Block) -> None:
        """Take back the extent of ``block``."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
