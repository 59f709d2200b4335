"""What whole passes take at a few choices of alpha, tried in turn once the model has solved one.

[Note: trials] The model of ``solve`` knows blocks and links, but not what else uses either, nor
what partly swapped tensors cost beside the copies that are measured. So its answer is held against
the two that need no model: rebuilding all rows, and swapping all. Forward and backward of some
passes of each, in turn, so that what else the machine does meets all of them. Disturbances only
add, so the shortest pass stands for each; the solved one gives way only to one that is clearly
shorter.
"""

from collections.abc import Sequence
from enum import IntEnum

ALIKE = 1.03  # what differs by less is equal: measurements vary as much
ROUNDS = 5


class Choice(IntEnum):
    """Where the cut of each block is, by the bytes that move."""

    REBUILT = 0  # every row that can be is rebuilt
    SOLVED = 1
    SWAPPED = 2  # nothing is rebuilt


class Trials:
    """Chooses among ``choices``; pure but for the seconds that it is told.

    Attributes:
        settled: the choice that was found.
    """

    def __init__(self, choices: Sequence[Choice]) -> None:
        self._seconds: dict[Choice, list[float]] = {choice: [] for choice in sorted(choices)}
        self.settled: Choice | None = self._settle()

    def present(self) -> Choice:
        """The choice for the pass that begins."""
        if self.settled is not None:
            return self.settled
        return min(self._seconds, key=lambda choice: len(self._seconds[choice]))

    def took(self, choice: Choice, seconds: float) -> None:
        """A pass with ``choice`` took so long, and did nothing that later ones don't."""
        if self.settled is None and choice in self._seconds:
            self._seconds[choice].append(seconds)
            self.settled = self._settle()

    def shortest_s(self) -> dict[Choice, float]:
        """The shortest pass of each choice that was tried so far."""
        return {choice: min(taken) for choice, taken in self._seconds.items() if taken}

    def _settle(self) -> Choice | None:
        if len(self._seconds) == 1:
            return next(iter(self._seconds))
        if any(len(seconds) < ROUNDS for seconds in self._seconds.values()):
            return None
        shortest = self.shortest_s()
        best = min(shortest, key=lambda choice: shortest[choice])
        solved_s = shortest.get(Choice.SOLVED)
        alike = solved_s is not None and solved_s <= ALIKE * shortest[best]
        return Choice.SOLVED if alike else best
