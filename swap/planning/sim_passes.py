"""The passes of a simulated step: forward and backward of each micro-batch.

[Note: passes that repeat] A pass that begins as the one before it did is that pass again, as steps
are (``simulate`` [Note: steps that repeat]). The first of a step makes gradients, the second may be
the first that adds to them, the last may step: those between are counted, once two were alike.
Each looks up other rows of tables, so more and more pages are in memory, and looks take less time
than is counted.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from offload.swap.planning.compiled import Moment
from offload.swap.planning.sim_gradients import SimGradients
from offload.swap.planning.sim_pass import SimPass
from offload.swap.planning.sim_pipeline import are_alike
from offload.swap.planning.sim_saved import SimSaved
from offload.swap.planning.world import Reading, World

_LIKE_OTHERS = 2  # the number of the first pass that others may repeat


class Part(Protocol):
    """Of the simulated runtime."""

    def standing(self) -> tuple[object, ...]:
        """What a step or a pass depends on, but for times."""


class _Beginning(NamedTuple):
    """How a pass began.

    Attributes:
        standing: all that is no time, but for pages of tables.
        ahead_s: of the lanes.
    """

    standing: tuple[object, ...]
    ahead_s: tuple[float, ...]
    reading: Reading
    mapped_nbytes: int


class SimPasses:
    """Goes through a step's passes.

    Args:
        parts: whatever a pass depends on.
        count: of passes.
        repeats: whether those that repeat are counted; else all are simulated.
    """

    def __init__(
        self,
        world: World,
        one: SimPass,
        saved: SimSaved,
        gradients: SimGradients,
        parts: Sequence[Part],
        *,
        count: int,
        repeats: bool,
    ) -> None:
        self._world = world
        self._pass = one
        self._saved = saved
        self._gradients = gradients
        self._parts = parts
        self._last = count - 1
        self._may_repeat = repeats and self._last > _LIKE_OTHERS + 1

    def go_through(self, passes: Iterable[Iterable[Moment]]) -> None:
        """Forwards and backwards, of all micro-batches or of the first of them."""
        before: _Beginning | None = None
        is_counted = False
        for number, moments in enumerate(passes):
            if is_counted and number < self._last:
                continue
            if self._may_repeat and _LIKE_OTHERS <= number < self._last:
                now = self._beginning()
                if before is not None and self._repeats(before, now):
                    self._repeat(before, now, self._last - number)
                    is_counted = True
                    continue
                before = now
            self._pass.go_through(moments, number)

    def _beginning(self) -> _Beginning:
        gradients, world = self._gradients, self._world
        gradients.poll()  # as a forward does
        held = world.memory.now
        del held["pages"]
        standing = [part.standing() for part in (gradients, *self._parts)]
        return _Beginning(
            (held, *standing), world.ahead_s(()), world.reading(), gradients.mapped_nbytes
        )

    def _repeats(self, before: _Beginning, now: _Beginning) -> bool:
        return (
            self._gradients.is_settled
            and self._pass.forwards == 1
            and before.standing == now.standing
            and are_alike(
                now.ahead_s,
                before.ahead_s,
                since_s=before.reading.now_s,
                now_s=now.reading.now_s,
            )
            and self._saved.would_choose_again(first=False)
        )

    def _repeat(self, before: _Beginning, now: _Beginning, times: int) -> None:
        """What has been since ``before`` comes so many times more."""
        self._world.repeat(before.reading, times, ())
        self._gradients.mapped_nbytes += times * (now.mapped_nbytes - before.mapped_nbytes)
        self._pass.look_up_again(times)
