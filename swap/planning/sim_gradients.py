"""Gradients of a simulated run: ``swap.gradients`` on a virtual clock.

[Note: further parts] A gradient that comes in a second pass of the step is added to the one that is
there: in memory if that stays or is still leaving, and then it leaves once more; else through the
mapping of its home (``gradients`` [Note: always a right gradient]). The kernel moves what that
takes. It keeps the pages where memory has room for all of them beside the budget, and writes them
when the next gradient comes home past it. Otherwise each part reads and writes them: pages that
come around again when others have taken their place are never found.
"""

from collections import deque
from collections.abc import Collection  # noqa: TC003 (as all of ours)
from dataclasses import dataclass

from offload.swap.gradients import MIN_NBYTES
from offload.swap.planning.cost import Costs
from offload.swap.planning.world import Flight, World

_ROLE = "gradient"
# Of a table whose gradient gets further rows: what is looked at at once (``row_gradients``), and
# numbers of a byte each that this makes.
_SHARD_NBYTES, _MASKS, _LEAST_ITEMSIZE = 8 << 20, 3, 2


@dataclass(slots=True)
class _Leaving:
    name: str
    nbytes: int
    flight: Flight
    is_changed: bool = False  # since it began to leave


class SimGradients:
    """Gradients leave as backward produces them.

    Args:
        limit_nbytes: that may wait for their write.
        pages_stay: the kernel has room for the pages of all homes.

    Attributes:
        kept: the weights whose gradients stay.
        on_file: those whose gradients have left.
        by_rows: those whose last gradients were made of rows alone.
        held: those whose gradients are needed behind the step, which was put off.
        mapped_nbytes: to which further parts were added through mappings.
    """

    def __init__(
        self, world: World, costs: Costs, *, limit_nbytes: int, pages_stay: bool = True
    ) -> None:
        self._world = world
        self._costs = costs
        self._leaving_s = costs.gradient_s
        self._pages_stay = pages_stay
        self.limit_nbytes = limit_nbytes
        self._leaving: deque[_Leaving] = deque()
        self._leaving_nbytes = 0
        self.kept: Collection[str] = ()
        self.on_file: set[str] = set()
        self.by_rows: set[str] = set()
        self.held: set[str] = set()
        self.in_memory_nbytes = 0
        self.mapped_nbytes = 0
        self._in_pages: set[str] = set()  # whose newest bytes only the kernel has

    def take(self, name: str, nbytes: int) -> None:
        """The gradient of the weight ``name`` is complete."""
        world = self._world
        if self._leaving and self._leaving[0].flight.ended_s <= world.now_s:
            self.poll()
        world.memory.add("gradients", nbytes)
        self.in_memory_nbytes += nbytes
        if nbytes < MIN_NBYTES or name in self.kept:
            return
        if self._leaving_s:
            world.compute(self._leaving_s)
        if name in self._in_pages:
            self._in_pages.discard(name)
            world.write_back(name, _ROLE, nbytes)
        flight = world.submit(world.writes, name, _ROLE, nbytes)
        self._leaving.append(_Leaving(name, nbytes, flight))
        self._leaving_nbytes += nbytes
        while self._leaving and (
            self._leaving_nbytes > self.limit_nbytes or world.memory.room() < 0
        ):
            self._await_oldest("full")

    def take_rows(self, name: str, nbytes: int) -> None:
        """The gradient of the weight ``name`` is complete: rows of ``nbytes`` written to its home.

        The kernel writes them behind.
        """
        self.poll()
        self._world.submit(self._world.writes, name, _ROLE, nbytes)
        self.on_file.add(name)
        self.by_rows.add(name)

    def poll(self) -> None:
        """Let go of the gradients whose write has ended."""
        leaving, world = self._leaving, self._world
        while leaving and leaving[0].flight.ended_s <= world.now_s:
            left = leaving.popleft()
            if left.is_changed:
                flight = world.submit(world.writes, left.name, _ROLE, left.nbytes)
                leaving.append(_Leaving(left.name, left.nbytes, flight))
                continue
            self.on_file.add(left.name)
            self._let_go(left.nbytes)

    def _await_oldest(self, reason: str) -> None:
        world = self._world
        world.wait(world.writes, self._leaving[0].flight, reason)
        self.poll()

    def _let_go(self, nbytes: int) -> None:
        self._leaving_nbytes -= nbytes
        self.in_memory_nbytes -= nbytes
        self._world.memory.drop("gradients", nbytes)

    # Further parts, see the note.

    def add(self, name: str, nbytes: int) -> int:
        """A further part of the gradient of ``name`` has come.

        Returns:
            Bytes of its home that are mapped now.
        """
        world = self._world
        there = next((left for left in self._leaving if left.name == name), None)
        if there is not None:
            there.is_changed = True
        if there is not None or nbytes < MIN_NBYTES or name in self.kept:
            world.compute(self._costs.added_s(nbytes))
            self.poll()
            return 0
        self.poll()
        self.mapped_nbytes += nbytes
        world.memory.add("gradients", nbytes)  # the part
        if name not in self._in_pages:
            world.fault_in(name, _ROLE, nbytes)
        world.memory.add_pages(nbytes)
        world.compute(self._costs.added_at_home_s(nbytes))
        if self._pages_stay:
            self._in_pages.add(name)
        else:
            world.write_back(name, _ROLE, nbytes)
        world.memory.drop("gradients", nbytes)
        return nbytes

    def add_rows(self, name: str, nbytes: int, home_nbytes: int) -> None:
        """Further rows of ``nbytes`` of the gradient of ``name`` have been written to its home.

        All of that was looked at before, for zeros with a sign.
        """
        world = self._world
        self.poll()
        shard = min(_SHARD_NBYTES, home_nbytes)
        world.memory.add_pages(shard)
        world.memory.pass_through([_MASKS * shard // _LEAST_ITEMSIZE])
        world.compute(self._costs.looked_over_s(home_nbytes))
        world.memory.add_pages(-shard)
        world.submit(world.writes, name, _ROLE, nbytes)
        self.by_rows.discard(name)

    @property
    def is_settled(self) -> bool:
        """Whether no gradient is on its way."""
        return not self._leaving

    def settle(self, name: str) -> None:
        """Have no gradient of ``name`` on its way."""
        while any(left.name == name for left in self._leaving):
            self._await_oldest("drain")

    def give(self, name: str, nbytes: int) -> None:
        """The gradient of ``name``, which stayed in memory, is somebody else's from now on."""
        assert name in self.kept
        self.in_memory_nbytes -= nbytes
        self._world.memory.drop("gradients", nbytes)

    def take_mapped_nbytes(self) -> int:
        """``mapped_nbytes``, which begin anew."""
        nbytes, self.mapped_nbytes = self.mapped_nbytes, 0
        return nbytes

    def standing(self) -> tuple[object, ...]:
        """What the next step depends on, between two steps."""
        return frozenset(self.by_rows), frozenset(self._in_pages)

    def clear(self) -> None:
        """The step has used all but the ``held`` ones, and the user's code lets go of them."""
        self._leaving = deque(one for one in self._leaving if one.name in self.held)
        self._leaving_nbytes = sum(one.nbytes for one in self._leaving)
        self._world.memory.drop("gradients", self.in_memory_nbytes - self._leaving_nbytes)
        self.in_memory_nbytes = self._leaving_nbytes
        self.on_file &= self.held

    def use_up(self, name: str) -> None:
        """The gradient of the weight ``name``, which was held, is needed no more."""
        self.held.discard(name)
        self.on_file.discard(name)
