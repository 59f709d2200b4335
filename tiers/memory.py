"""Host memory that tiers own: page-aligned, huge-page advised, seen as bytes or as tensors."""

import ctypes
import math
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from offload.tiers import hostmem

if TYPE_CHECKING:
    import torch


def memory_at(address: int, nbytes: int) -> memoryview:
    """A writable byte view of ``nbytes`` at ``address``; the caller keeps the memory alive."""
    if nbytes == 0:
        return memoryview(bytearray())
    return memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")


def tensor_at(
    address: int,
    dtype: "torch.dtype",
    shape: Sequence[int],  # any number of dimensions, contiguous
    *,
    on_release: "tuple[int, int] | None" = None,
) -> "torch.Tensor":
    """A contiguous tensor over the memory at ``address``.

    ``on_release=(address, nbytes)`` unmaps that range when the last tensor that shares the
    storage dies: numpy's array, not ``torch.frombuffer``, keeps it alive until then.
    """
    import torch

    nbytes = math.prod(shape) * dtype.itemsize
    array = np.frombuffer(memory_at(address, nbytes), dtype=np.uint8)
    if on_release is not None:
        weakref.finalize(array, hostmem.unmap, *on_release).atexit = False
    return torch.from_numpy(array).view(dtype).view(tuple(shape))


class HostBuffer:
    """A private, page-aligned, huge-page-advised buffer of ``nbytes``; freed by ``release``."""

    __slots__ = ("_released", "address", "nbytes")

    def __init__(self, nbytes: int) -> None:
        self.nbytes = hostmem.page_ceil(nbytes)
        align = hostmem.HUGE_PAGE if self.nbytes >= hostmem.HUGE_PAGE else hostmem.PAGE
        self.address = hostmem.map_anonymous(self.nbytes, align=align)
        self._released = False

    def view(self, offset: int = 0, nbytes: int | None = None) -> memoryview:
        """Bytes ``offset`` to ``offset + nbytes`` of the buffer."""
        return memory_at(self.address + offset, self.nbytes - offset if nbytes is None else nbytes)

    def tensor(
        self, dtype: "torch.dtype", shape: Sequence[int], *, offset: int = 0
    ) -> "torch.Tensor":
        """A tensor over the bytes from ``offset``; the buffer must outlive it."""
        return tensor_at(self.address + offset, dtype, shape)

    def release(self) -> None:
        """Give the memory back to the kernel; safe to call twice."""
        if not self._released:
            self._released = True
            hostmem.unmap(self.address, self.nbytes)
