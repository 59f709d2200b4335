"""The seam to whatever stores saved tensors: plain tensors go out and come back, no more."""

import math
import weakref
from collections.abc import Generator, Sequence
from typing import Any, Protocol, TypeAlias

import torch

from offload.allocator.errors import CapacityError
from offload.swap.activations import ActivationCache
from offload.swap.homes import Home
from offload.swap.places import Place, Trip
from offload.swap.tokenwise.solve import Link
from offload.tiers.lanes import Transfer

_PROBE_NBYTES = 16 << 20
_PROBES = 2  # the first one finds things cold


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
        """Where saved bytes go, measured, with the free bytes; empty while that is unknown.

        Asking begins to measure. Never blocks where the model computes on a device.
        """


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
        self._probes: list[_Probe] | None = None
        self._measured: list[Link] = []

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
        spiller = self._cache.spiller
        if self._probes is None:
            self._probes = [_probe(home, spiller.place) for home in spiller.homes]
        while self._probes:  # one link after the other: they may share a path
            try:
                next(self._probes[0])
            except StopIteration as ended:
                del self._probes[0]
                self._measured += [ended.value] if ended.value is not None else []
            else:
                return ()
        if not self._links:
            kept = Link(
                name="memory", bytes_per_s=math.inf, free_nbytes=float(self._cache.limit_nbytes)
            )
            self._links = (kept, *self._measured)
        return self._links


_Probe: TypeAlias = Generator[None, None, Link | None]


def _probe(home: Home, place: Place) -> _Probe:
    """The link to ``home``, by writing and reading some MiB; None if it takes nothing.

    What they took is told by their lanes: on a device, by events of the lane's stream. Yields
    while they are under way, where the host is not to wait.
    """
    room_nbytes = home.room_nbytes()
    try:
        block = home.allocate(_PROBE_NBYTES)
    except CapacityError:
        return None
    trip = Trip(home=home, block=block, nbytes=_PROBE_NBYTES, key="link probe")
    seconds: tuple[list[float], list[float]] = [], []
    try:
        for _ in range(_PROBES if place.computes_behind else 1):
            written = place.send(trip, place.gather((), _PROBE_NBYTES))
            yield from _ended(written, place, seconds[0])
            read = place.fetch(trip)[1]
            yield from _ended(read, place, seconds[1])
    except CapacityError:  # the device is full
        return None
    finally:
        block.release()
    rate = _PROBE_NBYTES / max(map(min, seconds))
    return Link(name=home.name, bytes_per_s=rate, free_nbytes=float(room_nbytes))


def _ended(transfer: Transfer, place: Place, seconds: list[float]) -> Generator[None, None, None]:
    """Note what ``transfer`` has taken.

    Raises:
        TierIOError: it failed.
    """
    while place.computes_behind and not transfer.done():
        yield
    transfer.wait()
    assert transfer.duration_s is not None
    seconds.append(transfer.duration_s)
