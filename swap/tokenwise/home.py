"""The seam to whatever stores saved tensors: plain tensors go out and come back, no more."""

import math
import shutil
import time
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from offload.swap.activations import ActivationCache
from offload.swap.copying import read_jobs, write_jobs
from offload.swap.residency import Residency
from offload.swap.tokenwise.solve import Link
from offload.tiers.journal import Label

_PROBE_NBYTES = 16 << 20


class Home(Protocol):
    """Where saved tensors wait between forward and backward."""

    def pack(self, tensor: torch.Tensor) -> Any:
        """Take ``tensor``; what is returned owns it, and unpacks as often as asked."""

    def unpack(self, packed: Any) -> torch.Tensor:
        """The tensor as it was packed, waiting for it where it must."""

    def prefetch(self, packed: Sequence[Any]) -> None:
        """These are needed soon, in this order; never blocks."""

    def use_weights(self, names: Sequence[str]) -> None:
        """The model's weights of these names are read now."""

    def borrow(self, nbytes: int) -> None:
        """What is rebuilt takes ``nbytes`` more memory (less, if negative) than before."""

    def links(self) -> Sequence[Link]:
        """Where saved bytes go, measured, with the free bytes; empty while that is unknown."""


class MemoryHome:
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

    def use_weights(self, names: Sequence[str]) -> None:
        """Weights are in memory."""

    def borrow(self, nbytes: int) -> None:
        """Memory is not bounded here."""

    def links(self) -> Sequence[Link]:
        return ()


class CacheHome:
    """The tensor cache as a home."""

    def __init__(self, cache: ActivationCache) -> None:
        self._cache = cache
        self._links: tuple[Link, ...] = ()

    def pack(self, tensor: torch.Tensor) -> Any:
        return self._cache.pack(tensor)

    def unpack(self, packed: Any) -> torch.Tensor:
        tensor = self._cache.unpack(packed)
        self._cache._spill()  # what was fetched beyond the limit goes with its last user
        return tensor

    def prefetch(self, packed: Sequence[Any]) -> None:
        cache = self._cache
        for one in packed:
            storage = getattr(one, "storage", None)
            if storage is None or storage.residency is not Residency.ABSENT:
                continue
            if cache.kept_nbytes + storage.nbytes > cache.limit_nbytes:
                return
            cache._fetch(storage)

    def use_weights(self, names: Sequence[str]) -> None:
        self._cache.weights.use([name for name in names if name in self._cache.weights.weights])

    def borrow(self, nbytes: int) -> None:
        self._cache.limit_nbytes -= nbytes

    def links(self) -> Sequence[Link]:
        if not self._links:
            kept = Link(
                name="memory", bytes_per_s=math.inf, free_nbytes=float(self._cache.limit_nbytes)
            )
            self._links = (kept, self._scratch_link())
        return self._links

    def _scratch_link(self) -> Link:
        """Scratch, measured once by a write and a read of a few MiB; the slower one counts."""
        scratch = self._cache.scratch
        memory = torch.empty(_PROBE_NBYTES, dtype=torch.uint8)
        block = scratch.allocate(_PROBE_NBYTES)
        label = Label("link probe", "activation", "host", scratch.spec.name)
        slowest_s = 0.0
        try:
            for lane, jobs_of in (
                (scratch.lanes.writes, write_jobs),
                (scratch.lanes.reads, read_jobs),
            ):
                jobs = jobs_of(scratch.file, block, memory.data_ptr(), memory.nbytes)
                began_s = time.perf_counter()
                lane.submit(jobs, label, memory.nbytes, owner=memory).wait()
                slowest_s = max(slowest_s, time.perf_counter() - began_s)
        finally:
            block.release()
        free = shutil.disk_usage(scratch.file.directory).free
        return Link(
            name=scratch.spec.name, bytes_per_s=_PROBE_NBYTES / slowest_s, free_nbytes=float(free)
        )
