"""Gradients of a simulated run: ``swap.gradients`` on a virtual clock."""

from collections import deque
from collections.abc import Collection  # noqa: TC003 (as all of ours)
from dataclasses import dataclass

from offload.swap.gradients import MIN_NBYTES
from offload.swap.planning.world import Flight, World

_ROLE = "gradient"


@dataclass(slots=True)
class _Leaving:
    name: str
    nbytes: int
    flight: Flight


class SimGradients:
    """Gradients leave as backward produces them.

    Args:
        limit_nbytes: that may wait for their write.
        leaving_s: of the training thread, for each that leaves.

    Attributes:
        kept: the weights whose gradients stay.
        on_file: those whose gradients have left.
        by_rows: those whose last gradients were made of rows alone.
        held: those whose gradients are needed behind the step, which was put off.
    """

    def __init__(self, world: World, *, limit_nbytes: int, leaving_s: float = 0.0) -> None:
        self._world = world
        self._leaving_s = leaving_s
        self.limit_nbytes = limit_nbytes
        self._leaving: deque[_Leaving] = deque()
        self._leaving_nbytes = 0
        self.kept: Collection[str] = ()
        self.on_file: set[str] = set()
        self.by_rows: set[str] = set()
        self.held: set[str] = set()
        self.in_memory_nbytes = 0

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
        flight = world.submit(world.writes, name, _ROLE, nbytes)
        self._leaving.append(_Leaving(name, nbytes, flight))
        self._leaving_nbytes += nbytes
        while self._leaving and (
            self._leaving_nbytes > self.limit_nbytes or world.memory.room() < 0
        ):
            world.wait(world.writes, self._leaving[0].flight, "full")
            self.poll()

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
        leaving, now_s = self._leaving, self._world.now_s
        while leaving and leaving[0].flight.ended_s <= now_s:
            left = leaving.popleft()
            self.on_file.add(left.name)
            self._let_go(left.nbytes)

    def _let_go(self, nbytes: int) -> None:
        self._leaving_nbytes -= nbytes
        self.in_memory_nbytes -= nbytes
        self._world.memory.drop("gradients", nbytes)

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
