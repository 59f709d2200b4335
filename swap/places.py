"""The memory that saved tensors live in between their uses: that of the host, or of a device.

[Note: moves of a device] A copy out of the device waits for the kernels that were enqueued before
it: they made the bytes. The host is told when it has ended, and only then lets the memory go, so no
stream that reads it is still to come. A copy in goes to fresh memory and is behind nothing but the
earlier owner of the bytes; the stream that uses them waits for it, and the host does not. Memory
that was filled for the stream it was allocated on goes with the last tensor over it, however far
the host runs ahead: whoever gets it next is behind that stream. Bytes that go to a home which is
not pinned, a file or a memory node, pass through small pinned buffers, on the home's own lane
(``ferry``). See ``accelerator`` [Note: streams and events].
"""

import ctypes
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from offload.swap.ferry import Cargo, Ferry, bytes_of
from offload.swap.homes import ROLE, Home, MemoryHome
from offload.tiers import hostmem
from offload.tiers.accelerator import DeviceMemory, Stream
from offload.tiers.base import Block
from offload.tiers.device import DeviceTransfer
from offload.tiers.journal import Journal, Label
from offload.tiers.lanes import Job, Transfer
from offload.tiers.memory import tensor_at
from offload.tiers.pinned import PinnedTier

Pieces = Sequence[tuple[int, int, torch.UntypedStorage]]  # offset, nbytes, the bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Trip:
    """What goes where: ``nbytes`` that records call ``key``, to or from ``block`` of ``home``."""

    home: Home
    block: Block
    nbytes: int
    key: str


@dataclass(frozen=True, slots=True)
class _Filled:
    """Memory that a copy fills, and the stream on which it was allocated."""

    memory: torch.UntypedStorage
    stream: Stream


class Place(ABC):
    """The memory that saved tensors live in.

    Attributes:
        owns: whether a tensor lives there.
        digest: the checksum of so many bytes at an address; None where there is none.
        computes_behind: whether what computes there runs behind the host, which does well not to
            wait for it.
    """

    owns: Callable[[torch.Tensor], bool]
    computes_behind: bool = False
    digest: Callable[[int, int], int] | None = None

    @abstractmethod
    def gather(self, pieces: Pieces, nbytes: int) -> torch.UntypedStorage:
        """One storage of ``nbytes`` with the bytes of all ``pieces``."""

    @abstractmethod
    def send(
        self, trip: Trip, memory: torch.UntypedStorage, before: Sequence[Job] = ()
    ) -> Transfer:
        """Copy ``memory`` away; ``before`` are jobs that run as part of it."""

    @abstractmethod
    def fetch(self, trip: Trip) -> tuple[torch.UntypedStorage, Transfer]:
        """Fresh memory that is filled with what was sent away.

        Raises:
            CapacityError: the device has no room.
        """

    @abstractmethod
    def order(self, transfer: Transfer) -> bool:
        """Make what is computed from now on come after ``transfer``; False: the host must wait."""


class HostPlace(Place):
    """Host memory: bytes are copied by the home's lanes, straight from and to the storages."""

    owns = staticmethod(operator.attrgetter("is_cpu"))

    def __init__(self) -> None:
        from offload.tiers.store import checksum  # a library that a device does not need

        self.digest = checksum

    def gather(self, pieces: Pieces, nbytes: int) -> torch.UntypedStorage:
        gathered = torch.UntypedStorage(nbytes, device="cpu")
        for offset, size, memory in pieces:
            ctypes.memmove(gathered.data_ptr() + offset, memory.data_ptr(), size)
        return gathered

    def send(
        self, trip: Trip, memory: torch.UntypedStorage, before: Sequence[Job] = ()
    ) -> Transfer:
        home = trip.home
        jobs = [*before, *home.write_jobs(trip.block, memory.data_ptr(), trip.nbytes)]
        label = Label(trip.key, ROLE, "host", home.name)
        return home.writes.submit(jobs, label, trip.nbytes, owner=memory)

    def fetch(self, trip: Trip) -> tuple[torch.UntypedStorage, Transfer]:
        home, memory = trip.home, _fresh(trip.nbytes)
        jobs = home.read_jobs(trip.block, memory.data_ptr(), trip.nbytes)
        label = Label(trip.key, ROLE, home.name, "host")
        return memory, home.reads.submit(jobs, label, trip.nbytes, owner=memory)

    def order(self, transfer: Transfer) -> bool:
        return transfer.done()


