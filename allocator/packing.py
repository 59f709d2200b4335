"""Static packing: buffers with known lifetimes get fixed offsets in one arena."""

from bisect import insort
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from offload.allocator.exact import search
from offload.allocator.extent import Extent, align_up
from offload.allocator.lifetimes import (
    Lifetime,
    LiveBytes,
    Packing,
    check_keys,
    granule_of,
)

EXACT_COUNT = 12
"""Of so many buffers the packing is optimal, and proven to be: the search ends within its nodes."""
_NODES = 20_000  # twice of what the hardest of many random cases took
# Nodes times buffers: a node costs more, and gains less, the more there are.
_EFFORT_OF_MORE = 40_000
_SEARCHED_COUNT = 128  # the search is as deep as there are buffers

_EFFORT = 30_000_000  # pairs of buffers that may be looked at, but for three orders at least

# Lifetimes and the busiest tick of each to a key of sorting. What is alive when the arena is
# fullest goes first: it has to lie without gaps; the rest finds room beside it. Some traces want
# large ones first.
_ORDERS: tuple[Callable[[Lifetime, int], tuple[int, ...]], ...] = (
    lambda life, busiest: (-busiest, life.first_tick),
    lambda life, busiest: (-busiest, -life.nbytes, -life.last_tick),
    lambda life, _: (-life.nbytes, life.first_tick),
    lambda life, busiest: (-busiest, -life.nbytes * life.ticks),
    lambda life, _: (-life.nbytes, -life.ticks),
    lambda life, _: (-life.nbytes.bit_length(), -life.ticks),
    lambda life, busiest: (-busiest, -life.ticks),
    lambda life, _: (-life.nbytes * life.ticks, life.first_tick),
    lambda life, _: (life.first_tick, -life.nbytes),
    lambda life, _: (-life.last_tick, -life.nbytes),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Offsets by position, the arena that they need, and the bound; see ``Packing``."""

    offsets: tuple[int, ...]
    peak_nbytes: int
    lower_bound_nbytes: int


def pack(lifetimes: Sequence[Lifetime]) -> Packing:
    """Offsets such that no two living buffers overlap, in as small an arena as is found.

    Deterministic. Best fit is tried in several orders, and the least peak taken; where it is above
    the bound, a search for a smaller one follows (``exact``).

    Raises:
        ValueError: a key comes twice.
    """
    check_keys(lifetimes)
    placement = place(lifetimes)
    return Packing(
        extents={
            life.key: Extent(offset, life.nbytes)
            for life, offset in zip(lifetimes, placement.offsets, strict=True)
        },
        peak_nbytes=placement.peak_nbytes,
        lower_bound_nbytes=placement.lower_bound_nbytes,
    )


def place(lifetimes: Sequence[Lifetime]) -> Placement:
    """As ``pack``, by position: keys do not matter."""
    live = LiveBytes(lifetimes)
    bound = live.peak_nbytes
    busiest = [live.most_during(life.first_tick, life.last_tick) for life in lifetimes]
    peak = stacked_nbytes(lifetimes) + 1  # the first order is surely below it
    offsets = [0] * len(lifetimes)
    tries = max(3, _EFFORT // max(len(lifetimes) ** 2, 1))
    for order in _ORDERS[:tries]:
        keys = [order(life, most) for life, most in zip(lifetimes, busiest, strict=True)]
        ordered = sorted(range(len(lifetimes)), key=keys.__getitem__)
        fitted = _best_fit(lifetimes, ordered, below_nbytes=peak)
        if fitted is not None:
            peak, offsets = fitted
        if peak <= bound:
            break
    if peak > bound and len(lifetimes) <= _SEARCHED_COUNT:
        few = len(lifetimes) <= EXACT_COUNT
        nodes = _NODES if few else _EFFORT_OF_MORE // len(lifetimes)
        found = search(lifetimes, beat_nbytes=peak, bound_nbytes=bound, nodes=nodes)
        peak, offsets = found.peak_nbytes, list(found.offsets or offsets)
        bound = peak if found.proven else bound
    return Placement(offsets=tuple(offsets), peak_nbytes=peak, lower_bound_nbytes=bound)


def stacked_nbytes(lifetimes: Sequence[Lifetime]) -> int:
    """Bytes that all of them need one on top of the other, in any order: no packing takes more."""
    granule = granule_of(lifetimes)
    return sum(align_up(life.nbytes, granule) + life.align - granule for life in lifetimes)


def _best_fit(
    lifetimes: Sequence[Lifetime], order: Iterable[int], *, below_nbytes: int
) -> tuple[int, list[int]] | None:
    """Peak and offsets where each buffer gets the smallest gap that holds it, in this order.

    None: they are not below ``below_nbytes``.
    """
    granule = granule_of(lifetimes)
    placed: list[tuple[int, int, int, int]] = []  # offset, end, first and last tick; sorted
    offsets = [0] * len(lifetimes)
    peak = 0
    for index in order:
        life = lifetimes[index]
        size, align = align_up(life.nbytes, granule), life.align
        first, last = life.first_tick, life.last_tick
        at, least, end = -1, 0, 0
        for offset, stop, begins, ends in placed:  # the hot loop of every plan
            if begins <= last and first <= ends:
                if offset > end:
                    start = align_up(end, align)
                    room = offset - start
                    if room >= size and (at < 0 or room < least):
                        at, least = start, room
                end = max(end, stop)
        if at < 0:
            at = align_up(end, align)
        if at + size >= below_nbytes:
            return None
        insort(placed, (at, at + size, first, last))
        offsets[index] = at
        peak = max(peak, at + size)
    return peak, offsets
