"""What streams through a tier, in the order in which it is used next.

[Note: ranks] Items are kept sorted, so that nothing is sorted when room is needed: by the place of
their next use in the expected pass (``trace`` [Note: places of next uses]), and of two that are not
expected the one that joined first goes first. Both are one integer, the *rank*: the place, and
below it the number of the joining, counted down.
"""

from bisect import bisect_left, insort
from collections.abc import Hashable, Iterator
from typing import Generic, Protocol, TypeVar

from offload.swap.trace import Trace

_ORDER_BITS = 32  # so many joinings may be told apart between two passes
_ORDER_MASK = (1 << _ORDER_BITS) - 1


class _Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


_Key = TypeVar("_Key", bound=Hashable)
_Item = TypeVar("_Item", bound=_Sized)


class Streaming(Generic[_Key, _Item]):
    """Items by their next use, as ``trace`` expects it; iterated in the order of joining.

    Attributes:
        nbytes: of all items.
    """

    def __init__(self, trace: Trace[_Key]) -> None:
        self.nbytes = 0
        self._items: dict[_Key, _Item] = {}
        self._ranks: dict[_Key, int] = {}
        self._ranked: dict[int, _Item] = {}
        self._order: list[int] = []  # all ranks, rising
        self._joined = 0
        self.follow(trace)

    def follow(self, trace: Trace[_Key]) -> None:
        """Expect what ``trace`` expects from now on."""
        self._trace = trace
        trace.watched = self._ranks
        trace.moved, trace.restarted = self._rerank, self._rerank_all
        self._rerank_all()

    def __contains__(self, key: _Key) -> bool:
        return key in self._items

    def __iter__(self) -> Iterator[_Item]:
        return iter(self._items.values())

    def join(self, key: _Key, item: _Item) -> None:
        """``item`` is here or on its way; it may have joined before."""
        if key not in self._items:
            self._items[key] = item
            self.nbytes += item.nbytes
            self._joined += 1
            self._rank(key, item, self._trace.place(key), self._joined)

    def leave(self, key: _Key) -> None:
        """The item of ``key``, if it has joined, is here no more, or stays."""
        item = self._items.pop(key, None)
        if item is not None:
            self.nbytes -= item.nbytes
            rank = self._ranks.pop(key)
            del self._ranked[rank]
            del self._order[bisect_left(self._order, rank)]

    def farthest(self, limit: int) -> Iterator[_Item]:
        """The items used behind the place ``limit``, the last one first."""
        least = limit << _ORDER_BITS
        for rank in reversed(self._order):
            if rank <= least:
                return
            yield self._ranked[rank]

    def _rank(self, key: _Key, item: _Item, place: int, joined: int) -> None:
        rank = (place << _ORDER_BITS) - joined
        self._ranks[key], self._ranked[rank] = rank, item
        insort(self._order, rank)

    def _rerank(self, key: _Key, place: int) -> None:
        before = self._ranks[key]  # as to unrank and rank it
        order, ranked = self._order, self._ranked
        now = (place << _ORDER_BITS) - (-before & _ORDER_MASK)
        del order[bisect_left(order, before)]
        insort(order, now)
        ranked[now] = ranked.pop(before)
        self._ranks[key] = now

    def _rerank_all(self) -> None:
        self._ranked.clear()
        self._order.clear()
        self._joined = 0
        for key, item in self._items.items():
            self._joined += 1
            self._rank(key, item, self._trace.place(key), self._joined)
