"""Weights stream: fetched ahead of their use, given up when others are nearer.

[Note: right values always] A weight is a ``MappedTensor``: *filed* it reads right through the
kernel, *held* it is in memory. Fetching and evicting change speed, never values. Writes by the
user's own code are noticed in either state and become a new version in the store: in a filed
weight by the kernel's page map (``absorb``), in a held one by comparing the checksums of its
bytes with the store's (``evict``, ``absorb``). The same comparison catches a damaged disk: if
the bytes in memory changed but nobody wrote, the block itself fails its checksum. What is written
to a weight that is on its way is kept, too (``mapped`` [Note: landing]). A weight that a step
changed in memory is dirty: memory alone has it until it is stored.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from offload.swap.residency import Residency
from offload.swap.window import Window, in_backward
from offload.swap.writeback import is_changed, write_back
from offload.tiers.journal import Journal, Label
from offload.tiers.lanes import Transfer
from offload.tiers.mapped import MappedTensor
from offload.tiers.pages import PagePool
from offload.tiers.store import Store, StoredTensor

_EXPECTED_NBYTES = 1 << 20  # smaller gradients are not worth a look at the resident set


@dataclass(slots=True, eq=False)
class Weight:
    """One weight: the parameters that share it, its durable bytes and its stable memory."""

    name: str
    parameters: list[nn.Parameter]
    stored: StoredTensor
    mapped: MappedTensor
    residency: Residency = Residency.ABSENT
    resident: bool = False  # the plan keeps it in memory
    held: bool = False  # a step is changing it: neither fetched nor evicted
    proved: bool = False  # compared with the store, or written there, since it came from the drive
    landing_nbytes: int = 0  # of a fetch in flight, that the resident set may not show yet
    transfer: Transfer | None = field(default=None, repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of the weight."""
        return self.mapped.nbytes

    @property
    def gradient_nbytes(self) -> int:
        """Bytes of the gradient that backward makes of it."""
        return self.nbytes if self.parameters[0].requires_grad else 0

    @property
    def in_memory(self) -> bool:
        """Whether its bytes are in private memory, ready for use."""
        return self.residency in (Residency.READY, Residency.DIRTY)

    @property
    def is_coming(self) -> bool:
        """Whether it is on its way to memory, where a step will change it."""
        return self.held and self.residency is Residency.FETCHING

    @property
    def dirty(self) -> bool:
        """Whether a step in memory has changed it since it was stored."""
        return self.residency is Residency.DIRTY


