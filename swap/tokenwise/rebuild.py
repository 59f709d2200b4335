"""Backward: rebuilds one part of a block at a time, into one of two buffers."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch

from offload.swap.tokenwise.buffers import RoundingBuffers, layout
from offload.swap.tokenwise.home import Home
from offload.swap.tokenwise.passes import BlockPass, Measured, Part, RowsHandle
from offload.swap.tokenwise.replay import direct, interchangeable, rows_of


@dataclass(frozen=True, slots=True)
class _Rebuilt:
    """The storages of one part, whole again."""

    of: weakref.ref[Part]
    tensors: dict[int, torch.Tensor]  # by storage: what fills it


@dataclass(frozen=True, slots=True)
class _Begun:
    """The backward of a block, from its first rebuild on."""

    of: weakref.ref[BlockPass]
    plan: Measured
    previous: weakref.ref[BlockPass] | None
    cut: int
    began_s: float


class _Tails:
    """Rebuilt rows go behind the cut of their tensors."""

    def __init__(self) -> None:
        self.tails: dict[int, torch.Tensor] = {}  # by value
        self._straight: set[int] = set()

    def add(self, value: int, tail: torch.Tensor, *, straight: bool) -> None:
        self.tails[value] = tail
        if straight:
            self._straight.add(value)

    def place(self, value: int) -> torch.Tensor | None:
        return self.tails[value] if value in self._straight else None

    def take(self, value: int, rows: torch.Tensor) -> torch.Tensor:
        tail = self.tails[value]
        if rows.data_ptr() != tail.data_ptr():  # else a product has written there
            tail.copy_(rows.reshape(tail.shape))
        return tail if interchangeable(rows, tail) else rows


class Rebuilder:
    """Gives back saved tensors whose tail rows were not swapped.

    The second buffer serves while something of the first one is still needed: parts of several
    forwards in turn, say. Both are freed when no part that may need them lives any more.
    """

    def __init__(self, home: Home, clock: Callable[[], float]) -> None:
        self._home = home
        self._clock = clock
        self._buffers = RoundingBuffers()
        self._rebuilt: list[_Rebuilt | None] = [None, None]
        self._last_turn = 0
        self._living: dict[int, weakref.ref[Part]] = {}
        self._begun: _Begun | None = None
        self._waited_s = 0.0  # in ``unpack`` since then
        self._rebuild_s = 0.0  # of its parts so far
        self._heads_s = 0.0

    @property
    def buffers_nbytes(self) -> int:
        """Bytes of the two buffers."""
        return self._buffers.nbytes

    def watch(self, part: Part) -> None:
        """``part`` may be rebuilt later."""
        key = id(part)
        self._living[key] = weakref.ref(part, lambda _ref: self._ended(key))

    def waited(self, seconds: float) -> None:
        """Time in backward that is not backward's own."""
        self._waited_s += seconds

    def unpack(self, handle: RowsHandle) -> torch.Tensor:
        """The saved tensor.

        Raises:
            RuntimeError: it, or a parameter that it is rebuilt from, was modified in place.
        """
        handle.check()
        slot = handle.slot
        root = self._tensors_of(handle.part)[slot.storage]
        begin = root.storage_offset() * root.itemsize
        with torch.no_grad():
            return torch.empty(0, dtype=slot.dtype, device=root.device).set_(
                root.untyped_storage(),
                begin // slot.dtype.itemsize + slot.offset,
                slot.shape,
                slot.stride,
            )

    def _tensors_of(self, part: Part) -> dict[int, torch.Tensor]:
        for rebuilt in self._rebuilt:
            if rebuilt is not None and rebuilt.of() is part:
                return rebuilt.tensors
        began_s = self._clock()
        self._measure_backward(part.block_pass, began_s)
        tensors = self._rebuild(part)
        self._waited_s += self._clock() - began_s
        return tensors

    def _rebuild(self, part: Part) -> dict[int, torch.Tensor]:
        block_pass = part.block_pass
        replay = block_pass.replay
        assert replay is not None
        program, targets = replay.chain.program, list(part.targets.values())
        offsets, nbytes = layout([target.nbytes for target in targets])
        turn, flat = self._take_buffer(nbytes, block_pass.device)
        tensors: dict[int, torch.Tensor] = {}
        heads: dict[int, torch.Tensor] = {}
        sink = _Tails()
        for target, offset in zip(targets, offsets, strict=True):
            value = program.values[target.root]
            tensor = torch.empty(0, dtype=value.dtype, device=flat.device).set_(
                flat.untyped_storage(), offset // value.itemsize, value.shape, value.stride
            )
            tensors[target.storage] = tensor
            tail = rows_of(tensor, target.axis, replay.cut, program.rows)
            sink.add(target.root, tail, straight=direct(target.axis, tail))
            if replay.cut:
                heads[target.storage] = rows_of(tensor, target.axis, 0, replay.cut)
        self._rebuild_s += block_pass.rebuild(sink.tails.keys(), sink, heads)
        self._heads_s = block_pass.heads_s
        self._rebuilt[turn] = _Rebuilt(weakref.ref(part), tensors)
        return tensors

    def _take_buffer(self, nbytes: int, device: torch.device) -> tuple[int, torch.Tensor]:
        """The buffer that was used last if its part has ended, else the other one."""
        turn = self._last_turn
        if self._rebuilt[turn] is not None:
            turn ^= 1
            self._rebuilt[turn] = None  # its views are not holders of the buffer any more
        self._last_turn = turn
        before = self._buffers.nbytes
        flat = self._buffers.take(turn, nbytes, device)
        self._home.borrow(self._buffers.nbytes - before)
        return turn, flat

    def _measure_backward(self, block_pass: BlockPass, now_s: float) -> None:
        """Another block's turn: that of the one before has just ended, if it follows on it."""
        begun = self._begun
        if begun is not None and begun.of() is block_pass:
            return
        if begun is not None and begun.previous is not None and begun.previous() is block_pass:
            begun.plan.measured_backward(now_s - begun.began_s - self._waited_s)
            begun.plan.measured(self._rebuild_s, self._heads_s, begun.cut)
        assert block_pass.replay is not None
        self._begun = _Begun(
            weakref.ref(block_pass),
            block_pass.plan,
            block_pass.previous,
            block_pass.replay.cut,
            now_s,
        )
        self._waited_s = self._rebuild_s = 0.0

    def _ended(self, key: int) -> None:
        """The graph of one part is gone."""
        self._living.pop(key, None)
        for turn, rebuilt in enumerate(self._rebuilt):
            if rebuilt is not None and rebuilt.of() is None:
                self._rebuilt[turn] = None
        if not self._living:
            self._home.borrow(-self._buffers.nbytes)
            self._buffers.give_back()
