"""The simulated device: device memory that the CPU computes on, in virtual time.

See ``timeline`` [Note: virtual time]. Memory that was never written, whose copy failed or that was
released reads as ``POISON``, a NaN in every float type. So code that lacks an event edge gets
NaNs or stale values under some seed, on a machine without any device; ``races`` looks for it.
"""

import ctypes
import errno
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from offload.allocator.errors import TierIOError
from offload.tiers import hostmem
from offload.tiers.accelerator import POISON, Accelerator, DeviceMemory, Event, Stream
from offload.tiers.cpudevice import DoneEvent, HostMemoryPool
from offload.tiers.simulated.timeline import Timeline, Timing, VirtualStream

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """What goes wrong by itself.

    Attributes:
        errors: share of copies that fail, and leave poison where they should have written.
        stalls: share of copies that take ``stall_s`` longer.
    """

    errors: float = 0.0
    stalls: float = 0.0
    stall_s: float = 1.0


class SimulatedAccelerator(Accelerator):
    """A device of ``capacity`` bytes whose every delay follows from ``seed``."""

    name = "simulated"

    def __init__(
        self,
        seed: int = 0,
        *,
        capacity: int | None = None,
        timing: Timing | None = None,
        faults: Faults | None = None,
    ) -> None:
        import torch

        self.torch_device = torch.device("cpu")
        self.timeline = Timeline(seed, timing or Timing())
        self._faults = faults or Faults()
        self._failing: dict[str, list[BaseException]] = {}
        self._failed_kernels: list[Exception] = []
        self._pool = HostMemoryPool(capacity)
        self._streams: dict[str, VirtualStream] = {}
        self._current = self._stream("compute")

    def now(self) -> float:
        return self.timeline.now_s

    def allocate(self, nbytes: int) -> DeviceMemory:
        memory = self._pool.allocate(nbytes, self.name, DoneEvent())
        ctypes.memset(memory.tensor.data_ptr(), POISON, nbytes)
        return memory

    def owns(self, tensor: "torch.Tensor") -> bool:
        return self._pool.owns(tensor)

    def stream(self, name: str) -> Stream:
        return self._stream(name)

    def _stream(self, name: str) -> VirtualStream:
        if name not in self._streams:
            self._streams[name] = VirtualStream(self.timeline, name)
        return self._streams[name]

    def current_stream(self) -> Stream:
        return self._current

    @contextmanager
    def use_stream(self, name: str) -> Iterator[None]:
        """Kernels go to this stream meanwhile, as under ``torch.cuda.stream``."""
        before, self._current = self._current, self._stream(name)
        try:
            yield
        finally:
            self._current = before

    @contextmanager
    def compute(self, seconds: float | None = None) -> Iterator[None]:
        """The CPU computes on device tensors right here, as one kernel of the current stream.

        For code that can't be deferred, such as a model's own forward. What the stream waits for
        is waited for first; what it does not wait for may not have arrived.
        """
        self._current.record().settle()
        yield
        self.timeline.pass_time(self._kernel_s(seconds))

    def launch(self, call: Callable[[], object], *, stream: Stream | None = None) -> None:
        self._raise_failed_kernels()
        from torch.utils._python_dispatch import _disable_current_modes

        target = self._current if stream is None else self._stream(stream.name)

        def effect() -> None:
            try:
                with _disable_current_modes():  # of whatever the host happens to be doing then
                    call()
            except Exception as error:
                self._failed_kernels.append(error)
                raise

        target.enqueue(getattr(call, "__name__", "kernel"), self._kernel_s(None), effect)

    def _raise_failed_kernels(self) -> None:
        """Nobody waits for a kernel: its error is raised by the next call, as on a real device."""
        if self._failed_kernels:
            raise self._failed_kernels.pop(0)

    def _kernel_s(self, seconds: float | None) -> float:
        timeline = self.timeline
        return timeline.jittered(timeline.timing.kernel_s if seconds is None else seconds)

    def copy_in(
        self, stream: Stream, memory: DeviceMemory, offset: int, address: int, nbytes: int
    ) -> Event:
        target = memory.tensor.data_ptr() + offset
        return self._copy(stream, f"copy in to {offset}", memory, (target, address), nbytes)

    def copy_out(
        self, stream: Stream, memory: DeviceMemory, offset: int, address: int, nbytes: int
    ) -> Event:
        source = memory.tensor.data_ptr() + offset
        return self._copy(stream, f"copy out of {offset}", memory, (address, source), nbytes)

    def _copy(
        self, stream: Stream, name: str, memory: DeviceMemory, ends: tuple[int, int], nbytes: int
    ) -> Event:
        target, source = ends
        timing, chance = self.timeline.timing, self.timeline.random.random
        seconds = self.timeline.jittered(timing.latency_s + nbytes / timing.bytes_per_s)
        if chance() < self._faults.stalls:
            seconds += self._faults.stall_s
        error = self._next_error(stream, nbytes, fails=chance() < self._faults.errors)

        def effect(keep: DeviceMemory = memory) -> None:
            del keep  # alive until now
            for address in ends:  # a real device would fail, or write to another's memory
                if not hostmem.is_mapped(address, nbytes):
                    raise TierIOError(
                        errno.EFAULT,
                        f"the memory of a {name} of {nbytes} bytes was unmapped before its end",
                    )
            if error is not None:
                ctypes.memset(target, POISON, nbytes)
                raise error
            ctypes.memmove(target, source, nbytes)

        return self._stream(stream.name).enqueue(f"{name}, {nbytes} bytes", seconds, effect)

    def fail_next(self, stream: str, error: BaseException) -> None:
        """The next copy on ``stream`` fails with ``error``; several calls queue up."""
        self._failing.setdefault(stream, []).append(error)

    def _next_error(self, stream: Stream, nbytes: int, *, fails: bool) -> BaseException | None:
        if waiting := self._failing.get(stream.name):
            return waiting.pop(0)
        if fails:
            return TierIOError(
                errno.EIO, f"injected fault: copy of {nbytes} bytes on {stream.name}"
            )
        return None

    def poison(
        self, memory: DeviceMemory, offset: int, nbytes: int, after: Iterable[Event]
    ) -> Event | None:
        stream = VirtualStream(self.timeline, "memory")  # its own: ordered behind ``after`` only
        for event in after:
            stream.wait(event)
        tensor = memory.bytes_at(offset, nbytes)  # kept alive by the effect
        return stream.enqueue(
            f"poison {nbytes} bytes at {offset}", 0.0, partial(tensor.fill_, POISON)
        )

    def total_nbytes(self) -> int | None:
        return self._pool.capacity

    def set_limit(self, nbytes: int) -> None:
        self._pool.set_limit(nbytes, self.name)

    def held_nbytes(self) -> int:
        return self._pool.used_nbytes

    def peak_nbytes(self) -> int:
        return self._pool.peak_nbytes

    def synchronize(self) -> None:
        self.timeline.run_all()
        self._raise_failed_kernels()
