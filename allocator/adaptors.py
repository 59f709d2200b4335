"""Adaptors around an arena: what it measures and what it refuses are wrappers, not branches in it.

They compose, as RMM's memory resource adaptors do: ``LimitAdaptor(StatisticsAdaptor(TLSF(n)), m)``.
"""

from typing import Protocol

from offload.allocator.errors import CapacityError
from offload.allocator.extent import Extent
from offload.allocator.stats import AllocatorStats
from offload.allocator.units import format_nbytes


class Arena(Protocol):
    """Gives extents out and takes them back; ``TLSF`` is one, and so is every adaptor."""

    @property
    def capacity(self) -> int: ...
    @property
    def current_nbytes(self) -> int: ...
    @property
    def current_count(self) -> int: ...
    @property
    def largest_free_nbytes(self) -> int: ...
    @property
    def last_free_nbytes(self) -> int: ...

    def allocate(self, nbytes: int, *, align: int = 4096) -> Extent: ...
    def reserve(self, extent: Extent) -> None: ...
    def free(self, extent: Extent) -> None: ...
    def grow(self, nbytes: int) -> None: ...


class ArenaAdaptor:
    """Hands every call on to ``inner``."""

    def __init__(self, inner: Arena) -> None:
        self.inner = inner

    @property
    def capacity(self) -> int:
        """Bytes of the arena."""
        return self.inner.capacity

    @property
    def current_nbytes(self) -> int:
        """Bytes in use."""
        return self.inner.current_nbytes

    @property
    def current_count(self) -> int:
        """Extents in use."""
        return self.inner.current_count

    @property
    def largest_free_nbytes(self) -> int:
        """Bytes of the largest hole."""
        return self.inner.largest_free_nbytes

    @property
    def last_free_nbytes(self) -> int:
        """Bytes of the hole at its end."""
        return self.inner.last_free_nbytes

    def allocate(self, nbytes: int, *, align: int = 4096) -> Extent:
        """See ``TLSF.allocate``."""
        return self.inner.allocate(nbytes, align=align)

    def reserve(self, extent: Extent) -> None:
        """See ``TLSF.reserve``."""
        self.inner.reserve(extent)

    def free(self, extent: Extent) -> None:
        """See ``TLSF.free``."""
        self.inner.free(extent)

    def grow(self, nbytes: int) -> None:
        """See ``TLSF.grow``."""
        self.inner.grow(nbytes)


class StatisticsAdaptor(ArenaAdaptor):
    """Counts bytes and extents: now, at the peak, and since the beginning."""

    def __init__(self, inner: Arena) -> None:
        super().__init__(inner)
        self._peak_nbytes = self._total_nbytes = inner.current_nbytes
        self._peak_count = self._total_count = inner.current_count

    def allocate(self, nbytes: int, *, align: int = 4096) -> Extent:
        """See ``TLSF.allocate``."""
        extent = super().allocate(nbytes, align=align)
        self._count(extent)
        return extent

    def reserve(self, extent: Extent) -> None:
        """See ``TLSF.reserve``."""
        super().reserve(extent)
        self._count(extent)

    def _count(self, extent: Extent) -> None:
        self._total_nbytes += extent.nbytes
        self._total_count += 1
        self._peak_nbytes = max(self._peak_nbytes, self.current_nbytes)
        self._peak_count = max(self._peak_count, self.current_count)

    def stats(self) -> AllocatorStats:
        """Bytes and counts, now and at their peaks."""
        return AllocatorStats(
            capacity=self.capacity,
            current_nbytes=self.current_nbytes,
            peak_nbytes=self._peak_nbytes,
            total_nbytes=self._total_nbytes,
            current_count=self.current_count,
            peak_count=self._peak_count,
            total_count=self._total_count,
            largest_free_nbytes=self.largest_free_nbytes,
        )


class LimitAdaptor(ArenaAdaptor):
    """Refuses what would put more than ``limit_nbytes`` in use."""

    def __init__(self, inner: Arena, limit_nbytes: int) -> None:
        super().__init__(inner)
        self.limit_nbytes = limit_nbytes

    def allocate(self, nbytes: int, *, align: int = 4096) -> Extent:
        """See ``TLSF.allocate``.

        Raises:
            CapacityError: the limit, or the arena, has no room.
        """
        self._check(nbytes)
        return super().allocate(nbytes, align=align)

    def reserve(self, extent: Extent) -> None:
        """See ``TLSF.reserve``.

        Raises:
            CapacityError: the limit has no room, or part of the range is in use.
        """
        self._check(extent.nbytes)
        super().reserve(extent)

    def _check(self, nbytes: int) -> None:
        free = self.limit_nbytes - self.current_nbytes
        if nbytes > free:
            raise CapacityError(
                f"{format_nbytes(nbytes)} ({nbytes} bytes) were asked, the limit of "
                f"{format_nbytes(self.limit_nbytes)} has {format_nbytes(max(free, 0))} left: "
                f"raise it by {format_nbytes(nbytes - free)}"
            )
