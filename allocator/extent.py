"""A byte range of an arena, and alignment arithmetic."""

from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, slots=True, order=True)
class Extent:
    """Bytes ``offset`` to ``offset + nbytes`` of an arena.

    Raises:
        ValueError: a negative offset or size.
    """

    offset: int
    nbytes: int

    def __post_init__(self) -> None:
        if self.offset < 0 or self.nbytes < 0:
            raise ValueError(f"an extent can't have offset {self.offset} or {self.nbytes} bytes")

    @property
    def end(self) -> int:
        """The first byte after the extent."""
        return self.offset + self.nbytes

    def overlaps(self, other: Self) -> bool:
        """Whether the two share a byte."""
        return self.offset < other.end and other.offset < self.end

    def contains(self, other: Self) -> bool:
        """Whether every byte of ``other`` is in this extent."""
        return self.offset <= other.offset and other.end <= self.end


def align_up(value: int, align: int) -> int:
    """``value`` rounded up to a multiple of ``align``."""
    return -(-value // align) * align
