"""The step inside the next forward of a simulated run: ``swap.forward_step`` on a virtual clock."""

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from offload.swap.planning.sim_pipeline import SimPipeline
from offload.swap.planning.sim_spent import Spent
from offload.swap.planning.sim_step import SimStep
from offload.swap.planning.sim_weights import SimWeight, SimWeights
from offload.swap.planning.world import World


@dataclass(slots=True, eq=False)
class _Put:
    """A weight whose step was put off."""

    step: "SimForwardStep"
    weight: SimWeight
    lined_up: bool = False
    unstepped: int = 0  # tiles
    unwritten: int = 0

    def arrive(self) -> None:
        self.step.arrive(self.weight)

    def stepped_one(self) -> None:
        self.unstepped -= 1
        if not self.unstepped:
            self.step.used_up(self.weight)

    def wrote_one(self) -> None:
        self.unwritten -= 1
        if not self.unwritten:
            self.step.wrote(self.weight)


class SimForwardStep:
    """Steps weights right before the next forward uses them.

    Args:
        tables: weights of which a module reads single rows.

    Attributes:
        finished: called when all of a step has been stepped and written.
        spent: of the step that was put off, since the last ``end_step``.
        late_s: seconds in ``finished`` since the last ``end_step``.
    """

    def __init__(
        self, world: World, weights: SimWeights, step: SimStep, *, tables: Collection[str]
    ) -> None:
        self._world = world
        self._weights = weights
        self._step = step
        self._tables = tables
        self.finished: Callable[[], None] = lambda: None
        self._seen: dict[str, None] = {}  # weights that forward used since the last step
        self._put: dict[str, _Put] = {}  # what is not written yet
        self._line: deque[_Put] = deque()  # not lined up yet, in the order of their use
        self._is_begun = self._is_in_forward = False
        self.spent = Spent(world)
        self.late_s = 0.0
        step.put_off = self.take

    @property
    def is_pending(self) -> bool:
        """Whether a step has been put off and is not finished."""
        return bool(self._put) or self._is_begun

    @property
    def _pipeline(self) -> SimPipeline:
        return self._step.pipeline

    # The step.

    def take(self, names: Sequence[str]) -> Sequence[str]:
        """Put off the step of what can wait of ``names``; returns the others."""
        if not self._step.has_states:
            return names  # a first step makes them
        seen = self._seen
        waiting = [name for name in names if name in seen and name not in self._tables]
        self._put = {name: _Put(self, self._weights.weights[name]) for name in waiting}
        self._step.gradients.held = set(waiting)
        return [name for name in names if name not in self._put]

    def start(self) -> None:
        """``optimizer.step()`` is about to return."""
        places = {name: place for place, name in enumerate(self._seen)}
        self._seen = {}
        if not self._put:
            return
        self._line.extend(self._put[name] for name in sorted(self._put, key=places.__getitem__))
        self._is_begun = True
        with self.spent.counting():
            self._line_up()
            self._pipeline.advance()

    # Forward.

    def begin(self) -> None:
        """A forward begins."""
        self._is_in_forward = True

    def need(self, weights: Sequence[SimWeight]) -> None:
        """``weights`` are about to be used: have them stepped."""
        if not self._is_in_forward:
            return
        self._seen.update((weight.name, None) for weight in weights)
        waiting = [self._put[one.name] for one in weights if one.name in self._put]
        if not waiting:
            return
        with self.spent.counting():
            for put in waiting:
                if not put.lined_up:
                    self._weights.bring(put.weight)
                    self._line.remove(put)
                    self._add(put)
                self._pipeline.finish_target(put)

    def go_on(self) -> None:
        """A module is about to compute: have the next weights' tiles on their way meanwhile."""
        if self._put:
            with self.spent.counting():
                self._line_up()
                self._pipeline.advance()

    def _line_up(self) -> None:
        while self._line:
            is_near = self._weights.fetch_ahead(self._line[0].weight)
            if not is_near and self._pipeline.is_waiting:
                return
            self._add(self._line.popleft())

    def _add(self, put: _Put) -> None:
        put.lined_up = True
        self._weights.hold(put.weight, wait=False)
        tiles = self._step.tiles([put.weight.name])
        put.unstepped = put.unwritten = sum(count for _, count in tiles)
        for tile, count in tiles:
            self._pipeline.add(tile, count, put.wrote_one, put.stepped_one, put.arrive)

    def arrive(self, weight: SimWeight) -> None:
        """A tile of ``weight`` is about to be stepped."""
        self._weights.arrive(weight)

    def used_up(self, weight: SimWeight) -> None:
        """All tiles of ``weight`` are stepped: nobody needs its gradient any more."""
        self._step.gradients.use_up(weight.name)

    def wrote(self, weight: SimWeight) -> None:
        """All tiles of ``weight`` are written."""
        self._weights.let_go(weight)
        del self._put[weight.name]

    def end_forward(self) -> None:
        """The outermost module's forward has ended: finish what is left of the step."""
        self._is_in_forward = False
        if not self._is_begun:
            return
        with self.spent.counting():
            while self._line:
                self._add(self._line.popleft())
            self._pipeline.finish()
            self._is_begun = False
        began_s = self._world.now_s
        self.finished()
        self.late_s += self._world.now_s - began_s

    def standing(self) -> tuple[object, ...]:
        """What the next step depends on, between two steps."""
        return tuple(self._put), tuple(self._seen)

    def end_step(self) -> None:
        """``optimizer.step()`` has taken down what it is to do."""
        self.spent.restart()
        self.late_s = 0.0
