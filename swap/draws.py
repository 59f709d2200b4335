"""What functions draw from torch's generator when they run in turns: as if one after the other.

[Note: draws in turns] One after the other, each function begins where the one before has left the
generator. In turns that place must be known before the one before has ended. It is the generator's
state, moved on by as many numbers as that function will draw, and a function draws as many as it
did when its input had the same shapes. So each has a state of its own, which is the generator's
while it runs; how many numbers it drew is counted when it has ended, by moving its first state on
until it is the last one; and that is known the next time. Functions of which it is not known run
one after the other, from their beginning, for they may keep the state that they meet (checkpoints
do); unless none that is known draws any. Whether what was foretold came true is seen at the end.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

_CHUNK = 1 << 16
_MOST = 1 << 24  # numbers that are counted; more than that: never foretold
_KNOWN = 4096  # shapes that are remembered
# Of the state as ``Generator.get_state`` gives it (ATen/CPUGeneratorImpl.cpp, the legacy layout):
# the place in the block of numbers, and the block. Another layout is noticed: nothing is found.
_PLACE, _BLOCK, _BLOCK_NUMEL = slice(16, 24), slice(24, 24 + 8 * 624), 624


def signature_of(value: Any) -> Hashable:
    """The shapes and types in ``value``: equal ones are expected to draw as many numbers."""
    return tuple(
        (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, torch.Tensor) else type(leaf)
        for leaf in tree_leaves(value)
    )


def moved_on(state: torch.Tensor, count: int) -> torch.Tensor:
    """The state of torch's CPU generator ``count`` numbers of 32 bits after ``state``."""
    if not count:
        return state
    generator = torch.Generator()
    generator.set_state(state)
    drawn = torch.empty(min(count, _CHUNK), dtype=torch.int32)
    while count > 0:
        drawn[:count].random_(generator=generator)
        count -= len(drawn)
    return generator.get_state()


def count_draws(first: torch.Tensor, last: torch.Tensor) -> int | None:
    """How many numbers of 32 bits were drawn between two states; None if that can't be told."""
    generator = torch.Generator()
    generator.set_state(first)
    drawn, state, count = torch.empty(_BLOCK_NUMEL, dtype=torch.int32), first, 0
    while not torch.equal(state[_BLOCK], last[_BLOCK]):
        if count >= _MOST:
            return None
        drawn.random_(generator=generator)
        state, count = generator.get_state(), count + _BLOCK_NUMEL
    count += _place(last) - _place(first)
    # A generator that was just seeded is at place 0 of no block.
    for candidate in (count, count - _BLOCK_NUMEL):
        if candidate >= 0 and torch.equal(moved_on(first, candidate), last):
            return candidate
    return None


def _place(state: torch.Tensor) -> int:
    return int(state[_PLACE].clone().view(torch.int64))


class Draws:
    """Remembers, from run to run, how many numbers functions draw whose inputs have such shapes."""

    def __init__(self) -> None:
        self._counts: dict[Hashable, int | None] = {}  # None: can't be told

    def begin(self, signatures: Sequence[Hashable]) -> "Run":
        """Functions with inputs of these shapes are about to run in turns."""
        # Where nothing was ever drawn, nothing is expected of new shapes either.
        unknown = None if any(count != 0 for count in self._counts.values()) else 0
        counts = [
            self._counts.get(signature, unknown if self._counts else None)
            for signature in signatures
        ]
        return Run(torch.get_rng_state(), counts)

    def learn(self, run: "Run", signatures: Sequence[Hashable]) -> None:
        """Count what the functions of ``run``, which has ended, have drawn."""
        for signature, first, last in zip(signatures, run.first, run.last, strict=True):
            known = self._counts.get(signature, 0)
            if known is None or torch.equal(moved_on(first, known), last):
                count = known
            else:
                count = count_draws(first, last)
            self._counts.pop(signature, None)
            self._counts[signature] = count
        while len(self._counts) > _KNOWN:
            del self._counts[next(iter(self._counts))]


class Run:
    """The generator's states while functions run in turns; see [Note: draws in turns].

    Args:
        state: the generator's now.
        counts: numbers that each function is expected to draw; None: not known.

    Attributes:
        first, last: of each function: the states that it began and ended with, so far.
        is_alone: each must run to its end before the next one goes on.
    """

    def __init__(self, state: torch.Tensor, counts: Sequence[int | None]) -> None:
        self.is_alone = None in counts[:-1]
        self._expects = counts
        self._entered: set[int] = set()
        self._is_late = False  # a function had begun before it was known where it should
        self.first = [state]
        for count in counts[:-1]:
            before = self.first[-1]
            self.first.append(before if self.is_alone else moved_on(before, count or 0))
        self.last = list(self.first)

    def leave(self, index: int) -> bool:
        """The turn of a function ends; whether each must run to its end from now on."""
        state = torch.get_rng_state()
        is_last = index == len(self.first) - 1
        if not (is_last or torch.equal(state, self.last[index])):
            # It draws though that was not expected, as somebody has switched dropout on.
            self.is_alone = self.is_alone or not self._expects[index]
            if self.is_alone:
                self._begin_later(index, state)
        self.last[index] = state
        return self.is_alone

    def enter(self, index: int | None) -> None:
        """The turn of a function begins; None: all have ended."""
        if index is not None:
            self._entered.add(index)
        torch.set_rng_state(self.last[-1 if index is None else index])

    def _begin_later(self, index: int, state: torch.Tensor) -> None:
        """Functions behind ``index`` that have drawn nothing yet begin at ``state``."""
        for later in range(index + 1, len(self.first)):
            if torch.equal(self.last[later], self.first[later]):
                self._is_late = self._is_late or later in self._entered
                self.first[later] = self.last[later] = state

    @property
    def is_exact(self) -> bool:
        """Whether each function began where the one before has ended."""
        return not self._is_late and all(
            torch.equal(last, first)
            for last, first in zip(self.last[:-1], self.first[1:], strict=True)
        )
