"""What an accelerator gives: device bytes, streams, events, asynchronous copies, a memory limit.

[Note: streams and events] Work is enqueued on *streams*: one stream keeps its order, two streams
have none between them. An *event* marks a point of a stream; ``stream.wait(event)`` is the only
edge between streams, and ``event.settle()`` the only one from a stream to the host. Nothing else
may be relied on: an order that merely happens on one machine is a race on another. So whoever
enqueues a copy first declares every edge that it needs, and keeps the event of the copy beside
the bytes that it reads and writes. ``simulated`` is built to break code that does not.

The current stream belongs to the user's code, which may change it at any time: it is asked for at
each use, and before a side stream is entered. Side streams are made once, by name.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

from offload.allocator.errors import UnsupportedError
from offload.allocator.segment import ArenaStats

if TYPE_CHECKING:
    import torch

POISON = 0xFF
"""The byte of bytes that nobody may read: repeated it is a NaN in every IEEE and OCP float type."""


class Event(ABC):
    """A point of a stream."""

    error: BaseException | None = None  # why the work before it failed; known once it is done

    @abstractmethod
    def done(self) -> bool:
        """Whether all work before the point has ended, well or not; never blocks or raises."""

    @abstractmethod
    def settle(self) -> None:
        """Block until done, well or not; never raises."""

    @abstractmethod
    def span(self) -> tuple[float, float]:
        """When its operation started and ended, in seconds of ``Accelerator.now``; once done."""

    def seconds_since(self, earlier: "Event") -> float:
        """Seconds from ``earlier``, an event of the same device; once both are done, and well."""
        return self.span()[1] - earlier.span()[1]


class Stream(ABC):
    """A queue of work that runs in order. See [Note: streams and events]."""

    name: str

    @abstractmethod
    def record(self) -> Event:
        """The point behind everything that was enqueued so far."""

    @abstractmethod
    def wait(self, event: Event) -> None:
        """Make what is enqueued from now on wait for ``event``; the host does not wait."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DeviceMemory:
    """Bytes of the device, given back when the last tensor over them dies.

    Attributes:
        tensor: shape (nbytes,), uint8.
        ready: work on the bytes waits for this: an earlier owner may still be using them.
    """

    tensor: "torch.Tensor"
    ready: Event

    def bytes_at(self, offset: int, nbytes: int) -> "torch.Tensor":
        """The bytes from ``offset`` on: shape (nbytes,), uint8."""
        return self.tensor[offset : offset + nbytes]

    def view(self, offset: int, dtype: "torch.dtype", shape: Sequence[int]) -> "torch.Tensor":
        """A contiguous tensor of ``shape`` over the bytes from ``offset`` on."""
        nbytes = dtype.itemsize
        for size in shape:
            nbytes *= size
        return self.bytes_at(offset, nbytes).view(dtype).view(tuple(shape))


class StepArena(Protocol):
    """One piece of the device for all that a step computes, sized by what such a step asked for.

    A step's form is what steps that ask for the same have in common.
    """

    def begin(self, form: Hashable) -> None:
        """A step of this form computes from now on; nothing if one does already."""

    def end(self) -> None:
        """The step has computed; nothing if none does."""

    def stats(self) -> ArenaStats:
        """As of the last ``end``."""

    def close(self) -> None:
        """Give everything back; safe to call twice."""


class Accelerator(ABC):
    """One device.

    Attributes:
        torch_device: where torch has the tensors whose bytes are on it.
    """

    name: str
    torch_device: "torch.device"

    @abstractmethod
    def now(self) -> float:
        """Seconds on the clock that the spans of events are told in; give it to the journal."""

    @abstractmethod
    def allocate(self, nbytes: int) -> DeviceMemory:
        """Device bytes with undefined content.

        Raises:
            CapacityError: the device or its limit has no room; names both byte counts.
        """

    def step_arena(self) -> StepArena:
        """An arena for what torch allocates while a step computes; ``allocate`` stays out of it.

        Raises:
            UnsupportedError: the memory of this device is not torch's to cut.
        """
        raise UnsupportedError(
            f"device_arena needs a CUDA device, and the model computes on {self.name}: leave it out"
        )

    @abstractmethod
    def owns(self, tensor: "torch.Tensor") -> bool:
        """Whether the bytes of ``tensor`` are on this device."""

    @abstractmethod
    def stream(self, name: str) -> Stream:
        """The side stream of this name; made at the first call, the same one ever after."""

    @abstractmethod
    def current_stream(self) -> Stream:
        """The stream on which the calling thread's kernels go now."""

    @abstractmethod
    def copy_in(
        self, stream: Stream, memory: DeviceMemory, offset: int, address: int, nbytes: int
    ) -> Event:
        """Enqueue a copy of host bytes at ``address`` to ``offset``; both must stay alive.

        It changes no tensor's version: bytes that arrive are no write to what they belong to.
        """

    @abstractmethod
    def copy_out(
        self, stream: Stream, memory: DeviceMemory, offset: int, address: int, nbytes: int
    ) -> Event:
        """Enqueue a copy of device bytes from ``offset`` to host bytes at ``address``."""

    @abstractmethod
    def launch(self, call: Callable[[], object], *, stream: Stream | None = None) -> None:
        """Enqueue what ``call`` does to tensors of the device, on the current stream or another."""

    @abstractmethod
    def poison(
        self, memory: DeviceMemory, offset: int, nbytes: int, after: Iterable[Event]
    ) -> Event | None:
        """Fill with ``POISON`` once ``after`` are done; None where the device does not check."""

    @abstractmethod
    def total_nbytes(self) -> int | None:
        """Bytes of memory that the device has; None: as many as the host gives it."""

    @abstractmethod
    def set_limit(self, nbytes: int) -> None:
        """Bound what ``allocate`` and the user's own tensors may hold.

        Raises:
            BudgetError: the device has fewer bytes.
        """

    @abstractmethod
    def held_nbytes(self) -> int:
        """Bytes that are held now, by whomever in this process."""

    @abstractmethod
    def peak_nbytes(self) -> int:
        """The most bytes that were held at once."""

    @abstractmethod
    def synchronize(self) -> None:
        """Block until all work of all streams has ended."""

    def close(self) -> None:
        """End all work; safe to call twice."""
        self.synchronize()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
