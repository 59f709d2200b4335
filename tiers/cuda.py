"""A CUDA device through ``torch.cuda``; see ``accelerator`` [Note: streams and events].

Device bytes come from torch's caching allocator, so one limit and one peak hold for them and for
the user's own tensors. The allocator orders the reuse of memory on the stream that allocated it
only: ``DeviceMemory.ready`` is recorded there, and whoever uses the bytes elsewhere waits for it
and has ended that use before the memory is dropped. ``record_stream`` is never called: it would
delay reuse until the host polls, by an unbounded time.

``runtime`` stands for ``torch.cuda`` in tests.
"""

import random
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol, cast

from offload.allocator.errors import BudgetError, CapacityError, TierIOError, UnsupportedError
from offload.allocator.units import format_nbytes
from offload.tiers.accelerator import POISON, Accelerator, DeviceMemory, Event, StepArena, Stream
from offload.tiers.memory import tensor_at

if TYPE_CHECKING:
    import torch

    from offload.tiers.cuda_arena import CudaArena

_EIO = 5
_SLEEP_CYCLES = 2_000_000  # about a millisecond: longer than any copy of a race test


class CudaRuntime(Protocol):
    """What is used of ``torch.cuda``."""

    Event: Callable[..., Any]
    Stream: Callable[..., Any]

    def is_available(self) -> bool: ...
    def current_device(self) -> int: ...
    def current_stream(self, device: Any) -> Any: ...
    def stream(self, stream: Any) -> AbstractContextManager[Any]: ...
    def synchronize(self, device: Any) -> None: ...
    def mem_get_info(self, device: Any) -> tuple[int, int]: ...
    def set_per_process_memory_fraction(self, fraction: float, device: Any) -> None: ...
    def memory_allocated(self, device: Any) -> int: ...
    def max_memory_reserved(self, device: Any) -> int: ...
    def reset_peak_memory_stats(self, device: Any) -> None: ...
    def _sleep(self, cycles: int) -> None: ...


class CudaEvent(Event):
    """A CUDA event, with the one before it if it ends a copy."""

    def __init__(self, end: Any, start: Any, anchor: "tuple[Any, float]") -> None:
        self._end = end
        self._start = start
        self._anchor = anchor
        self.error: BaseException | None = None

    @property
    def raw(self) -> Any:
        """The ``torch.cuda.Event``."""
        return self._end

    def done(self) -> bool:
        try:
            return bool(self._end.query())
        except RuntimeError as error:  # the device failed: nothing runs any more
            self._fail(error)
            return True

    def settle(self) -> None:
        try:
            self._end.synchronize()
        except RuntimeError as error:
            self._fail(error)

    def _fail(self, error: RuntimeError) -> None:
        self.error = TierIOError(_EIO, f"the CUDA device failed: {error}")
        self.error.__cause__ = error

    def span(self) -> tuple[float, float]:
        if self.error is not None:  # a failed device tells no times
            return 0.0, 0.0
        event, at_s = self._anchor
        ended_s = at_s + event.elapsed_time(self._end) / 1e3
        duration_s = self._start.elapsed_time(self._end) / 1e3 if self._start is not None else 0.0
        return ended_s - duration_s, ended_s

    def seconds_since(self, earlier: Event) -> float:
        # Straight from one to the other: CUDA tells milliseconds as float32, so that two times
        # since the anchor differ by whole milliseconds after some hours.
        if isinstance(earlier, CudaEvent):
            return float(earlier.raw.elapsed_time(self._end)) / 1e3
        return super().seconds_since(earlier)


class CudaStream(Stream):
    """A CUDA stream under a name."""

    def __init__(self, name: str, raw: Any, record: Callable[[Any], CudaEvent]) -> None:
        self.name = name
        self.raw = raw
        self._record = record

    def record(self) -> Event:
        return self._record(self.raw)

    def wait(self, event: Event) -> None:
        if isinstance(event, CudaEvent):
            self.raw.wait_event(event.raw)
        else:
            event.settle()  # of another device: the host stands between the two

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CudaStream) and bool(self.raw == other.raw)

    def __hash__(self) -> int:
        return hash(self.raw)


