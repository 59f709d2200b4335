"""The virtual world of a simulated run: a clock, a drive with two lanes, memory that is counted.

The training thread is the only one that acts: it computes, which lets time pass, or waits for a
lane. Lanes are passive, so that between two of its actions everything follows by arithmetic.

[Note: a shared drive] Each lane serves its transfers in order. While both have work they share the
drive: each goes on at its own rate times ``together``, which the machine's measurement of reads and
writes at once gives (1: nothing is shared, 1/2: the drive does one thing at a time).
"""

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
        return self.limit_nbytes - self._resident(self.nbytes)

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
        self.drive_busy_s = 0.0
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
        reads, writes = self.reads.queue, self.writes.queue
        while (reads or writes) and self.now_s < until_s:
            until_s += self._serve_one(until_s) * self._lost_s_per_byte
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
        flight = Flight(label, nbytes, lane.work_s(nbytes), lane.latency_s)
        if after is not None and after.ended_s is None:
            after.follower = lane, flight
        elif urgent and lane.queue:
            lane.queue.insert(1, flight)
        else:
            lane.queue.append(flight)
        return flight

    def done(self, flight: Flight) -> bool:
        """Whether it has ended."""
        return flight.ended_s is not None and flight.ended_s <= self.now_s

    def wait(self, lane: SimLane, flight: Flight, reason: str) -> None:
        """Stall until ``flight`` has ended."""
        if flight.ended_s is not None and flight.ended_s <= self.now_s:
            return
        if flight.ended_s is None:
            self._expedite(lane, flight)
        began_s = self.now_s
        while flight.ended_s is None:
            self._serve_one()
        # The drive is done with it, the link may not be.
        while self.now_s < flight.ended_s and (self.reads.queue or self.writes.queue):
            self._serve_one(flight.ended_s)
        self.now_s = max(self.now_s, flight.ended_s)
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
        while self.reads.queue or self.writes.queue:
            self._serve_one()

    def _expedite(self, lane: SimLane, flight: Flight) -> None:
        queue = lane.queue
        if flight in queue and queue[0] is not flight:
            queue.remove(flight)
            queue.insert(1, flight)

    # How time passes.

    def _serve_one(self, until_s: float = float("inf")) -> int:
        """Serve both lanes until the next transfer ends, or until then; bytes of what ended."""
        reads, writes = self.reads.queue, self.writes.queue
        speed = self._together if reads and writes else 1.0
        served_s = (until_s - self.now_s) * speed  # of each lane's first
        read, write = reads[0] if reads else None, writes[0] if writes else None
        if read is not None and read.work_s < served_s:
            served_s = read.work_s
        if write is not None and write.work_s < served_s:
            served_s = write.work_s
        began_s, span_s = self.now_s, served_s / speed
        self.now_s += span_s
        self.drive_busy_s += span_s
        ended_nbytes = 0
        if read is not None:
            if read.began_s is None:
                read.began_s = began_s
            read.work_s -= served_s
            if read.work_s <= _NO_WORK_S:
                self._end(read, self.reads)
                ended_nbytes += read.nbytes
        if write is not None:
            if write.began_s is None:
                write.began_s = began_s
            write.work_s -= served_s
            if write.work_s <= _NO_WORK_S:
                self._end(write, self.writes)
                ended_nbytes += write.nbytes
        return ended_nbytes

    def _end(self, flight: Flight, lane: SimLane) -> None:
        lane.queue.popleft()
        flight.ended_s = self.now_s + flight.lag_s
        if flight.follower is not None:
            following, follower = flight.follower
            following.queue.append(follower)
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
        queued = [flight.work_s for lane in (self.reads, self.writes) for flight in lane.queue]
        return (*ends, float(len(self.reads.queue)), *queued)

    def repeat(self, since: Reading, times: int, flights: Iterable[Flight]) -> None:
        """What happened ``since`` then happens so many times more; ``flights`` are on their way."""
        totals = self._totals
        later_s = (self.now_s - since.now_s) * times
        for flight in flights:
            if flight.ended_s is not None:
                flight.ended_s += later_s
        self.drive_busy_s += (self.drive_busy_s - since.drive_busy_s) * times
        totals.stall_s += (totals.stall_s - since.stall_s) * times
        totals.read_nbytes += (totals.read_nbytes - since.read_nbytes) * times
        totals.written_nbytes += (totals.written_nbytes - since.written_nbytes) * times
        self.now_s += later_s


def read_lane(seconds: Callable[[int], float], latency_s: float) -> SimLane:
    """From the drive to memory."""
    return SimLane(_READING, seconds, latency_s)


def write_lane(seconds: Callable[[int], float], latency_s: float) -> SimLane:
    """From memory to the drive."""
    return SimLane(_WRITING, seconds, latency_s)
