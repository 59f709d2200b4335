"""Copies of weights on a device: fetched ahead of their use, given up when others are nearer.

[Note: a copy and its weight] The weight itself never leaves its stable address in host memory
(``mapped`` [Note: stable addresses]): what the user's code reads and writes is there, whatever the
device does. A *copy* is a cache of it. It comes from the store's file, through pinned buffers and
past the host's memory, or from memory where the plan keeps the weight there, or memory alone has
its newest values. A copy is valid while nobody writes to the weight. At the start of each pass
(``begin_pass``) it is held against it: version counters tell changes by torch, the kernel's page
map others. What is in memory, where only a comparison of all bytes would tell, is fetched again
or, if it is frozen, compared once and not kept in memory from then on. A step gives up the copies
of trained weights before it begins.

A kernel that writes to a copy in place (an embedding with ``max_norm``) is seen by the copy's own
version counter: the bytes go back to the weight when the copy is given up, and at the end of the
pass in any case.

[Note: memory of a copy] Fresh memory is allocated for the stream that computes, and a fetch fills
it when kernels of its earlier owner have ended (``accelerator`` [Note: streams and events]); the
host has seen the end of the fetch before it enqueues a kernel that reads it. Memory goes with the
last tensor over it, so that no kernel that has been enqueued meets another's bytes; if other
streams have used the copy, the one it was allocated for waits for them first. What somebody else
still holds (a checkpoint's recomputed tensors) makes no room when it is given up: it stays.
"""

from dataclasses import dataclass, field
from functools import partial

import torch

from offload.allocator.errors import CapacityError
from offload.swap.copying import storage_use_count
from offload.swap.ferry import Cargo, Ferry, Mover, copy_from, copy_to
from offload.swap.residency import Residency
from offload.swap.saved import modified_error
from offload.swap.weights import Weight, WeightSwapper
from offload.swap.window import Window
from offload.tiers.accelerator import DeviceMemory, Stream
from offload.tiers.hostmem import page_ceil
from offload.tiers.journal import Label
from offload.tiers.lanes import Lane, Transfer
from offload.tiers.pieces import BlockFile, move_jobs


