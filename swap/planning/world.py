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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from offload.swap.planning.compiled import Moment
from offload.swap.planning.sim_memory import Memory
from offload.tiers.events import Recorder, Stall
from offload.tiers.hostmem import PAGE
from offload.tiers.journal import Journal, Label
from offload.tiers.pieces import PIECE_NBYTES

_NEVER_S = math.inf
# By which rounding may part two ends that are one: early in a run, and late.
_NO_TIME_S, _ROUNDED = 1e-12, 1 + 2.0**-52


@dataclass(slots=True, eq=False)
class Flight:
    """A transfer of the bytes of ``key``, in their ``role``.

    Attributes:
        work_s: what the drive has to do for it, alone and at full speed.
        ended_s: when its bytes have arrived; never, as long as that is not known.
        follower: what is queued when this has ended.
        is_ours: a run records it; else the kernel moves it, for a mapped file.
    """

    key: str
    role: str
    nbytes: int
    work_s: float
    began_s: float = _NEVER_S
    ended_s: float = _NEVER_S
    follower: "tuple[SimLane, Flight] | None" = None
    is_ours: bool = True


class _Work(dict[int, float]):
    """Seconds of the drive by bytes, cut into pieces as a run cuts them.

    Args:
        seconds: of one request.
    """

    def __init__(self, seconds: Callable[[int], float]) -> None:
        super().__init__()
        self._seconds = seconds

    def __missing__(self, nbytes: int) -> float:
        pieces, rest = divmod(max(nbytes, PAGE), PIECE_NBYTES)
        found = pieces * self._seconds(PIECE_NBYTES) + (self._seconds(rest) if rest else 0.0)
        self[nbytes] = found
        return found


