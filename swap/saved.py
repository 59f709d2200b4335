"""What autograd's saved tensors become: views of storages, which move as units.

[Note: owned handles] Autograd keeps a ``View``. It owns its ``Part``, the one of its storage for
the storage's whole life however many views are saved, and the part owns the ``Unit`` that moves:
one large storage, or a batch of small ones. When the graph node dies, so does the ``View``; with
the last one memory and block are given back. Unpacking is pure: ``retain_graph``, a second
backward and dead branches need no special case.

[Note: whose storage] A storage is known by the address of its control block. While the part lets
the bytes go, it keeps a weak reference, so that this address can't be given to another storage:
if the user still holds the bytes, a second ``pack`` finds the part, and ``unpack`` the bytes.

[Note: version probes] Saved-tensor hooks switch off autograd's own check that a saved tensor was
not changed. A view therefore keeps an alias, which shares the tensor's version counter. When the
bytes are let go, the alias is exchanged for one without bytes that still shares the counter. So a
change in place is an error whenever it happens, and wherever the bytes are, as in plain autograd.
"""

import weakref
from collections import deque
from functools import cache
from typing import TypeAlias

import torch

from offload.swap.homes import Home  # noqa: TC001 (as all of ours)
from offload.swap.places import Place
from offload.swap.residency import Residency
from offload.tiers.base import Block
from offload.tiers.lanes import Transfer

_Layout: TypeAlias = tuple[torch.dtype, int, torch.Size, tuple[int, ...], bool, bool]

_TIDY_AT = 16  # views of a part, dead ones included
_READY, _ABSENT = Residency.READY, Residency.ABSENT  # asked of the class they take their time
_MODIFIED = (
    "one of the variables needed for gradient computation has been modified by an inplace "
    "operation after it was saved"
)


class View:
    """One tensor as it was saved, its layout and version: what autograd keeps.

    Attributes:
        tensor: an alias, or a probe without bytes; see [Note: version probes].
        part: the bytes; None if they are never moved.
        name: of the weight that it is, or is a view of.
    """

    __slots__ = ("__weakref__", "layout", "name", "part", "tensor", "version")

    def __init__(
        self, tensor: torch.Tensor, part: "Part | None" = None, name: str | None = None
    ) -> None:
        self.tensor = tensor
        self.version = tensor._version
        self.layout: _Layout | None = None  # of the tensor, while there is a probe
        self.part = part
        self.name = name

    def check(self) -> None:
        """Raise if the tensor was modified in place since it was saved.

        Raises:
            RuntimeError: it was, as autograd raises it.
        """
        if self.tensor._version != self.version:
            raise modified_error(self.tensor._version, self.version)

    def is_modified(self) -> bool:
        """Whether the tensor was modified in place since it was saved."""
        return self.tensor._version != self.version

    def let_go(self) -> None:
        """Stop holding the bytes."""
        if self.layout is None:
            tensor = self.tensor
            self.layout = (
                tensor.dtype,
                int(tensor.storage_offset()),
                tensor.size(),
                tensor.stride(),
                tensor.is_conj(),
                tensor.is_neg(),
            )
            self._exchange(_no_bytes(tensor.device))

    def come_back(self, memory: torch.UntypedStorage) -> None:
        """Be the same view of ``memory``, which has the storage's bytes."""
        if self.layout is not None:
            dtype, offset, size, stride, conjugate, negative = self.layout
            view = torch.empty(0, dtype=dtype, device=memory.device)
            view.set_(memory, offset, size, stride)
            view = torch._conj(view) if conjugate else view
            self._exchange(torch._neg_view(view) if negative else view)
            self.layout = None

    def _exchange(self, content: torch.Tensor) -> None:
        # In a new alias: whoever has been given the old one keeps its bytes.
        alias = self.tensor.detach()
        alias.data = content
        self.tensor = alias


def modified_error(version: int, expected: int) -> RuntimeError:
    """What autograd raises if a saved tensor was modified in place."""
    return RuntimeError(
        f"{_MODIFIED}: it is at version {version}; expected version {expected} instead"
    )


@cache
def _no_bytes(device: torch.device) -> torch.Tensor:
    return torch.empty(0, device=device)


