"""Saved activations: kept while they fit, swapped to scratch beyond that, oldest first.

[Note: owned handles] What autograd saves is replaced by a ``_Packed`` that owns its data through
a ``_Storage``, one per storage however many views were saved. When the graph node dies, so does
the ``_Packed``; with the last one the storage's memory and block are given back. ``unpack`` is
pure: ``retain_graph`` and dead branches need no special case.

[Note: modified in place] Saved-tensor hooks switch off autograd's own check that a saved tensor
was not changed. The version counter is therefore recorded at ``pack`` and compared whenever the
bytes are used: at ``unpack`` while they are in memory, at the moment they are written out else.

The oldest saved tensor is used last in backward, so spilling the oldest first is Belady's rule.
"""

import weakref
from collections import deque
from dataclasses import dataclass
from typing import TypeAlias

import torch

from offload.swap.copying import read_jobs, write_jobs
from offload.swap.residency import Residency
from offload.swap.weights import WeightSwapper
from offload.tiers.base import Block
from offload.tiers.filetier import FileTier
from offload.tiers.journal import Journal, Label
from offload.tiers.lanes import Transfer


class _Storage:
    """The bytes behind saved tensors, in memory, in scratch, or both.

    Residency: READY memory only or memory and block; WRITING both soon; ABSENT block only;
    FETCHING block, memory soon.
    """

    __slots__ = (
        "__weakref__",
        "block",
        "cache",
        "index",
        "memory",
        "nbytes",
        "packed",
        "residency",
        "transfer",
    )

    def __init__(self, cache: "ActivationCache", memory: torch.UntypedStorage, index: int) -> None:
        self.cache = cache
        self.memory: torch.UntypedStorage | None = memory
        self.nbytes = memory.nbytes()
        self.index = index  # order of packing
        self.block: Block | None = None
        self.transfer: Transfer | None = None
        self.residency = Residency.READY
        self.packed: weakref.WeakSet[_Packed] = weakref.WeakSet()

    def __del__(self) -> None:
        self.cache._forget(self)


@dataclass(slots=True)
class _Remains:
    """What a dead storage leaves until its transfer, which owns its memory, has ended."""

    block: Block | None
    transfer: Transfer | None


class _Packed:
    """One saved tensor: a view of a storage."""

    __slots__ = ("__weakref__", "changed", "meta", "storage", "tensor", "version")

    def __init__(self, tensor: torch.Tensor, storage: _Storage) -> None:
        self.tensor: torch.Tensor | None = tensor  # while the original memory lives
        self.version = tensor._version
        self.changed = False
        self.storage = storage
        self.meta = (tensor.dtype, tensor.storage_offset(), tensor.size(), tensor.stride())

    def let_go(self) -> None:
        """The bytes are going to scratch: stop holding the original memory."""
        if self.tensor is not None:
            self.changed = self.changed or self.tensor._version != self.version
            self.tensor = None


class _Kept:
    """A saved tensor that is never swapped, with its version."""

    __slots__ = ("name", "tensor", "version")

    def __init__(self, tensor: torch.Tensor, name: str | None = None) -> None:
        self.tensor = tensor
        self.version = tensor._version
        self.name = name  # of the weight that it is, or is a view of


_Saved: TypeAlias = _Packed | _Kept


