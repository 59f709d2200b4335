"""Saved activations of a simulated run: ``swap.spilling`` and ``swap.lookahead``, virtually.

Units, their order, the limits and the times at which they are fetched are those of ``Spiller``
([Note: what is spilled], [Note: just in time]). A storage is in memory while its unit is, or while
others than autograd hold it.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from offload.swap.activations import BATCH_ALIGN, BATCH_NBYTES
from offload.swap.planning.world import Flight, World
from offload.tiers.journal import Label

_ROLE = "activation"


@dataclass(slots=True, eq=False)
class _Unit:
    """What moves as one: ``members`` are its storages that autograd still needs."""

    position: int
    nbytes: int
    members: set[int]
    stays: bool = False
    in_memory: bool = True
    on_file: bool = False
    writing: Flight | None = None
    fetching: Flight | None = None
    used: bool = False


class SimSaved:
    """What autograd has saved.

    Args:
        storages: bytes of each storage of the program.
        limit_nbytes: of units that stay in memory; as many more may be leaving.
        hook_s: what one hook costs the training thread.
    """

    def __init__(
        self,
        world: World,
        storages: tuple[int, ...],
        *,
        limit_nbytes: int,
        min_nbytes: int,
        hook_s: float,
    ) -> None:
        self._world = world
        self._storages = storages
        self._limit_nbytes = limit_nbytes
        self._min_nbytes = min_nbytes
        self._hook_s = hook_s
        self._held_by_others: set[int] = set()
        self._unit_of: dict[int, _Unit] = {}
        self._units: list[_Unit] = []
        self._order: deque[_Unit] = deque()
        self._staying: deque[_Unit] = deque()
        self._writing: list[_Unit] = []
        self._batch: list[int] = []
        self._batch_nbytes = 0
        self._batched: set[int] = set()
        self.kept_nbytes = 0
        self.spilled_nbytes = 0  # the most that units took of the drive at once
        self._on_file_nbytes = 0
        self._absent = 0  # units whose bytes are in the file only
        # Of the last pass: units in the order of their first use, and when that was.
        self._uses: list[tuple[int, float]] = []
        self._expected: list[tuple[int, float]] = []
        self._ranks: dict[int, int] = {}
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
        self._uses, self._units = [], []
        self._order.clear()
        self._staying.clear()

    # Storages.

    def hold(self, storage: int) -> None:
        """Others than autograd hold it from now on."""
        self._held_by_others.add(storage)
        self._world.memory.add("transients", self._storages[storage])

    def let_go(self, storage: int) -> None:
        """Only autograd may hold it still."""
        self._held_by_others.discard(storage)
        self._world.memory.add("transients", -self._storages[storage])
        if self._is_kept(storage):
            self._world.memory.add("saved", self._storages[storage])

    def _is_kept(self, storage: int) -> bool:
        """Whether saving holds it in memory."""
        if storage in self._batched:
            return True
        unit = self._unit_of.get(storage)
        return unit is not None and unit.in_memory

    def _come(self, storage: int) -> None:
        if storage not in self._held_by_others:
            self._world.memory.add("saved", self._storages[storage])

    def _go(self, storage: int) -> None:
        if storage not in self._held_by_others:
            self._world.memory.add("saved", -self._storages[storage])

    # Units.

    def save(self, storage: int) -> None:
        """Autograd saves it."""
        self._world.compute(self._hook_s)
        self._settle()
        nbytes = self._storages[storage]
        if nbytes >= self._min_nbytes:
            self._come(storage)
            self._add([storage], nbytes)
        else:
            self._batch.append(storage)
            self._batched.add(storage)
            self._come(storage)
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
        for storage in waiting:
            self._batched.discard(storage)
        sizes = (-(-self._storages[one] // BATCH_ALIGN) * BATCH_ALIGN for one in waiting)
        self._add(waiting, sum(sizes))

    def _add(self, members: list[int], nbytes: int) -> None:
        unit = _Unit(len(self._units), nbytes, set(members))
        unit.stays = unit.position in self._stay_positions
        self._units.append(unit)
        for storage in members:
            self._unit_of[storage] = unit
        self.kept_nbytes += nbytes
        (self._staying if unit.stays else self._order).append(unit)
        if self.kept_nbytes > self._limit_nbytes:
            self._spill(None)

    def _spill(self, sparing: _Unit | None) -> None:
        self._send_excess_away(sparing)
        while self._writing and self.kept_nbytes > 2 * self._limit_nbytes:
            first = self._writing[0]
            assert first.writing is not None
            self._world.wait(self._world.writes, first.writing, "full")
            self._finish_write(first)
            self._send_excess_away(sparing)

    def _send_excess_away(self, sparing: _Unit | None) -> None:
        excess = self.kept_nbytes - sum(unit.nbytes for unit in self._writing) - self._limit_nbytes
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
        label = Label(f"saved {unit.position}", _ROLE, "host", "file")
        unit.writing = self._world.submit(self._world.writes, label, unit.nbytes)
        self._writing.append(unit)

    def _settle(self) -> None:
        for unit in [one for one in self._writing if one.writing and self._world.done(one.writing)]:
            self._finish_write(unit)

    def _finish_write(self, unit: _Unit) -> None:
        self._writing.remove(unit)
        unit.writing, unit.on_file = None, True
        if unit.members:
            self._drop(unit)

    def _drop(self, unit: _Unit) -> None:
        unit.in_memory = False
        self._absent += 1
        self.kept_nbytes -= unit.nbytes
        for storage in unit.members:
            self._go(storage)

    # Backward.

    def unsave(self, storage: int) -> None:
        """Backward needs it now."""
        self._world.compute(self._hook_s)
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
        if self._absent:
            self._fetch_ahead(unit)

    def _fetch(self, unit: _Unit) -> None:
        label = Label(f"saved {unit.position}", _ROLE, "file", "host")
        unit.fetching = self._world.submit(self._world.reads, label, unit.nbytes)
        unit.in_memory = True
        self._absent -= 1
        self.kept_nbytes += unit.nbytes
        for member in unit.members:
            self._come(member)
        (self._staying if unit.stays else self._order).append(unit)

    def _fetch_ahead(self, present: _Unit) -> None:
        next_use_s: float | None = None
        queued_nbytes = 0
        for unit, due_s in self._upcoming(present):
            next_use_s = due_s if next_use_s is None else next_use_s
            if unit.fetching is not None:
                queued_nbytes += unit.nbytes
            if unit.in_memory or not unit.members:
                continue
            queued_nbytes += unit.nbytes
            lead_s = 2 * self._world.reads.work_s(queued_nbytes)
            has_room = self.kept_nbytes + unit.nbytes <= self._limit_nbytes
            if due_s > lead_s + next_use_s or not has_room:
                return
            self._fetch(unit)

    def _upcoming(self, present: _Unit) -> Iterator[tuple[_Unit, float]]:
        rank = self._ranks.get(present.position)
        if rank is None:
            for place in range(present.position - 1, -1, -1):
                yield self._units[place], 0.0
            return
        began_s = self._expected[rank][1]
        for later in range(rank + 1, len(self._expected)):
            position, used_s = self._expected[later]
            if position < len(self._units):
                yield self._units[position], used_s - began_s

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
        if unit.on_file or unit.writing is not None:
            self._on_file_nbytes -= unit.nbytes
        if unit.in_memory:
            unit.in_memory = False
            self.kept_nbytes -= unit.nbytes
        else:
            self._absent -= 1
