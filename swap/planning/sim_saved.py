"""Saved activations of a simulated run: ``swap.spilling`` on a virtual clock.

Units, their order, the limits and the times at which they are fetched are those of ``Spiller``
([Note: what is spilled], [Note: just in time]). A storage is in memory while its unit is, or while
others than autograd hold it.
"""

from collections import deque
from collections.abc import Iterable, Sequence

from offload.allocator.errors import CapacityError
from offload.allocator.units import format_nbytes
from offload.swap.activations import BATCH_ALIGN
from offload.swap.planning.sim_batch import SimBatch
from offload.swap.planning.sim_turns import SimTurns, Unit
from offload.swap.planning.sim_writes import SimDrive
from offload.swap.planning.world import World

_ROLE = "activation"


class SimSaved:
    """What autograd has saved.

    Args:
        storages: bytes of each storage of the program.
        limit_nbytes: of units that stay in memory; as many more may be leaving.
        drive: says whether it takes what leaves; by default it takes all.
    """

    def __init__(
        self,
        world: World,
        storages: tuple[int, ...],
        *,
        limit_nbytes: int,
        min_nbytes: int,
        drive: SimDrive | None = None,
    ) -> None:
        self._world = world
        self._drive = drive if drive is not None and drive.is_bounded else None
        self._storages = storages
        self._limit_nbytes = limit_nbytes
        self._min_nbytes = min_nbytes
        self._turns = SimTurns(len(storages))
        self._held_by_others = bytearray(len(storages))  # a mark for each storage
        self._unit_of: list[Unit | None] = [None] * len(storages)
        self._order: deque[Unit] = deque()
        self._staying: deque[Unit] = deque()
        self._writing: deque[Unit] = deque()
        self._writing_nbytes = 0
        self._batch = SimBatch(storages)
        self._saved_nbytes = 0  # since the pass began, whether or not they are needed still
        self.kept_nbytes = 0
        self.spilled_nbytes = 0  # the most that units took of the drive at once
        self._on_file_nbytes = 0
        self._absent = 0  # units whose bytes are in the file only
        self._work_s = world.reads.work_s
        self._looked_ahead = -1  # from this turn, and nothing has changed since then
        self._keys: list[str] = []  # of units, by position

    def begin(self, *, first: bool = True) -> None:
        """A forward begins, the ``first`` of a step or a further one."""
        self._turns.begin(self._limit_nbytes, first=first)
        self._batch.begin()
        self._saved_nbytes = 0
        self._order.clear()
        self._staying.clear()

    def standing(self) -> tuple[object, ...]:
        """What the next step depends on, between two steps, but for the times of uses."""
        if self._saved_nbytes <= self._limit_nbytes:  # nothing ever moves
            return (True,)
        batch = self._batch.standing()
        return self._turns.used, batch, self.kept_nbytes, self._on_file_nbytes, self._absent

    @property
    def largest_nbytes(self) -> int:
        """Of the largest unit of the present pass."""
        return max((unit.nbytes for unit in self._turns.units), default=0)

    def would_choose_again(self, *, first: bool = True) -> bool:
        """Whether the times of the last pass lead to what it, or the first, has chosen."""
        return self._turns.would_choose_again(first=first)

    # Storages.

    def let_go(self, storage: int) -> None:
        """Only autograd holds it still."""
        self._held_by_others[storage] = False
        unit, nbytes = self._unit_of[storage], self._storages[storage]
        if unit is not None:
            unit.own_nbytes += nbytes
            is_kept = unit.in_memory
        else:
            is_kept = storage in self._batch
        if is_kept:
            self._world.memory.keep("saved", nbytes)
        else:
            self._world.memory.nbytes -= nbytes

    # Units.

    def save(self, storage: int) -> None:
        """Autograd saves it, and others hold it, too."""
        if self._writing:
            self._settle()
        self._held_by_others[storage] = True
        nbytes = self._storages[storage]
        self._saved_nbytes += nbytes + BATCH_ALIGN
        if nbytes >= self._min_nbytes:
            unit = self._unit_of[storage] = self._turns.add({storage}, nbytes)
            self._keep(unit)
            return
        if together := self._batch.add(storage):
            self._add_batch(together)

    def _add_batch(self, waiting: Sequence[int]) -> None:
        sizes = (-(-self._storages[one] // BATCH_ALIGN) * BATCH_ALIGN for one in waiting)
        unit = self._turns.add(set(waiting), sum(sizes))
        for storage in waiting:
            self._unit_of[storage] = unit
            if not self._held_by_others[storage]:
                unit.own_nbytes += self._storages[storage]
        self._keep(unit)

    def _keep(self, unit: Unit) -> None:
        """``unit`` is new, and in memory."""
        if unit.position == len(self._keys):
            self._keys.append(f"saved {unit.position}")
        self.kept_nbytes += unit.nbytes
        self._looked_ahead = -1
        (self._staying if unit.stays else self._order).append(unit)
        limit = self._limit_nbytes
        if self.kept_nbytes > limit:
            # What is above the limit by itself has the room of all others that leave.
            self._spill(None, unit.nbytes if unit.nbytes > limit else 2 * limit)

    # Token-wise recompute.

    def borrow(self, nbytes: int) -> None:
        """What is rebuilt takes so many bytes more of the limit, or fewer."""
        self._limit_nbytes -= nbytes
        self._saved_nbytes += max(nbytes, 0)  # as much less may stay
        self._looked_ahead = -1

    def prefetch(self, storages: Iterable[int]) -> None:
        """Fetch these, in this order, as far as the limit has room."""
        for storage in storages:
            unit = self._unit_of[storage]
            if unit is not None and not unit.in_memory:
                if self.kept_nbytes + unit.nbytes > self._limit_nbytes:
                    return
                self._fetch(unit)

    # Out.

    def _spill(self, sparing: Unit | None, most: int) -> None:
        """There is more than may stay: send it away, but for ``sparing``, which is used now."""
        self._send_excess_away(sparing)
        memory = self._world.memory
        while self._writing and (self.kept_nbytes > most or memory.is_tight()):
            self._await_first()
            self._send_excess_away(sparing)

    def _await_first(self) -> None:
        """Wait for the unit that has been leaving longest."""
        writing = self._writing[0].writing
        assert writing is not None
        self._world.wait(self._world.writes, writing, "full")
        self._finish_write()

    def _send_excess_away(self, sparing: Unit | None) -> None:
        staying = self._limit_nbytes
        if staying < 0 and sparing is not None:
            staying = 0
        excess = self.kept_nbytes - self._writing_nbytes - staying
        for queue in (self._order, self._staying):
            if excess > 0:
                excess = self._send_first_away(queue, excess, sparing)

    def _send_first_away(self, queue: deque[Unit], excess: int, sparing: Unit | None) -> int:
        """The first units of ``queue``, up to ``excess`` bytes; how many of these are left."""
        passed_over: list[Unit] = []
        while excess > 0 and queue:
            unit = queue.popleft()
            if not unit.members:
                continue
            if unit is sparing or unit.fetching is not None:
                passed_over.append(unit)
            elif unit.in_memory and unit.writing is None:
                excess -= unit.nbytes
                if self._drive is None or unit.on_file:
                    self._send_away(unit)
                elif not self._try_to_send_away(unit, refusable=sparing is None):
                    passed_over.append(unit)
                    break
        if passed_over:
            queue.extendleft(reversed(passed_over))
        return excess

    def _try_to_send_away(self, unit: Unit, *, refusable: bool) -> bool:
        """Whether the drive takes the bytes of ``unit``; if not, they stay."""
        assert self._drive is not None
        refusal = self._drive.refusal(unit.nbytes, self._on_file_nbytes)
        if refusal is None:
            self._send_away(unit)
        elif refusable:
            self._check_room(refusal)
        return refusal is None

    def _check_room(self, refusal: CapacityError) -> None:
        """The drive takes no more.

        Raises:
            CapacityError: memory has no room either.
        """
        memory = self._world.memory
        while memory.room() < 0 and self._writing:
            self._await_first()
        missing = -memory.room()
        if missing > 0:
            raise CapacityError(
                f"saved activations of {format_nbytes(self.kept_nbytes)} are "
                f"{format_nbytes(missing)} too many for memory, and can't leave it: {refusal}"
            )

    def _send_away(self, unit: Unit) -> None:
        if unit.on_file:
            self._drop(unit)
            return
        self._on_file_nbytes += unit.nbytes
        if self._on_file_nbytes > self.spilled_nbytes:
            self.spilled_nbytes = self._on_file_nbytes
        world, key = self._world, self._keys[unit.position]
        unit.writing = world.submit(world.writes, key, _ROLE, unit.nbytes)
        self._writing.append(unit)
        self._writing_nbytes += unit.nbytes

    def _settle(self) -> None:
        # In the order in which they were submitted: what is waited for is the first of them.
        while self._writing:
            writing = self._writing[0].writing
            assert writing is not None
            if writing.ended_s > self._world.now_s:
                return
            self._finish_write()

    def _finish_write(self) -> None:
        """The first unit that is being written is on the drive."""
        unit = self._writing.popleft()
        self._writing_nbytes -= unit.nbytes
        unit.writing, unit.on_file = None, True
        if unit.members:
            self._drop(unit)

    def _drop(self, unit: Unit) -> None:
        unit.in_memory = False
        self._looked_ahead = -1
        self._absent += 1
        if unit.turn is not None:
            self._turns.absent[unit.turn] = True
        self.kept_nbytes -= unit.nbytes
        self._world.memory.drop("saved", unit.own_nbytes)

    # Backward.

    def unsave(self, storage: int) -> None:
        """Backward needs it now."""
        if self._writing:
            self._settle()
        unit = self._unit_of[storage]
        if unit is None:
            return
        world, turns = self._world, self._turns
        if not unit.used:
            unit.used = True
            turns.used.append(unit.position)
            turns.times_s.append(world.now_s)
        if self.kept_nbytes > self._limit_nbytes:
            self._spill(unit, 2 * self._limit_nbytes)
        if not unit.in_memory:
            self._fetch(unit)
        if unit.fetching is not None:
            world.wait(world.reads, unit.fetching, "late")
            unit.fetching = None
            self._looked_ahead = -1
            if unit.turn is not None:
                turns.fetching.pop(unit.turn, None)
        if self._absent and unit.turn != self._looked_ahead:
            if unit.turn is None:
                self._fetch_backwards(unit)
            else:
                self._look_ahead(unit.turn)

    def _fetch(self, unit: Unit) -> None:
        unit.in_memory = True
        self._absent -= 1
        turn = unit.turn
        if turn is not None:
            self._turns.absent[turn] = False
        if unit.is_batch or unit.own_nbytes:
            world, key = self._world, self._keys[unit.position]
            unit.fetching = world.submit(world.reads, key, _ROLE, unit.nbytes)
            if turn is not None:
                self._turns.fetching[turn] = unit.nbytes
        self.kept_nbytes += unit.nbytes
        self._looked_ahead = -1
        memory = self._world.memory
        for storage in unit.members:  # each may be the one of the peak
            if not self._held_by_others[storage]:
                memory.add("saved", self._storages[storage])
        (self._staying if unit.stays else self._order).append(unit)

    def _look_ahead(self, present: int) -> None:
        """Fetch what is due behind the turn ``present``, which is that of what is used now."""
        turns, limit_nbytes = self._turns, self._limit_nbytes
        absent, units, order = turns.absent, turns.units, turns.order
        turn = absent.find(True, present + 1)
        while turn >= 0:
            unit = units[order[turn]]
            if self.kept_nbytes + unit.nbytes > limit_nbytes:
                break
            if turns.is_early(present, unit, turn, self._work_s):
                break
            self._fetch(unit)
            turn = absent.find(True, turn + 1)
        self._looked_ahead = present

    def _fetch_backwards(self, present: Unit) -> None:
        """Nobody knew that ``present`` would be used: expect the ones that were saved before it."""
        for unit in reversed(self._turns.units[: present.position]):
            if not unit.in_memory and unit.members:
                if self.kept_nbytes + unit.nbytes > self._limit_nbytes:
                    return
                self._fetch(unit)

    def forget(self, storage: int) -> None:
        """Autograd needs it no more."""
        unit, nbytes = self._unit_of[storage], self._storages[storage]
        if unit is None:  # the next pass may save one with its number
            self._batch.forget(storage)
            if not self._held_by_others[storage]:
                self._world.memory.drop("saved", nbytes)
            return
        self._unit_of[storage] = None
        unit.members.remove(storage)
        if not self._held_by_others[storage]:
            unit.own_nbytes -= nbytes
            if unit.in_memory:
                self._world.memory.drop("saved", nbytes)
        if not unit.members:
            self._forget_unit(unit)

    def _forget_unit(self, unit: Unit) -> None:
        """Autograd needs none of its members any more."""
        self._looked_ahead = -1
        if unit.on_file or unit.writing is not None:
            self._on_file_nbytes -= unit.nbytes
        if unit.in_memory:
            unit.in_memory = False
            self.kept_nbytes -= unit.nbytes
        else:
            self._absent -= 1
            if unit.turn is not None:
                self._turns.absent[unit.turn] = False
