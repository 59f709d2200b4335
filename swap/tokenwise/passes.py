"""One forward of one block: what it saves, and what backward rebuilds of it.

[Note: one forward of a block] The first forward with inputs of some shape is recorded and swaps
everything whole; at its end the chain is found and its rows are rebuilt and compared, while what
was saved is still at hand. A cut that has verified is used from then on. Tensors that the chain
starts from are handed to the keeper at the next moment outside an operation: inside one, their
version counters are not up to date.

[Note: versions] Saved-tensor hooks switch off autograd's check for tensors changed in place. A
handle therefore keeps a *witness*: an alias whose storage is taken away, so that it holds no
bytes, but still shares the version counter of what was saved. The parameters that are read again
in backward are checked by version and storage.
"""

import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from offload.swap.tokenwise.analyse import Target
from offload.swap.tokenwise.keeper import Keeper
from offload.swap.tokenwise.measure import Measurements
from offload.swap.tokenwise.program import Slot, Value
from offload.swap.tokenwise.record import Recorder
from offload.swap.tokenwise.replay import Replay, Sink, rows_of
from offload.swap.tokenwise.timing import Stopwatch

_MODIFIED = (
    "one of the variables needed for gradient computation has been modified by an inplace "
    "operation after it was saved"
)


class Weights:
    """The parameters and buffers of a block, as they are now.

    Attributes:
        tensors: by name, to compute with.
        by_storage: names by storage (``_cdata``).
        prefix: of the names in the model.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        present = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        self.tensors: Mapping[str, torch.Tensor] = present
        self.by_storage: Mapping[int, str] = names_by_storage(present)
        self.prefix = f"{name}." if name else ""

    def state_of(self, name: str) -> tuple[int, int]:
        """Changes when ``name`` is written to, or has another storage; its version is the first."""
        return state_of(self.tensors[name])

    def use(self, names: Iterable[str], keeper: Keeper) -> None:
        """These are read now."""
        keeper.use_weights([self.tensors[name] for name in names])


class BlockPass:
    """One forward of a block.

    Args:
        replay: what backward rebuilds; without it everything is swapped whole.
        on_part: is told of each part that backward may ask for.
        heads: runs while heads are copied out of their tensors, and back.
        keeps: whether everything is swapped whole, and is fetched once more when the forward
            ends to be compared with what is rebuilt.
    """

    def __init__(
        self,
        keeper: Keeper,
        weights: Weights,
        recorder: Recorder,
        replay: Replay | None,
        measurements: Measurements,
        *,
        on_part: "Callable[[Part], None]",
        heads: Stopwatch,
        device: torch.device,
        keeps: bool,
        previous: "BlockPass | None",
    ) -> None:
        self.measurements = measurements
        self.on_part = on_part
        self.device = device
        self.keeper = keeper
        self.weights = weights
        self.recorder: Recorder | None = recorder
        self.replay = replay
        self.keeps = keeps
        self.previous = weakref.ref(previous) if previous is not None else None
        self.packed_saved: dict[int, Any] = {}  # by storage, to be compared
        self.packed_sources: dict[int, Any] = {}
        self.packed_heads: dict[int, Any] = {}
        self.heads = heads
        self._parts: weakref.WeakValueDictionary[int, Part] = weakref.WeakValueDictionary()
        self._pending: list[tuple[int, torch.Tensor]] = []
        self._targets = (
            {target.storage: target for target in replay.chain.targets} if replay else {}
        )
        self._versions = {
            name: weights.state_of(name) for name in (replay.weights if replay else ())
        }

    def wanted(self, value: int, tensor: torch.Tensor) -> None:
        """The recorder has met a tensor that the chain may start from."""
        self._pending.append((value, tensor))

    def pack(self, tensor: torch.Tensor) -> Any:
        """Autograd saves ``tensor`` during this forward."""
        assert self.recorder is not None
        slot = self.recorder.saved(tensor)
        self._take_sources()
        if self.keeps:
            if slot.root is not None and slot.storage not in self.packed_saved:
                whole = root_of(tensor, self.recorder.value(slot.root))
                self.packed_saved[slot.storage] = self.keeper.pack(whole)
            return self.keeper.pack(tensor)
        if slot.storage in self._targets and self.recorder.diverged is None:
            return self._rows_handle(slot, tensor)
        return self.keeper.pack(tensor)

    def saved(self, storage: int) -> torch.Tensor:
        """What fills a storage of which this forward has saved views."""
        return self.keeper.unpack(self.packed_saved[storage])

    def leave(self) -> None:
        """The forward has ended."""
        self._take_sources()
        self.recorder = None

    def _take_sources(self) -> None:
        for value, tensor in self._pending:
            self.packed_sources[value] = self.keeper.pack(tensor)
        self._pending.clear()

    def _rows_handle(self, slot: Slot, tensor: torch.Tensor) -> "RowsHandle":
        assert self.replay is not None
        target = self._targets[slot.storage]
        cut = self.replay.cut
        if cut and slot.storage not in self.packed_heads:
            root = root_of(tensor, self.replay.chain.program.values[target.root])
            with self.heads:
                rows = rows_of(root, target.axis, 0, cut)
                head = rows.clone(memory_format=torch.contiguous_format)
            self.packed_heads[slot.storage] = self.keeper.pack(head)
        part = self._parts.get(target.part)
        if part is None:
            part = self._parts[target.part] = Part(self)
            self.on_part(part)
        return RowsHandle(part, part.piece_of(target), slot, tensor)

    def packed(self) -> list[Any]:
        """Everything that backward needs from the keeper, in the order of need."""
        return [*self.packed_sources.values(), *self.packed_heads.values()]

    def check_weights(self, names: Iterable[str]) -> None:
        """Raises RuntimeError if one of these parameters was changed since forward."""
        for name in names:
            expected, found = self._versions[name], self.weights.state_of(name)
            if found != expected:
                shape = tuple(self.weights.tensors[name].shape)
                raise RuntimeError(
                    f"{_MODIFIED}: {self.weights.prefix}{name} {shape}, which "
                    f"rows are rebuilt from, is at version {found[0]}; expected version "
                    f"{expected[0]} and the same storage. Step the optimizer after backward"
                )

    def rebuild(
        self,
        roots: Collection[int],
        sink: Sink,
        heads: Mapping[int, torch.Tensor],
        computing: Stopwatch,
    ) -> None:
        """Give ``sink`` the tail rows of ``roots`` while ``heads`` (by storage) are fetched.

        ``computing`` runs while rows are rebuilt.

        Raises:
            RuntimeError: a source or a parameter was modified in place.
        """
        assert self.replay is not None
        self.check_weights(self.replay.weights_of(roots))
        needed = self.replay.sources_of(roots)
        packed = [self.packed_sources[value] for value in needed]
        self.keeper.prefetch([*packed, *(self.packed_heads[storage] for storage in heads)])
        sources = {value: self.keeper.unpack(self.packed_sources[value]) for value in needed}
        self._prefetch_what_follows()
        self.run(self.replay, roots, sources, sink, computing)
        del sources
        for storage, head in heads.items():
            fetched = self.keeper.unpack(self.packed_heads[storage])
            with self.heads:
                head.copy_(fetched)

    def _prefetch_what_follows(self) -> None:
        """What backward needs next: the rest of this block, then the block before it."""
        self.keeper.prefetch(self.packed())
        before = self.previous() if self.previous is not None else None
        if before is not None:
            self.keeper.prefetch(before.packed())

    def run(
        self,
        replay: Replay,
        roots: Collection[int],
        sources: Mapping[int, torch.Tensor],
        sink: Sink,
        computing: Stopwatch,
    ) -> None:
        """Execute ``replay`` with the block's weights as they are now; ``computing`` runs then."""
        self.weights.use(replay.weights_of(roots), self.keeper)
        with computing:
            replay.run(roots, sources, self.weights.tensors, sink)


