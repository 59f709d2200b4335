"""Static packing: buffers with known lifetimes get fixed offsets in one arena."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from offload.allocator.extent import Extent, align_up


@dataclass(frozen=True, slots=True)
class Lifetime:
    """``nbytes`` that must exist from ``first_tick`` to ``last_tick``, both included."""

    key: str
    nbytes: int
    first_tick: int
    last_tick: int

    def meets(self, other: "Lifetime") -> bool:
        """Whether both are alive at some tick."""
        return self.first_tick <= other.last_tick and other.first_tick <= self.last_tick


@dataclass(frozen=True, slots=True)
class Packing:
    """Extents by key; ``lower_bound_nbytes`` is the most that is alive at any tick."""

    extents: dict[str, Extent]
    peak_nbytes: int
    lower_bound_nbytes: int

    @property
    def gap(self) -> float:
        """How far the peak is above the bound, as a share of it."""
        return self.peak_nbytes / self.lower_bound_nbytes - 1 if self.lower_bound_nbytes else 0.0


_ORDERS: tuple[Callable[[Lifetime], tuple[int, ...]], ...] = (
    lambda life: (-life.nbytes, life.first_tick),
    lambda life: (-life.nbytes * (life.last_tick - life.first_tick + 1), life.first_tick),
    lambda life: (life.first_tick, -life.nbytes),
    lambda life: (life.first_tick - life.last_tick, -life.nbytes),
)


def pack(lifetimes: Sequence[Lifetime], *, align: int = 4096) -> Packing:
    """Offsets such that no two living buffers overlap, by best fit in several orders.

    Deterministic. The least peak over the orders is taken (dynamic storage allocation is
    NP-hard; the lower bound tells how good the result is).
    """
    bound = live_peak_nbytes(lifetimes, align=align)
    best: dict[str, Extent] | None = None
    best_peak = 0
    for order in _ORDERS:
        extents = _place(sorted(lifetimes, key=lambda life: (*order(life), life.key)), align)
        peak = max((align_up(extent.end, align) for extent in extents.values()), default=0)
        if best is None or peak < best_peak:
            best, best_peak = extents, peak
        if best_peak == bound:
            break
    return Packing(best or {}, best_peak, bound)


def live_peak_nbytes(lifetimes: Sequence[Lifetime], *, align: int = 1) -> int:
    """The most bytes alive at any tick, each buffer rounded up to ``align``."""
    changes: dict[int, int] = {}
    for life in lifetimes:
        size = align_up(life.nbytes, align)
        changes[life.first_tick] = changes.get(life.first_tick, 0) + size
        changes[life.last_tick + 1] = changes.get(life.last_tick + 1, 0) - size
    peak = live = 0
    for tick in sorted(changes):
        live += changes[tick]
        peak = max(peak, live)
    return peak


def _place(ordered: Sequence[Lifetime], align: int) -> dict[str, Extent]:
    placed: list[tuple[Lifetime, Extent]] = []
    extents: dict[str, Extent] = {}
    for life in ordered:
        neighbours = sorted(extent for other, extent in placed if life.meets(other))
        extent = Extent(_best_gap(neighbours, align_up(life.nbytes, align)), life.nbytes)
        placed.append((life, Extent(extent.offset, align_up(life.nbytes, align))))
        extents[life.key] = extent
    return extents


def _best_gap(neighbours: Sequence[Extent], nbytes: int) -> int:
    """Offset of the smallest gap between ``neighbours`` (sorted) that holds ``nbytes``."""
    best, best_size, end = None, 0, 0
    for extent in neighbours:
        gap = extent.offset - end
        if gap >= nbytes and (best is None or gap < best_size):
            best, best_size = end, gap
        end = max(end, extent.end)
    return end if best is None else best


def check(packing: Packing, lifetimes: Sequence[Lifetime]) -> None:
    """Raise unless every buffer has its bytes and no two living ones share any.

    Raises:
        ValueError: naming the first pair that overlaps.
    """
    ordered = sorted(lifetimes, key=lambda life: life.first_tick)
    for index, life in enumerate(ordered):
        extent = packing.extents[life.key]
        if extent.nbytes != life.nbytes or extent.end > packing.peak_nbytes:
            raise ValueError(f"{life.key} has {extent}, which does not hold its bytes")
        for other in ordered[index + 1 :]:
            if other.first_tick > life.last_tick:
                break
            if life.nbytes and extent.overlaps(packing.extents[other.key]):
                raise ValueError(f"{life.key} and {other.key} overlap while both are alive")
