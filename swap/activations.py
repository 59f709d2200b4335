"""Saved-tensor hooks: saved activations are kept while they fit, and swapped beyond that.

``saved`` tells what autograd gets instead of its tensors, ``spilling`` moves the bytes, ``homes``
are where they go, ``lookahead`` knows what backward needs next.

Parameters and buffers, and whatever is a view of one, are told by their storage and never moved;
backward asks for a weight when it needs one. What can't be moved exactly is left alone, and the
record says why.

[Note: several threads] Backward may run on several threads at once: those of a user who calls it
on each, those of a TorchScript fork, and the one that autograd itself has for each device, beside
the caller's for what is on the CPU. So one lock is held while bytes are given in charge, used or
moved, even while the thread waits for them: the jobs that bring them never take it, and neither
does the death of a handle, which can happen on any thread (``saved.Graveyard``).
"""

import threading
import weakref  # noqa: TC003 (as all of them)
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch

from offload.allocator.units import format_nbytes
from offload.swap.fixed import FixedStorages
from offload.swap.homes import Home
from offload.swap.kinds import (
    PLAIN_TYPES,
    flattened,
    has_bytes,
    is_wrapper,
    nbytes_of,
    shape_of,
    why_unmovable,
)
from offload.swap.lookahead import Lookahead
from offload.swap.places import Place
from offload.swap.residency import Residency
from offload.swap.saved import KnownParts, Part, Unit, View
from offload.swap.spilling import Spiller
from offload.swap.uncompiled import uncompiled
from offload.swap.unseen import unseen_nbytes
from offload.tiers.journal import Journal

_STRIDED = torch.strided
LEAST_NBYTES = 512  # a handle takes as much
_READY = Residency.READY  # asked of the class it takes its time
BATCH_NBYTES = 1 << 20  # small storages move together when there are so many bytes of them
BATCH_ALIGN = 64
# A part of something that the user holds anyway, such as a data set: moving it all frees nothing.
_SLICE_SHARE, _SLICED_NBYTES = 64, 16 << 20


def is_small_slice(tensor: torch.Tensor, storage_nbytes: int) -> bool:
    """Whether ``tensor`` is so small a part of its storage that moving that frees nothing."""
    return storage_nbytes >= _SLICED_NBYTES and storage_nbytes >= _SLICE_SHARE * tensor.nbytes


class WeightUser(Protocol):
    """Is told when backward needs weights."""

    def use(self, names: Sequence[str]) -> None: ...


class _Nobody:
    def use(self, names: Sequence[str]) -> None:
        pass


@dataclass(frozen=True, slots=True)
class _Wrapped:
    """A saved subclass that wraps ordinary tensors (DTensor, float8): each is packed alone."""

    kind: Any
    inner: dict[str, Any]  # handles, and what is no tensor (a mesh)
    context: object
    size: torch.Size
    stride: tuple[int, ...]


Saved: TypeAlias = View | _Wrapped | torch.Tensor


@dataclass(slots=True)
class LeftAlone:
    """Saved tensors that were not moved, for one reason."""

    count: int = 0
    nbytes: int = 0


