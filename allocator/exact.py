"""The exact solver of small cases: depth first, with a proof of the optimum.

[Note: the search] Take any packing, and let its buffers fall, lowest first, onto those that fell
before and live at the same ticks: none ends higher than it was. So some optimum is such a pile,
and building it lowest offset first, each buffer on top of what stands at its ticks, finds it.
Three facts make the tree small (MiniMalloc, Moffitt, ASPLOS 2023):

- offsets never fall along a branch, and of equal ones the smaller index comes first, so each pile
  is built in one order only;
- a buffer is not placed above the place that another one could fill before it (its end is not
  higher): letting that one fall would be no worse;
- at each tick, what is still to come stands on top of what is there, and no lower than the last
  offset. A branch whose bound reaches the best known peak can't improve it.

The count of nodes bounds the effort, never the clock: the same buffers give the same packing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from offload.allocator.extent import align_up
from offload.allocator.lifetimes import Lifetime, granule_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What the search ended with.

    Attributes:
        offsets: by position of the lifetimes; None: nothing is below the peak to beat.
        peak_nbytes: of these offsets, or the peak to beat.
        proven: whether nothing smaller exists; otherwise the nodes ran out.
    """

    offsets: tuple[int, ...] | None
    peak_nbytes: int
    proven: bool


def search(
    lifetimes: Sequence[Lifetime], *, beat_nbytes: int, bound_nbytes: int, nodes: int
) -> Found:
    """The smallest packing below ``beat_nbytes``; ends at once at ``bound_nbytes``.

    Args:
        nodes: of the search, at most; what was best by then is returned.
    """
    tree = _Tree(lifetimes, beat_nbytes, bound_nbytes, nodes)
    tree.descend(0, -1)
    return Found(
        offsets=tuple(tree.best) if tree.best is not None else None,
        peak_nbytes=tree.best_peak,
        proven=tree.nodes > 0 or tree.best_peak <= bound_nbytes,
    )


class _Tree:
    """One branch of the search at a time, undone on the way back."""

    def __init__(
        self, lifetimes: Sequence[Lifetime], beat_nbytes: int, bound_nbytes: int, nodes: int
    ) -> None:
        granule = granule_of(lifetimes)
        self.sizes = [align_up(life.nbytes, granule) for life in lifetimes]
        self.aligns = [life.align for life in lifetimes]
        edges = sorted(
            {life.first_tick for life in lifetimes} | {life.last_tick + 1 for life in lifetimes}
        )
        at = {tick: section for section, tick in enumerate(edges)}
        # Between two edges nothing changes: a section stands for all its ticks.
        self.spans = [range(at[life.first_tick], at[life.last_tick + 1]) for life in lifetimes]
        self.floor = [0] * len(edges)  # what stands in each section
        self.to_come = [0] * len(edges)  # bytes that are still to be placed in it
        for size, span in zip(self.sizes, self.spans, strict=True):
            for section in span:
                self.to_come[section] += size
        self.waiting = set(range(len(lifetimes)))
        self.offsets = [0] * len(lifetimes)
        self.best: list[int] | None = None
        self.best_peak = beat_nbytes
        self.bound = bound_nbytes
        self.nodes = nodes

    def descend(self, last_offset: int, last_index: int) -> None:
        """Try every buffer that may come next, in the order of promise."""
        if not self.waiting:
            self.best_peak, self.best = max(self.floor), list(self.offsets)
            return
        self.nodes -= 1
        places = {index: self._place(index) for index in self.waiting}
        if self._least_peak(places, last_offset) >= self.best_peak:
            return
        first_end = min(offset + self.sizes[index] for index, offset in places.items())
        for offset, _, index in sorted(
            (offset, -self.sizes[index] * len(self.spans[index]), index)
            for index, offset in places.items()
            if offset < first_end and (offset, index) > (last_offset, last_index)
        ):
            if self.nodes <= 0 or self.best_peak <= self.bound:
                return
            before = self._put(index, offset)
            self.descend(offset, index)
            self._take_back(index, before)

    def _place(self, index: int) -> int:
        span = self.spans[index]
        return align_up(max(self.floor[span.start : span.stop]), self.aligns[index])

    def _least_peak(self, places: dict[int, int], last_offset: int) -> int:
        """No pile on this branch is lower."""
        lowest = dict.fromkeys(range(len(self.floor)), self.best_peak)
        for index, offset in places.items():
            start = max(offset, last_offset)
            for section in self.spans[index]:
                lowest[section] = min(lowest[section], start)
        return max(
            max(standing, lowest[section] + more if more else 0)
            for section, (standing, more) in enumerate(zip(self.floor, self.to_come, strict=True))
        )

    def _put(self, index: int, offset: int) -> list[int]:
        """Place a buffer; what stood in its sections before."""
        span, size = self.spans[index], self.sizes[index]
        before = self.floor[span.start : span.stop]
        for section in span:
            self.floor[section] = offset + size
            self.to_come[section] -= size
        self.offsets[index] = offset
        self.waiting.discard(index)
        return before

    def _take_back(self, index: int, before: list[int]) -> None:
        span, size = self.spans[index], self.sizes[index]
        self.floor[span.start : span.stop] = before
        for section in span:
            self.to_come[section] += size
        self.waiting.add(index)