@dataclass(slots=True, eq=False)
class DeviceCopy:
    """One weight's copy on the device. See [Note: a copy and its weight].

    Attributes:
        tensor: over ``memory``, of the weight's dtype and shape.
        written: how often kernels have written to copies of this weight, so far.
    """

    weight: Weight
    residency: Residency = Residency.ABSENT
    resident: bool = False
    held: bool = False
    landing_nbytes: int = 0
    transfer: Transfer | None = field(default=None, repr=False)
    cargo: Cargo | None = None  # while it is fetched
    memory: DeviceMemory | None = None
    tensor: torch.Tensor | None = None
    versions: int = 0  # of the parameters, when it was fetched
    written: int = 0
    _version: int = 0  # of ``tensor``, when it was last the weight's
    _owners: int = 0  # of the memory, when nobody else had it
    _home: Stream | None = None
    _streams: list[Stream] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The name of the weight."""
        return self.weight.name

    @property
    def nbytes(self) -> int:
        """Bytes of the weight."""
        return self.weight.nbytes

    @property
    def in_memory(self) -> bool:
        """Whether the copy can be used."""
        return self.residency is Residency.READY

    def take(self, memory: DeviceMemory, home: Stream) -> None:
        """``memory`` will have the bytes; it was allocated for ``home``."""
        like = self.weight.mapped.tensor
        self.memory, self._home, self._streams = memory, home, []
        self.tensor = memory.view(0, like.dtype, like.shape)
        self._version, self._owners = self.tensor._version, storage_use_count(self.tensor)
        self.versions = versions_of(self.weight)

    def is_shared(self) -> bool:
        """Whether somebody else holds a tensor over the memory."""
        return self.tensor is not None and storage_use_count(self.tensor) > self._owners

    def count_written(self) -> bool:
        """Note what kernels have written since the last call; whether they did."""
        assert self.tensor is not None
        more = self.tensor._version - self._version
        self.written += more
        self._version = self.tensor._version
        return more > 0

    def used_on(self, stream: Stream) -> None:
        """Kernels of ``stream`` read the copy from now on."""
        if stream != self._home and stream not in self._streams:
            self._streams.append(stream)

    def drop(self) -> None:
        """Let the memory go. See [Note: memory of a copy]."""
        if self._home is not None:
            for stream in self._streams:
                self._home.wait(stream.record())
        self.memory = self.tensor = self._home = None
        self._streams = []


class DeviceWeights(Window[DeviceCopy]):
    """The copies of all weights of one model; called by one thread at a time.

    Args:
        host: the weights themselves.
        lane: on which copies are filled.
        window_nbytes: bytes of copies that are on the device or on their way to it.

    Attributes:
        names: of the weights whose copies are here, by storage (``_cdata``).
    """

    def __init__(self, host: WeightSwapper, ferry: Ferry, lane: Lane, window_nbytes: int) -> None:
        super().__init__(host.journal, lane, window_nbytes, role="copy")
        self._host = host
        self._ferry = ferry
        self._accelerator = ferry.accelerator
        self.names: dict[int, str] = {}
        for name, weight in host.weights.items():
            self.weights[name] = DeviceCopy(weight)

    def begin_pass(self) -> None:
        """A pass begins: give up the copies whose weights have changed since they were fetched."""
        for copy in list(self._streaming):
            if copy.versions != versions_of(copy.weight) or self._may_have_changed(copy.weight):
                self.evict(copy)

    def resize(self, nbytes: int) -> None:
        """The window is ``nbytes`` from now on: what is beyond it leaves, what is used last first.

        Raises:
            TierIOError: what kernels wrote to one could not be brought home.
        """
        self.window_nbytes = nbytes
        for victim in self._farthest(self.streaming_nbytes - nbytes, -1):
            self.evict(victim)

    def before_step(self) -> None:
        """The optimizer is going to write to weights."""
        for copy in list(self._streaming):
            if _is_trained(copy.weight):
                self.evict(copy)

    def _may_have_changed(self, weight: Weight) -> bool:
        """Whether somebody has written to ``weight`` past the version counters, or nobody knows."""
        if not weight.mapped.held:
            return self._host.absorb(weight)
        if _is_trained(weight):
            return True  # the next step would change it anyway
        if self._host.absorb(weight):  # compares all bytes: once, for it is not in memory then
            return True
        self._host.evict(weight)
        return False

    def end_pass(self) -> None:
        """A pass has ended: what its kernels wrote to copies is the weights' own from now on."""
        for copy in self._streaming:
            if copy.in_memory and copy.count_written():
                self._write_back(copy)

    def require(self, name: str) -> torch.Tensor:
        """The copy of ``name``, for kernels of the current stream; a new alias.

        Raises:
            TierIOError, CapacityError: as ``use``.
        """
        copy = self.weights[name]
        if not copy.in_memory or not self._in_use or name not in self._in_use[-1]:
            self.use([name])
        assert copy.tensor is not None
        copy.used_on(self._accelerator.current_stream())
        return copy.tensor.detach()

    def name_of(self, storage: torch.UntypedStorage) -> str | None:
        """The weight whose copy ``storage`` is, if it is one."""
        return self.names.get(storage._cdata)

    def state_of(self, name: str) -> tuple[int, int]:
        """Changes whenever the weight, or a copy of it, is written to."""
        copy = self.weights[name]
        if copy.in_memory and copy.count_written():
            self._write_back(copy)
        return versions_of(copy.weight), copy.written

    def check_state(self, name: str, state: tuple[int, int]) -> None:
        """Raise unless the bytes of ``state`` can be had.

        What the present backward has stepped, it may go on reading as long as a copy from before
        the step is here.

        Raises:
            RuntimeError: the weight was modified in place since.
            StepInterruptedError: this backward has stepped it, and the copy has left.
        """
        now, copy = self.state_of(name), self.weights[name]
        if not self._host.is_stepped(name):
            if now != state:
                raise modified_error(sum(now), sum(state))
        elif not copy.in_memory or (copy.versions, copy.written) != state:
            self._host.before_use([name])

    def _can_leave(self, weight: DeviceCopy) -> bool:
        return weight.in_memory and not weight.held and not weight.is_shared()

    def _fetch(self, weight: DeviceCopy, *, urgent: bool = False) -> bool:
        if self._host.is_stepped(weight.name):  # or it might come half stepped
            if urgent:
                self._host.before_use([weight.name])
            return False
        memory = self._allocate(weight.nbytes, urgent=urgent)
        if memory is None:
            return False
        source, fill = self._source(weight.weight)
        weight.take(memory, self._accelerator.current_stream())
        weight.cargo = Cargo(memory)
        jobs = self._ferry.jobs_in(weight.cargo, weight.nbytes, fill)
        label = Label(weight.name, "weight", source, self._accelerator.name)
        weight.transfer = self._lane.submit(jobs, label, weight.nbytes, urgent=urgent)
        self.names[memory.tensor.untyped_storage()._cdata] = weight.name
        if not weight.resident:
            self._streaming.join(weight.name, weight)
        self._become(weight, Residency.FETCHING)
        return True

    def _allocate(self, nbytes: int, *, urgent: bool) -> DeviceMemory | None:
        try:
            return self._accelerator.allocate(nbytes)
        except CapacityError:
            if not urgent:
                return None
        self.make_room()
        return self._accelerator.allocate(nbytes)

    def make_room(self) -> None:
        """Give up all copies but those that are computed with now.

        Raises:
            TierIOError: what kernels wrote to one could not be brought home.
        """
        in_use = {name for names in self._in_use[-1:] for name in names}
        for copy in list(self._streaming):
            if copy.name not in in_use:
                self.evict(copy)

    def _arrived(self, weight: DeviceCopy) -> None:
        assert weight.cargo is not None
        weight.cargo.let_go()
        weight.cargo = None

    def _source(self, weight: Weight) -> tuple[str, Mover]:
        """Where the newest bytes are, and what gives them to the ferry."""
        if weight.resident and weight.residency is Residency.ABSENT:
            self._host.bring(weight)  # once: it stays
        if weight.residency is not Residency.ABSENT:
            return "host", partial(copy_from, weight.mapped.address)
        self._host.absorb(weight)
        tier = self._host.store.tier
        assert weight.stored.current is not None
        return tier.spec.name, partial(_read_from, tier.file, weight.stored.current.extent.offset)

    def evict(self, weight: DeviceCopy) -> None:
        """Give up the copy; what kernels wrote to it is the weight's own."""
        self._await(weight, "drain")
        if not weight.in_memory:
            return
        if weight.count_written():
            self._write_back(weight)
        self._forget(weight)
        self._streaming.leave(weight.name)
        self._become(weight, Residency.ABSENT)

    def _lost(self, weight: DeviceCopy) -> None:
        self._forget(weight)

    def _forget(self, weight: DeviceCopy) -> None:
        assert weight.memory is not None
        del self.names[weight.memory.tensor.untyped_storage()._cdata]
        weight.drop()

    def _write_back(self, copy: DeviceCopy) -> None:
        assert copy.memory is not None
        self._host.settle()  # a fetch would put the old bytes over these
        ready = self._accelerator.current_stream().record()
        source = DeviceMemory(tensor=copy.memory.tensor, ready=ready)
        drain = partial(copy_to, copy.weight.mapped.address)
        for job in self._ferry.jobs_out(Cargo(source), copy.nbytes, drain):
            job()

    def close(self) -> None:
        """Give all copies up."""
        self.evict_streaming()


def _is_trained(weight: Weight) -> bool:
    return any(parameter.requires_grad for parameter in weight.parameters)


def versions_of(weight: Weight) -> int:
    """Changes whenever torch writes to one of the weight's parameters."""
    return sum(parameter._version for parameter in weight.parameters)


def _read_from(file: BlockFile, base: int, at: int, address: int, nbytes: int) -> None:
    for job in move_jobs(file, file.read, base + at, address, page_ceil(nbytes)):
        job()
