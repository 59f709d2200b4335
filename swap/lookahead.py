"""Which saved bytes backward needs next, and when: learned from the last pass of the same kind.

Backward uses roughly in reverse what forward saved. What it really used, in which order and when,
is known after the first pass; the next pass of the same kind is expected to repeat it. Pure: it
decides nothing and moves nothing. A wrong expectation costs time, never correctness.
"""

import weakref
from collections import deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

from offload.swap.saved import Unit

_REMEMBERED = 4  # passes before a backward that are told apart
LIKENESS = 4  # sizes of one bucket differ by less than a quarter (``buckets`` [Note: buckets])


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """How a pass was used.

    Attributes:
        sizes: bytes of its units, in the order of packing.
        order: positions of the units, in the order of their first use.
        times_s: when that was, for each of ``order``.
        ranks: where a position stands in ``order``.
    """

    sizes: tuple[int, ...]
    order: tuple[int, ...]
    times_s: tuple[float, ...]
    ranks: dict[int, int]

    def is_like(self, position: int, nbytes: int) -> bool:
        """Whether there was a unit of about ``nbytes``: batches of one bucket differ a little."""
        if position >= len(self.sizes):
            return False
        expected = self.sizes[position]
        return LIKENESS * abs(expected - nbytes) <= max(expected, nbytes)

    def needed_first(self, nbytes: int) -> frozenset[int]:
        """The positions that are used first, as many as fit ``nbytes``."""
        chosen: set[int] = set()
        for position in self.order:
            nbytes -= self.sizes[position]
            if nbytes < 0:
                break
            chosen.add(position)
        return frozenset(chosen)


class _Pass:
    """The units that one pass packed, and their uses."""

    __slots__ = ("expected", "sizes", "staying", "units", "uses")

    def __init__(self, expected: Expectation | None, limit_nbytes: int) -> None:
        self.expected = expected
        self.staying = expected.needed_first(limit_nbytes) if expected else frozenset()
        self.sizes: list[int] = []
        self.units: list[weakref.ref[Unit]] = []
        self.uses: dict[int, float] = {}  # time of the first use by position, in that order

    def add(self, unit: Unit) -> None:
        position = len(self.units)
        if self.expected and not self.expected.is_like(position, unit.nbytes):
            self.expected = None  # another shape than last time, and another bucket
            self.staying = frozenset()
        unit.origin, unit.position = self, position
        unit.stays = position in self.staying
        self.units.append(weakref.ref(unit))
        self.sizes.append(unit.nbytes)

    def learned(self) -> Expectation:
        return Expectation(
            sizes=tuple(self.sizes),
            order=tuple(self.uses),
            times_s=tuple(self.uses.values()),
            ranks={position: rank for rank, position in enumerate(self.uses)},
        )

    def after(self, position: int) -> Iterator[tuple[Unit, float]]:
        """The units that are expected after ``position``, with the seconds until then."""
        expected = self.expected
        rank = expected.ranks.get(position) if expected else None
        if expected is None or rank is None:
            yield from ((unit, 0.0) for unit in self.backwards(position))
            return
        for next_rank in range(rank + 1, len(expected.order)):
            unit = self.units[expected.order[next_rank]]() if self._has(next_rank) else None
            if unit is not None:
                yield unit, expected.times_s[next_rank] - expected.times_s[rank]

    def _has(self, rank: int) -> bool:
        assert self.expected is not None
        return self.expected.order[rank] < len(self.units)

    def backwards(self, position: int) -> Iterator[Unit]:
        """The units packed before ``position``, the latest first."""
        for earlier in range(min(position, len(self.units)) - 1, -1, -1):
            unit = self.units[earlier]()
            if unit is not None:
                yield unit


class Lookahead:
    """Learns passes by their kind, and predicts the uses of the present ones."""

    def __init__(self) -> None:
        self._passes: dict[Hashable, deque[_Pass]] = {}
        self._recent: deque[_Pass] = deque(maxlen=_REMEMBERED)
        self._now = _Pass(None, 0)
        self._recent.append(self._now)

    def begin(self, kind: Hashable, limit_nbytes: int) -> None:
        """A pass of ``kind`` begins; ``limit_nbytes`` of what it saves may stay in memory."""
        known = self._passes.setdefault(kind, deque(maxlen=_REMEMBERED))
        used = next((earlier for earlier in reversed(known) if earlier.uses), None)
        self._now = _Pass(used.learned() if used else None, limit_nbytes)
        known.append(self._now)
        self._recent.append(self._now)

    def add(self, unit: Unit) -> None:
        """``unit`` was packed: the next one of the present pass."""
        self._now.add(unit)

    def used(self, unit: Unit, now_s: float) -> None:
        """Backward uses ``unit``."""
        origin = unit.origin
        assert type(origin) is _Pass
        if unit.position not in origin.uses:
            origin.uses[unit.position] = now_s

    def upcoming(self, unit: Unit) -> Iterator[tuple[Unit, float]]:
        """What is expected after ``unit``, nearest first, with the seconds until then.

        Zero seconds: it isn't known when.
        """
        present = _origin(unit)
        yield from present.after(unit.position)
        for other in reversed(self._recent):
            if other is not present and not other.uses:
                yield from ((earlier, 0.0) for earlier in other.backwards(len(other.units)))


def _origin(unit: Unit) -> _Pass:
    assert isinstance(unit.origin, _Pass)
    return unit.origin
