"""The virtual world of a simulated run: a clock, a drive with two lanes, memory that is counted.

The training thread is the only one that acts: it computes, which lets time pass, or waits for a
lane. Lanes are passive, so that between two of its actions everything follows by arithmetic.

[Note: a shared drive] Each lane serves its transfers in order. While both have work they share the
drive: each goes on at its own rate times ``together``, which the machine's measurement of reads and
writes at once gives (1: nothing is shared, 1/2: the drive does one thing at a time).
"""

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from offload.tiers.hostmem import PAGE
from offload.tiers.journal import Journal, Label
from offload.tiers.pieces import PIECE_NBYTES

Role: TypeAlias = Literal[
    "fixed", "weights", "saved", "transients", "gradients", "staging", "states", "pages"
]
_READING, _WRITING = "file→host", "host→file"  # as ``Lanes`` names them


class Memory:
    """Bytes of the resident set by role, and their peak.

    ``pages`` are clean pages of files, which the governor takes back above ``limit_nbytes``.
    """

    def __init__(self, limit_nbytes: int) -> None:
        self.limit_nbytes = limit_nbytes
        self.now: Counter[Role] = Counter()
        self.nbytes = 0  # pages of files are not counted in
        self.peak_nbytes = 0
        self.peak_roles: dict[Role, int] = {}

    def add(self, role: Role, nbytes: int) -> None:
        """``nbytes`` more are resident, or fewer."""
        self.now[role] += nbytes
        if role != "pages":
            self.nbytes += nbytes
        if nbytes > 0 and (resident := self.resident_nbytes) > self.peak_nbytes:
            self.peak_nbytes = resident
            self.peak_roles = dict(self.now)

    @property
    def resident_nbytes(self) -> int:
        """The resident set."""
        return self.nbytes + min(self.now["pages"], max(self.limit_nbytes - self.nbytes, 0))

    def room(self) -> int:
        """Bytes left below the limit; negative above it."""
        return self.limit_nbytes - self.resident_nbytes

    def restart_peak(self) -> None:
        """Begin a new measurement of the peak."""
        self.peak_nbytes = self.resident_nbytes
        self.peak_roles = dict(self.now)


@dataclass(slots=True, eq=False)
class Flight:
    """A transfer: ``work_s`` is what the drive still has to do for it, alone and at full speed."""

    label: Label
    nbytes: int
    work_s: float
    lag_s: float
    began_s: float | None = None
    ended_s: float | None = None


class SimLane:
    """The queue of one direction.

    Args:
        seconds: that a request of so many bytes takes of the drive.
        latency_s: of one request on an idle link, beyond what it takes of the drive.
    """

    def __init__(self, name: str, seconds: Callable[[int], float], latency_s: float) -> None:
        self.name = name
        self.queue: deque[Flight] = deque()
        self._seconds = seconds
        self._latency_s = latency_s

    def work_s(self, nbytes: int) -> float:
        """Seconds of the drive for ``nbytes``, cut into pieces as a run cuts them."""
        pieces, rest = divmod(max(nbytes, PAGE), PIECE_NBYTES)
        return pieces * self._seconds(PIECE_NBYTES) + (self._seconds(rest) if rest else 0.0)

    def flight(self, label: Label, nbytes: int) -> Flight:
        """A transfer that is not queued yet."""
        return Flight(label, nbytes, self.work_s(nbytes), self._latency_s)


class World:
    """Clock, drive, memory, journal.

    Args:
        together: see [Note: a shared drive].
    """

    def __init__(
        self,
        reads: SimLane,
        writes: SimLane,
        *,
        together: float,
        memory: Memory,
        journal: Journal | None = None,
    ) -> None:
        self.now_s = 0.0
        self.drive_busy_s = 0.0
        self.reads, self.writes = reads, writes
        self.memory = memory
        self.journal = journal or Journal(clock=lambda: self.now_s)
        self._together = together

    # What the training thread does.

    def compute(self, seconds: float) -> None:
        """Let time pass."""
        self._pass_until(self.now_s + seconds)

    def submit(self, lane: SimLane, label: Label, nbytes: int, *, urgent: bool = False) -> Flight:
        """Queue a transfer; ``urgent`` is next after the one that is served."""
        flight = lane.flight(label, nbytes)
        if urgent and lane.queue:
            lane.queue.insert(1, flight)
        else:
            lane.queue.append(flight)
        return flight

    def done(self, flight: Flight) -> bool:
        """Whether it has ended."""
        return flight.ended_s is not None and flight.ended_s <= self.now_s

    def wait(self, lane: SimLane, flight: Flight, reason: str, role: str | None = None) -> None:
        """Stall until ``flight`` has ended."""
        if self.done(flight):
            return
        self._expedite(lane, flight)
        label = flight.label
        with self.journal.stall(label.key, role or label.role, lane.name, reason):
            while flight.ended_s is None:
                self._serve(until_s=float("inf"))
            self._pass_until(max(flight.ended_s, self.now_s))

    def drain(self) -> None:
        """Let everything end; counts as a stall of nobody."""
        while self.reads.queue or self.writes.queue:
            self._serve(until_s=float("inf"))

    def _expedite(self, lane: SimLane, flight: Flight) -> None:
        queue = lane.queue
        if flight in queue and queue[0] is not flight:
            queue.remove(flight)
            queue.insert(1, flight)

    # How time passes.

    def _pass_until(self, until_s: float) -> None:
        while self.now_s < until_s and (self.reads.queue or self.writes.queue):
            self._serve(until_s)
        self.now_s = max(self.now_s, until_s)

    def _serve(self, until_s: float) -> None:
        """Serve both lanes until the next transfer ends, or until then."""
        busy = [lane for lane in (self.reads, self.writes) if lane.queue]
        speed = self._together if len(busy) > 1 else 1.0
        for lane in busy:
            if lane.queue[0].began_s is None:
                lane.queue[0].began_s = self.now_s
        span_s = min(min(lane.queue[0].work_s for lane in busy) / speed, until_s - self.now_s)
        self.now_s += span_s
        self.drive_busy_s += span_s
        for lane in busy:
            head = lane.queue[0]
            head.work_s -= span_s * speed
            if head.work_s <= 1e-12:
                lane.queue.popleft()
                head.ended_s = self.now_s + head.lag_s
                self._tell(head, lane)

    def _tell(self, flight: Flight, lane: SimLane) -> None:
        assert flight.began_s is not None
        assert flight.ended_s is not None
        self.journal.moved(
            flight.label,
            flight.nbytes,
            flight.ended_s - flight.began_s,
            lane.name,
            ended_s=flight.ended_s,
        )


def read_lane(seconds: Callable[[int], float], latency_s: float) -> SimLane:
    """From the drive to memory."""
    return SimLane(_READING, seconds, latency_s)


def write_lane(seconds: Callable[[int], float], latency_s: float) -> SimLane:
    """From memory to the drive."""
    return SimLane(_WRITING, seconds, latency_s)
