"""The device tier: blocks of device memory, moved to and from host memory on two lanes.

[Note: edges of a block] See ``accelerator`` [Note: streams and events]. Beside each living block
stand the events of the last copies that read and wrote it, and the streams whose kernels took it
up (``tensor``) since. From these every edge follows:

- a copy waits for the copies on the other lane that touch the block, and for its kernels: those
  enqueued before ``used``, or else before the copy itself;
- ``tensor`` makes the current stream wait for the copies and for kernels of other streams, so
  its own kernels come after them;
- ``release`` leaves these events with the bytes. Whoever gets the bytes next inherits them, so
  memory is reused without the host waiting, and no sooner than its last kernel has ended;
- a copy from host memory waits for a copy still on its way to that memory, and the other way
  round: the device→host→device path.

A fresh block has no kernels behind it: a prefetch into it overlaps with whatever computes. What
the lanes read and write on the host side must outlive the transfer; ``fetch`` and ``evict`` tell
the pinned pool so.
"""

import math
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from offload.allocator.errors import CapacityError, StaleBlockError, UnsupportedError
from offload.allocator.extent import Extent, align_up
from offload.allocator.planned import PlannedArena, PlanningStats
from offload.allocator.tlsf import TLSF
from offload.tiers.accelerator import Accelerator, DeviceMemory, Event, Stream
from offload.tiers.base import Block, Tier, TierSpec
from offload.tiers.journal import Journal, Label
from offload.tiers.lanes import Transfer
from offload.tiers.pinned import PinnedTier

if TYPE_CHECKING:
    import torch

_ALIGN = 512  # torch's own: kernels load 16 bytes at once, copies like whole sectors


class DeviceTransfer(Transfer):
    """A copy on a lane of the device: done when its event is."""

    __slots__ = ("_journal", "_lane", "_seen", "event")

    def __init__(
        self, label: Label, nbytes: int, event: Event | None, lane: str, journal: Journal
    ) -> None:
        super().__init__(label, nbytes, 0)
        self.event = event  # None: there was nothing to move
        self._lane = lane
        self._journal = journal
        self._seen = event is None

    def done(self) -> bool:
        if self.event is not None and not self._seen and self.event.done():
            self._end(self.event)
        return self._seen

    def settle(self) -> None:
        if self.event is not None and not self._seen:
            self.event.settle()
            self._end(self.event)

    def wait(self) -> None:
        self.settle()
        super().wait()

    def _end(self, event: Event) -> None:
        with self._lock:
            if self._seen:
                return
            self._seen = True
            self.owner = None
            self.error = event.error
        if self.error is None:
            self.started_s, self.ended_s = started_s, ended_s = event.span()
            self._journal.moved(
                self.label, self.nbytes, ended_s - started_s, self._lane, ended_s=ended_s
            )


@dataclass(slots=True, kw_only=True)
class _Edges:
    """What stands beside a block. See [Note: edges of a block]."""

    writes: list[Event] = field(default_factory=list)  # the bytes are not right before these
    reads: list[Event] = field(default_factory=list)  # the bytes may not change before these
    streams: list[Stream] = field(default_factory=list)  # may enqueue kernels on the block
    filling: list[Transfer] = field(default_factory=list)  # copies in, until known to be well

    def all(self) -> list[Event]:
        return [*self.writes, *self.reads, *(stream.record() for stream in self.streams)]


