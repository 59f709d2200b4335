"""Small saved storages of a simulated run: they wait until they are enough to move as one.

A storage that is forgotten while it waits is counted in its batch until that is closed or a pass
begins, as a run counts it.
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
        self._waiting: dict[int, None] = {}  # in their order
        self._counted_nbytes = 0

    def __contains__(self, storage: int) -> bool:
        return storage in self._waiting

    def begin(self) -> None:
        """A pass begins."""
        self._count()

    def standing(self) -> tuple[int, ...]:
        """What the next step depends on, between two steps."""
        return tuple(self._waiting)

    def add(self, storage: int) -> Sequence[int]:
        """``storage`` waits; those that move now, if they are enough."""
        self._waiting[storage] = None
        self._counted_nbytes += self._sizes[storage]
        return self._close() if self._counted_nbytes >= BATCH_NBYTES else ()

    def forget(self, storage: int) -> None:
        """Autograd needs ``storage``, which waits, no more."""
        del self._waiting[storage]

    def _close(self) -> Sequence[int]:
        self._count()
        if self._counted_nbytes < _LEAST_NBYTES:
            return ()
        together = tuple(self._waiting)
        self._waiting.clear()
        self._counted_nbytes = 0
        return together

    def _count(self) -> None:
        self._counted_nbytes = sum(self._sizes[one] for one in self._waiting)
