"""What moves as one of the saved storages of a simulated run, and such units by their turns."""

from bisect import bisect_left, bisect_right, insort
from dataclasses import dataclass

from offload.swap.planning.world import Flight


@dataclass(slots=True, eq=False)
class Unit:
    """What moves as one: ``members`` are its storages that autograd still needs.

    Attributes:
        turn: ``sim_saved`` [Note: turns]; None where no use of it is expected.
        is_batch: of several storages, whoever still needs them.
    """

    position: int
    nbytes: int
    members: set[int]
    turn: int | None
    stays: bool
    is_batch: bool = False
    in_memory: bool = True
    on_file: bool = False
    writing: Flight | None = None
    fetching: Flight | None = None
    used: bool = False


class Turns:
    """Units in the order of their turns, and their bytes."""

    def __init__(self) -> None:
        self._turns: list[int] = []
        self._nbytes: dict[int, int] = {}
        self._total_nbytes = 0

    def add(self, unit: Unit) -> None:
        """One more; without a turn it is not kept."""
        if unit.turn is not None:
            insort(self._turns, unit.turn)
            self._nbytes[unit.turn] = unit.nbytes
            self._total_nbytes += unit.nbytes

    def discard(self, unit: Unit) -> None:
        """One less, if it is kept."""
        if unit.turn is not None and unit.turn in self._nbytes:
            self._total_nbytes -= self._nbytes.pop(unit.turn)
            del self._turns[bisect_left(self._turns, unit.turn)]

    def after(self, turn: int) -> int | None:
        """The first one behind ``turn``."""
        at = bisect_right(self._turns, turn)
        return self._turns[at] if at < len(self._turns) else None

    def nbytes_between(self, after: int, before: int) -> int:
        """Bytes of the units whose turns are between these two."""
        first, last = bisect_right(self._turns, after), bisect_left(self._turns, before)
        if first == 0 and last == len(self._turns):
            return self._total_nbytes
        return sum(self._nbytes[turn] for turn in self._turns[first:last])