class Part:
    """The bytes behind saved views: one storage, from its first ``pack`` to its last handle."""

    __slots__ = (
        "__weakref__", "_known", "_tidy_at", "_weak", "key", "memory", "nbytes", "offset", "ref",
        "unit", "views",
    )  # fmt: skip

    def __init__(
        self, memory: torch.UntypedStorage, key: int, nbytes: int, known: "KnownParts"
    ) -> None:
        self.memory: torch.UntypedStorage | None = memory
        self.nbytes = nbytes
        self.key = key
        self.offset = 0  # in its unit
        self.unit: Unit | None = None  # none yet: waits for its batch to be full
        self.views: list[weakref.ref[View]] = []
        self._tidy_at = _TIDY_AT
        self._known = known
        self._weak: int | None = None
        self.ref = known[key] = weakref.ref(self)  # the one that others keep, too

    def view(self, tensor: torch.Tensor) -> View:
        """The handle of ``tensor``, which stands on the bytes in memory."""
        view = View(tensor, self)
        views = self.views
        views.append(weakref.ref(view))
        if len(views) > self._tidy_at:
            self.views = [known for known in views if known() is not None]
            self._tidy_at = max(_TIDY_AT, 2 * len(self.views))
        return view

    def living_views(self) -> list[View]:
        """The handles that somebody still needs."""
        return [view for known in self.views if (view := known()) is not None]

    def hold(self, memory: torch.UntypedStorage) -> None:
        """``memory`` has the bytes from now on."""
        if memory._cdata != self.key or self._weak is not None:
            self._forget_key()
            self.key = memory._cdata
            self._known[self.key] = self.ref
        for view in self.living_views():
            view.let_go()  # of other memory
        self.memory = memory

    def let_go(self) -> None:
        """Hold the bytes no longer; if the user does, they can still be found."""
        if self.memory is not None:
            for view in self.living_views():
                view.let_go()
            self._weak = int(self.memory._weak_ref())  # type: ignore[call-overload]
            self.memory = None

    def living(self) -> torch.UntypedStorage | None:
        """The storage, if the user still holds it."""
        if self._weak is None:
            return self.memory
        storage: torch.UntypedStorage | None = torch.UntypedStorage._new_with_weak_ptr(self._weak)
        return storage

    def _forget_key(self) -> None:
        if self._known.get(self.key) is self.ref:
            del self._known[self.key]
        if self._weak is not None:
            torch.UntypedStorage._free_weak_ref(self._weak)
            self._weak = None

    def __del__(self) -> None:
        self._forget_key()


KnownParts: TypeAlias = dict[int, weakref.ref[Part]]  # by key


class Unit:
    """What moves as one, and where it is.

    Residency: READY in memory, in a block too if there is one; WRITING both soon; ABSENT in its
    block; FETCHING in its block, in memory soon.
    """

    __slots__ = (
        "__weakref__", "arrival", "arriving", "block", "changed", "digest", "doubtful",
        "graveyard", "home", "index", "nbytes", "origin", "parts", "position", "residency",
        "stays", "transfer",
    )  # fmt: skip

    def __init__(self, parts: list[Part], nbytes: int, index: int, graveyard: "Graveyard") -> None:
        self.parts = [part.ref for part in parts]
        self.nbytes = nbytes
        self.index = index  # in the order of packing
        self.origin: object = None  # the pass that packed it
        self.position = 0  # in that pass
        self.stays = False  # backward needs it early: the last to be given up
        self.graveyard = graveyard
        self.home: Home | None = None
        self.block: Block | None = None
        self.digest: int | None = None  # of the bytes in the block
        self.changed = False  # the bytes in memory are known not to be those of the block
        self.doubtful = False  # the bytes in memory may no longer be those of the block
        self.transfer: Transfer | None = None
        self.arriving: torch.UntypedStorage | None = None
        self.arrival: Transfer | None = None  # has filled the memory for those who wait for it
        self.residency = _READY

    @property
    def name(self) -> str:
        """What records call it."""
        return f"saved {self.index}"

    def living(self) -> list[Part]:
        """Its parts that somebody still needs."""
        return [part for known in self.parts if (part := known()) is not None]

    def gathered(self, place: Place) -> torch.UntypedStorage:
        """One storage with the bytes of all living parts, which are in memory."""
        parts = self.living()
        if len(self.parts) == 1 and parts and parts[0].memory is not None:
            return parts[0].memory
        pieces = [
            (part.offset, part.nbytes, part.memory) for part in parts if part.memory is not None
        ]
        return place.gather(pieces, self.nbytes)

    def held_by_user(self) -> tuple[Part, torch.UntypedStorage] | None:
        """The one part and its storage, if somebody else still holds that."""
        parts = self.living()
        if len(self.parts) > 1 or not parts:
            return None
        memory = parts[0].living()
        return None if memory is None else (parts[0], memory)

    def __del__(self) -> None:
        held_nbytes = self.nbytes if self.residency is not _ABSENT else 0
        self.graveyard.add(held_nbytes, self.block, self.transfer)


class Graveyard:
    """What dead units leave; they die on any thread, at any moment.

    That is the bytes that each held in memory, its block, and the transfer that uses both until
    it has ended. ``bury`` has something to do while there are ``dead`` or ``buried`` ones.
    """

    def __init__(self) -> None:
        self.dead: deque[tuple[int, Block | None, Transfer | None]] = deque()
        self.buried: list[tuple[Block, Transfer | None]] = []  # used by a transfer still

    def add(self, held_nbytes: int, block: Block | None, transfer: Transfer | None) -> None:
        """A unit has died."""
        self.dead.append((held_nbytes, block, transfer))

    def bury(self) -> tuple[int, int]:
        """Give blocks back that no transfer uses.

        Returns:
            Bytes of memory that the units which died meanwhile held, and how many held none.
        """
        held_nbytes = absent = 0
        while self.dead:
            nbytes, block, transfer = self.dead.popleft()
            held_nbytes += nbytes
            absent += not nbytes
            if block is not None:
                self.buried.append((block, transfer))
        if self.buried:
            self.buried = [entry for entry in self.buried if not _is_released(*entry)]
        return held_nbytes, absent


def _is_released(block: Block, transfer: Transfer | None) -> bool:
    """Give ``block`` back, unless ``transfer`` still uses it."""
    if transfer is not None and not transfer.done():
        return False
    block.release()
    return True
