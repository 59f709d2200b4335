"""What has to be packed and what a packing is: lifetimes, extents, the bound, the one checker.

Dynamic storage allocation: buffers that live at given ticks get fixed offsets so that no two
share a byte while both are alive, and the arena is as small as possible. It is NP-hard (Garey and
Johnson, SR2); whatever solves it here returns a ``Packing``, and every one passes ``check``.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import accumulate

from offload.allocator.extent import Extent, align_up


@dataclass(frozen=True, slots=True)
class Lifetime:
    """``nbytes`` that must exist from ``first_tick`` to ``last_tick``, both included.

    Attributes:
        align: the offset is a multiple of this power of two.

    Raises:
        ValueError: no bytes, no ticks, or an alignment that is no power of two.
    """

    key: str
    nbytes: int
    first_tick: int
    last_tick: int
    align: int = 512

    def __post_init__(self) -> None:
        if self.nbytes <= 0:
            raise ValueError(
                f"{self.key} has {self.nbytes} bytes: a buffer has at least one, leave out "
                "what holds nothing"
            )
        if self.last_tick < self.first_tick:
            raise ValueError(
                f"{self.key} ({self.nbytes} bytes) lives from tick {self.first_tick} to "
                f"{self.last_tick}: it needs one tick at least, {self.first_tick} to "
                f"{self.first_tick}"
            )
        if self.align <= 0 or self.align & (self.align - 1):
            raise ValueError(
                f"{self.key} ({self.nbytes} bytes) is aligned to {self.align}, no power of two: "
                f"{1 << max(self.align - 1, 0).bit_length()} is the next one"
            )

    @property
    def ticks(self) -> int:
        """How many ticks it lives."""
        return self.last_tick - self.first_tick + 1

    def meets(self, other: "Lifetime") -> bool:
        """Whether both are alive at some tick."""
        return self.first_tick <= other.last_tick and other.first_tick <= self.last_tick


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """Where everything goes.

    Attributes:
        extents: by key of the lifetime, with the bytes that were asked.
        peak_nbytes: of the arena that holds them, in whole granules (``granule_of``).
        lower_bound_nbytes: no packing is smaller: the most bytes alive at a tick, unless a solver
            has proven more.
    """

    extents: Mapping[str, Extent]
    peak_nbytes: int
    lower_bound_nbytes: int

    @property
    def gap(self) -> float:
        """How far the peak is above the bound, as a share of it; 0 is optimal."""
        return self.peak_nbytes / self.lower_bound_nbytes - 1 if self.lower_bound_nbytes else 0.0


def granule_of(lifetimes: Iterable[Lifetime]) -> int:
    """The smallest alignment: offsets are multiples of it, so an arena has it whole."""
    return min((life.align for life in lifetimes), default=1)


class LiveBytes:
    """How many bytes are alive at which ticks, each buffer in whole granules."""

    def __init__(self, lifetimes: Sequence[Lifetime]) -> None:
        granule = granule_of(lifetimes)
        changes: dict[int, int] = {}
        for life in lifetimes:
            size = align_up(life.nbytes, granule)
            changes[life.first_tick] = changes.get(life.first_tick, 0) + size
            changes[life.last_tick + 1] = changes.get(life.last_tick + 1, 0) - size
        self._ticks = sorted(changes)
        self._nbytes = list(accumulate(changes[tick] for tick in self._ticks))

    @property
    def peak_nbytes(self) -> int:
        """The most at any tick: a lower bound of every packing."""
        return max(self._nbytes, default=0)

    def most_during(self, first_tick: int, last_tick: int) -> int:
        """The most at any of these ticks, both included."""
        begin = max(bisect_right(self._ticks, first_tick) - 1, 0)
        return max(self._nbytes[begin : bisect_right(self._ticks, last_tick)], default=0)


def live_peak_nbytes(lifetimes: Sequence[Lifetime]) -> int:
    """The most bytes alive at any tick, in whole granules: a lower bound of every packing."""
    return LiveBytes(lifetimes).peak_nbytes


def events(lifetimes: Sequence[Lifetime]) -> Iterator[tuple[int, bool]]:
    """(position, whether it comes or goes) in the order that an allocator sees.

    At each tick what begins there comes first, and then goes what ends there; each in the order
    given.
    """
    come: dict[int, list[int]] = {}
    go: dict[int, list[int]] = {}
    for position, life in enumerate(lifetimes):
        come.setdefault(life.first_tick, []).append(position)
        go.setdefault(life.last_tick, []).append(position)
    for tick in sorted(come.keys() | go.keys()):
        yield from ((position, True) for position in come.get(tick, ()))
        yield from ((position, False) for position in go.get(tick, ()))


def check_keys(lifetimes: Sequence[Lifetime]) -> None:
    """Raise unless every key comes once.

    Raises:
        ValueError: naming one that comes twice.
    """
    seen: set[str] = set()
    for life in lifetimes:
        if life.key in seen:
            raise ValueError(
                f"{life.key} ({life.nbytes} bytes) comes twice: a key names one buffer"
            )
        seen.add(life.key)


def check(packing: Packing, lifetimes: Sequence[Lifetime]) -> None:
    """Raise unless every buffer has its bytes, aligned and in bounds, shared with no living one.

    Raises:
        ValueError: naming the first buffer, or pair of them, that is wrong.
    """
    check_keys(lifetimes)
    if len(packing.extents) != len(lifetimes):
        raise ValueError(f"{len(packing.extents)} extents for {len(lifetimes)} buffers")
    bound = live_peak_nbytes(lifetimes)
    if not bound <= packing.lower_bound_nbytes <= packing.peak_nbytes:
        raise ValueError(
            f"{bound} bytes are alive at once: a bound of {packing.lower_bound_nbytes} and a peak "
            f"of {packing.peak_nbytes} can't be"
        )
    living: list[tuple[Extent, Lifetime]] = []  # by offset: neighbours overlap if any do
    ends: list[tuple[int, Extent]] = []  # a heap, by last tick
    for life in sorted(lifetimes, key=lambda life: (life.first_tick, life.key)):
        extent = packing.extents.get(life.key)
        if extent is None or extent.nbytes != life.nbytes or extent.end > packing.peak_nbytes:
            raise ValueError(
                f"{life.key} has {extent}, which does not hold its {life.nbytes} bytes"
            )
        if extent.offset % life.align:
            raise ValueError(f"{life.key} is at {extent.offset}, no multiple of {life.align}")
        while ends and ends[0][0] < life.first_tick:
            _, gone = heappop(ends)
            del living[bisect_left(living, gone, key=_extent_of)]
        place = bisect_left(living, extent, key=_extent_of)
        for taken, other in living[max(place - 1, 0) : place + 1]:
            if extent.overlaps(taken):
                raise ValueError(f"{other.key} and {life.key} overlap while both are alive")
        living.insert(place, (extent, life))
        heappush(ends, (life.last_tick, extent))


def _extent_of(entry: tuple[Extent, Lifetime]) -> Extent:
    return entry[0]