class ActivationCache:
    """The hooks of one model; any thread may call them, see [Note: several threads].

    Args:
        homes: where saved bytes go, in this order.
        limit_nbytes: bytes of saved tensors that may stay in memory.
        min_nbytes: smaller storages move in batches.
        in_flight_nbytes: more than the limit while they leave, and to fetch ahead; by default the
            limit again.
        weights: told when backward needs one of those that ``fixed`` names.
        room: bytes left in the budget; asked when no home takes more. By default saved tensors
            may then take what leaving ones may.
        place: where saved tensors live that may be moved; by default host memory.
        is_tight: as of ``Spiller``.

    Attributes:
        left_alone: what was not moved, by reason.
        fixed: storages that are never moved.
    """

    def __init__(
        self,
        homes: Sequence[Home],
        journal: Journal,
        *,
        limit_nbytes: int,
        min_nbytes: int,
        in_flight_nbytes: int | None = None,
        weights: WeightUser | None = None,
        room: Callable[[], int] | None = None,
        place: Place | None = None,
        is_tight: Callable[[], bool] = lambda: False,
    ) -> None:
        self.journal = journal
        self.weights = weights or _Nobody()
        self.min_nbytes = min_nbytes
        self.spiller = Spiller(
            homes, journal, limit_nbytes, in_flight_nbytes, room, place, is_tight
        )
        self._owns = self.spiller.place.owns
        self.lookahead = Lookahead()
        self.left_alone: dict[str, LeftAlone] = {}
        self.fixed = FixedStorages()
        self._names = self.fixed.names
        self._parts: KnownParts = {}
        self._batch: list[weakref.ref[Part]] = []
        self._batch_nbytes = 0
        self._packed_count = 0
        self._used_last = -1
        self._kind: Hashable = None
        self._counted_kinds: set[Hashable] = set()
        # Packing may run what packs again: a dispatch mode, a finalizer.
        self._lock = threading.RLock()
        # For the two hooks: ``with`` takes half as long again.
        self._acquire, self._release = self._lock.acquire, self._lock.release

    @property
    def limit_nbytes(self) -> int:
        """Bytes of saved tensors that may stay in memory."""
        return self.spiller.limit_nbytes

    @limit_nbytes.setter
    def limit_nbytes(self, nbytes: int) -> None:
        self.spiller.limit_nbytes = nbytes

    @property
    def kept_nbytes(self) -> int:
        """Bytes of saved tensors in memory, arriving or leaving."""
        with self._lock:
            return self.spiller.kept_nbytes

    def take_peak(self) -> int:
        """The most bytes of saved tensors that were in memory since the last call."""
        with self._lock:
            return self.spiller.take_peak()

    def begin_pass(self, kind: Hashable) -> None:
        """A forward begins; passes of one ``kind`` are expected to repeat."""
        with self._lock:
            self._kind = kind
            self._look_who_waits()  # what the last pass has left over is not counted in this one
            self.lookahead.begin(kind, self.limit_nbytes)
            self.fixed.look_up()

    # The hooks.

    @uncompiled
    def pack(self, tensor: torch.Tensor) -> Saved:
        """Called by autograd for each tensor that it saves.

        Raises:
            CapacityError: no home takes what exceeds the limit, and memory has no room.
        """
        if (
            type(tensor) not in PLAIN_TYPES
            or tensor.layout is not _STRIDED
            or not self._owns(tensor)
        ):
            return self._pack_other(tensor)
        # An alias: the tensor itself would own the graph node that owns what is returned here,
        # and a graph that nobody runs backward on would never be freed.
        tensor = tensor.detach()
        memory = tensor.untyped_storage()
        key = memory._cdata
        name = self._names.get(key)
        if name is not None:
            return View(tensor, None, name)
        self._acquire()
        try:
            spiller = self.spiller
            if not spiller.is_idle:
                spiller.settle()
            known = self._parts.get(key)
            part = known() if known is not None else None
            if part is not None and (view := self._pack_again(part, tensor, memory)) is not None:
                return view
            nbytes = memory.nbytes()
            if nbytes < LEAST_NBYTES:
                return View(tensor)
            if nbytes >= _SLICED_NBYTES and is_small_slice(tensor, nbytes):
                return self._leave_alone(tensor, "a small slice of a large storage")
            return self._pack_new(tensor, memory, key, nbytes)
        finally:
            self._release()

    def _pack_new(
        self, tensor: torch.Tensor, memory: torch.UntypedStorage, key: int, nbytes: int
    ) -> Saved:
        if tensor.is_nested or tensor.is_quantized or tensor.is_inference():
            return self._leave_alone(tensor, why_unmovable(tensor, self._owns))
        if not has_bytes(memory):
            return self._leave_alone(tensor, "a stand-in without bytes")
        part = Part(memory, key, nbytes, self._parts)
        view = part.view(tensor)
        if nbytes >= self.min_nbytes:
            self._add_unit([part], nbytes)
        else:
            self._batch.append(part.ref)
            self._batch_nbytes += nbytes
            if self._batch_nbytes >= BATCH_NBYTES:
                self._close_batch()
        return view

    def _pack_again(
        self, part: Part, tensor: torch.Tensor, memory: torch.UntypedStorage
    ) -> View | None:
        """One more view of ``part``, whose storage is ``memory``; None if it must be a new part."""
        unit = part.unit
        if part.memory is not None:
            if unit is not None and unit.block is not None:
                unit.doubtful = True  # it may have been changed since it was written
            return part.view(tensor)
        if unit is None or len(unit.parts) > 1:
            return None  # of a batch that has left: it joins the next one
        self.spiller.take_back(unit, part, memory)
        view = part.view(tensor)
        self.spiller.spill()
        return view

    def _add_unit(self, parts: list[Part], nbytes: int) -> None:
        unit = Unit(parts, nbytes, self._packed_count, self.spiller.graveyard)
        self._packed_count += 1
        for part in parts:
            part.unit = unit
        self.lookahead.add(unit)
        self.spiller.add(unit)

    def _close_batch(self) -> None:
        """The small storages that still live move as one from now on, if they are enough."""
        living = self._look_who_waits()
        if self._batch_nbytes < BATCH_NBYTES // 2:
            return
        self._batch, self._batch_nbytes = [], 0
        end = 0
        for part in living:
            part.offset = end
            end += -(-part.nbytes // BATCH_ALIGN) * BATCH_ALIGN
        self._add_unit(living, end)

    def _look_who_waits(self) -> list[Part]:
        """The small storages that wait and still live; no others are counted any more."""
        living = [part for known in self._batch if (part := known()) is not None]
        self._batch_nbytes = sum(part.nbytes for part in living)
        self._batch = [part.ref for part in living]
        return living

    @uncompiled
    def unpack(self, saved: Saved) -> torch.Tensor:
        """Called by autograd when backward needs a saved tensor.

        Raises:
            RuntimeError: it was modified in place since it was saved.
            TierIOError: its bytes could not be read back.
        """
        if type(saved) is not View:
            return self._unpack_wrapped(saved)
        if saved.tensor._version != saved.version:
            saved.check()
        part = saved.part
        if part is None:
            if saved.name:
                self.weights.use([saved.name])
            return saved.tensor
        self._acquire()
        try:
            if not self.spiller.is_idle:
                self.spiller.settle()
            if part.unit is None:
                return saved.tensor
            self._use(part.unit)
            if saved.layout is not None:
                assert part.memory is not None
                saved.come_back(part.memory)
            return saved.tensor
        finally:
            self._release()

    def prefetch(self, handles: Iterable[object]) -> None:
        """Fetch these, in this order, as far as the limit has room; never blocks."""
        parts = [each.part for each in handles if isinstance(each, View) and each.part is not None]
        with self._lock:
            self.spiller.prefetch(part.unit for part in parts if part.unit is not None)

    def _use(self, unit: Unit) -> None:
        """Have the bytes of ``unit`` in memory, and on their way what backward needs next."""
        spiller = self.spiller
        if unit.index == self._used_last:
            spiller.bring(unit)
            return
        self._used_last = unit.index
        self.lookahead.used(unit, self.journal.now())
        if spiller.is_over:
            spiller.spill(sparing=unit)
        if unit.residency is not _READY or unit.arrival is not None:
            spiller.bring(unit)
        if spiller.absent:
            spiller.fetch_ahead(self.lookahead.upcoming(unit))

    # What is more than its bytes.

    def _pack_other(self, tensor: torch.Tensor) -> Saved:
        if type(tensor) in PLAIN_TYPES or not is_wrapper(tensor):
            reason = why_unmovable(tensor, self._owns)
            return self._leave_alone(tensor.detach(), reason)
        names, context = flattened(tensor)
        inner = {name: getattr(tensor, name) for name in names}
        # The offsets of a jagged tensor are its size by their identity: no other tensor will do.
        only = ("_values",) if tensor.is_nested else names
        inner = {
            name: self.pack(each) if name in only and isinstance(each, torch.Tensor) else each
            for name, each in inner.items()
        }
        return _Wrapped(type(tensor), inner, context, tensor.size(), tensor.stride())

    def _unpack_wrapped(self, saved: Saved) -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        assert isinstance(saved, _Wrapped)
        inner = {
            name: self.unpack(each) if isinstance(each, View | _Wrapped) else each
            for name, each in saved.inner.items()
        }
        tensor: torch.Tensor = saved.kind.__tensor_unflatten__(
            inner, saved.context, saved.size, saved.stride
        )
        return tensor

    def _leave_alone(self, tensor: torch.Tensor, reason: str) -> Saved:
        counted = self.left_alone.setdefault(reason, LeftAlone())
        counted.count += 1
        counted.nbytes += nbytes_of(tensor)
        if counted.count == 1:
            self.journal.notice(
                "activations",
                f"a saved tensor ({shape_of(tensor)}, {tensor.dtype}) stays in memory: it is "
                f"{reason}",
            )
        return tensor if tensor.is_inference() else View(tensor)  # it counts no versions

    def count_unseen(self, outputs: Any) -> None:
        """Count what custom Functions behind ``outputs`` keep past the hooks, once for each kind.

        It stays in memory, beside the limit.
        """
        if self._kind in self._counted_kinds:
            return
        self._counted_kinds.add(self._kind)
        for name, nbytes in unseen_nbytes(outputs, frozenset(self.fixed.names)).items():
            self.journal.notice(
                "activations",
                f"{name} keeps {format_nbytes(nbytes)} ({nbytes} bytes) on its ctx, where no hook "
                "sees them: they stay in memory. ctx.save_for_backward would let them leave",
            )

    def close(self) -> None:
        """Wait for writes in flight; saved tensors that still live stay usable."""
        with self._lock:
            self.spiller.close()
            self.fixed.close()
        for reason, left in self.left_alone.items():
            self.journal.notice(
                "activations",
                f"{left.count} saved tensors ({format_nbytes(left.nbytes)} in all) stayed in "
                f"memory: {reason}",
            )