class WeightSwapper(Window[Weight]):
    """Decides which weights are in memory; called on the training thread only.

    Args:
        store: the home of the weights.
        journal: takes moves, stalls and changes of residency.
        window_nbytes: bytes of streaming weights that may be in memory or on their way. One
            module's own weights may exceed it while it computes.
        room: bytes left until the budget; the window shrinks where the rest of the process
            (the user's own data, the kernels' buffers) takes more than was planned.
        expect: told, before backward uses a weight, what its gradient will take.
    """

    def __init__(
        self,
        store: Store,
        journal: Journal,
        window_nbytes: int,
        room: Callable[[], int] = lambda: sys.maxsize,
        expect: Callable[[int], None] = lambda _nbytes: None,
    ) -> None:
        super().__init__(journal, store.tier.lanes.reads, window_nbytes, room=room)
        self.store = store
        self.pool = PagePool()
        self._expect = expect
        self.overwritten: Callable[[Weight], None] = lambda _weight: None  # see ``absorb``
        self.before_use: Callable[[Sequence[str]], None] = lambda _names: None  # may refuse it
        self.is_stepped: Callable[[str], bool] = lambda _name: False  # by the present backward

    def use(self, names: Sequence[str]) -> None:
        """As in ``Window``; in backward there is room for the gradients that follow.

        Raises:
            StepInterruptedError: backward reads a weight that it has stepped.
        """
        self.before_use(names)
        self.land()
        super().use(names)
        if in_backward():
            coming = sum(self.weights[name].gradient_nbytes for name in names)
            if coming >= _EXPECTED_NBYTES:
                self._expect(coming)

    def land(self) -> None:
        """Move what has been read to its address, for those that use it past all hooks.

        Raises:
            TierIOError: the kernel refused.
        """
        for weight in self._fetching.values():
            if weight.transfer is not None and weight.transfer.done():
                weight.mapped.land()

    def add(self, weight: Weight) -> None:
        """Take over a weight whose mapped tensor is filed at its current block."""
        self.weights[weight.name] = weight

    def keep(self, names: Iterable[str]) -> None:
        """Make ``names`` the resident weights, fetched at their next use."""
        wanted = set(names)
        for weight in self.weights.values():
            weight.resident = weight.name in wanted
            if weight.resident:
                self._streaming.leave(weight.name)
            elif weight.residency is not Residency.ABSENT:
                self._streaming.join(weight.name, weight)

    def uncache(self, names: Iterable[str]) -> None:
        """Drop what the page cache has of the weights ``names``, in which rows are looked up.

        What was just built is cached in large folios, and a look at one row maps all of its folio.

        Raises:
            TierIOError: the disk could not take what was built.
        """
        file, tables = self.store.tier.file, [self.weights[name] for name in names]
        if tables:
            file.sync()
        for table in tables:
            if (block := table.mapped.block) is not None:
                table.mapped.shed()
                file.uncache(block.extent.offset, block.extent.nbytes)

    def hold(self, weight: Weight, *, wait: bool = True) -> None:
        """Keep ``weight`` where it is until ``let_go``: in memory, or in its file alone.

        A step changes a held weight: what is in memory is changed there, what is not has its tiles
        read, and must not be fetched while a new version is written. One that is used meanwhile
        is read through its mapping.

        Args:
            wait: until ``weight`` is here, if it is on its way; else ``arrive`` does.

        Raises:
            TierIOError: a read that was on its way failed.
        """
        weight.held = True
        if wait:
            self.arrive(weight)

    def arrive(self, weight: Weight) -> None:
        """Wait for ``weight`` if it is on its way.

        Raises:
            TierIOError: its read failed.
        """
        self._await(weight, "late")

    def bring(self, weight: Weight, *, wait: bool = True) -> None:
        """Have ``weight`` in memory now, unless a step holds it in its file.

        Args:
            wait: until it is there.

        Raises:
            TierIOError: a read failed.
        """
        if weight.residency is Residency.ABSENT and not weight.held:
            self._make_room(weight, force=True)
            self._fetch(weight, urgent=True)
        if wait:
            self.arrive(weight)

    def fetch_ahead(self, weight: Weight) -> bool:
        """Begin to fetch ``weight`` if the window has room for it; whether it is here or coming.

        Raises:
            TierIOError: what had to go could not be stored.
        """
        if weight.residency is Residency.ABSENT and not weight.held and self._make_room(weight):
            self._fetch(weight)
        return weight.residency is not Residency.ABSENT

    def let_go(self, weight: Weight) -> None:
        """``weight`` may be fetched and evicted again."""
        weight.held = False
        if weight.residency is Residency.ABSENT:
            self.trace.unsettle(weight.name)

    def give_up(self, nbytes: int) -> None:
        """Evict so many bytes of streaming weights, those used last first, as far as they reach.

        Raises:
            TierIOError: what the user's code wrote could not be stored.
        """
        self.pool.trim()
        for victim in self._farthest(nbytes, -1):
            self.evict(victim)
        self.pool.trim()

    def _spare_nbytes(self) -> int:
        return self.pool.nbytes

    def _arrived(self, weight: Weight) -> None:
        weight.mapped.land()

    def _lost(self, weight: Weight) -> None:
        if weight.mapped.held:  # else it was never anything but filed, and may have been written
            self._refile(weight)

    def _fetch(self, weight: Weight, *, urgent: bool = False) -> bool:
        self.absorb(weight)
        label = Label(weight.name, "weight", self.store.tier.spec.name, "host")
        # Resident weights stay: large ranges of their own keep the kernel's list of them short.
        kept_nbytes = self.pool.nbytes
        jobs = weight.mapped.fetch_jobs(None if weight.resident else self.pool)
        weight.landing_nbytes = weight.nbytes - (kept_nbytes - self.pool.nbytes)
        weight.proved = False
        if not weight.resident:
            self._streaming.join(weight.name, weight)
        # What the fetch left of its victims' pages may wait only within the window. The rest goes
        # before the read begins: both would be there at once.
        room = self._room() - weight.landing_nbytes - self.landing_nbytes
        self.pool.trim(min(self.window_nbytes - self.streaming_nbytes, room))
        weight.transfer = self._lane.submit(jobs, label, weight.nbytes, urgent=urgent)
        self._become(weight, Residency.FETCHING)
        return True

    def evict(self, weight: Weight) -> None:
        """Give the memory of ``weight`` back; what was written to it is stored first."""
        self._await(weight, "drain")
        if not weight.in_memory:
            return
        self.absorb(weight)
        assert weight.stored.current is not None
        weight.mapped.file_as(weight.stored.current, None if weight.resident else self.pool)
        self._streaming.leave(weight.name)
        self._become(weight, Residency.ABSENT)

    def evict_streaming(self) -> None:
        """Give back the memory of all weights that are not resident."""
        super().evict_streaming()
        self.pool.trim()

    def store_new(self, weight: Weight) -> None:
        """Store the bytes that memory has now, which a step has just changed."""
        self._await(weight, "drain")  # a small one may be on its way
        self.store.write(weight.stored, weight.mapped.tensor)
        self.replaced(weight)

    def absorb(self, weight: Weight) -> bool:
        """Store what the user's code wrote to ``weight``, if it did; True if so.

        ``overwritten`` is called before, while the store still has the old values. See
        [Note: right values always].
        """
        if not self._written(weight):
            return False
        self._await(weight, "drain")
        self.overwritten(weight)
        self.store.write(weight.stored, weight.mapped.tensor)
        self._refile(weight)
        return True

    def changed(self, weight: Weight) -> None:
        """A step changes ``weight`` in memory: the store has it again after ``absorb``."""
        if not weight.dirty:
            self._become(weight, Residency.DIRTY)

    def dirty_nbytes(self) -> int:
        """Bytes of weights whose newest values only memory has."""
        return sum(weight.nbytes for weight in self.weights.values() if weight.dirty)

    def _refile(self, weight: Weight) -> None:
        """Point the mapping at the current version, which equals what memory has."""
        assert weight.stored.current is not None
        if weight.in_memory and weight.mapped.held:
            weight.mapped.block = weight.stored.current
        else:
            weight.mapped.file_as(weight.stored.current)
        if weight.dirty:
            self._become(weight, Residency.READY)

    def _written(self, weight: Weight) -> bool:
        if weight.dirty:
            return True
        if not weight.mapped.held:
            return weight.mapped.written_while_filed()
        return is_changed(self.store, weight.stored, weight.mapped.address)

    def absorb_all(self) -> None:
        """Store all that is newer in memory; after this the store is the newest state."""
        for weight in self.weights.values():
            self._await(weight, "drain")
        held = [weight for weight in self.weights.values() if weight.dirty and weight.mapped.held]
        write_back(self.store, [(weight.stored, weight.mapped.address) for weight in held])
        for weight in held:
            self._refile(weight)
        stored = set(held)
        for weight in self.weights.values():
            if weight not in stored:
                self.absorb(weight)

    def replaced(self, weight: Weight) -> None:
        """The optimizer stored a new version; memory holds it too if ``weight`` is in memory."""
        self._refile(weight)
        torch.autograd.graph.increment_version(weight.parameters)
