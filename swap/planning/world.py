"""The virtual world of a simulated run: a clock, a drive with two lanes, memory that is counted.

The training thread is the only one that acts: it computes, which lets time pass, or waits for a
lane. Lanes are passive, so that between two of its actions everything follows by arithmetic.

[Note: a shared drive] Each lane serves its transfers in order. While both have work they share the
drive: each goes on at its own rate times ``together``, which the machine's measurement of reads and
writes at once gives (1: nothing is shared, 1/2: the drive does one thing at a time).

[Note: lanes that lag] While no transfer ends, the lanes need no attention: when the next one will
end follows from what stands at their heads. So time passes by one comparison, and the work that was
done until then is taken off when a transfer ends, or something else looks at it.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias, get_args

from offload.tiers.events import Recorder, Stall
from offload.tiers.hostmem import PAGE
from offload.tiers.journal import Journal, Label
from offload.tiers.pieces import PIECE_NBYTES

Role: TypeAlias = Literal[
    "fixed", "weights", "saved", "transients", "gradients", "staging", "states", "pages"
]
_READING, _WRITING = "file→host", "host→file"  # as ``Lanes`` names them
_NO_WORK_S = 1e-12  # what rounding leaves of a transfer that has ended


class Memory:
    """Bytes of the resident set by role, and their peak.

    ``pages`` are clean pages of files, which the governor takes back above ``limit_nbytes``.
    """

    def __init__(self, limit_nbytes: int) -> None:
        self.limit_nbytes = limit_nbytes
        self.now: dict[Role, int] = dict.fromkeys(get_args(Role), 0)
        self.nbytes = 0  # pages of files are not counted in
        self.peak_nbytes = 0
        self.peak_roles: dict[Role, int] = {}

    def add(self, role: Role, nbytes: int) -> None:
        """``nbytes`` more are resident, or fewer."""
        self.now[role] += nbytes
        if role != "pages":
            self.nbytes += nbytes
        # What is resident is at most the sum: it most often tells that this is no new peak.
        if nbytes > 0 and self.nbytes + self.now["pages"] > self.peak_nbytes:
            resident = self.resident_nbytes
            if resident > self.peak_nbytes:
                self.peak_nbytes = resident
                self.peak_roles = dict(self.now)

    def pass_through(self, role: Role, highs: Sequence[int], nbytes: int) -> None:
        """``role`` comes and goes: it is ``nbytes`` more in the end.

        Args:
            highs: bytes more than at the beginning, each time that they were more than ever before.
        """
        if highs and self.nbytes + highs[-1] + self.now["pages"] > self.peak_nbytes:
            for high in highs:
                resident = self._resident(self.nbytes + high)
                if resident > self.peak_nbytes:
                    self.peak_nbytes = resident
                    self.peak_roles = {**self.now, role: self.now[role] + high}
        self.now[role] += nbytes
        self.nbytes += nbytes

    @property
    def resident_nbytes(self) -> int:
        """The resident set."""
        return self._resident(self.nbytes)

    def _resident(self, nbytes: int) -> int:
        """With ``nbytes`` of everything but pages of files."""
        return nbytes + min(self.now["pages"], max(self.limit_nbytes - nbytes, 0))

    def room(self) -> int:
        """Bytes left below the limit; negative above it."""
        free = self.limit_nbytes - self.nbytes
        return max(free - self.now["pages"], 0) if free > 0 else free

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
    follower: "tuple[SimLane, Flight] | None" = None  # what is queued when this has ended


class SimLane:
    """The queue of one direction.

    Args:
        seconds: that a request of so many bytes takes of the drive.
        latency_s: of one request on an idle link, beyond what it takes of the drive.
    """

    def __init__(self, name: str, seconds: Callable[[int], float], latency_s: float) -> None:
        self.name = name
        self.queue: deque[Flight] = deque()
        self.latency_s = latency_s
        self._seconds = seconds
        self._known_s: dict[int, float] = {}

    def work_s(self, nbytes: int) -> float:
        """Seconds of the drive for ``nbytes``, cut into pieces as a run cuts them."""
        found = self._known_s.get(nbytes)
        if found is None:
            pieces, rest = divmod(max(nbytes, PAGE), PIECE_NBYTES)
            found = pieces * self._seconds(PIECE_NBYTES) + (self._seconds(rest) if rest else 0.0)
            self._known_s[nbytes] = found
        return found


class Reading(NamedTuple):
    """Clock and counters at one moment."""

    now_s: float
    stall_s: float
    drive_busy_s: float
    read_nbytes: int
    written_nbytes: int


class World:
    """Clock, drive, memory, journal.

    Args:
        together: see [Note: a shared drive].
        lost_s_per_byte: by which computing takes longer for each byte that moves meanwhile.
        recorder: takes the events; without one only their totals are kept.
    """

    def __init__(
        self,
        reads: SimLane,
        writes: SimLane,
        *,
        together: float,
        memory: Memory,
        lost_s_per_byte: float = 0.0,
        recorder: Recorder | None = None,
    ) -> None:
        self.now_s = 0.0
        self._lost_s_per_byte = lost_s_per_byte
        self._drive_busy_s = 0.0
        self._seen_s = 0.0  # until then the lanes' work has been taken off
        self._due_s = math.inf  # when the next transfer ends
        self._first_s = 0.0  # what the drive has to do until then, for the first of each lane
        self._speed = 1.0
        self.reads, self.writes = reads, writes
        self.memory = memory
        self.is_recorded = recorder is not None
        self.journal = Journal(recorder, clock=lambda: self.now_s)
        self._totals = self.journal.totals
        self._together = together

    # What the training thread does.

    def compute(self, seconds: float) -> None:
        """Let time pass: ``seconds``, and what moves take from them."""
        until_s = self.now_s + seconds
        while self._due_s <= until_s:
            until_s += self._end_next() * self._lost_s_per_byte
        self.now_s = until_s

    def submit(
        self,
        lane: SimLane,
        label: Label,
        nbytes: int,
        *,
        urgent: bool = False,
        after: Flight | None = None,
    ) -> Flight:
        """Queue a transfer; ``urgent`` is next after the one that is served.

        One ``after`` another is queued when that one, which nothing else follows, has ended.
        """
        flight, queue = Flight(label, nbytes, lane.work_s(nbytes), lane.latency_s), lane.queue
        if after is not None and after.ended_s is None:
            after.follower = lane, flight
        elif not queue:
            self._catch_up()
            self._queue_first(lane, flight)
            self._look_ahead()
        elif urgent:
            queue.insert(1, flight)
        else:
            queue.append(flight)
        return flight

    def done(self, flight: Flight) -> bool:
        """Whether it has ended."""
        return flight.ended_s is not None and flight.ended_s <= self.now_s

    def wait(self, lane: SimLane, flight: Flight, reason: str) -> None:
        """Stall until ``flight`` has ended."""
        if flight.ended_s is not None and flight.ended_s <= self.now_s:
            return
        if flight in lane.queue and lane.queue[0] is not flight:
            lane.queue.remove(flight)
            lane.queue.insert(1, flight)
        began_s = self.now_s
        while flight.ended_s is None:
            self._end_next()
        # The drive is done with it, the link may not be.
        while self._due_s <= flight.ended_s:
            self._end_next()
        self.now_s = flight.ended_s
        stalled_s = self.now_s - began_s
        self._totals.stall_s += stalled_s
        if self.is_recorded:
            label = flight.label
            self.journal.record(
                Stall(
                    t_s=self.now_s,
                    key=label.key,
                    role=label.role,
                    lane=lane.name,
                    reason=reason,
                    duration_s=stalled_s,
                )
            )

    def drain(self) -> None:
        """Let everything end; counts as a stall of nobody."""
        while self._due_s < math.inf:
            self._end_next()

    @property
    def drive_busy_s(self) -> float:
        """Seconds in which the drive has worked."""
        self._catch_up()
        return self._drive_busy_s

    # How time passes; see [Note: lanes that lag].

    def _look_ahead(self) -> None:
        """Tell when the next transfer ends."""
        reads, writes = self.reads.queue, self.writes.queue
        self._speed = 1.0
        if not reads and not writes:
            self._due_s = math.inf
            return
        if not writes:
            self._first_s = reads[0].work_s
        elif not reads:
            self._first_s = writes[0].work_s
        else:
            self._first_s = min(reads[0].work_s, writes[0].work_s)
            self._speed = self._together
        self._due_s = self._seen_s + self._first_s / self._speed

    def _catch_up(self) -> None:
        """Take the work off that was done by now."""
        if self._due_s < math.inf:
            span_s = self.now_s - self._seen_s
            served_s = span_s * self._speed
            self._drive_busy_s += span_s
            self._first_s -= served_s
            for lane in (self.reads, self.writes):
                if lane.queue:
                    lane.queue[0].work_s -= served_s
        self._seen_s = self.now_s

    def _end_next(self) -> int:
        """Go to where the next transfer ends, or both lanes' do; bytes of what ended."""
        reads, writes, first_s = self.reads.queue, self.writes.queue, self._first_s
        now_s = self.now_s = self._due_s
        self._drive_busy_s += now_s - self._seen_s
        self._seen_s = now_s
        ended_nbytes = 0
        read, write = reads[0] if reads else None, writes[0] if writes else None
        if read is not None:
            read.work_s -= first_s
            if read.work_s <= _NO_WORK_S:
                ended_nbytes += self._end(self.reads)
        if write is not None:
            write.work_s -= first_s
            if write.work_s <= _NO_WORK_S:
                ended_nbytes += self._end(self.writes)
        self._look_ahead()
        return ended_nbytes

    def _queue_first(self, lane: SimLane, flight: Flight) -> None:
        flight.began_s = self.now_s
        lane.queue.append(flight)

    def _end(self, lane: SimLane) -> int:
        flight = lane.queue.popleft()
        flight.ended_s = self.now_s + flight.lag_s
        if lane.queue:
            lane.queue[0].began_s = self.now_s
        if flight.follower is not None:
            following, follower = flight.follower
            if following.queue:
                following.queue.append(follower)
            else:
                self._queue_first(following, follower)
        if self.is_recorded:
            assert flight.began_s is not None
            self.journal.moved(
                flight.label,
                flight.nbytes,
                flight.ended_s - flight.began_s,
                lane.name,
                ended_s=flight.ended_s,
            )
        elif lane is self.reads:
            self._totals.read_nbytes += flight.nbytes
        else:
            self._totals.written_nbytes += flight.nbytes
        return flight.nbytes

    # What repeats.

    def reading(self) -> Reading:
        """Clock and counters, now."""
        totals = self._totals
        return Reading(
            self.now_s, totals.stall_s, self.drive_busy_s, totals.read_nbytes, totals.written_nbytes
        )

    def ahead_s(self, flights: Iterable[Flight]) -> tuple[float, ...]:
        """What the future depends on: work in the queues, and when ``flights`` end, from now on."""
        self._catch_up()
        ends = (
            -1.0 if flight.ended_s is None else max(flight.ended_s - self.now_s, 0.0)
            for flight in flights
        )
        queued = [flight.work_s for lane in (self.reads, self.writes) for flight in lane.queue]
        return (*ends, float(len(self.reads.queue)), *queued)

    def repeat(self, since: Reading, times: int, flights: Iterable[Flight]) -> None:
        """What happened ``since`` then happens so many times more; ``flights`` are on their way."""
        self._catch_up()
        totals = self._totals
        later_s = (self.now_s - since.now_s) * times
        for flight in flights:
            if flight.ended_s is not None:
                flight.ended_s += later_s
        self._drive_busy_s += (self._drive_busy_s - since.drive_busy_s) * times
        totals.stall_s += (totals.stall_s - since.stall_s) * times
        totals.read_nbytes += (totals.read_nbytes - since.read_nbytes) * times
        totals.written_nbytes += (totals.written_nbytes - since.written_nbytes) * times
        self.now_s += later_s
        self._seen_s += later_s
        self._due_s += later_s


def read_lane(seconds: Callable[[int], float], latency_s: float) -> SimLane:
    """From the drive to memory."""
    return SimLane(_READING, seconds, latency_s)


def write_lane(seconds: Callable[[int], float], latency_s: float) -> SimLane:
    """From memory to the drive."""
    return SimLane(_WRITING, seconds, latency_s)
