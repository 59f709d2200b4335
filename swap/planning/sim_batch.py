"""Small saved storages of a simulated run: they wait until they are enough to move as one.

[Note: what was left over] A storage that is forgotten while it waits is counted in its batch until
that is closed, as a run counts it. So each pass begins with bytes that the last one has left, other
ones each time. They decide when a batch is closed; but where so little ever waits that no closing
moves anything, they decide nothing.
"""

from collections.abc import Sequence

from offload.swap.activations import BATCH_NBYTES

_LEAST_NBYTES = BATCH_NBYTES // 2  # that move as one


class SimBatch:
    """The storages that wait.

    Args:
        sizes: bytes of each storage of the program.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = sizes
        self._order: list[int] = []
        self._members: set[int] = set()
        self._counted_nbytes = 0  # see [Note: what was left over]
        self._waiting_nbytes = 0
        self._most_nbytes = 0  # that waited at once, in the present pass

    def __contains__(self, storage: int) -> bool:
        return storage in self._members

    def begin(self) -> None:
        """A pass begins."""
        self._most_nbytes = self._waiting_nbytes

    def standing(self) -> tuple[object, ...]:
        """What the next step depends on, between two steps."""
        moves = self._most_nbytes >= _LEAST_NBYTES
        return tuple(self._order), len(self._members), self._counted_nbytes if moves else None

    def add(self, storage: int) -> Sequence[int]:
        """``storage`` waits; those that move now, if they are enough."""
        nbytes = self._sizes[storage]
        self._order.append(storage)
        self._members.add(storage)
        self._counted_nbytes += nbytes
        self._waiting_nbytes += nbytes
        if self._waiting_nbytes > self._most_nbytes:
            self._most_nbytes = self._waiting_nbytes
        return self._close() if self._counted_nbytes >= BATCH_NBYTES else ()

    def _close(self) -> Sequence[int]:
        waiting = self._order = [one for one in self._order if one in self._members]
        self._counted_nbytes = sum(self._sizes[one] for one in waiting)
        if self._counted_nbytes < _LEAST_NBYTES:
            return ()
        self._order, self._counted_nbytes, self._waiting_nbytes = [], 0, 0
        self._members.difference_update(waiting)
        return waiting

    def forget(self, storage: int) -> None:
        """Autograd needs ``storage``, which waits, no more."""
        self._members.remove(storage)
        self._order.remove(storage)
        self._waiting_nbytes -= self._sizes[storage]
