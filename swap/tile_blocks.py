"""A tile whose states are rounded, or do not exist yet, is stepped by small blocks.

[Note: blocks of a tile] Widened, stepped and rounded as a whole, a tile's states pass through
memory three times in float32, and that takes longer than the step itself. Here they are float32
only in a scratch of a few MiB that every block uses again; staging memory has them as they are read
and written. An optimizer that may be cut into tiles may be cut so, too (``optim_kinds``
[Note: tiles]), and the random bits of an element depend on its place alone, so nothing depends on
the blocks. They stay in the processor's cache.

In a first step the optimizer makes the states itself, in fresh memory that no budget has planned
for. A block's are little; a tile's would be half of its staging once more.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import Optimizer

from offload.swap.optim_kinds import step_on
from offload.swap.rounding import round_and_destroy
from offload.swap.tile_parts import Part
from offload.swap.tiles import Piece, cut
from offload.tiers.memory import HostBuffer

BLOCK_NUMEL = 1 << 19  # of most tiles; an optimizer's step costs as much as 30,000 elements
_LEAST_NUMEL = 1 << 16


def block_numel(chunk_numel: int) -> int:
    """Elements of a block: little beside a tile of ``chunk_numel`` elements."""
    return min(max(min(BLOCK_NUMEL, chunk_numel // 4 // 64 * 64), _LEAST_NUMEL), chunk_numel)


class BlockStep:
    """Steps tiles by blocks.

    Args:
        chunk_numel: elements of one tile.
    """

    def __init__(self, optimizer: Optimizer, chunk_numel: int) -> None:
        self._optimizer = optimizer
        self._numel = block_numel(chunk_numel)
        self._scratch: list[tuple[HostBuffer, torch.Tensor]] = []  # of one block's states

    def step(self, group: Mapping[str, Any], parts: Sequence[Part]) -> None:
        """Step ``parts``, of the optimizer's ``group``; what is rounded is ready to be written."""
        for pieces in cut([part.piece.numel for part in parts], self._numel):
            blocks = self._lay_out(parts, pieces)
            for block in blocks:
                block.widen()
            afters = step_on(
                self._optimizer,
                group,
                [block.parameter for block in blocks],
                [block.state_before() for block in blocks],
            )
            for block, after in zip(blocks, afters, strict=True):
                block.take(after)

    def _lay_out(self, parts: Sequence[Part], pieces: Sequence[Piece]) -> "list[_Block]":
        blocks, begin = [], 0
        for piece in pieces:
            block = _Block(parts[piece.index], piece)
            for number, name in enumerate(block.part.by_blocks):
                block.values[name] = self._values(number)[begin : begin + piece.numel]
            blocks.append(block)
            begin += piece.numel
        return blocks

    def _values(self, number: int) -> torch.Tensor:
        while len(self._scratch) <= number:
            buffer = HostBuffer(4 * self._numel)
            self._scratch.append((buffer, buffer.tensor(torch.float32, (self._numel,))))
        return self._scratch[number][1]

    def close(self) -> None:
        """Return the scratch memory to the kernel; the next step takes it again."""
        while self._scratch:
            self._scratch.pop()[0].release()


@dataclass(slots=True, eq=False)
class _Block:
    """A piece of a part, whose rounded states are float32 in scratch memory.

    Attributes:
        piece: counted from the beginning of ``part``.
        values: of states that are rounded, by name.
    """

    part: Part
    piece: Piece
    values: dict[str, torch.Tensor] = field(default_factory=dict)
    parameter: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        gradient = self.part.parameter.grad
        assert gradient is not None
        self.parameter = self._of(self.part.parameter)
        self.parameter.grad = self._of(gradient)

    def _of(self, values: torch.Tensor) -> torch.Tensor:
        return values[self.piece.start : self.piece.stop]

    def widen(self) -> None:
        for name, values in self.values.items():
            if name in self.part.target.before:
                values.copy_(self._of(self.part.by_blocks[name].read))

    def state_before(self) -> dict[str, Any]:
        states = self.part.states
        return {
            name: self.values[name]
            if name in self.values
            else self._of(value)
            if name in states
            else value
            for name, value in self.part.state_before().items()
        }

    def take(self, after: Mapping[str, Any]) -> None:
        """Keep what the optimizer made of the state; round it."""
        start, stop = self.piece.start, self.piece.stop
        for name, value in after.items():
            values = self.values.get(name)
            if values is None:
                self.part.take({name: value}, start, stop)
                continue
            if value.data_ptr() != values.data_ptr():
                values.copy_(value)  # made afresh
            self.part.target.after.setdefault(name, None)
            round_and_destroy(
                values,
                self._of(self.part.by_blocks[name].written),
                key=self.part.target.rounding[name].key,
                start=self.part.piece.start + start,
            )
