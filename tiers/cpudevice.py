"""The CPU as the device: device memory is host memory, and work is over when it is enqueued.

It is the reference that races are found against: everything happens in the order of the calls.
"""

import ctypes
import itertools
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from offload.allocator.errors import BudgetError, CapacityError
from offload.allocator.units import format_nbytes
from offload.tiers import hostmem
from offload.tiers.accelerator import Accelerator, DeviceMemory, Event, Stream
from offload.tiers.memory import tensor_at

if TYPE_CHECKING:
    import torch


class DoneEvent(Event):
    """An event in the past."""

    def __init__(self, started_s: float = 0.0, ended_s: float = 0.0) -> None:
        self._span = started_s, ended_s

    def done(self) -> bool:
        return True

    def settle(self) -> None:
        return

    def span(self) -> tuple[float, float]:
        return self._span


class CpuStream(Stream):
    """A stream that never has work left."""

    def __init__(self, name: str) -> None:
        self.name = name

    def record(self) -> Event:
        now_s = time.perf_counter()
        return DoneEvent(now_s, now_s)

    def wait(self, event: Event) -> None:
        event.settle()  # an event of another device: here the host is the stream


class HostMemoryPool:
    """Device memory made of host memory: bounded, counted, unmapped with its last tensor."""

    def __init__(self, capacity: int | None = None) -> None:
        self.capacity = capacity
        self.limit = capacity
        self.used_nbytes = self.peak_nbytes = 0
        self._held: dict[int, tuple[int, int]] = {}  # (address, bytes)
        self._numbers = itertools.count()
        self._lock = threading.RLock()  # tensors die on any thread, at any moment

    def set_limit(self, nbytes: int, owner: str) -> None:
        if self.capacity is not None and nbytes > self.capacity:
            raise BudgetError(
                f"{owner} has {format_nbytes(self.capacity)} ({self.capacity} bytes), its budget "
                f"says {format_nbytes(nbytes)}: write device={self.capacity}",
                needed_nbytes=nbytes,
                budget_nbytes=self.capacity,
            )
        self.limit = nbytes

    def allocate(self, nbytes: int, owner: str, ready: Event) -> DeviceMemory:
        import torch

        held = hostmem.page_ceil(max(nbytes, 1))
        with self._lock:
            if self.limit is not None and self.used_nbytes + held > self.limit:
                raise CapacityError(
                    f"{owner} may hold {format_nbytes(self.limit)}, of which "
                    f"{format_nbytes(self.limit - self.used_nbytes)} are free; "
                    f"{format_nbytes(held)} ({held} bytes) were asked"
                )
            self.used_nbytes += held
            self.peak_nbytes = max(self.peak_nbytes, self.used_nbytes)
        address = hostmem.map_anonymous(held)
        tensor = tensor_at(address, torch.uint8, (max(nbytes, 1),), on_release=(address, held))
        number = next(self._numbers)  # an address may be another's before this one is forgotten
        self._held[number] = address, held
        memory = DeviceMemory(tensor=tensor[:nbytes], ready=ready)
        weakref.finalize(tensor.untyped_storage(), self._freed, number).atexit = False
        return memory

    def _freed(self, number: int) -> None:
        _, nbytes = self._held.pop(number)
        with self._lock:
            self.used_nbytes -= nbytes

    def owns(self, tensor: "torch.Tensor") -> bool:
        """Whether the bytes of ``tensor`` are in this memory."""
        if not tensor.is_cpu:
            return False
        try:
            at = tensor.untyped_storage().data_ptr()
        except RuntimeError:
            return False  # of a subclass that has no bytes
        return any(start <= at < start + nbytes for start, nbytes in self._held.copy().values())


class CpuAccelerator(Accelerator):
    """The host as a device of ``capacity`` bytes (None: as many as the host gives)."""

    name = "cpu"

    def __init__(self, capacity: int | None = None) -> None:
        import torch

        self.torch_device = torch.device("cpu")
        self._pool = HostMemoryPool(capacity)
        self._streams: dict[str, CpuStream] = {}

    def now(self) -> float:
        return time.perf_counter()

    def allocate(self, nbytes: int) -> DeviceMemory:
        return self._pool.allocate(nbytes, self.name, DoneEvent())

    def owns(self, tensor: "torch.Tensor") -> bool:
        return self._pool.owns(tensor)

    def stream(self, name: str) -> Stream:
        return self._streams.setdefault(name, CpuStream(name))

    def current_stream(self) -> Stream:
        return self.stream("compute")

    def copy_in(
        self, stream: Stream, memory: DeviceMemory, offset: int, address: int, nbytes: int
    ) -> Event:
        del stream
        return self._copy(memory.tensor.data_ptr() + offset, address, nbytes)

    def copy_out(
        self, stream: Stream, memory: DeviceMemory, offset: int, address: int, nbytes: int
    ) -> Event:
        del stream
        return self._copy(address, memory.tensor.data_ptr() + offset, nbytes)

    def _copy(self, target: int, source: int, nbytes: int) -> Event:
        began = self.now()
        ctypes.memmove(target, source, nbytes)
        return DoneEvent(began, self.now())

    def launch(self, call: Callable[[], object], *, stream: Stream | None = None) -> None:
        del stream
        call()

    def poison(
        self, memory: DeviceMemory, offset: int, nbytes: int, after: Iterable[Event]
    ) -> Event | None:
        del memory, offset, nbytes, after  # nothing is ever late here
        return None

    def total_nbytes(self) -> int | None:
        return self._pool.capacity

    def set_limit(self, nbytes: int) -> None:
        self._pool.set_limit(nbytes, self.name)

    def held_nbytes(self) -> int:
        return self._pool.used_nbytes

    def peak_nbytes(self) -> int:
        return self._pool.peak_nbytes

    def synchronize(self) -> None:
        return
