"""Saved activations of a simulated run: ``swap.spilling`` and ``swap.lookahead``, virtually.

Units, their order, the limits and the times at which they are fetched are those of ``Spiller``
([Note: what is spilled], [Note: just in time]). A storage is in memory while its unit is, or while
others than autograd hold it.

[Note: turns] A unit's *turn* is its place in the order in which backward is expected to use them:
that of the last pass or, where there was none, the reverse of their positions. There is a mark for
each turn whose unit is absent, so that the next one to be fetched is found at once.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from offload.swap.activations import BATCH_ALIGN, BATCH_NBYTES
from offload.swap.planning.world import Flight, World
from offload.tiers.journal import Label

_ROLE = "activation"
# Between fetching a unit now and later: the arguments of ``_is_early``, and what it told.
_Choice: TypeAlias = tuple[int, int, int, float, bool]


@dataclass(slots=True, eq=False)
class _Unit:
    """What moves as one: ``members`` are its storages that autograd still needs.

    Attributes:
        turn: see [Note: turns]; None where no use of it is expected.
    """

    position: int
    nbytes: int
    members: set[int]
    turn: int | None
    stays: bool
    in_memory: bool = True
    on_file: bool = False
    writing: Flight | None = None
    fetching: Flight | None = None
    used: bool = False


def _is_early(
    uses: Sequence[tuple[int, float]], present: int, following: int, turn: int, lead_s: float
) -> bool:
    """Whether the next use is soon enough to fetch a unit.

    Args:
        uses: that are expected, by turn.
        present: the turn of what is used now; ``following``: of what is used next, or the same.
        turn: of the unit.
        lead_s: before its use it has to be fetched.
    """
    now_s = uses[present][1]
    return uses[turn][1] - now_s > lead_s + (uses[following][1] - now_s)


class SimSaved:
    """What autograd has saved.

    Args:
        storages: bytes of each storage of the program.
        limit_nbytes: of units that stay in memory; as many more may be leaving.
    """

    def __init__(
        self, world: World, storages: tuple[int, ...], *, limit_nbytes: int, min_nbytes: int
    ) -> None:
        self._world = world
        self._storages = storages
        self._limit_nbytes = limit_nbytes
        self._min_nbytes = min_nbytes
        self._held_by_others: set[int] = set()
        self._unit_of: dict[int, _Unit] = {}
        self._units: list[_Unit] = []
        self._order: deque[_Unit] = deque()
        self._staying: deque[_Unit] = deque()
        self._writing: deque[_Unit] = deque()
        self._writing_nbytes = 0
        self._batch: list[int] = []
        self._batch_nbytes = 0
        self._batched: set[int] = set()
        self._saved_nbytes = 0  # since the pass began, whether or not they are needed still
        self.kept_nbytes = 0
        self.spilled_nbytes = 0  # the most that units took of the drive at once
        self._on_file_nbytes = 0
        self._absent = 0  # units whose bytes are in the file only
        self._looked_ahead = -1  # from this turn, and nothing has changed since then
        self._absent_turns = bytearray(len(storages))
        self._fetching: dict[int, int] = {}  # bytes of units on their way, by turn
        self._labels: list[tuple[Label, Label]] = []  # out and in, by position
        # Of the last pass: units in the order of their first use, and when that was.
        self._uses: list[tuple[int, float]] = []
        self._expected: list[tuple[int, float]] = []
        self._ranks: dict[int, int] = {}
        self._choices: list[_Choice] = []  # that times decided, of the present pass
        self._stay_positions: set[int] = set()

    def begin(self) -> None:
        """A forward begins; the last pass is expected to repeat."""
        if self._uses:
            self._expected = self._uses
            self._ranks = {position: rank for rank, (position, _) in enumerate(self._expected)}
            room, self._stay_positions = self._limit_nbytes, set()
            for position, _ in self._expected:
                room -= self._units[position].nbytes
                if room < 0:
                    break
                self._stay_positions.add(position)
        self._uses, self._units, self._choices = [], [], []
        self._saved_nbytes = 0
        self._order.clear()
        self._staying.clear()
        self._absent_turns = bytearray(len(self._storages))
        self._fetching = {}

    def standing(self) -> tuple[object, ...]:
        """What the next step depends on, between two steps, but for the times of uses."""
        if self._saved_nbytes <= self._limit_nbytes:  # nothing ever moves
            return (True,)
        uses = [position for position, _ in self._uses]
        batch = tuple(self._batch), self._batch_nbytes, len(self._batched)
        return uses, batch, self.kept_nbytes, self._on_file_nbytes, self._absent

    def would_choose_again(self) -> bool:
        """Whether the times of the last pass lead to what that pass has chosen."""
        return all(
            _is_early(self._uses, present, following, turn, lead_s) is early
            for present, following, turn, lead_s, early in self._choices
        )

    # Storages.

    def let_go(self, storage: int) -> None:
        """Only autograd holds it still."""
        memory, nbytes = self._world.memory, self._storages[storage]
        self._held_by_others.discard(storage)
        if self._is_kept(storage):
            memory.turn("transients", "saved", nbytes)
        else:
            memory.add("transients", -nbytes)

    def _is_kept(self, storage: int) -> bool:
        """Whether saving holds it in memory."""
        unit = self._unit_of.get(storage)
        return unit.in_memory if unit is not None else storage in self._batched

    def _come(self, storage: int) -> None:
        if storage not in self._held_by_others:
            self._world.memory.add("saved", self._storages[storage])

    def _go(self, storage: int) -> None:
        if storage not in self._held_by_others:
            self._world.memory.add("saved", -self._storages[storage])

    # Units.

    def save(self, storage: int) -> None:
        """Autograd saves it, and others hold it, too."""
        if self._writing:
            self._settle()
        self._held_by_others.add(storage)
        nbytes = self._storages[storage]
        self._saved_nbytes += nbytes + BATCH_ALIGN
        if nbytes >= self._min_nbytes:
            self._add([storage], nbytes)
            return
        self._batch.append(storage)
        self._batched.add(storage)
        self._batch_nbytes += nbytes
        if self._batch_nbytes >= BATCH_NBYTES:
            self._close_batch()

    def _close_batch(self) -> None:
        waiting = [one for one in self._batch if one in self._batched]
        self._batch_nbytes = sum(self._storages[one] for one in waiting)
        self._batch = waiting
        if self._batch_nbytes < BATCH_NBYTES // 2:
            return
        self._batch, self._batch_nbytes = [], 0
        self._batched.difference_update(waiting)
        sizes = (-(-self._storages[one] // BATCH_ALIGN) * BATCH_ALIGN for one in waiting)
        self._add(waiting, sum(sizes))

    def _add(self, members: list[int], nbytes: int) -> None:
        position = len(self._units)
        turn = self._ranks.get(position) if self._expected else self._reverse(position)
        if position == len(self._labels):
            name = f"saved {position}"
            out = Label(name, _ROLE, "host", "file")
            self._labels.append((out, Label(name, _ROLE, "file", "host")))
        unit = _Unit(position, nbytes, set(members), turn, position in self._stay_positions)
        self._units.append(unit)
        for storage in members:
            self._unit_of[storage] = unit
        self.kept_nbytes += nbytes
        self._looked_ahead = -1
        (self._staying if unit.stays else self._order).append(unit)
        if self.kept_nbytes > self._limit_nbytes:
            self._spill(None)

    def _spill(self, sparing: _Unit | None) -> None:
        self._send_excess_away(sparing)
        while self._writing and self.kept_nbytes > 2 * self._limit_nbytes:
            first = self._writing[0]
            assert first.writing is not None
            self._world.wait(self._world.writes, first.writing, "full")
            self._finish_write()
            self._send_excess_away(sparing)

    def _send_excess_away(self, sparing: _Unit | None) -> None:
        excess = self.kept_nbytes - self._writing_nbytes - self._limit_nbytes
        if excess <= 0:
            return
        for queue in (self._order, self._staying):
            passed_over: list[_Unit] = []
            while excess > 0 and queue:
                unit = queue.popleft()
                if not unit.members:
                    continue
                if unit is sparing or unit.fetching is not None:
                    passed_over.append(unit)
                elif unit.in_memory and unit.writing is None:
                    excess -= unit.nbytes
                    self._send_away(unit)
            queue.extendleft(reversed(passed_over))

    def _send_away(self, unit: _Unit) -> None:
        if unit.on_file:
            self._drop(unit)
            return
        self._on_file_nbytes += unit.nbytes
        self.spilled_nbytes = max(self.spilled_nbytes, self._on_file_nbytes)
        out, _ = self._labels[unit.position]
        unit.writing = self._world.submit(self._world.writes, out, unit.nbytes)
        self._writing.append(unit)
        self._writing_nbytes += unit.nbytes

    def _settle(self) -> None:
        # In the order in which they were submitted: what is waited for is the first of them.
        while self._writing:
            writing = self._writing[0].writing
            assert writing is not None
            if not self._world.done(writing):
                return
            self._finish_write()

    def _finish_write(self) -> None:
        """The first unit that is being written is on the drive."""
        unit = self._writing.popleft()
        self._writing_nbytes -= unit.nbytes
        unit.writing, unit.on_file = None, True
        if unit.members:
            self._drop(unit)

    def _drop(self, unit: _Unit) -> None:
        unit.in_memory = False
        self._looked_ahead = -1
        self._absent += 1
        if unit.turn is not None:
            self._absent_turns[unit.turn] = True
        self.kept_nbytes -= unit.nbytes
        for storage in unit.members:
            self._go(storage)

    # Backward.

    def unsave(self, storage: int) -> None:
        """Backward needs it now."""
        if self._writing:
            self._settle()
        unit = self._unit_of.get(storage)
        if unit is None:
            return
        if not unit.used:
            unit.used = True
            self._uses.append((unit.position, self._world.now_s))
        if self.kept_nbytes > self._limit_nbytes:
            self._spill(unit)
        if not unit.in_memory:
            self._fetch(unit)
        if unit.fetching is not None:
            self._world.wait(self._world.reads, unit.fetching, "late")
            unit.fetching = None
            self._looked_ahead = -1
            if unit.turn is not None:
                self._fetching.pop(unit.turn, None)
        if self._absent:
            self._fetch_ahead(unit)

    def _fetch(self, unit: _Unit) -> None:
        _, back = self._labels[unit.position]
        unit.fetching = self._world.submit(self._world.reads, back, unit.nbytes)
        unit.in_memory = True
        self._absent -= 1
        if unit.turn is not None:
            self._absent_turns[unit.turn] = False
            self._fetching[unit.turn] = unit.nbytes
        self.kept_nbytes += unit.nbytes
        self._looked_ahead = -1
        for member in unit.members:
            self._come(member)
        (self._staying if unit.stays else self._order).append(unit)

    def _fetch_ahead(self, present: _Unit) -> None:
        if present.turn is None:
            self._fetch_backwards(present)
            return
        if present.turn == self._looked_ahead:
            return
        self._look_ahead(present.turn)
        self._looked_ahead = present.turn

    def _look_ahead(self, present: int) -> None:
        """Fetch what is due behind the turn ``present``."""
        absent = self._absent_turns
        turn = absent.find(True, present + 1)
        while turn >= 0:
            unit = self._unit_at(turn)
            if self.kept_nbytes + unit.nbytes > self._limit_nbytes:
                return
            if self._expected and self._is_early(present, unit, turn):
                return
            self._fetch(unit)
            turn = absent.find(True, turn + 1)

    def _unit_at(self, turn: int) -> _Unit:
        return self._units[self._expected[turn][0] if self._expected else self._reverse(turn)]

    def _reverse(self, position: int) -> int:
        """The turn of a position, or the other way round, where nothing is expected."""
        return len(self._storages) - 1 - position

    def _is_early(self, present: int, unit: _Unit, turn: int) -> bool:
        """Whether ``unit`` need not come yet, as what has the turn ``present`` is used."""
        lead_nbytes = unit.nbytes
        for at, nbytes in self._fetching.items():
            if present < at < turn:
                lead_nbytes += nbytes
        lead_s = 2 * self._world.reads.work_s(lead_nbytes)
        expected, known = self._expected, len(self._units)
        following = present + 1
        while following < len(expected) and expected[following][0] >= known:
            following += 1
        if following == len(expected):
            following = present
        early = _is_early(expected, present, following, turn, lead_s)
        self._choices.append((present, following, turn, lead_s, early))
        return early

    def _fetch_backwards(self, present: _Unit) -> None:
        """Nobody knew that ``present`` would be used: expect the ones that were saved before it."""
        for unit in reversed(self._units[: present.position]):
            if not unit.in_memory and unit.members:
                if self.kept_nbytes + unit.nbytes > self._limit_nbytes:
                    return
                self._fetch(unit)

    def forget(self, storage: int) -> None:
        """Autograd needs it no more."""
        if storage in self._batched:
            self._batched.discard(storage)
            self._go(storage)
            return
        unit = self._unit_of.pop(storage)
        unit.members.discard(storage)
        if unit.in_memory:
            self._go(storage)
        if unit.members:
            return
        self._looked_ahead = -1
        if unit.on_file or unit.writing is not None:
            self._on_file_nbytes -= unit.nbytes
        if unit.in_memory:
            unit.in_memory = False
            self.kept_nbytes -= unit.nbytes
        else:
            self._absent -= 1
            if unit.turn is not None:
                self._absent_turns[unit.turn] = False