class SimLane:
    """The queue of one direction.

    Args:
        source, target: as ``Lanes`` names them.
        seconds: that a request of so many bytes takes of the drive.
        latency_s: of one request on an idle link, beyond what it takes of the drive.

    Attributes:
        due_s: when the drive is done with the first transfer, as things stand.
        work_s: of the drive, for so many bytes.
    """

    def __init__(
        self, source: str, target: str, seconds: Callable[[int], float], latency_s: float
    ) -> None:
        self.source, self.target = source, target
        self.name = f"{source}→{target}"
        self.queue: deque[Flight] = deque()
        self.due_s = _NEVER_S
        self.latency_s = latency_s
        self.other = self  # the lane that shares the drive, once there is a world
        self.work_s: Mapping[int, float] = _Work(seconds)


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
        self._due_s = _NEVER_S  # when the next transfer ends
        self._speed = 1.0  # of each lane that works
        self.reads, self.writes = reads, writes
        reads.other, writes.other = writes, reads
        self.memory = memory
        self.is_recorded = recorder is not None
        self.journal = Journal(recorder, clock=lambda: self.now_s)
        self._totals = self.journal.totals
        self._together = together

    # What the training thread does.

    def go_through(
        self, moments: Iterable[Moment], handlers: Sequence[Callable[[int], None]]
    ) -> None:
        """Let time pass and memory come and go as ``moments`` tell, and handle each of them.

        Args:
            handlers: for each ``What``.
        """
        memory = self.memory
        for seconds, highs, nbytes, what, which in moments:
            if seconds:  # as ``compute`` does
                until_s = self.now_s + seconds
                while self._due_s <= until_s:
                    until_s += self._end_next() * self._lost_s_per_byte
                self.now_s = until_s
            # What is resident is at most the sum: it most often tells that there is no new peak.
            if highs and memory.nbytes + highs[-1] + memory.pages_nbytes > memory.peak_nbytes:
                memory.pass_through(highs)
            if nbytes:  # of transients
                memory.nbytes += nbytes
            handlers[what](which)

    def compute(self, seconds: float) -> None:
        """Let time pass: ``seconds``, and what moves take from them."""
        until_s = self.now_s + seconds
        while self._due_s <= until_s:
            until_s += self._end_next() * self._lost_s_per_byte
        self.now_s = until_s

    def submit(self, lane: SimLane, key: str, role: str, nbytes: int) -> Flight:
        """Queue a transfer."""
        return self._queue(lane, Flight(key, role, nbytes, lane.work_s[nbytes]))

    def _queue(self, lane: SimLane, flight: Flight) -> Flight:
        if lane.queue:
            lane.queue.append(flight)
        else:
            self._begin(lane, flight)
        return flight

    def submit_after(
        self, before: Flight, lane: SimLane, key: str, role: str, nbytes: int
    ) -> Flight:
        """As ``submit``, when ``before``, which nothing else follows, has ended."""
        if before.ended_s < _NEVER_S:
            return self.submit(lane, key, role, nbytes)
        flight = Flight(key, role, nbytes, lane.work_s[nbytes])
        before.follower = lane, flight
        return flight

    def move(self, lane: SimLane, key: str, role: str, nbytes: int, reason: str) -> None:
        """Submit a transfer, and stall until it has ended."""
        if self._due_s < _NEVER_S or self.is_recorded:
            self.wait(lane, self.submit(lane, key, role, nbytes), reason)
            return
        # Nothing else is on the way: the same without a flight.
        began_s, totals = self.now_s, self._totals
        due_s = began_s + lane.work_s[nbytes]
        self._busy_s += due_s - began_s
        self.now_s = due_s + lane.latency_s
        totals.stall_s += self.now_s - began_s
        if lane is self.reads:
            totals.read_nbytes += nbytes
        else:
            totals.written_nbytes += nbytes

    def wait(self, lane: SimLane, flight: Flight, reason: str) -> None:
        """Stall until ``flight`` has ended."""
        began_s = self.now_s
        if flight.ended_s <= began_s:
            return
        self._await(lane, flight)
        stalled_s = self.now_s - began_s
        self._totals.stall_s += stalled_s
        if self.is_recorded:
            self.journal.record(
                Stall(
                    t_s=self.now_s,
                    key=flight.key,
                    role=flight.role,
                    lane=lane.name,
                    reason=reason,
                    duration_s=stalled_s,
                )
            )

    def _await(self, lane: SimLane, flight: Flight) -> None:
        queue = lane.queue
        if queue and queue[0] is not flight and flight in queue:
            queue.remove(flight)
            queue.insert(1, flight)
        while flight.ended_s == _NEVER_S:
            self._end_next()
        # The drive is done with it, the link may not be.
        while self._due_s <= flight.ended_s:
            self._end_next()
        self.now_s = flight.ended_s

    # What the kernel moves for a mapped file: nothing records it, and no wait for it is a stall.

    def fault_in(self, key: str, role: str, nbytes: int) -> None:
        """The training thread touches bytes of a mapped file that memory has not."""
        reads = self.reads
        flight = Flight(key, role, nbytes, reads.work_s[nbytes], is_ours=False)
        self._await(reads, self._queue(reads, flight))

    def write_back(self, key: str, role: str, nbytes: int) -> None:
        """Bytes that were changed in a mapped file go to the drive."""
        writes = self.writes
        self._queue(writes, Flight(key, role, nbytes, writes.work_s[nbytes], is_ours=False))

    def drain(self) -> None:
        """Let everything end; counts as a stall of nobody."""
        while self._due_s < _NEVER_S:
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
        if reads.due_s > until_s:
            return self._end(writes)
        ended_nbytes = self._end(reads)
        if writes.due_s <= until_s:
            ended_nbytes += self._end(writes)
        return ended_nbytes

    def _begin(self, lane: SimLane, flight: Flight) -> None:
        """An idle lane begins to work."""
        now_s = flight.began_s = self.now_s
        lane.queue.append(flight)
        other = lane.other
        if other.queue:
            self._go_on(other, self._together)
            due_s = lane.due_s = now_s + flight.work_s / self._together
            self._due_s = due_s if due_s < other.due_s else other.due_s
        else:
            self._busy_since_s = now_s
            self._due_s = lane.due_s = now_s + flight.work_s

    def _go_on(self, lane: SimLane, speed: float) -> None:
        """All work goes on at this speed: that of ``lane``, and what begins from now on."""
        lane.due_s = self.now_s + (lane.due_s - self.now_s) * (self._speed / speed)
        self._speed = speed

    def _end(self, lane: SimLane) -> int:
        """The first transfer of ``lane`` has ended; its bytes."""
        now_s, queue, other = self.now_s, lane.queue, lane.other
        flight = queue.popleft()
        flight.ended_s = now_s + lane.latency_s
        if queue:
            first = queue[0]
            first.began_s = now_s
            due_s = lane.due_s = now_s + first.work_s / self._speed
            self._due_s = due_s if due_s < other.due_s else other.due_s
        else:
            lane.due_s = _NEVER_S
            if other.queue:
                self._go_on(other, 1.0)
            else:
                assert self._busy_since_s is not None
                self._busy_s += now_s - self._busy_since_s
                self._busy_since_s = None
            self._due_s = other.due_s
        if flight.follower is not None:
            following, follower = flight.follower
            if following.queue:
                following.queue.append(follower)
            else:
                self._begin(following, follower)
        if not flight.is_ours:
            return flight.nbytes
        if self.is_recorded:
            self.journal.moved(
                Label(flight.key, flight.role, lane.source, lane.target),
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
            -1.0 if flight.ended_s == _NEVER_S else max(flight.ended_s - self.now_s, 0.0)
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
    return SimLane("file", "host", seconds, latency_s)


def write_lane(seconds: Callable[[int], float], latency_s: float) -> SimLane:
    """From memory to the drive."""
    return SimLane("host", "file", seconds, latency_s)