class CudaAccelerator(Accelerator):
    """The CUDA device ``device``.

    Args:
        device: as torch takes it; without an index, the current one.
        checked: fill what may not be read with ``POISON``, for tests.
        runtime: ``torch.cuda``, unless a test brings its own.

    Raises:
        UnsupportedError: this machine or this build of torch has no CUDA device.
    """

    def __init__(
        self,
        device: "torch.device | str | int" = "cuda",
        *,
        checked: bool = False,
        runtime: CudaRuntime | None = None,
    ) -> None:
        import torch

        self._runtime = runtime or cast("CudaRuntime", torch.cuda)
        if not self._runtime.is_available():
            raise UnsupportedError(
                f"torch {torch.__version__} finds no CUDA device: nvidia-smi tells whether the "
                "driver is there, and torch.version.cuda whether torch was built for CUDA"
            )
        self._device = torch.device(device)
        index = cast("int | None", self._device.index)
        if self._device.type == "cuda" and index is None:  # some calls want a number
            self._device = torch.device("cuda", self._runtime.current_device())
        self.name = str(self._device)
        self.torch_device = self._device
        self._checked = checked
        self._streams: dict[str, CudaStream] = {}
        self._arena: CudaArena | None = None
        anchor = self._runtime.Event(enable_timing=True)
        anchor.record(self._runtime.current_stream(self._device))
        self._runtime.synchronize(self._device)
        self._anchor = anchor, time.perf_counter()

    def now(self) -> float:
        return time.perf_counter()

    def _record(self, raw: Any, start: Any = None) -> CudaEvent:
        event = self._runtime.Event(enable_timing=True)
        event.record(raw)
        return CudaEvent(event, start, self._anchor)

    def allocate(self, nbytes: int) -> DeviceMemory:
        import torch

        outside = nullcontext() if self._arena is None else self._arena.outside()
        try:
            with outside:
                tensor = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        except torch.OutOfMemoryError as error:
            free, total = self._runtime.mem_get_info(self._device)
            raise CapacityError(
                f"{self.name} has no room for {format_nbytes(nbytes)} ({nbytes} bytes): "
                f"{format_nbytes(free)} of {format_nbytes(total)} are free, and its limit may be "
                f"lower. {error}"
            ) from error
        if self._checked:
            tensor.fill_(POISON)
        return DeviceMemory(tensor=tensor, ready=self.current_stream().record())

    def step_arena(self) -> StepArena:
        from offload.tiers.cuda_arena import ArenaRuntime, CudaArena

        self._arena = CudaArena(self._device, runtime=cast("ArenaRuntime", self._runtime))
        return self._arena

    def owns(self, tensor: "torch.Tensor") -> bool:
        return tensor.device == self._device

    def stream(self, name: str) -> Stream:
        if name not in self._streams:
            raw = self._runtime.Stream(device=self._device)
            self._streams[name] = CudaStream(name, raw, self._record)
        return self._streams[name]

    def current_stream(self) -> Stream:
        return CudaStream("compute", self._runtime.current_stream(self._device), self._record)

    def copy_in(
        self, stream: Stream, memory: DeviceMemory, offset: int, address: int, nbytes: int
    ) -> Event:
        return self._copy(stream, memory.bytes_at(offset, nbytes), _host_bytes(address, nbytes))

    def copy_out(
        self, stream: Stream, memory: DeviceMemory, offset: int, address: int, nbytes: int
    ) -> Event:
        return self._copy(stream, _host_bytes(address, nbytes), memory.bytes_at(offset, nbytes))

    def _copy(self, stream: Stream, target: "torch.Tensor", source: "torch.Tensor") -> Event:
        raw = self._raw(stream)
        start = self._runtime.Event(enable_timing=True)
        start.record(raw)
        with self._runtime.stream(raw):
            target.data.copy_(source, non_blocking=True)  # ``data`` has a version of its own
        return self._record(raw, start)

    def _raw(self, stream: Stream) -> Any:
        assert isinstance(stream, CudaStream), f"{stream.name} is a stream of another device"
        return stream.raw

    def launch(self, call: Callable[[], object], *, stream: Stream | None = None) -> None:
        if stream is None:
            call()
        else:
            with self._runtime.stream(self._raw(stream)):
                call()

    def poison(
        self, memory: DeviceMemory, offset: int, nbytes: int, after: Iterable[Event]
    ) -> Event | None:
        if not self._checked:
            return None
        stream = self.stream("poison")
        for event in after:
            stream.wait(event)
        with self._runtime.stream(self._raw(stream)):
            memory.bytes_at(offset, nbytes).fill_(POISON)
        return stream.record()

    def total_nbytes(self) -> int:
        return self._runtime.mem_get_info(self._device)[1]

    def set_limit(self, nbytes: int) -> None:
        """Bound torch's caching allocator, and count its peak from now on.

        The CUDA context (some hundred MiB) stands outside the allocator, and of this limit.
        """
        total = self.total_nbytes()
        if nbytes > total:
            raise BudgetError(
                f"{self.name} has {format_nbytes(total)} ({total} bytes), its budget says "
                f"{format_nbytes(nbytes)}: write device={total}",
                needed_nbytes=nbytes,
                budget_nbytes=total,
            )
        self._runtime.set_per_process_memory_fraction(nbytes / total, self._device)
        self._runtime.reset_peak_memory_stats(self._device)

    def held_nbytes(self) -> int:
        return self._runtime.memory_allocated(self._device)

    def peak_nbytes(self) -> int:
        return self._runtime.max_memory_reserved(self._device)

    def synchronize(self) -> None:
        self._runtime.synchronize(self._device)


class DelayedCudaAccelerator(CudaAccelerator):
    """A CUDA device whose streams are held up at random before each copy and each launch.

    A real device is quick and regular, and hides races. Held up, it shows them.
    """

    def __init__(
        self,
        seed: int,
        device: "torch.device | str | int" = "cuda",
        *,
        runtime: CudaRuntime | None = None,
    ) -> None:
        super().__init__(device, checked=True, runtime=runtime)
        self._random = random.Random(seed)

    def _hold_up(self, raw: Any) -> None:
        if self._random.random() < 0.5:
            with self._runtime.stream(raw):
                self._runtime._sleep(self._random.randrange(1, _SLEEP_CYCLES))

    def _copy(self, stream: Stream, target: "torch.Tensor", source: "torch.Tensor") -> Event:
        self._hold_up(self._raw(stream))
        return super()._copy(stream, target, source)

    def launch(self, call: Callable[[], object], *, stream: Stream | None = None) -> None:
        self._hold_up(self._raw(stream or self.current_stream()))
        super().launch(call, stream=stream)


def _host_bytes(address: int, nbytes: int) -> "torch.Tensor":
    import torch

    return tensor_at(address, torch.uint8, (nbytes,))
