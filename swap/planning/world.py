"""The virtual world of a simulated run: a clock, a drive with two lanes, memory that is counted.

The training thread is the only one that acts: it computes, which lets time pass, or waits for a
lane. Lanes are passive, so that between two of its actions everything follows by arithmetic.

[Note: a shared drive] Each lane serves its transfers in order. While both have work they share the
drive: each goes on at its own rate times ``together``, which the machine's measurement of reads and
writes at once gives (1: nothing is shared, 1/2: the drive does one thing at a time).

[Note: lanes that lag] When the first transfer of a lane will end is known as it begins, and changes
only where the other lane begins to work or has nothing more to do. So time passes by one
comparison, and a lane needs attention only when one of its own transfers ends.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, NamedTuple, TypeAlias, get_args

from offload.tiers.events import Recorder, Stall
from offload.tiers.hostmem import PAGE
from offload.tiers.journal import Journal, Label
from offload.tiers.pieces import PIECE_NBYTES

Role: TypeAlias = Literal[
    "fixed", "weights", "saved", "transients", "gradients", "staging", "states", "pages"
]
_READING, _WRITING = "file→host", "host→file"  # as ``Lanes`` names them
# By which rounding may part two ends that are one: early in a run, and late.
_NO_TIME_S, _ROUNDED = 1e-12, 1 + 2.0**-52


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

    def turn(self, role: Role, into: Role, nbytes: int) -> None:
        """``nbytes`` have another role from now on; neither is that of pages."""
        self.now[role] -= nbytes
        self.now[into] += nbytes

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
    """A transfer: ``work_s`` is what the drive has to do for it, alone and at full speed."""

    label: Label
    nbytes: int
    work_s: float
    began_s: float | None = None
    ended_s: float | None = None
    follower: "tuple[SimLane, Flight] | None" = None  # what is queued when this has ended


class SimLane:
    """The queue of one direction.

    Args:
        seconds: that a request of so many bytes takes of the drive.
        latency_s: of one request on an idle link, beyond what it takes of the drive.

    Attributes:
        due_s: when the drive is done with the first transfer, as things stand.
    """

    def __init__(self, name: str, seconds: Callable[[int], float], latency_s: float) -> None:
        self.name = name
        self.queue: deque[Flight] = deque()
        self.due_s = math.inf
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
        self._busy_s = 0.0  # of the drive, until it last had nothing to do
        self._busy_since_s: float | None = None
        self._due_s = math.inf  # when the next transfer ends
        self._speed = 1.0  # of each lane that works
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
        flight, queue = Flight(label, nbytes, lane.work_s(nbytes)), lane.queue
        if after is not None and after.ended_s is None:
            after.follower = lane, flight
        elif not queue:
            self._begin(lane, flight)
            self._due_s = min(self.reads.due_s, self.writes.due_s)
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
        since_s = self._busy_since_s
        return self._busy_s if since_s is None else self._busy_s + (self.now_s - since_s)

    # How time passes; see [Note: lanes that lag].

    def _end_next(self) -> int:
        """Go to where the next transfer ends, or both lanes' do; bytes of what ended."""
        now_s = self.now_s = self._due_s
        reads, writes = self.reads, self.writes
        until_s = now_s * _ROUNDED + _NO_TIME_S
        ended_nbytes = 0
        if reads.due_s <= until_s:
            ended_nbytes += self._end(reads)
        if writes.due_s <= until_s:
            ended_nbytes += self._end(writes)
        self._due_s = min(reads.due_s, writes.due_s)
        return ended_nbytes

    def _begin(self, lane: SimLane, flight: Flight) -> None:
        """An idle lane begins to work."""
        now_s = flight.began_s = self.now_s
        lane.queue.append(flight)
        other = self.writes if lane is self.reads else self.reads
        if other.queue:
            self._go_on(other, self._together)
            lane.due_s = now_s + flight.work_s / self._together
        else:
            self._busy_since_s = now_s
            lane.due_s = now_s + flight.work_s

    def _rest(self, lane: SimLane) -> None:
        """A lane has nothing more to do."""
        lane.due_s = math.inf
        other = self.writes if lane is self.reads else self.reads
        if other.queue:
            self._go_on(other, 1.0)
        else:
            self._busy_s, self._busy_since_s = self.drive_busy_s, None

    def _go_on(self, lane: SimLane, speed: float) -> None:
        """All work goes on at this speed: that of ``lane``, and what begins from now on."""
        lane.due_s = self.now_s + (lane.due_s - self.now_s) * (self._speed / speed)
        self._speed = speed

    def _end(self, lane: SimLane) -> int:
        queue = lane.queue
        flight = queue.popleft()
        flight.ended_s = self.now_s + lane.latency_s
        if queue:
            first = queue[0]
            first.began_s = self.now_s
            lane.due_s = self.now_s + first.work_s / self._speed
        else:
            self._rest(lane)
        if flight.follower is not None:
            following, follower = flight.follower
            if following.queue:
                following.queue.append(follower)
            else:
                self._begin(following, follower)
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
        ends = (
            -1.0 if flight.ended_s is None else max(flight.ended_s - self.now_s, 0.0)
            for flight in flights
        )
        lanes = [lane for lane in (self.reads, self.writes) if lane.queue]
        firsts = ((lane.due_s - self.now_s) * self._speed for lane in lanes)
        others = (flight.work_s for lane in lanes for flight in islice(lane.queue, 1, None))
        return (*ends, float(len(self.reads.queue)), *firsts, *others)

    def repeat(self, since: Reading, times: int, flights: Iterable[Flight]) -> None:
        """What happened ``since`` then happens so many times more; ``flights`` are on their way."""
        totals = self._totals
        later_s = (self.now_s - since.now_s) * times
        for flight in flights:
            if flight.ended_s is not None:
                flight.ended_s += later_s
        self._busy_s += (self.drive_busy_s - since.drive_busy_s) * times
        totals.stall_s += (totals.stall_s - since.stall_s) * times
        totals.read_nbytes += (totals.read_nbytes - since.read_nbytes) * times
        totals.written_nbytes += (totals.written_nbytes - since.written_nbytes) * times
        self.now_s += later_s
        self._due_s += later_s
        for lane in (self.reads, self.writes):
            lane.due_s += later_s
        if self._busy_since_s is not None:
            self._busy_since_s += later_s


def read_lane(seconds: Callable[[int], float], latency_s: float) -> SimLane:
    """From the drive to memory."""
    return SimLane(_READING, seconds, latency_s)


def write_lane(seconds: Callable[[int], float], latency_s: float) -> SimLane:
    """From memory to the drive."""
    return SimLane(_WRITING, seconds, latency_s)
