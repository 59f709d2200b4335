"""How long things take where they run: on the host, or on a device that the host runs ahead of.

[Note: time of a device] The host only enqueues: its clock would tell how long enqueueing took. So
a mark is an event of the stream that computes, and a time is told later, when the device has got
there; nobody waits for it. Between two marks the stream computes, or it is idle, for want of bytes
(it waits for a fetch) or of kernels (the host waits for room). So whatever is not to count lies
between a pause and a resumption: the first one is recorded before the edge, the other one after
it. What the host takes for itself meanwhile is no time of the device: see ``host_clock``. On the
host a mark is the clock's reading, an event of the past, and everything is told at once.
"""

import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self

from offload.tiers.accelerator import Accelerator, Event
from offload.tiers.cpudevice import DoneEvent

_MOST_MARKS = 1 << 13  # that wait for the device: some passes of a large model
_MOST_MARKS_EACH = 1 << 10

Took = Callable[[float], None]


class Timer:
    """Hands out stopwatches that run by ``clock``, or on ``accelerator`` by its current stream.

    Attributes:
        accelerator: where the model computes, if that is not the host.
        host_clock: of what the host does within the times measured; None where they do not
            contain it, for a device computes meanwhile.
        measures: whether stopwatches that are handed out from now on measure anything.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        accelerator: Accelerator | None = None,
    ) -> None:
        self.host_clock = clock if accelerator is None else None
        self.measures = True
        self._clock = clock
        self.accelerator = accelerator
        self._untold: deque[tuple[list[Event], Took]] = deque()
        self._marks = 0  # of these

    def stopwatch(self, *, running: bool = False) -> "Stopwatch":
        """A new one, at zero."""
        self.tell()
        watch = Stopwatch(self, measures=self.measures and self._marks < _MOST_MARKS)
        if running:
            watch.resume()
        return watch

    def mark(self) -> Event:
        """Now; on a device, behind all work that was enqueued so far."""
        if self.accelerator is not None:
            return self.accelerator.current_stream().record()
        now_s = self._clock()
        return DoneEvent(now_s, now_s)

    def tell(self) -> None:
        """Tell what is known by now; never blocks."""
        while self._untold and all(mark.done() for mark in reversed(self._untold[0][0])):
            marks, took = self._untold.popleft()
            self._marks -= len(marks)
            if all(mark.error is None for mark in marks):  # a failed device tells no times
                pairs = zip(marks[::2], marks[1::2], strict=True)
                took(sum((ended.seconds_since(began) for began, ended in pairs), start=0.0))

    def tell_later(self, marks: list[Event], took: Took) -> None:
        """Call ``took`` with the seconds between each two of ``marks``, as soon as all are done."""
        self._untold.append((marks, took))
        self._marks += len(marks)
        self.tell()


class Stopwatch:
    """Sums up the time for which it runs. ``with`` one, it runs inside."""

    __slots__ = ("_marks", "_timer")

    def __init__(self, timer: Timer, *, measures: bool) -> None:
        self._timer = timer
        self._marks: list[Event] | None = [] if measures else None  # starts and pauses in turn

    def resume(self) -> None:
        """Run, if it does not."""
        if self._marks is not None and len(self._marks) % 2 == 0:
            self._mark(self._marks)

    def pause(self) -> None:
        """Stand still, if it runs."""
        if self._marks is not None and len(self._marks) % 2 == 1:
            self._mark(self._marks)

    def _mark(self, marks: list[Event]) -> None:
        marks.append(self._timer.mark())
        if len(marks) > _MOST_MARKS_EACH:  # nobody has taken its time for long
            self._marks = None

    def tell(self, took: Took) -> None:
        """End, and call ``took`` with the seconds as soon as they are known; once at most.

        Never, if it did not measure or the device failed.
        """
        self.pause()
        marks, self._marks = self._marks, None
        if marks is not None:
            self._timer.tell_later(marks, took)

    def __enter__(self) -> Self:
        self.resume()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.pause()
