"""Norms of gradients, taken while these are still in memory, and when they may be believed.

[Note: a norm is of these bytes] A norm that was taken as a gradient left is right only as long as
nobody has written to the gradient. Version counters don't see ``p.grad.data`` or numpy, and a
checksum would read what the norm is to spare the reading of. The kernel sees every write:

* While backward runs, gradients whose norm is known are mapped privately. What user code writes
  (in hooks) stays in copies of pages, which the page map tells (``mapped`` [Note: private
  writes]). At the end of backward such copies are written to scratch, and their norms forgotten.
* When backward gives control to the user's code all gradients are mapped shared, as ever, and the
  file gets a *stamp*: a time of its last change that no clock tells. The first write to any page
  behind any mapping faults, and the fault sets the time. As long as the stamp is there, nothing at
  all was written. Where a file system doesn't keep that (a probe tells), no norm is believed.

So a norm is either proved to be of the bytes that ``p.grad`` shows, or measured anew.

Norms are taken only where they are likely to be asked for: by what the last steps did.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from offload.tiers.mapped import MappedTensor
from offload.tiers.pieces import BlockFile

_MOST_MISSES = 2  # a loss scale, say, is taken out of gradients before they are clipped


@dataclass(frozen=True, slots=True)
class NormCall:
    """Which of torch's functions takes a norm, and of which order.

    How a sum rounds may depend on the function, and on the number of threads.
    """

    take: Callable[[torch.Tensor, float], torch.Tensor]
    order: float

    def __call__(self, gradient: torch.Tensor) -> torch.Tensor:
        """The norm of ``gradient``."""
        with torch.no_grad():
            return self.take(gradient, self.order)


class KnownNorms:
    """The norms of the last backward's gradients; used on the thread of backward only.

    Args:
        file: the scratch that gradients lie in.

    Attributes:
        wanted: whether this backward's gradients are likely to be asked for their norms.
    """

    def __init__(self, file: BlockFile) -> None:
        self.wanted = False
        self._file = file
        self._asked: NormCall | None = None
        self._since = 0  # backward passes since norms were asked for
        self._period = 0  # that many lay between the last two times
        self._norms: dict[MappedTensor, torch.Tensor] = {}
        self._threads = 0
        self._proven = False
        self._misses = 0  # times that norms were taken for nothing, in a row
        self._disabled = False

    def begin(self) -> None:
        """A backward begins: what is known is of the last one."""
        self._norms.clear()
        self._proven = False
        self._since += 1
        self.wanted = (
            not self._disabled
            and self._asked is not None
            and self._period <= self._since <= 2 * self._period
            and not torch.is_autocast_enabled("cpu")
        )
        self._threads = torch.get_num_threads()

    def skip(self) -> None:
        """Several backward passes begin, which run in turns: what is known is of none of them."""
        self.begin()
        self.wanted = False

    def disable(self) -> None:
        """Backward runs inside of backward here: whose end is the last one is not known."""
        self._disabled = True
        self.wanted = False
        self._norms.clear()

    def take(self, home: MappedTensor, gradient: torch.Tensor) -> None:
        """``gradient``, which is or will be in ``home``, is in memory now."""
        assert self._asked is not None
        self._norms[home] = self._asked(gradient)

    def forget(self, home: MappedTensor) -> None:
        """What is in ``home`` is, or will be, something else."""
        self._norms.pop(home, None)

    def has(self, home: MappedTensor) -> bool:
        """Whether a norm was taken."""
        return home in self._norms

    def prove(self) -> None:
        """Backward gives control to the user's code, and every gradient is in scratch."""
        if self._proven:  # another end of the same backward: nothing may have been written since
            if not self._file.is_stamped():
                self._norms.clear()
        elif self._norms:
            self._proven = self._file.stamp()

    def ask(self, call: NormCall, *, answered: int) -> None:
        """All norms were asked for, and so many of them were known."""
        if not self._since:
            return  # again, of the same gradients
        if self.wanted:
            self._misses = 0 if answered else self._misses + 1
            self._disabled = self._disabled or self._misses >= _MOST_MISSES
        self._period, self._since = self._since, 0
        self._asked = call

    def holds_finite(self, home: MappedTensor) -> bool:
        """Whether what is in ``home`` now is known to have no NaN and no infinity."""
        if self._asked is None or self._asked.order <= 0:
            return False
        norm = self.known(home, self._asked)
        return norm is not None and bool(norm.isfinite())

    def known(self, home: MappedTensor, call: NormCall) -> torch.Tensor | None:
        """The norm of what is in ``home`` now, if it is known."""
        norm = self._norms.get(home)
        if (
            norm is None
            or not self._proven
            or call != self._asked
            or torch.get_num_threads() != self._threads
            or torch.is_autocast_enabled("cpu")
            or not self._file.is_stamped()
        ):
            return None
        return norm
