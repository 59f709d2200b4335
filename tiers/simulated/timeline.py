"""Virtual time: streams of operations that take effect late, in any order that was not forbidden.

[Note: virtual time] The host is one thread of control; time passes for it when it calls the
device and when it waits. An operation is *ready* once the operation before it on its stream and
every event that its stream waited for are done. It then takes its jittered time, and only at its
end does its effect happen, all at once. So for two operations between which no order was declared
both orders occur, each under some seed; and what was declared holds under every seed. Reading at
the end, too, catches a source that is overwritten while it is being read.
"""

import heapq
import random
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from offload.tiers.accelerator import Event, Stream

Effect: TypeAlias = Callable[[], object]
_LOG_LENGTH = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How long things take, in seconds of virtual time.

    Attributes:
        latency_s: of a copy, besides its bytes.
        kernel_s: of a kernel.
        host_s: that the host spends between two calls.
        jitter: mean of the exponential delay of each, as a multiple of its time; 0 is exact.
        late: share of operations that take ``late_factor`` times as long.
    """

    bytes_per_s: float = 25e9
    latency_s: float = 10e-6
    kernel_s: float = 20e-6
    host_s: float = 10e-6
    jitter: float = 1.0
    late: float = 0.15
    late_factor: float = 20.0


class Operation:
    """A piece of work on a stream; ``effect`` runs at its end."""

    __slots__ = (
        "blockers",
        "dependants",
        "done",
        "duration_s",
        "effect",
        "ended_s",
        "error",
        "name",
        "started_s",
        "stream",
    )

    def __init__(self, stream: str, name: str, duration_s: float, effect: Effect | None) -> None:
        self.stream = stream
        self.name = name
        self.duration_s = duration_s
        self.effect = effect
        self.blockers = 0
        self.dependants: list[Operation] = []
        self.done = False
        self.error: BaseException | None = None
        self.started_s = self.ended_s = 0.0


class Timeline:
    """The virtual clock, and the operations that wait for it. See [Note: virtual time].

    A lock makes it safe to use from several threads, which then are one host.

    Attributes:
        lock: held while operations are submitted and while they end.
    """

    def __init__(self, seed: int, timing: Timing) -> None:
        self.timing = timing
        self.random = random.Random(seed)
        self.now_s = 0.0
        self.log: deque[str] = deque(maxlen=_LOG_LENGTH)  # what ended last, for reports of races
        self._ends: list[tuple[float, float, int, Operation]] = []
        self._count = 0
        self.lock = threading.RLock()

    def jittered(self, seconds: float) -> float:
        """``seconds`` as they turn out."""
        timing = self.timing
        seconds *= 1 + timing.jitter * self.random.expovariate(1)
        if self.random.random() < timing.late:
            seconds *= timing.late_factor
        return seconds

    def submit(self, operation: Operation, after: "list[Operation]") -> None:
        """Enqueue; it is ready once all of ``after`` are done. The host spends a moment on it."""
        with self.lock:
            for blocker in after:
                if not blocker.done:
                    operation.blockers += 1
                    blocker.dependants.append(operation)
            if operation.blockers == 0:
                self._start(operation)
            self.pass_time(self.jittered(self.timing.host_s))

    def pass_time(self, seconds: float) -> None:
        """The host does something else for so long."""
        with self.lock:
            until = self.now_s + seconds
            while self._ends and self._ends[0][0] <= until:
                self._end_next()
            self.now_s = max(self.now_s, until)

    def run_until(self, operation: Operation) -> None:
        """The host waits for ``operation``; it comes, for only earlier ones can hold it up."""
        with self.lock:
            while not operation.done:
                self._end_next()

    def run_all(self) -> None:
        """The host waits for everything."""
        with self.lock:
            while self._ends:
                self._end_next()

    def _start(self, operation: Operation) -> None:
        operation.started_s = self.now_s
        end = self.now_s + operation.duration_s
        self._count += 1
        # Ends at the same instant come in any order too.
        heapq.heappush(self._ends, (end, self.random.random(), self._count, operation))

    def _end_next(self) -> None:
        end_s, _, _, operation = heapq.heappop(self._ends)
        self.now_s = max(self.now_s, end_s)
        operation.ended_s = self.now_s
        if operation.effect is not None:
            try:
                operation.effect()
            except Exception as error:  # noqa: BLE001  raised again by whoever waits
                operation.error = error
            operation.effect = None  # it may own tensors
        operation.done = True
        self.log.append(f"{operation.ended_s * 1e6:9.1f} us  {operation.stream}: {operation.name}")
        for dependant in operation.dependants:
            dependant.blockers -= 1
            if dependant.blockers == 0:
                self._start(dependant)
        operation.dependants.clear()


class VirtualEvent(Event):
    """An operation's end; None is a point before which there was nothing.

    Args:
        recorded_s: when the host recorded it, if it is a point: on a stream that has nothing left
            to do it lies there, not at the end of what the stream did last.
    """

    def __init__(
        self, timeline: Timeline, operation: Operation | None, recorded_s: float | None = None
    ) -> None:
        self._timeline = timeline
        self.operation = operation
        self._recorded_s = recorded_s

    @property
    def error(self) -> BaseException | None:  # type: ignore[override]
        return self.operation.error if self.operation else None

    def done(self) -> bool:
        if self.operation is None:
            return True
        if not self.operation.done:  # asking takes time: a loop that polls comes to an end
            self._timeline.pass_time(self._timeline.jittered(self._timeline.timing.host_s))
        return self.operation.done

    def settle(self) -> None:
        if self.operation is not None:
            self._timeline.run_until(self.operation)

    def span(self) -> tuple[float, float]:
        started_s, ended_s = (
            (self.operation.started_s, self.operation.ended_s) if self.operation else (0.0, 0.0)
        )
        if self._recorded_s is None:
            return started_s, ended_s
        at_s = max(self._recorded_s, ended_s)
        return at_s, at_s


class VirtualStream(Stream):
    """A stream of a ``Timeline``."""

    def __init__(self, timeline: Timeline, name: str) -> None:
        self.name = name
        self._timeline = timeline
        self._last: Operation | None = None
        self._awaited: list[Operation] = []  # by whatever comes next

    def enqueue(self, name: str, duration_s: float, effect: Effect | None) -> VirtualEvent:
        """Work that takes ``duration_s`` and has its effect at its end."""
        operation = Operation(self.name, name, duration_s, effect)
        with self._timeline.lock:  # whoever comes next must find the operation submitted
            after, self._awaited = self._awaited, []
            if self._last is not None:
                after.append(self._last)
            self._last = operation
            self._timeline.submit(operation, after)
        return VirtualEvent(self._timeline, operation)

    def record(self) -> VirtualEvent:
        if self._awaited:  # the point lies behind these waits as well
            return self.enqueue("event", 0.0, None)
        return VirtualEvent(self._timeline, self._last, self._timeline.now_s)

    def wait(self, event: Event) -> None:
        if not isinstance(event, VirtualEvent):
            event.settle()  # of another device: the host stands between the two
            return
        with self._timeline.lock:
            if event.operation is not None and not event.operation.done:
                self._awaited.append(event.operation)
