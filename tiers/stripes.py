"""Where the bytes of a striped file lie: pure integer arithmetic, no files, no clock.

One logical address space is cut into units. A pattern of paths repeats over them, in which each
path appears as often as its weight says, spread as evenly as can be (smooth weighted round
robin). The units of one path follow each other in its own file without a gap.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

UNIT_NBYTES = 4 << 20  # two huge pages: a fast request on any path, and few mappings
MOST_SLOTS = 64  # longest pattern: what is slower than a 64th of all would only hold others up
_GOOD_SHARE = 0.97  # of the sum of all rates; the shortest pattern that reaches it is taken


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Bytes that lie together on one path.

    Attributes:
        path: number of the path.
        offset: where they begin in the path's own file.
        start: where they begin in the range that was asked for.
    """

    path: int
    offset: int
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Stripes:
    """The places of all bytes; ``weights[path]`` units of each pattern lie on ``path``.

    Raises:
        ValueError: no weight is positive, or the unit is not.
    """

    unit_nbytes: int
    weights: tuple[int, ...]
    _pattern: tuple[int, ...] = field(init=False, repr=False, compare=False)  # path of each slot
    _ranks: tuple[int, ...] = field(init=False, repr=False, compare=False)  # among its path's
    _slots: tuple[tuple[int, ...], ...] = field(init=False, repr=False, compare=False)  # by path

    def __post_init__(self) -> None:
        if self.unit_nbytes <= 0 or min(self.weights, default=-1) < 0 or not any(self.weights):
            raise ValueError(
                f"can't stripe units of {self.unit_nbytes} bytes by weights {self.weights}"
            )
        pattern = _pattern(self.weights)
        slots = tuple(
            tuple(slot for slot, path in enumerate(pattern) if path == wanted)
            for wanted in range(len(self.weights))
        )
        object.__setattr__(self, "_pattern", pattern)
        object.__setattr__(self, "_ranks", tuple(slots[p].index(s) for s, p in enumerate(pattern)))
        object.__setattr__(self, "_slots", slots)

    def place(self, offset: int) -> tuple[int, int]:
        """(path, offset in its own file) of one byte."""
        unit, within = divmod(offset, self.unit_nbytes)
        period, slot = divmod(unit, len(self._pattern))
        path = self._pattern[slot]
        rank = period * self.weights[path] + self._ranks[slot]
        return path, rank * self.unit_nbytes + within

    def runs(self, offset: int, nbytes: int) -> list[Run]:
        """The places of ``nbytes`` from ``offset`` on; neighbouring units of one path merge."""
        found: list[Run] = []
        done = 0
        while done < nbytes:
            at = offset + done
            part = min(self.unit_nbytes - at % self.unit_nbytes, nbytes - done)
            path, begin = self.place(at)
            last = found[-1] if found else None
            if last is not None and last.path == path:
                assert last.offset + last.nbytes == begin
                found[-1] = Run(
                    path=path, offset=last.offset, start=last.start, nbytes=last.nbytes + part
                )
            else:
                found.append(Run(path=path, offset=begin, start=done, nbytes=part))
            done += part
        return found

    def path_nbytes(self, path: int, nbytes: int) -> int:
        """Bytes of the path's own file that hold its part of the first ``nbytes``."""
        units, within = divmod(nbytes, self.unit_nbytes)
        periods, slots = divmod(units, len(self._pattern))
        whole = periods * self.weights[path] + self._pattern[:slots].count(path)
        partial = within if self._pattern[slots] == path else 0
        return whole * self.unit_nbytes + partial

    def held_nbytes(self, sizes: Sequence[int]) -> int:
        """The longest beginning that files of ``sizes`` bytes hold without a gap."""
        return min(
            self._logical(path, size) for path, size in enumerate(sizes) if self.weights[path]
        )

    def _logical(self, path: int, offset: int) -> int:
        """The logical offset of a byte of the path's own file: ``place`` backwards."""
        rank, within = divmod(offset, self.unit_nbytes)
        period, index = divmod(rank, self.weights[path])
        unit = period * len(self._pattern) + self._slots[path][index]
        return unit * self.unit_nbytes + within


def _pattern(weights: Sequence[int]) -> tuple[int, ...]:
    """Each path as often as its weight, the most overdue one first."""
    total = sum(weights)
    credit = [0] * len(weights)
    pattern: list[int] = []
    for _ in range(total):
        credit = [have + weight for have, weight in zip(credit, weights, strict=True)]
        path = max(range(len(weights)), key=lambda path: (credit[path], -path))
        credit[path] -= total
        pattern.append(path)
    return tuple(pattern)


def weights_for(rates: Sequence[float]) -> tuple[int, ...]:
    """Small weights in proportion to ``rates`` (bytes per second, any scale).

    The shortest pattern whose slowest path lets all of them reach 97 % of the sum of their
    rates, or else the best one of at most ``MOST_SLOTS`` slots. A path that is too slow to carry
    one slot of it gets weight 0.
    """
    best: tuple[float, tuple[int, ...]] = (0.0, ())
    for slots in range(1, MOST_SLOTS + 1):
        weights = _apportion(rates, slots)
        share = reached_share(rates, weights)
        best = max(best, (share, weights), key=lambda found: found[0])
        if share >= _GOOD_SHARE:
            break
    shortest = math.gcd(*best[1])  # a longer one of the same shares may win by rounding alone
    return tuple(weight // shortest for weight in best[1])


def reached_share(rates: Sequence[float], weights: Sequence[int]) -> float:
    """Which part of the sum of ``rates`` is reached when bytes are spread by ``weights``."""
    total = sum(weights)
    reached = min(
        rate * total / weight for rate, weight in zip(rates, weights, strict=True) if weight
    )
    return reached / sum(rates)


def _apportion(rates: Sequence[float], slots: int) -> tuple[int, ...]:
    """Give each slot to the path that is done with it first."""
    weights = [0] * len(rates)
    for _ in range(slots):
        path = min(range(len(rates)), key=lambda path: (weights[path] + 1) / rates[path])
        weights[path] += 1
    return tuple(weights)