class Piece:
    """A storage of which rows are rebuilt; it lives as long as the handles of its views.

    Attributes:
        tensor: what fills the storage, while it is rebuilt.
    """

    __slots__ = ("__weakref__", "target", "tensor")

    def __init__(self, target: Target) -> None:
        self.target = target
        self.tensor: torch.Tensor | None = None


class Part:
    """The pieces of one forward that are rebuilt together; it lives as long as one of them."""

    def __init__(self, block_pass: BlockPass) -> None:
        self.block_pass = block_pass
        self.pieces: weakref.WeakValueDictionary[int, Piece] = weakref.WeakValueDictionary()

    def piece_of(self, target: Target) -> Piece:
        """The piece of ``target``, made with its first handle."""
        piece = self.pieces.get(target.storage)
        if piece is None:
            piece = self.pieces[target.storage] = Piece(target)
        return piece

    def let_go(self) -> None:
        """Rebuilt tensors are not held any more, but by who was given them."""
        for piece in list(self.pieces.values()):
            piece.tensor = None


@dataclass(frozen=True, slots=True)
class _Witness:
    """Tells whether a saved tensor was changed: [Note: versions]."""

    alias: torch.Tensor
    version: int


class RowsHandle:
    """A saved tensor of which the tail rows are rebuilt."""

    __slots__ = ("part", "piece", "slot", "witness")

    def __init__(self, part: Part, piece: Piece, slot: Slot, tensor: torch.Tensor) -> None:
        self.part = part
        self.piece = piece
        self.slot = slot
        alias = tensor.detach()
        alias.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        self.witness = _Witness(alias, tensor._version)

    def check(self) -> None:
        """Raises RuntimeError if the tensor was changed in place since it was saved."""
        found, expected = self.witness.alias._version, self.witness.version
        if found != expected:
            raise RuntimeError(
                f"{_MODIFIED}: {tuple(self.slot.shape)} is at version {found}; "
                f"expected version {expected} instead"
            )


def root_of(tensor: torch.Tensor, root: Value) -> torch.Tensor:
    """The tensor that fills the storage of ``tensor``."""
    return torch.empty(0, dtype=root.dtype, device=tensor.device).set_(
        tensor.untyped_storage(), root.offset, root.shape, root.stride
    )


def names_by_storage(tensors: Mapping[str, torch.Tensor]) -> dict[int, str]:
    """The names of ``tensors`` by their storage's ``_cdata``, of plain ones."""
    return {
        tensor.untyped_storage()._cdata: name
        for name, tensor in tensors.items()
        if type(tensor) in (torch.Tensor, nn.Parameter, nn.Buffer)
        and tensor.layout is torch.strided
    }


def state_of(tensor: torch.Tensor) -> tuple[int, int]:
    """The version of ``tensor`` and its storage."""
    return tensor._version, int(tensor.untyped_storage()._cdata)
