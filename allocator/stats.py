"""What an allocator tells about itself."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocatorStats:
    """Bytes and counts of extents: now, at the peak, and since the beginning."""

    capacity: int
    current_nbytes: int
    peak_nbytes: int
    total_nbytes: int
    current_count: int
    peak_count: int
    total_count: int
    largest_free_nbytes: int

    @property
    def fragmentation(self) -> float:
        """Share of the free bytes that are outside the largest hole."""
        free = self.capacity - self.current_nbytes
        return 1 - self.largest_free_nbytes / free if free else 0.0