class DeviceTier(Tier):
    """``capacity`` bytes of ``accelerator``, taken at once and handed out exactly.

    Args:
        journal: takes a ``Move`` for each finished copy; by default one on the device's clock.

    Raises:
        CapacityError: the device has no room for ``capacity`` bytes.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        capacity: int,
        *,
        journal: Journal | None = None,
        name: str = "device",
    ) -> None:
        self.accelerator = accelerator
        self.journal = journal or Journal(clock=accelerator.now)
        capacity = align_up(capacity, _ALIGN)
        self.spec = TierSpec(name=name, kind="device", capacity=capacity, align=_ALIGN)
        self._memory: DeviceMemory | None = accelerator.allocate(capacity)
        self._arena = PlannedArena(TLSF(capacity))
        self._lanes = accelerator.stream("host→device"), accelerator.stream("device→host")
        for lane in self._lanes:
            lane.wait(self._memory.ready)
        self._edges: dict[int, _Edges] = {}  # by generation of the block
        self._left: list[tuple[Extent, list[Event]]] = []  # by blocks that were released
        self._moving: list[DeviceTransfer] = []
        self._host: list[tuple[int, int, DeviceTransfer]] = []  # start, end: being copied
        self._lock = threading.RLock()  # autograd's backward runs on a thread of its own

    def allocate(self, nbytes: int) -> Block:
        asked = align_up(max(nbytes, 1), _ALIGN)
        with self._lock:
            memory = self._open_memory()
            try:
                extent = self._arena.allocate(asked, align=_ALIGN)
            except CapacityError as error:
                raise CapacityError(f"{self.spec.name} tier: {error}") from error
            block = Block(self, extent, nbytes)
            edges = _Edges(writes=[memory.ready] if not memory.ready.done() else [])
            edges.writes += self._inherited(extent)
            self._edges[block.generation] = edges
            return block

    def next_step(self) -> None:
        """A training step is over, if one had begun, and the next one begins.

        A step that asks for the same blocks as the one before, in the same order, gets them at
        planned addresses: see ``allocator.planned`` [Note: the region]. Without this call there
        is no planning.
        """
        with self._lock:
            self._arena.next_step()

    def planning(self) -> PlanningStats:
        """How many steps ran at planned addresses, and fragmentation before and after."""
        with self._lock:
            return self._arena.stats()

    def _inherited(self, extent: Extent) -> list[Event]:
        """Events of earlier owners of the bytes that are still to come."""
        self._left = [
            (old, pending)
            for old, events in self._left
            if (pending := [event for event in events if not event.done()])
        ]
        return [event for old, events in self._left if old.overlaps(extent) for event in events]

    def tensor(
        self,
        block: Block,
        dtype: "torch.dtype",
        shape: Sequence[int],  # contiguous, from the first byte of the block on
        *,
        read_only: bool = False,
    ) -> "torch.Tensor":
        """A view of ``block`` for kernels that the current stream gets from now on.

        ``read_only`` kernels need not wait for copies out of the block.

        Raises:
            StaleBlockError: the block was released, or the tier closed.
            ValueError: the view leaves the block.
            TierIOError: the copy that filled the block failed.
        """
        block.check(0, math.prod(shape) * dtype.itemsize)
        stream = self.accelerator.current_stream()
        with self._lock:
            memory, edges = self._open_memory(), self._edges_of(block)
            edges.filling = [copy for copy in edges.filling if not copy.done() or copy.error]
            for copy in edges.filling:
                if copy.done():
                    copy.wait()  # raises
            others = [other.record() for other in edges.streams if other != stream]
            for event in (*edges.writes, *others, *(() if read_only else edges.reads)):
                stream.wait(event)
            if stream not in edges.streams:
                edges.streams.append(stream)
            return memory.view(block.extent.offset, dtype, shape)

    def used(self, block: Block) -> None:
        """The current stream has got its last kernel on ``block``, until the next ``tensor``.

        Copies then wait for these kernels only, not for whatever is enqueued behind them.

        Raises:
            StaleBlockError: the block was released, or the tier closed.
        """
        block.check(0, 0)
        stream = self.accelerator.current_stream()
        with self._lock:
            edges = self._edges_of(block)
            if stream in edges.streams:
                edges.streams.remove(stream)
                edges.writes.append(stream.record())  # it may have written

    def fetch(self, block: Block, source: Block, *, label: Label | None = None) -> Transfer:
        """Copy ``source``, a pinned block, into ``block``; it stays out of its pool meanwhile.

        Raises:
            UnsupportedError: ``source`` is no block of a pinned pool.
        """
        pool = self._pool_of(source)
        nbytes = min(block.nbytes, source.nbytes)
        transfer = self.write(block, pool.address(source), nbytes=nbytes, label=label)
        pool.guard(source, transfer)
        return transfer

    def evict(self, block: Block, target: Block, *, label: Label | None = None) -> Transfer:
        """Copy ``block`` to ``target``, a pinned block, which stays out of its pool meanwhile.

        Raises:
            UnsupportedError: ``target`` is no block of a pinned pool.
        """
        pool = self._pool_of(target)
        nbytes = min(block.nbytes, target.nbytes)
        transfer = self.read(block, pool.address(target), nbytes=nbytes, label=label)
        pool.guard(target, transfer)
        return transfer

    def _pool_of(self, host: Block) -> PinnedTier:
        """The pool of a pinned block, after transfers with it that no event edge can order."""
        if not isinstance(host.tier, PinnedTier):
            raise UnsupportedError(
                f"a block of {host.tier.spec.name} ({host.nbytes} bytes) is not pinned: the "
                "device fetches from and evicts to blocks of a pinned pool"
            )
        for transfer in host.tier.guards(host):
            if transfer not in self._moving:  # of a file, or of another device
                transfer.wait()
        return host.tier

    def _move(
        self, block: Block, address: int, offset: int, nbytes: int, label: Label, *, reading: bool
    ) -> Transfer:
        lane = self._lanes[reading]
        with self._lock:
            memory, edges = self._open_memory(), self._edges_of(block)
            if nbytes == 0:
                return DeviceTransfer(label, 0, None, lane.name, self.journal)
            self._forget_ended()
            # Kernels may have written what is read here and read what is written here.
            for event in (*edges.all(), *self._host_events(address, nbytes)):
                lane.wait(event)
            copy = self.accelerator.copy_out if reading else self.accelerator.copy_in
            event = copy(lane, memory, block.extent.offset + offset, address, nbytes)
            transfer = DeviceTransfer(label, nbytes, event, lane.name, self.journal)
            if reading:
                edges.reads = [*_pending(edges.reads), event]
            else:
                edges.writes = [*_pending(edges.writes), event]
                whole = offset == 0 and nbytes >= block.nbytes
                edges.filling = [transfer] if whole else [*edges.filling, transfer]
            self._moving.append(transfer)
            self._host.append((address, address + nbytes, transfer))
            return transfer

    def _host_events(self, address: int, nbytes: int) -> list[Event]:
        return [
            transfer.event
            for start, end, transfer in self._host
            if transfer.event is not None and start < address + nbytes and address < end
        ]

    def _forget_ended(self) -> None:
        """Let go of copies that ended well; the others wait for ``drain``."""
        self._moving = [
            transfer
            for transfer in self._moving
            if not transfer.done() or (transfer.error is not None and not transfer.observed)
        ]
        self._host = [entry for entry in self._host if not entry[2].done()]

    def drain(self) -> None:
        """Wait for all copies.

        Raises:
            BaseException: the first error of a copy that nobody waited for.
        """
        with self._lock:
            self._settle()
            moving, self._moving = self._moving, []
        for transfer in moving:
            if not transfer.observed:
                transfer.wait()

    def _settle(self) -> None:
        for transfer in self._moving:
            transfer.settle()
        self._forget_ended()

    def _open_memory(self) -> DeviceMemory:
        if self._memory is None:
            raise StaleBlockError(f"{self.spec.name} tier of {self.spec.capacity} bytes is closed")
        return self._memory

    def _edges_of(self, block: Block) -> _Edges:
        edges = self._edges.get(block.generation)
        if edges is None:
            raise StaleBlockError(
                f"block {block.generation} ({block.nbytes} bytes) outlived its tier, "
                f"{self.spec.name}"
            )
        return edges

    def _release(self, block: Block) -> None:
        with self._lock:
            edges = self._edges.pop(block.generation, None)
            if edges is None or self._memory is None:
                return  # the tier is closed
            events = edges.all()
            extent = block.extent
            poisoned = self.accelerator.poison(self._memory, extent.offset, extent.nbytes, events)
            self._left.append((extent, [*events, poisoned] if poisoned else events))
            self._arena.free(extent)

    def close(self) -> None:
        """End the copies and the kernels on blocks, and give the device memory back."""
        with self._lock:
            if self._memory is None:
                return
            self._settle()
            living = [event for edges in self._edges.values() for event in edges.all()]
            for event in (*living, *(event for _, events in self._left for event in events)):
                event.settle()
            self._edges.clear()
            self._left.clear()
            self._memory = None


def _pending(events: Iterable[Event]) -> list[Event]:
    return [event for event in events if not event.done()]
