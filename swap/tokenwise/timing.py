"""How long passes take. The host runs ahead of a device: there, events tell, and tell later."""

from collections.abc import Callable
from typing import TypeAlias

from offload.tiers.accelerator import Accelerator, Event

Mark: TypeAlias = float | Event
"""A point in time: seconds of the host's clock, or a point of a device's stream."""


class PassTimer:
    """Times passes by ``clock``, or on ``accelerator`` by its current stream."""

    def __init__(self, clock: Callable[[], float], accelerator: Accelerator | None = None) -> None:
        self._clock = clock
        self._accelerator = accelerator
        self._untold: list[tuple[Event, Event, Callable[[float], None]]] = []

    def mark(self) -> Mark:
        """Now; on a device, behind all work that was enqueued so far."""
        self.tell()
        if self._accelerator is None:
            return self._clock()
        return self._accelerator.current_stream().record()

    def since(self, began: Mark, took: Callable[[float], None]) -> None:
        """Call ``took`` with the seconds from ``began`` to now, as soon as they are known."""
        ended = self.mark()
        if isinstance(began, Event) and isinstance(ended, Event):
            self._untold.append((began, ended, took))
        elif isinstance(began, float) and isinstance(ended, float):
            took(ended - began)

    def tell(self) -> None:
        """Tell what the device has got to meanwhile; never blocks."""
        while self._untold and self._untold[0][1].done():
            began, ended, took = self._untold.pop(0)
            if began.error is None and ended.error is None:
                took(ended.span()[1] - began.span()[1])
