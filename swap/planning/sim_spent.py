"""Seconds that forward and backward of a simulated run spend on the optimizer's step."""

from collections.abc import Iterator
from contextlib import contextmanager

from offload.swap.planning.world import World


class Spent:
    """What went by inside of ``counting``, since ``restart``.

    Attributes:
        seconds: all of it.
        stalled_s: those of it that were waits.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self.restart()

    def restart(self) -> None:
        """Count from now on."""
        self.seconds = self.stalled_s = 0.0

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Around what works on the step."""
        began = self._world.reading()
        yield
        ended = self._world.reading()
        self.seconds += ended.now_s - began.now_s
        self.stalled_s += ended.stall_s - began.stall_s
