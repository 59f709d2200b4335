"""Backward: rebuilds one block at a time, into one of two buffers."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch

from offload.swap.tokenwise.buffers import RoundingBuffers, layout
from offload.swap.tokenwise.home import Home
from offload.swap.tokenwise.passes import BlockPass, Measured, RowsHandle
from offload.swap.tokenwise.replay import rows_of


@dataclass(slots=True)
class _Rebuilt:
    """The storages of one forward of a block, whole again."""

    of: "weakref.ref[BlockPass]"
    tensors: dict[int, torch.Tensor]  # by storage: what fills it


@dataclass(frozen=True, slots=True)
class _Ended:
    """The rebuild that came last."""

    plan: Measured
    previous: "weakref.ref[BlockPass] | None"
    at_s: float


class Rebuilder:
    """Gives back saved tensors whose tail rows were not swapped.

    Both buffers are freed when no forward that may need them lives any more.
    """

    def __init__(self, home: Home, clock: Callable[[], float]) -> None:
        self._home = home
        self._clock = clock
        self._buffers = RoundingBuffers()
        self._rebuilt: list[_Rebuilt | None] = [None, None]
        self._living: dict[int, weakref.ref[BlockPass]] = {}
        self._last: _Ended | None = None
        self._waited_s = 0.0  # in ``unpack`` since then

    @property
    def buffers_nbytes(self) -> int:
        """Bytes of the two buffers."""
        return self._buffers.nbytes

    def watch(self, block_pass: BlockPass) -> None:
        """``block_pass`` may be rebuilt later."""
        key = id(block_pass)
        self._living[key] = weakref.ref(block_pass, lambda _ref: self._ended(key))

    def waited(self, seconds: float) -> None:
        """Time that unpacking something else has taken."""
        self._waited_s += seconds

    def unpack(self, handle: RowsHandle) -> torch.Tensor:
        """The saved tensor.

        Raises:
            RuntimeError: it, or a parameter that it is rebuilt from, was modified in place.
        """
        handle.check()
        tensors = self._find(handle.block_pass)
        if tensors is None:
            tensors = self._rebuild(handle.block_pass)
        slot = handle.slot
        root = tensors[slot.storage]
        begin = root.storage_offset() * root.itemsize
        with torch.no_grad():
            return torch.empty(0, dtype=slot.dtype, device=root.device).set_(
                root.untyped_storage(),
                begin // slot.dtype.itemsize + slot.offset,
                slot.shape,
                slot.stride,
            )

    def _find(self, block_pass: BlockPass) -> dict[int, torch.Tensor] | None:
        for rebuilt in self._rebuilt:
            if rebuilt is not None and rebuilt.of() is block_pass:
                return rebuilt.tensors
        return None

    def _rebuild(self, block_pass: BlockPass) -> dict[int, torch.Tensor]:
        began_s = self._clock()
        self._measure_backward(block_pass, began_s)
        replay = block_pass.replay
        assert replay is not None
        program, targets = replay.chain.program, replay.chain.targets
        offsets, nbytes = layout([target.nbytes for target in targets])
        turn = self._buffers.next_turn()
        self._rebuilt[turn] = None  # its views are not holders of the buffer any more
        before = self._buffers.nbytes
        flat = self._buffers.take(turn, nbytes, block_pass.device)
        self._home.borrow(self._buffers.nbytes - before)
        tensors: dict[int, torch.Tensor] = {}
        tails: dict[int, torch.Tensor] = {}
        heads: dict[int, torch.Tensor] = {}
        for target, offset in zip(targets, offsets, strict=True):
            if target.storage not in block_pass.handed_out:
                continue
            value = program.values[target.root]
            tensor = torch.empty(0, dtype=value.dtype, device=flat.device).set_(
                flat.untyped_storage(), offset // value.itemsize, value.shape, value.stride
            )
            tensors[target.storage] = tensor
            tails[target.root] = rows_of(tensor, target.axis, replay.cut, program.rows)
            if replay.cut:
                heads[target.storage] = rows_of(tensor, target.axis, 0, replay.cut)
        rebuild_s = block_pass.rebuild(tails, heads, self._clock)
        self._rebuilt[turn] = _Rebuilt(weakref.ref(block_pass), tensors)
        block_pass.plan.measured(rebuild_s, replay.cut)
        self._last = _Ended(block_pass.plan, block_pass.previous, self._clock())
        self._waited_s = 0.0
        return tensors

    def _measure_backward(self, block_pass: BlockPass, now_s: float) -> None:
        """The block whose turn it was has just ended, if this one comes right before it."""
        last = self._last
        if last is not None and last.previous is not None and last.previous() is block_pass:
            last.plan.measured_backward(now_s - last.at_s - self._waited_s)

    def _ended(self, key: int) -> None:
        """The graph of one forward of a block is gone."""
        self._living.pop(key, None)
        for turn, rebuilt in enumerate(self._rebuilt):
            if rebuilt is not None and rebuilt.of() is None:
                self._rebuilt[turn] = None
        if not self._living:
            self._home.borrow(-self._buffers.nbytes)
            self._buffers.give_back()