class DevicePlace(Place):
    """The memory of a device. See [Note: moves of a device].

    Args:
        ferry: carries to and from homes that are not pinned; whoever made it closes it.
    """

    computes_behind = True

    def __init__(self, ferry: Ferry, journal: Journal) -> None:
        self.accelerator = ferry.accelerator
        self.owns = ferry.accelerator.owns
        self._ferry = ferry
        self._journal = journal

    def gather(self, pieces: Pieces, nbytes: int) -> torch.UntypedStorage:
        memory = self._allocate(nbytes)
        for offset, size, piece in pieces:
            target = memory.bytes_at(offset, size)
            self.accelerator.launch(partial(target.copy_, bytes_of(piece)[:size]))
        return memory.tensor.untyped_storage()

    def _allocate(self, nbytes: int) -> DeviceMemory:
        memory = self.accelerator.allocate(nbytes)
        self.accelerator.current_stream().wait(memory.ready)
        return memory

    def send(
        self, trip: Trip, memory: torch.UntypedStorage, before: Sequence[Job] = ()
    ) -> Transfer:
        ready = self.accelerator.current_stream().record()
        source = DeviceMemory(tensor=bytes_of(memory), ready=ready)
        home = trip.home
        label = Label(trip.key, ROLE, self.accelerator.name, home.name)
        pool = _pool_of(home)
        if pool is None:
            jobs = self._ferry.jobs_out(Cargo(source), trip.nbytes, partial(_write, trip))
            return home.writes.submit([*before, *jobs], label, trip.nbytes, owner=memory)
        for job in before:
            job()
        event = self._ferry.copy_out(source, 0, pool.address(trip.block), trip.nbytes)
        transfer = DeviceTransfer(
            label, trip.nbytes, event, self._ferry.outwards.name, self._journal
        )
        return self._guarded(pool, trip.block, transfer, memory)

    def fetch(self, trip: Trip) -> tuple[torch.UntypedStorage, Transfer]:
        target = self.accelerator.allocate(trip.nbytes)
        memory = target.tensor.untyped_storage()
        home = trip.home
        label = Label(trip.key, ROLE, home.name, self.accelerator.name)
        pool = _pool_of(home)
        if pool is None:
            jobs = self._ferry.jobs_in(Cargo(target), trip.nbytes, partial(_read, trip))
            return memory, home.reads.submit(jobs, label, trip.nbytes, owner=memory)
        event = self._ferry.copy_in(target, 0, pool.address(trip.block), trip.nbytes)
        transfer = DeviceTransfer(
            label, trip.nbytes, event, self._ferry.inwards.name, self._journal
        )
        filled = _Filled(memory, self.accelerator.current_stream())
        return memory, self._guarded(pool, trip.block, transfer, filled)

    def order(self, transfer: Transfer) -> bool:
        if isinstance(transfer, DeviceTransfer) and transfer.event is not None:
            stream = self.accelerator.current_stream()
            stream.wait(transfer.event)
            filled = transfer.owner
            if isinstance(filled, _Filled) and filled.stream == stream:
                transfer.owner = None  # see [Note: moves of a device]
            return True
        return transfer.done()

    def _guarded(
        self,
        pool: PinnedTier,
        block: Block,
        transfer: DeviceTransfer,
        owner: object,
    ) -> Transfer:
        """Keep ``owner`` alive, and ``block`` out of ``pool``, until the copy has ended."""
        transfer.owner = owner
        pool.guard(block, transfer)
        return transfer


def _write(trip: Trip, at: int, address: int, nbytes: int) -> None:
    for job in trip.home.write_jobs(trip.block, address, nbytes, offset=at):
        job()


def _read(trip: Trip, at: int, address: int, nbytes: int) -> None:
    for job in trip.home.read_jobs(trip.block, address, nbytes, offset=at):
        job()


def _fresh(nbytes: int) -> torch.UntypedStorage:
    """Host memory: of huge pages if it is large, for touching small ones takes long."""
    if nbytes < hostmem.HUGE_PAGE:
        return torch.UntypedStorage(nbytes, device="cpu")
    address = hostmem.map_anonymous(nbytes)
    mapped = address, hostmem.page_ceil(nbytes)
    return tensor_at(address, torch.uint8, (nbytes,), on_release=mapped).untyped_storage()


def _pool_of(home: Home) -> PinnedTier | None:
    """The pinned pool that ``home`` stands on, if it does."""
    tier = home.tier if isinstance(home, MemoryHome) else None
    return tier if isinstance(tier, PinnedTier) else None