class ActivationCache:
    """Saved-tensor hooks for one training thread.

    Args:
        weights: knows which storages are weights, and is told when backward needs one.
        scratch: the volatile tier.
        limit_nbytes: bytes of saved tensors that may stay in memory.
        min_nbytes: smaller storages always stay.
    """

    def __init__(
        self,
        weights: WeightSwapper,
        scratch: FileTier,
        journal: Journal,
        *,
        limit_nbytes: int,
        min_nbytes: int,
    ) -> None:
        self.weights = weights
        self.scratch = scratch
        self.journal = journal
        self.limit_nbytes = limit_nbytes
        self.min_nbytes = min_nbytes
        self.kept_nbytes = 0  # of swappable storages in memory, arriving or leaving
        self.peak_nbytes = 0
        self._weight_names: dict[int, str] = {}
        self._by_memory: dict[int, weakref.ref[_Storage]] = {}
        self._order: deque[weakref.ref[_Storage]] = deque()
        self._writing: deque[_Storage] = deque()
        self._absent: dict[int, weakref.ref[_Storage]] = {}  # by index
        self._dead: deque[_Remains] = deque()
        self._packed_count = 0

    def know_weights(self, storages: dict[int, str]) -> None:
        """Name the weight behind each storage (by ``census.storage_key``)."""
        self._weight_names = storages

    def pack(self, tensor: torch.Tensor) -> _Saved:
        """Called by autograd for each tensor that it saves."""
        self._settle()
        plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and _plain(tensor)
        # An alias: the tensor itself would own the graph node that owns what is returned here,
        # and a graph that nobody runs backward on would never be freed.
        tensor = tensor.detach()
        if not plain:
            return _Kept(tensor)
        memory = tensor.untyped_storage()
        name = self._weight_names.get(memory._cdata)
        if name is not None or memory.nbytes() < self.min_nbytes:
            return _Kept(tensor, name)
        packed = _Packed(tensor, self._storage_of(memory))
        packed.storage.packed.add(packed)
        self._spill()
        return packed

    def _storage_of(self, memory: torch.UntypedStorage) -> _Storage:
        known = self._by_memory.get(memory._cdata)
        storage = known() if known is not None else None
        if storage is not None and storage.memory is not None:
            return storage
        storage = _Storage(self, memory, self._packed_count)
        self._packed_count += 1
        self._by_memory[memory._cdata] = weakref.ref(storage)
        self._order.append(weakref.ref(storage))
        self._count(storage.nbytes)
        return storage

    def unpack(self, saved: _Saved) -> torch.Tensor:
        """Called by autograd when backward needs a saved tensor.

        Raises:
            RuntimeError: it was modified in place since it was saved.
            TierIOError: its bytes could not be read back.
        """
        self._settle()
        if isinstance(saved, _Kept):
            _check_version(saved.tensor, saved.version)
            if saved.name is not None:
                self.weights.use([saved.name])
            return saved.tensor
        if saved.changed:
            raise RuntimeError(_MODIFIED)
        if saved.tensor is not None:
            _check_version(saved.tensor, saved.version)
            self._prefetch(saved.storage.index)
            return saved.tensor
        memory = self._fetched(saved.storage)
        self._prefetch(saved.storage.index)
        dtype, offset, size, stride = saved.meta
        return torch.empty(0, dtype=dtype).set_(memory, offset, size, stride)

    def _spill(self) -> None:
        """Write the oldest storages out until the rest fits."""
        excess = self.kept_nbytes - sum(storage.nbytes for storage in self._writing)
        arriving: list[weakref.ref[_Storage]] = []
        while excess > self.limit_nbytes and self._order:
            known = self._order.popleft()
            storage = known()
            if storage is not None and storage.residency is Residency.FETCHING:
                arriving.append(known)  # its turn comes
            if storage is None or storage.residency is not Residency.READY:
                continue
            excess -= storage.nbytes
            self._write_out(storage)
        self._order.extendleft(reversed(arriving))
        while self._writing and self.kept_nbytes > 2 * self.limit_nbytes:
            self._await_written("full")

    def _write_out(self, storage: _Storage) -> None:
        assert storage.memory is not None
        if storage.block is not None:  # read back before: the block still has the bytes
            self._drop_memory(storage)
            return
        storage.block = self.scratch.allocate(storage.nbytes)
        jobs = write_jobs(
            self.scratch.file, storage.block, storage.memory.data_ptr(), storage.nbytes
        )
        label = Label(f"saved {storage.index}", "activation", "host", self.scratch.spec.name)
        storage.transfer = self.scratch.lanes.writes.submit(
            jobs, label, storage.nbytes, owner=storage.memory
        )
        self._become(storage, Residency.WRITING)
        self._writing.append(storage)

    def _settle(self) -> None:
        """Take note of writes that have ended and of storages that have died; never blocks."""
        while self._writing and _done(self._writing[0]):
            self._finish_write(self._writing.popleft())
        for _ in range(len(self._dead)):
            remains = self._dead.popleft()
            if remains.transfer is not None and not remains.transfer.done():
                self._dead.append(remains)  # its block is still in use
            elif remains.block is not None:
                remains.block.release()

    def _await_written(self, reason: str) -> None:
        storage = self._writing.popleft()
        assert storage.transfer is not None
        lane = self.scratch.lanes.writes.name
        with self.journal.stall(f"saved {storage.index}", "activation", lane, reason):
            storage.transfer.settle()
        self._finish_write(storage)

    def _finish_write(self, storage: _Storage) -> None:
        transfer, block = storage.transfer, storage.block
        assert transfer is not None
        assert block is not None
        storage.transfer = None
        if transfer.error is not None:  # memory is still whole: as if nothing had been begun
            storage.block = None
            block.release()
            self._become(storage, Residency.READY)
        transfer.wait()
        self._drop_memory(storage)

    def _drop_memory(self, storage: _Storage) -> None:
        assert storage.memory is not None
        for packed in list(storage.packed):
            packed.let_go()
        self._by_memory.pop(storage.memory._cdata, None)
        storage.memory = None
        self._count(-storage.nbytes)
        self._become(storage, Residency.ABSENT)

    def _fetch(self, storage: _Storage) -> None:
        assert storage.block is not None
        storage.memory = torch.empty(storage.nbytes, dtype=torch.uint8).untyped_storage()
        jobs = read_jobs(
            self.scratch.file, storage.block, storage.memory.data_ptr(), storage.nbytes
        )
        label = Label(f"saved {storage.index}", "activation", self.scratch.spec.name, "host")
        storage.transfer = self.scratch.lanes.reads.submit(
            jobs, label, storage.nbytes, owner=storage.memory
        )
        self._count(storage.nbytes)
        self._become(storage, Residency.FETCHING)
        self._order.append(weakref.ref(storage))

    def _fetched(self, storage: _Storage) -> torch.UntypedStorage:
        """The storage's memory, waiting for it where it must."""
        if storage.residency is Residency.ABSENT:
            self._fetch(storage)
        if storage.residency is Residency.FETCHING:
            assert storage.transfer is not None
            lane = self.scratch.lanes.reads
            if not storage.transfer.done():
                lane.expedite(storage.transfer)
                with self.journal.stall(f"saved {storage.index}", "activation", lane.name, "late"):
                    storage.transfer.settle()
            storage.transfer.wait()
            storage.transfer = None
            self._become(storage, Residency.READY)
        assert storage.memory is not None
        return storage.memory

    def _prefetch(self, index: int) -> None:
        """Fetch what backward needs next: the storages packed just before ``index``."""
        for earlier in sorted(self._absent, reverse=True):
            known = self._absent.get(earlier)  # a storage may die at any moment
            storage = known() if known is not None else None
            if earlier >= index or storage is None:
                continue
            if self.kept_nbytes + storage.nbytes > self.limit_nbytes:
                return
            self._fetch(storage)

    def _become(self, storage: _Storage, residency: Residency) -> None:
        old, storage.residency = storage.residency, residency
        if residency is Residency.ABSENT:
            self._absent[storage.index] = weakref.ref(storage)
        else:
            self._absent.pop(storage.index, None)
        self.journal.residency(
            f"saved {storage.index}", "activation", old.value, residency.value, storage.nbytes
        )

    def _count(self, nbytes: int) -> None:
        self.kept_nbytes += nbytes
        self.peak_nbytes = max(self.peak_nbytes, self.kept_nbytes)

    def _forget(self, storage: _Storage) -> None:
        """The last packed view of ``storage`` has died (on whichever thread that happened)."""
        self._absent.pop(storage.index, None)
        if storage.memory is not None:
            self._count(-storage.nbytes)
            known = self._by_memory.get(storage.memory._cdata)
            if known is not None and known() is None:
                del self._by_memory[storage.memory._cdata]
        self._dead.append(_Remains(storage.block, storage.transfer))

    def close(self) -> None:
        """Wait for writes in flight; saved tensors that still live stay usable."""
        while self._writing:
            self._await_written("drain")


_MODIFIED = (
    "one of the variables needed for gradient computation has been modified by an inplace "
    "operation after it was saved"
)


def _check_version(tensor: torch.Tensor, version: int) -> None:
    if tensor._version != version:
        raise RuntimeError(
            f"{_MODIFIED}: it is at version {tensor._version}; expected version {version} instead"
        )


def _plain(tensor: torch.Tensor) -> bool:
    """Whether the bytes of its storage, offset, size and stride are all there is to a tensor."""
    return (
        tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
        and not tensor.is_conj()
        and not tensor.is_neg()
        and not tensor.is_inference()
    )


def _done(storage: _Storage) -> bool:
    return storage.transfer is not None and storage.transfer.done()
