"""Two-level segregated fit over integers (Masmano et al., ECRTS 2004).

Holes are listed by size class: the first level is the power of two, the second divides it into
16. Two levels of bitmaps find a class with a hole that surely fits in constant time; neighbours
of a freed extent are merged at once, found through the holes' two ends.
"""

from collections import defaultdict

from offload.allocator.errors import CapacityError, StaleBlockError
from offload.allocator.extent import Extent, align_up

_SECOND_BITS = 4


class TLSF:
    """An arena of ``capacity`` bytes, ``current_nbytes`` of them in use; integers only."""

    def __init__(self, capacity: int) -> None:
        self.capacity = 0
        self._live: dict[int, Extent] = {}
        self._holes: dict[int, Extent] = {}  # by offset
        self._hole_ends: dict[int, int] = {}  # end -> offset
        self._classes: defaultdict[int, dict[int, None]] = defaultdict(dict)  # class -> offsets
        self._first = 0  # bitmap: which first levels have holes
        self._second: defaultdict[int, int] = defaultdict(int)
        self.current_nbytes = 0
        self.grow(capacity)

    def allocate(self, nbytes: int, *, align: int = 4096) -> Extent:
        """An extent of ``nbytes`` at a multiple of ``align``.

        Raises:
            CapacityError: no hole is large enough.
            ValueError: ``nbytes`` or ``align`` is not positive.
        """
        if nbytes <= 0 or align <= 0:
            raise ValueError(f"can't allocate {nbytes} bytes aligned to {align}")
        hole = self._find(nbytes, align)
        if hole is None:
            raise CapacityError(
                f"no room for {nbytes} bytes: {self.capacity - self.current_nbytes} of "
                f"{self.capacity} bytes are free, the largest hole has {self.largest_free_nbytes}"
            )
        extent = Extent(align_up(hole.offset, align), nbytes)
        self._take(hole, extent)
        return extent

    def reserve(self, extent: Extent) -> None:
        """Mark a given range as in use, to rebuild an arena from a record.

        Raises:
            CapacityError: part of it is in use already, or outside the arena.
        """
        for hole in self._holes.values():
            if hole.contains(extent):
                self._take(hole, extent)
                return
        raise CapacityError(f"bytes {extent.offset}..{extent.end} are not free")

    def free(self, extent: Extent) -> None:
        """Give an extent back; it merges with the holes beside it.

        Raises:
            StaleBlockError: the extent is not in use (freed before, or foreign).
        """
        if self._live.get(extent.offset) != extent:
            raise StaleBlockError(f"bytes {extent.offset}..{extent.end} are not in use")
        del self._live[extent.offset]
        self.current_nbytes -= extent.nbytes
        self._add_hole(extent)

    def grow(self, nbytes: int) -> None:
        """Add ``nbytes`` at the end of the arena."""
        if nbytes:
            added = Extent(self.capacity, nbytes)
            self.capacity += nbytes
            self._add_hole(added)

    @property
    def current_count(self) -> int:
        """Extents in use."""
        return len(self._live)

    @property
    def largest_free_nbytes(self) -> int:
        """Bytes of the largest hole."""
        return max((hole.nbytes for hole in self._holes.values()), default=0)

    @property
    def last_free_nbytes(self) -> int:
        """Bytes of the hole at the end of the arena, with which it would grow together."""
        start = self._hole_ends.get(self.capacity, self.capacity)
        return self.capacity - start

    def _find(self, nbytes: int, align: int) -> Extent | None:
        """A hole that holds ``nbytes`` aligned: by bitmap, else by looking at its own class."""
        wanted = nbytes + align - 1
        # Every hole of a higher class fits; those of the request's own class may.
        for size_class in self._classes_from(_class_of(nbytes)):
            for offset in self._classes[size_class]:
                hole = self._holes[offset]
                if hole.nbytes >= wanted or align_up(offset, align) + nbytes <= hole.end:
                    return hole
        return None

    def _classes_from(self, size_class: int) -> list[int]:
        first, second = divmod(size_class, 1 << _SECOND_BITS)
        found: list[int] = []
        levels = self._first >> first << first
        while levels:
            level = (levels & -levels).bit_length() - 1
            bits = self._second[level]
            if level == first:
                bits = bits >> second << second
            while bits:
                lowest = bits & -bits
                found.append((level << _SECOND_BITS) + lowest.bit_length() - 1)
                bits ^= lowest
            levels &= levels - 1
        return found

    def _take(self, hole: Extent, extent: Extent) -> None:
        self._remove_hole(hole)
        if extent.offset > hole.offset:
            self._insert_hole(Extent(hole.offset, extent.offset - hole.offset))
        if extent.end < hole.end:
            self._insert_hole(Extent(extent.end, hole.end - extent.end))
        self._live[extent.offset] = extent
        self.current_nbytes += extent.nbytes

    def _add_hole(self, extent: Extent) -> None:
        """Insert a hole merged with its neighbours."""
        start, end = extent.offset, extent.end
        if start in self._hole_ends:
            before = self._holes[self._hole_ends[start]]
            self._remove_hole(before)
            start = before.offset
        if end in self._holes:
            after = self._holes[end]
            self._remove_hole(after)
            end = after.end
        self._insert_hole(Extent(start, end - start))

    def _insert_hole(self, hole: Extent) -> None:
        size_class = _class_of(hole.nbytes)
        level, second = divmod(size_class, 1 << _SECOND_BITS)
        self._holes[hole.offset] = hole
        self._hole_ends[hole.end] = hole.offset
        self._classes[size_class][hole.offset] = None
        self._first |= 1 << level
        self._second[level] |= 1 << second

    def _remove_hole(self, hole: Extent) -> None:
        size_class = _class_of(hole.nbytes)
        level, second = divmod(size_class, 1 << _SECOND_BITS)
        del self._holes[hole.offset], self._hole_ends[hole.end]
        del self._classes[size_class][hole.offset]
        if not self._classes[size_class]:
            self._second[level] &= ~(1 << second)
            if not self._second[level]:
                self._first &= ~(1 << level)


def _class_of(nbytes: int) -> int:
    """Size class of a hole: (power of two, 16th of it) as one number."""
    level = nbytes.bit_length() - 1
    fraction = (nbytes - (1 << level)) << _SECOND_BITS >> level
    return (level << _SECOND_BITS) + fraction
