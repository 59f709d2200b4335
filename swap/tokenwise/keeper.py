"""The seam to whatever stores saved tensors: plain tensors go out and come back, no more."""

import math
import time
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from offload.allocator.errors import CapacityError
from offload.swap.activations import ActivationCache
from offload.swap.homes import Home
from offload.swap.places import Place, Trip
from offload.swap.tokenwise.solve import Link

_PROBE_NBYTES = 16 << 20


class Keeper(Protocol):
    """Where saved tensors wait between forward and backward."""

    def pack(self, tensor: torch.Tensor) -> Any:
        """Take ``tensor``; what is returned owns it, and unpacks as often as asked."""

    def unpack(self, packed: Any) -> torch.Tensor:
        """The tensor as it was packed, waiting for it where it must."""

    def prefetch(self, packed: Sequence[Any]) -> None:
        """These are needed soon, in this order; never blocks."""

    def use_weights(self, weights: Sequence[torch.Tensor]) -> None:
        """These weights of the model are read now."""

    def borrow(self, nbytes: int) -> None:
        """What is rebuilt takes ``nbytes`` more memory (less, if negative) than before."""

    def links(self) -> Sequence[Link]:
        """Where saved bytes go, measured, with the free bytes; empty while that is unknown."""


class MemoryKeeper:
    """Copies in memory: nothing is swapped, only rebuilt.

    Attributes:
        nbytes: of the copies that live.
        peak_nbytes: the most that ``nbytes`` has been.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self.peak_nbytes = 0

    def pack(self, tensor: torch.Tensor) -> Any:
        if isinstance(tensor, torch.nn.Parameter):
            return tensor.detach()
        copy = tensor.detach().clone()
        self.nbytes += copy.nbytes
        self.peak_nbytes = max(self.peak_nbytes, self.nbytes)
        weakref.finalize(copy, self._forget, copy.nbytes)
        return copy

    def _forget(self, nbytes: int) -> None:
        self.nbytes -= nbytes

    def unpack(self, packed: Any) -> torch.Tensor:
        tensor: torch.Tensor = packed
        return tensor.detach()

    def prefetch(self, packed: Sequence[Any]) -> None:
        """Everything is here already."""

    def use_weights(self, weights: Sequence[torch.Tensor]) -> None:
        """Weights are in memory."""

    def borrow(self, nbytes: int) -> None:
        """Memory is not bounded here."""

    def links(self) -> Sequence[Link]:
        return ()


class CacheKeeper:
    """The tensor cache keeps them."""

    def __init__(self, cache: ActivationCache) -> None:
        self._cache = cache
        self._links: tuple[Link, ...] = ()

    def pack(self, tensor: torch.Tensor) -> Any:
        return self._cache.pack(tensor)

    def unpack(self, packed: Any) -> torch.Tensor:
        return self._cache.unpack(packed)

    def prefetch(self, packed: Sequence[Any]) -> None:
        self._cache.prefetch(packed)

    def use_weights(self, weights: Sequence[torch.Tensor]) -> None:
        self._cache.weights.use(self._cache.fixed.weights_among(weights))

    def borrow(self, nbytes: int) -> None:
        self._cache.limit_nbytes -= nbytes

    def links(self) -> Sequence[Link]:
        if not self._links:
            kept = Link(
                name="memory", bytes_per_s=math.inf, free_nbytes=float(self._cache.limit_nbytes)
            )
            spiller = self._cache.spiller
            measured = (_measure(home, spiller.place) for home in spiller.homes)
            self._links = (kept, *(link for link in measured if link is not None))
        return self._links


def _measure(home: Home, place: Place) -> Link | None:
    """The link to ``home``, by one write and one read of some MiB; None if it takes nothing."""
    room_nbytes = home.room_nbytes()
    try:
        block = home.allocate(_PROBE_NBYTES)
    except CapacityError:
        return None
    trip = Trip(home=home, block=block, nbytes=_PROBE_NBYTES, key="link probe")
    try:
        began_s = time.perf_counter()
        place.send(trip, place.gather((), _PROBE_NBYTES)).wait()
        written_s = time.perf_counter()
        place.fetch(trip)[1].wait()
        slowest_s = max(written_s - began_s, time.perf_counter() - written_s)
    finally:
        block.release()
    return Link(
        name=home.name, bytes_per_s=_PROBE_NBYTES / slowest_s, free_nbytes=float(room_nbytes)
    )
