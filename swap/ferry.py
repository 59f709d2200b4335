"""Bytes between a device and what no device can copy from: they pass through pinned buffers.

A transfer is cut into chunks. Each is a job of a lane: it takes a small buffer that the device's
copy engine knows, fills it (from a file, say) and has it copied, or the other way round. So nothing
large is ever pinned, and as many chunks are on their way as the lanes have workers. A transfer is
done when the copies themselves have ended, so that whoever has waited for it needs no event. See
``accelerator`` [Note: streams and events].
"""

import ctypes
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

import torch

from offload.tiers.accelerator import Accelerator, DeviceMemory, Event
from offload.tiers.journal import Journal
from offload.tiers.lanes import Job
from offload.tiers.pinned import PinnedTier, SizeClass
from offload.tiers.pinning import Pinner

CHUNK_NBYTES = 8 << 20

Mover: TypeAlias = Callable[[int, int, int], None]
"""Moves bytes from or to host memory: (offset in all that travels, address, nbytes)."""


class Cargo:
    """Memory of a device that is carried; jobs hold this, so that who waited can let it go.

    A lane forgets a job some time after its end, when the processor comes to it. Memory of a device
    is too dear to wait for that.
    """

    __slots__ = ("memory",)

    def __init__(self, memory: DeviceMemory) -> None:
        self.memory: DeviceMemory | None = memory

    def let_go(self) -> None:
        """All jobs have ended: hold the memory no longer."""
        self.memory = None


class Ferry:
    """The pinned buffers of one device, and its two copy streams.

    Args:
        buffers: how many chunks may be on their way at once: as many as the lanes whose jobs come
            from here have workers.
        pinners: ways to pin the buffers, best first.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        journal: Journal,
        *,
        buffers: int,
        pinners: Sequence[Pinner] = (),
    ) -> None:
        self.accelerator = accelerator
        self.outwards = accelerator.stream("device→host")
        self.inwards = accelerator.stream("host→device")
        self.nbytes = buffers * CHUNK_NBYTES
        self._buffers = (
            PinnedTier(
                classes=[SizeClass(nbytes=CHUNK_NBYTES, count=buffers)],
                pinners=pinners,
                journal=journal,
                name="bounce",
            )
            if buffers
            else None
        )

    def jobs_out(self, source: Cargo, nbytes: int, drain: Mover) -> list[Job]:
        """Jobs that copy ``nbytes`` of ``source``, once it is ready, for ``drain`` to take."""
        return [partial(self._carry_out, source, drain, *chunk) for chunk in _chunks(nbytes)]

    def jobs_in(self, target: Cargo, nbytes: int, fill: Mover) -> list[Job]:
        """Jobs that have ``fill`` give ``nbytes``, and copy them to ``target`` once it is ready."""
        return [partial(self._carry_in, target, fill, *chunk) for chunk in _chunks(nbytes)]

    def copy_out(self, source: DeviceMemory, at: int, address: int, nbytes: int) -> Event:
        """Enqueue a copy of the bytes of ``source`` from ``at`` on to memory that is pinned."""
        self.outwards.wait(source.ready)
        return self.accelerator.copy_out(self.outwards, source, at, address, nbytes)

    def copy_in(self, target: DeviceMemory, at: int, address: int, nbytes: int) -> Event:
        """Enqueue a copy of memory that is pinned to ``target`` from ``at`` on."""
        self.inwards.wait(target.ready)
        return self.accelerator.copy_in(self.inwards, target, at, address, nbytes)

    def close(self) -> None:
        """Give the buffers back; no job is left to run."""
        if self._buffers is not None:
            self._buffers.close()

    # On the threads of lanes.

    def _carry_out(self, source: Cargo, drain: Mover, at: int, nbytes: int) -> None:
        assert self._buffers is not None
        assert source.memory is not None
        with self._buffers.allocate(CHUNK_NBYTES) as buffer:
            address = self._buffers.address(buffer)
            _end(self.copy_out(source.memory, at, address, nbytes))
            drain(at, address, nbytes)

    def _carry_in(self, target: Cargo, fill: Mover, at: int, nbytes: int) -> None:
        assert self._buffers is not None
        assert target.memory is not None
        with self._buffers.allocate(CHUNK_NBYTES) as buffer:
            address = self._buffers.address(buffer)
            fill(at, address, nbytes)
            _end(self.copy_in(target.memory, at, address, nbytes))


def bytes_of(memory: torch.UntypedStorage) -> torch.Tensor:
    """All bytes of ``memory``: shape (nbytes,), uint8."""
    return torch.empty(0, dtype=torch.uint8, device=memory.device).set_(memory)


def copy_from(base: int, at: int, address: int, nbytes: int) -> None:
    """Fill from host memory at ``base``; a ``Mover`` with that given."""
    ctypes.memmove(address, base + at, nbytes)


def copy_to(base: int, at: int, address: int, nbytes: int) -> None:
    """Drain to host memory at ``base``; a ``Mover`` with that given."""
    ctypes.memmove(base + at, address, nbytes)


def _end(event: Event) -> None:
    """Wait until the copy before ``event`` has ended, well."""
    event.settle()
    if event.error is not None:
        raise event.error


def _chunks(nbytes: int) -> list[tuple[int, int]]:
    """(offset, nbytes) of what passes through one buffer."""
    return [(at, min(CHUNK_NBYTES, nbytes - at)) for at in range(0, nbytes, CHUNK_NBYTES)]
