"""When backward uses what a simulated pass has saved: ``swap.lookahead``, virtually.

[Note: turns] A unit's *turn* is its place in the order in which backward is expected to use them:
that of the last pass or, where there was none, the reverse of their positions. There is a mark for
each turn whose unit is absent, so that the next one to be fetched is found at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from offload.swap.lookahead import LIKENESS
from offload.swap.planning.world import Flight

# Between fetching a unit now and later: the arguments of ``_is_early``, and what it told.
_Choice: TypeAlias = tuple[int, int, int, float, bool]


@dataclass(slots=True, eq=False)
class Unit:
    """What moves as one: ``members`` are its storages that autograd still needs.

    Attributes:
        position: among the units of its pass.
        turn: [Note: turns]; None where no use of it is expected.
        stays: it is one of those that are used first, as many as may stay in memory.
        is_batch: of several storages, whoever still needs them.
        own_nbytes: of the members that others than autograd hold no more.
    """

    position: int
    nbytes: int
    members: set[int]
    turn: int | None
    stays: bool
    is_batch: bool
    own_nbytes: int = 0
    in_memory: bool = True
    on_file: bool = False
    writing: Flight | None = None
    fetching: Flight | None = None
    used: bool = False


class SimTurns:
    """The units of the present pass, and what the last one lets expect of them.

    Args:
        most: units of a pass.

    Attributes:
        units: of the present pass, by position.
        order: positions by turn.
        used: positions in the order of their first use, and when that was: ``times_s``.
        absent: a mark for each turn whose unit is in the file only.
        fetching: bytes of units on their way, by turn.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.units: list[Unit] = []
        self.used: list[int] = []
        self.times_s: list[float] = []
        self.absent = bytearray(most)
        self.fetching: dict[int, int] = {}
        self.order: Sequence[int] = range(most - 1, -1, -1)
        self._expected_s: list[float] = []  # of the last pass, by turn: its ``times_s``
        # Of the last pass, by position: units, their turns, and those that are to stay.
        self._before: list[Unit] = []
        self._turns: dict[int, int] = {}
        self._staying: set[int] = set()
        self._differs = False  # a pass of the present step from the one before it
        self._choices: list[_Choice] = []  # that times decided, of the present pass
        self._first_choices = self._choices  # and of the first one of the step

    def begin(self, limit_nbytes: int, *, first: bool = True) -> None:
        """A pass begins, of which so many bytes may stay; the last one is expected to repeat.

        Args:
            first: of a step.
        """
        if self.used:
            self.order, self._expected_s = self.used, self.times_s
            self._turns = {position: turn for turn, position in enumerate(self.used)}
            self._staying = self._used_first(limit_nbytes)
            self._before = self.units
        self.used, self.times_s, self.units, self._choices = [], [], [], []
        if first:
            self._first_choices, self._differs = self._choices, False
        self.absent, self.fetching = bytearray(self._most), {}

    def _used_first(self, nbytes: int) -> set[int]:
        """The positions of those that fit."""
        fitting = set()
        for position in self.used:
            nbytes -= self.units[position].nbytes
            if nbytes < 0:
                break
            fitting.add(position)
        return fitting

    def add(self, members: set[int], nbytes: int) -> Unit:
        """The next unit of the pass."""
        units = self.units
        position = len(units)
        if self._expected_s and not self._was_alike(position, nbytes):
            self._expect_nothing()
        turn: int | None
        if self._expected_s:
            turn, stays = self._turns.get(position), position in self._staying
        else:
            turn, stays = self._most - 1 - position, False
        unit = Unit(position, nbytes, members, turn, stays, len(members) > 1)
        units.append(unit)
        return unit

    def _was_alike(self, position: int, nbytes: int) -> bool:
        """Whether the last pass had a unit of about ``nbytes`` there."""
        if position >= len(self._before):
            return False
        before = self._before[position].nbytes
        return before == nbytes or LIKENESS * abs(before - nbytes) <= max(before, nbytes)

    def _expect_nothing(self) -> None:
        """This pass is another one than the last: what is saved last is used first, then."""
        self.order, self._expected_s, self._differs = range(self._most - 1, -1, -1), [], True
        self.absent, self.fetching = bytearray(self._most), {}
        for unit in self.units:
            unit.turn = self._most - 1 - unit.position
            if unit.members and not unit.in_memory:
                self.absent[unit.turn] = True
            elif unit.members and unit.fetching is not None:
                self.fetching[unit.turn] = unit.nbytes

    def is_early(self, present: int, unit: Unit, turn: int, work_s: Mapping[int, float]) -> bool:
        """Whether ``unit`` need not come yet, as what has the turn ``present`` is used.

        Args:
            turn: of the unit.
            work_s: of the drive to fetch so many bytes.
        """
        order, times_s = self.order, self._expected_s
        if not times_s:
            return False
        lead_nbytes = unit.nbytes
        for at, nbytes in self.fetching.items():
            if present < at < turn:
                lead_nbytes += nbytes
        lead_s = 2 * work_s[lead_nbytes]
        known, count = len(self.units), len(times_s)
        following = present + 1
        while following < count and order[following] >= known:
            following += 1
        if following == count:
            following = present
        early = _is_early(times_s, present, following, turn, lead_s)
        self._choices.append((present, following, turn, lead_s, early))
        return early

    def would_choose_again(self, *, first: bool = True) -> bool:
        """Whether the times of the last pass lead to what was chosen.

        Args:
            first: by the first pass of the step; else by the last one.
        """
        return not self._differs and all(
            _is_early(self.times_s, present, following, turn, lead_s) is early
            for present, following, turn, lead_s, early in (
                self._first_choices if first else self._choices
            )
        )


def _is_early(
    times_s: Sequence[float], present: int, following: int, turn: int, lead_s: float
) -> bool:
    """Whether the next use is soon enough to fetch a unit.

    Args:
        times_s: of the uses that are expected, by turn.
        present: the turn of what is used now; ``following``: of what is used next, or the same.
        turn: of the unit.
        lead_s: before its use it has to be fetched.
    """
    now_s = times_s[present]
    return times_s[turn] - now_s > lead_s + (times_s[following] - now_s)
