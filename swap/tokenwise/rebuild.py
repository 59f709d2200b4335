"""Backward: rebuilds one part of a block at a time, into one of two buffers."""

import weakref
from dataclasses import dataclass
from functools import partial

import torch

from offload.swap.tokenwise.buffers import RoundingBuffers, layout
from offload.swap.tokenwise.keeper import Keeper
from offload.swap.tokenwise.measure import Measurements, Rebuilding
from offload.swap.tokenwise.passes import BlockPass, Part, Piece, RowsHandle
from offload.swap.tokenwise.program import Program
from offload.swap.tokenwise.replay import direct, interchangeable, rows_of
from offload.swap.tokenwise.timing import Stopwatch, Timer


@dataclass(frozen=True, slots=True)
class _Rebuilt:
    """A part whose pieces are whole again, and the bytes borrowed for it."""

    of: weakref.ref[Part]
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Begun:
    """The backward of a block, from its first rebuild on.

    Attributes:
        own: runs while backward computes, but for what is rebuilt.
        rebuilding: runs while rows are.
    """

    of: weakref.ref[BlockPass]
    measurements: Measurements
    figures: Rebuilding
    previous: weakref.ref[BlockPass] | None
    cut: int
    own: Stopwatch
    rebuilding: Stopwatch
    heads: Stopwatch


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

    At most two parts are held at a time, the second one while something of the first is still
    needed: parts of several forwards in turn, say.

    [Note: rounding buffers] On a device each of the two has a flat buffer, used again and again,
    so that the allocator never splits or grows. On the host every piece has memory of its own:
    its pages go back as soon as autograd is through with it, which a flat buffer can't do.

    Args:
        rounding: take flat buffers on the host, too.
    """

    def __init__(self, keeper: Keeper, timer: Timer, *, rounding: bool = False) -> None:
        self._keeper = keeper
        self._timer = timer
        self._rounding = rounding or timer.accelerator is not None
        self._buffers = RoundingBuffers(timer.accelerator)
        self._rebuilt: list[_Rebuilt | None] = [None, None]
        self._last_turn = 0
        self._living: dict[int, weakref.ref[Part]] = {}
        self._begun: _Begun | None = None

    @property
    def held_nbytes(self) -> int:
        """Bytes of the parts that are whole, as far as they were borrowed."""
        return sum(rebuilt.nbytes for rebuilt in self._rebuilt if rebuilt is not None)

    def watch(self, part: Part) -> None:
        """``part`` may be rebuilt later."""
        key = id(part)
        self._living[key] = weakref.ref(part, lambda _ref: self._ended(key))

    def pause(self) -> None:
        """What comes until ``resume`` is not backward's own."""
        if self._begun is not None:
            self._begun.own.pause()

    def resume(self) -> None:
        """Backward goes on."""
        if self._begun is not None:
            self._begun.own.resume()

    def end_pass(self) -> None:
        """Backward has ended; whose end was not seen is not measured."""
        self._begun = None

    def unpack(self, handle: RowsHandle) -> torch.Tensor:
        """The saved tensor.

        Raises:
            RuntimeError: it, or a parameter that it is rebuilt from, was modified in place.
        """
        handle.check()
        slot, piece = handle.slot, handle.piece
        if piece.tensor is None:
            begun = self._begin(handle.part.block_pass)
            begun.own.pause()
            self._rebuild(handle.part, begun.rebuilding)
            begun.own.resume()
        root = piece.tensor
        assert root is not None
        begin = root.storage_offset() * root.itemsize
        with torch.no_grad():
            return torch.empty(0, dtype=slot.dtype, device=root.device).set_(
                root.untyped_storage(),
                begin // slot.dtype.itemsize + slot.offset,
                slot.shape,
                slot.stride,
            )

    def _rebuild(self, part: Part, computing: Stopwatch) -> None:
        block_pass = part.block_pass
        replay = block_pass.replay
        assert replay is not None
        program, pieces = replay.chain.program, list(part.pieces.values())
        tensors = self._memory_for(part, pieces, program)
        heads: dict[int, torch.Tensor] = {}
        sink = _Tails()
        for piece, tensor in zip(pieces, tensors, strict=True):
            target = piece.target
            tail = rows_of(tensor, target.axis, replay.cut, program.rows)
            sink.add(target.root, tail, straight=direct(target.axis, tail))
            if replay.cut:
                heads[target.storage] = rows_of(tensor, target.axis, 0, replay.cut)
        block_pass.rebuild(sink.tails.keys(), sink, heads, computing)
        for piece, tensor in zip(pieces, tensors, strict=True):
            piece.tensor = tensor

    def _memory_for(self, part: Part, pieces: list[Piece], program: Program) -> list[torch.Tensor]:
        """What is to fill each piece: [Note: rounding buffers]."""
        device = part.block_pass.device
        offsets, nbytes = layout([piece.target.nbytes for piece in pieces])
        turn = self._free_turn()
        self._rebuilt[turn] = _Rebuilt(weakref.ref(part), nbytes)
        self._keeper.borrow(nbytes)
        values = [program.values[piece.target.root] for piece in pieces]
        if device.type == "cpu" and not self._rounding:
            return [
                torch.empty_strided(value.shape, value.stride, dtype=value.dtype)
                for value in values
            ]
        flat = self._buffers.take(turn, nbytes, device).untyped_storage()
        return [
            torch.empty(0, dtype=value.dtype, device=device).set_(
                flat, offset // value.itemsize, value.shape, value.stride
            )
            for value, offset in zip(values, offsets, strict=True)
        ]

    def _free_turn(self) -> int:
        """The place of the part that ended last, else of the older one, which is let go."""
        turn = self._last_turn
        if self._rebuilt[turn] is not None:
            turn ^= 1
            self._end(turn)
        self._last_turn = turn
        return turn

    def _end(self, turn: int) -> None:
        rebuilt = self._rebuilt[turn]
        if rebuilt is None:
            return
        self._rebuilt[turn] = None
        self._keeper.borrow(-rebuilt.nbytes)
        part = rebuilt.of()
        if part is not None:
            part.let_go()

    def _begin(self, block_pass: BlockPass) -> _Begun:
        """Its turn: that of the block before has just ended, if it follows on that one."""
        begun = self._begun
        if begun is not None and begun.of() is block_pass:
            return begun
        if begun is not None and begun.previous is not None and begun.previous() is block_pass:
            begun.own.tell(begun.measurements.backward)
            begun.rebuilding.tell(partial(begun.figures.rebuild, begun.cut))
            begun.heads.tell(partial(begun.figures.heads, begun.cut))
        assert block_pass.replay is not None
        self._begun = _Begun(
            weakref.ref(block_pass),
            block_pass.measurements,
            block_pass.measurements.of(block_pass.replay.chain),
            block_pass.previous,
            block_pass.replay.cut,
            self._timer.stopwatch(running=True),
            self._timer.stopwatch(),
            block_pass.heads,
        )
        return self._begun

    def _ended(self, key: int) -> None:
        """The graph of one part is gone."""
        self._living.pop(key, None)
        for turn, rebuilt in enumerate(self._rebuilt):
            if rebuilt is not None and rebuilt.of() is None:
                self._end(turn)
        if not self._living:
            self._buffers.give_back()
