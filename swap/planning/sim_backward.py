"""The step inside backward of a simulated run: ``swap.backward_step`` on a virtual clock."""

import itertools
from dataclasses import dataclass

from offload.swap.planning.sim_pipeline import SimPipeline
from offload.swap.planning.sim_spent import Spent
from offload.swap.planning.sim_step import SimStep
from offload.swap.planning.sim_weights import SimWeight, SimWeights
from offload.swap.planning.world import World


@dataclass(slots=True, eq=False)
class _Target:
    """A weight whose tiles are in flight."""

    step: "SimBackwardStep"
    weight: SimWeight
    gradient_nbytes: int  # in memory
    waiting_nbytes: int
    mapped_nbytes: int  # of the gradient at home; each tile takes its part from there
    unstepped: int  # tiles
    unwritten: int

    def stepped_one(self) -> None:
        if self.mapped_nbytes:
            taken_nbytes = self.mapped_nbytes // self.unstepped
            self.mapped_nbytes -= taken_nbytes
            self.step.took_pages(taken_nbytes)
        self.unstepped -= 1
        if not self.unstepped:
            self.step.used_up(self.gradient_nbytes, self.waiting_nbytes)

    def wrote_one(self) -> None:
        self.unwritten -= 1
        if not self.unwritten:
            self.step.wrote(self.weight)


class SimBackwardStep:
    """Steps weights as their gradients arrive.

    Args:
        limit_nbytes: bytes of gradients that may wait for their step, and of weights whose
            gradients are at home.

    Attributes:
        stepped: the weights of the present step that are done, or on their way.
        spent: of backward, since the last ``end_step``.
    """

    def __init__(
        self, world: World, weights: SimWeights, step: SimStep, *, limit_nbytes: int
    ) -> None:
        self._world = world
        self._weights = weights
        self._step = step
        self.limit_nbytes = limit_nbytes
        self.stepped: dict[str, SimWeight] = {}  # in the order of their gradients
        self.spent = Spent(world)
        self._next: dict[str, SimWeight] = {}  # the gradient that came after, last time
        self._pending_nbytes = 0  # what waits for weights that are not stepped yet

    @property
    def _pipeline(self) -> SimPipeline:
        return self._step.pipeline

    def take(self, weight: SimWeight, *, gradient_nbytes: int) -> None:
        """The gradient of ``weight`` is complete, of which so many bytes are in memory."""
        self._world.memory.add("gradients", gradient_nbytes)
        self.stepped[weight.name] = weight
        with self.spent.counting():
            if self._step.keeps(weight):
                self._step.step_in_memory([weight.name])
                self._world.memory.drop("gradients", gradient_nbytes)
            else:
                self._step_tiled(weight, gradient_nbytes, gradient_nbytes, 0)
            self._make_room(self._coming_nbytes(weight))

    def take_at_home(self, weight: SimWeight, *, mapped_nbytes: int) -> None:
        """As ``take``, of a gradient that has got its last part at home."""
        self.stepped[weight.name] = weight
        with self.spent.counting():
            streams = weight.in_memory and not weight.resident
            self._step_tiled(weight, 0, weight.nbytes if streams else 0, mapped_nbytes)
            self._make_room(self._coming_nbytes(weight))

    def _step_tiled(
        self, weight: SimWeight, gradient_nbytes: int, waiting_nbytes: int, mapped_nbytes: int
    ) -> None:
        self._weights.hold(weight)
        self._pending_nbytes += waiting_nbytes
        tiles = self._step.tiles([weight.name])
        number = sum(count for _, count in tiles)
        target = _Target(
            self, weight, gradient_nbytes, waiting_nbytes, mapped_nbytes, number, number
        )
        for tile, count in tiles:
            self._pipeline.add(tile, count, target.wrote_one, target.stepped_one)
        self._pipeline.advance()
        while self._pending_nbytes > self.limit_nbytes:
            self._pipeline.advance_one()

    def took_pages(self, nbytes: int) -> None:
        """A tile has taken its part of a gradient from pages of its home."""
        self._world.memory.add_pages(-nbytes)

    def used_up(self, gradient_nbytes: int, waiting_nbytes: int) -> None:
        """All tiles of a weight are stepped: its gradient goes."""
        self._pending_nbytes -= waiting_nbytes
        self._world.memory.drop("gradients", gradient_nbytes)

    def wrote(self, weight: SimWeight) -> None:
        """All tiles of ``weight`` are written."""
        self._weights.let_go(weight)

    def _coming_nbytes(self, weight: SimWeight) -> int:
        """Of the gradient that comes next; in the first step, of the largest that may."""
        if self._next:
            coming = self._next.get(weight.name)
            if coming is None or coming.name in self._step.gradients.by_rows:
                return 0
            return coming.nbytes
        unseen = (one for one in self._step.names if one not in self.stepped)
        return max((self._weights.weights[one].nbytes for one in unseen), default=0)

    def _make_room(self, nbytes: int) -> None:
        room = self._world.memory.room
        while nbytes > room() and self._pipeline.is_busy:
            self._pipeline.advance_one()
        if nbytes > room():
            self._pipeline.staging.close()
            self._weights.give_up(nbytes - room())

    def end_backward(self) -> None:
        """Backward gives control to the user's code: what it began is finished."""
        with self.spent.counting():
            self._pipeline.finish()

    def standing(self) -> tuple[object, ...]:
        """What the next step depends on, between two steps."""
        return tuple((name, after.name) for name, after in self._next.items())

    def end_step(self) -> None:
        """The step is over; the next one is expected to be like it."""
        order = list(self.stepped.values())
        self._next = {one.name: after for one, after in itertools.pairwise(order)}
        self.stepped = {}
        self.spent.restart()
