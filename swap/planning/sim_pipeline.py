"""Tiles in flight in a simulated run: ``swap.pipeline`` and ``swap.staging`` on a virtual clock.

[Note: what repeats] Thousands of equal tiles may follow each other, and after some of them the
lanes stand towards each other as they did before: from there on everything repeats. Where nothing
is recorded, what repeats is counted rather than simulated. Bytes are the same; times are but for
rounding. *Runs* of equal tiles repeat, too: those of one layer are those of the next. Lanes whose
rates have no common measure may never stand as before: looks that find nothing become rare.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from offload.swap.planning.world import Flight, Reading, World

_ROLE = "state"
_LEAST_COUNT = 16  # equal tiles that are worth a look for what repeats
_LONGEST_PERIOD = 8  # tiles
_LONGEST_ROUND = 64  # runs
_PATIENCE = 4 * _LONGEST_PERIOD  # looks at tiles of a run, before a rest that doubles
_TOLERANCE = 1e-9
_ROUNDINGS = 16  # of the clock: late in a long run they are more than the tolerance


class SimTile(NamedTuple):
    """What one tile moves and takes.

    Attributes:
        name: of its first weight.
        numel: elements.
        seconds: of its step.
        temporary_nbytes: of memory that its step makes.
    """

    name: str
    numel: int
    read_nbytes: int
    staging_nbytes: int
    written_nbytes: int
    seconds: float
    temporary_nbytes: int

    def equals(self, other: "SimTile") -> bool:
        """Whether only the names differ."""
        return self[1:] == other[1:]


def _nothing_follows() -> None:
    """Nobody asks when a tile is written."""


class Target(Protocol):
    """A weight, of whose tiles so many are not stepped or not written yet."""

    unstepped: int
    unwritten: int


@dataclass(slots=True, eq=False)
class _Waiting:
    tile: SimTile
    count: int
    written: Callable[[], None]
    stepped: Callable[[], None]
    arrive: Callable[[], None]

    @property
    def is_told(self) -> bool:
        """Whether somebody asks when a tile is stepped or written."""
        return self.written is not _nothing_follows or self.stepped is not _nothing_follows

    def alike(self) -> tuple[object, ...]:
        """Equal for runs of which only the names differ; never where somebody is told of tiles."""
        return (self,) if self.is_told else (*self.tile[1:], self.count)


@dataclass(slots=True, eq=False)
class _InFlight:
    tile: SimTile
    written: Callable[[], None]
    stepped: Callable[[], None]
    arrive: Callable[[], None]
    buffer_nbytes: int  # 0 once it is promised to another
    flight: Flight


@dataclass(frozen=True, slots=True)
class _Sight:
    """How tiles and lanes stood, and what had been until then.

    Attributes:
        state: all that is no time.
        waiting: tiles of the first run, or runs.
    """

    state: tuple[object, ...]
    waiting: int
    ahead_s: tuple[float, ...]
    reading: Reading

    def repeats(self, earlier: "_Sight") -> bool:
        """Whether what follows is what followed ``earlier``, if the same tiles do."""
        if self.state != earlier.state or self.waiting >= earlier.waiting:
            return False
        return are_alike(
            self.ahead_s, earlier.ahead_s, since_s=earlier.reading.now_s, now_s=self.reading.now_s
        )


def are_alike(
    ahead_s: Sequence[float], earlier_s: Sequence[float], *, since_s: float, now_s: float
) -> bool:
    """Whether the lanes stand ``now_s`` as they did ``since_s``, but for rounding."""
    if len(ahead_s) != len(earlier_s):
        return False
    rounding_s = _TOLERANCE * (now_s - since_s) + _ROUNDINGS * math.ulp(now_s)
    for here, there in zip(ahead_s, earlier_s, strict=True):
        if abs(here - there) > rounding_s:
            return False
    return True


class SimStaging:
    """``Staging``: the buffers of tiles in flight.

    Args:
        limit_nbytes: bytes of all buffers; one, of any size, may always be taken.
    """

    def __init__(self, world: World, limit_nbytes: int) -> None:
        self._world = world
        self.limit_nbytes = limit_nbytes
        self._taken_nbytes = 0
        self._free_nbytes = 0
        self.free: list[int] = []  # by their size

    def take(self, nbytes: int) -> int:
        """The size of the buffer; 0 for none."""
        nbytes = max(nbytes, 1)
        for buffer in self.free:
            if buffer >= nbytes:
                self.free.remove(buffer)
                self._free_nbytes -= buffer
                self._taken_nbytes += buffer
                return buffer
        while self.free and self._held_nbytes() + nbytes > self.limit_nbytes:
            self._release()
        if self._taken_nbytes and self._held_nbytes() + nbytes > self.limit_nbytes:
            return 0
        self._taken_nbytes += nbytes
        self._world.memory.add("staging", nbytes)
        return nbytes

    def _held_nbytes(self) -> int:
        return self._taken_nbytes + self._free_nbytes

    def give_back(self, buffer: int) -> None:
        """The tile is written: its buffer may be taken again."""
        self._taken_nbytes -= buffer
        self._free_nbytes += buffer
        self.free.append(buffer)

    def _release(self) -> None:
        buffer = self.free.pop()
        self._free_nbytes -= buffer
        self._world.memory.drop("staging", buffer)

    def close(self) -> None:
        """Return the memory of free buffers."""
        while self.free:
            self._release()


class SimPipeline:
    """Streams tiles: ``add`` them, then ``move_on`` or ``finish``.

    Args:
        staging_nbytes: bytes of tiles in flight; one tile may always be.
    """

    def __init__(self, world: World, *, staging_nbytes: int) -> None:
        self._world = world
        self.staging = SimStaging(world, staging_nbytes)
        self._waiting: deque[_Waiting] = deque()
        self._reading: deque[_InFlight] = deque()
        self._writing: deque[_InFlight] = deque()
        self._seen: deque[_Sight] = deque(maxlen=_LONGEST_PERIOD)
        self._runs: list[tuple[object, ...]] = []  # all that ``finish`` found waiting
        self._rounds: deque[_Sight] = deque(maxlen=_LONGEST_ROUND)

    def add(
        self,
        tile: SimTile,
        count: int,
        written: Callable[[], None] = _nothing_follows,
        stepped: Callable[[], None] = _nothing_follows,
        arrive: Callable[[], None] = _nothing_follows,
    ) -> None:
        """Line up equal tiles.

        Args:
            written, stepped: called as each of them is; ``arrive`` before it is stepped.
        """
        last = self._waiting[-1] if self._waiting else None
        merges = last is not None and last.written == written and last.tile.equals(tile)
        if last is not None and merges and not self._world.is_recorded:
            last.count += count
        else:
            self._waiting.append(_Waiting(tile, count, written, stepped, arrive))

    @property
    def is_busy(self) -> bool:
        """Whether any tile is not written yet."""
        return bool(self._waiting or self._reading or self._writing)

    @property
    def is_waiting(self) -> bool:
        """Whether a tile waits for staging memory to be read to."""
        return bool(self._waiting)

    def move_on(self) -> None:
        """Let written tiles go and begin to read others, as far as staging reaches."""
        world = self._world
        while self._writing and self._writing[0].flight.ended_s <= world.now_s:
            self._retire()
        while self._waiting:
            buffer = self.staging.take(self._waiting[0].tile.staging_nbytes)
            if not buffer:
                return
            self._read(buffer)

    def _read(self, buffer: int, after: Flight | None = None) -> None:
        """Begin to read the tile that waits longest."""
        world, first = self._world, self._waiting[0]
        tile = first.tile
        first.count -= 1
        if not first.count:
            self._waiting.popleft()
        lane, nbytes = world.reads, tile.read_nbytes
        if after is None:
            flight = world.submit(lane, tile.name, _ROLE, nbytes)
        else:
            flight = world.submit_after(after, lane, tile.name, _ROLE, nbytes)
        callbacks = first.written, first.stepped, first.arrive
        self._reading.append(_InFlight(tile, *callbacks, buffer, flight))

    def advance(self) -> None:
        """Read, step and write what can be without waiting for a lane."""
        self.move_on()
        while self._has_read():
            self._step_first()
            self.move_on()

    def _has_read(self) -> bool:
        return bool(self._reading) and self._reading[0].flight.ended_s <= self._world.now_s

    def advance_one(self) -> None:
        """Wait for the tile that is nearest to its end, and step it or let it go."""
        self.move_on()
        if self._reading:
            self._step_first()
        elif self._writing:
            self._retire()

    def finish_target(self, target: Target) -> None:
        """Go on until all tiles of ``target`` are written; others as far as they are read."""
        while True:
            self.move_on()
            if not target.unwritten:
                return
            if target.unstepped or self._has_read():
                self.advance_one()
            else:
                self._retire()

    def finish(self) -> None:
        """Go on until every tile has been written; no staging is kept."""
        self._seen.clear()
        self._rounds.clear()
        self._runs = [each.alike() for each in self._waiting]
        is_recorded = self._world.is_recorded  # then everything is simulated
        left, rest, looks = len(self._waiting), _PATIENCE, 0
        while self.is_busy:
            self.advance_one()
            if is_recorded or not self._waiting:
                continue
            if len(self._waiting) < left:
                self._skip_runs_that_repeat()
                left, rest, looks = len(self._waiting), _PATIENCE, 0
            looks += 1
            if looks > _PATIENCE:  # no look at so many tiles
                rest *= 2
                looks = -rest
                self._seen.clear()
            if looks >= 0 and self._waiting[0].count >= _LEAST_COUNT:
                self._skip_tiles_that_repeat()
        self.staging.close()

    def _step_first(self) -> None:
        world, first = self._world, self._reading.popleft()
        tile = first.tile
        world.wait(world.reads, first.flight, "late")
        first.arrive()
        if tile.temporary_nbytes:
            world.memory.pass_through([tile.temporary_nbytes])
        world.compute(tile.seconds)
        first.stepped()
        first.flight = world.submit(world.writes, tile.name, _ROLE, tile.written_nbytes)
        self._writing.append(first)
        if self._waiting and self._waiting[0].tile.staging_nbytes <= first.buffer_nbytes:
            buffer, first.buffer_nbytes = first.buffer_nbytes, 0
            self._read(buffer, first.flight)

    def _retire(self) -> None:
        first = self._writing.popleft()
        self._world.wait(self._world.writes, first.flight, "full")
        if first.buffer_nbytes:
            self.staging.give_back(first.buffer_nbytes)
        first.written()

    def _skip_tiles_that_repeat(self) -> None:
        """See [Note: what repeats]."""
        first, tiles = self._waiting[0], (*self._reading, *self._writing)
        if any(each.tile is not first.tile for each in tiles):
            self._seen.clear()
            return
        flights = [each.flight for each in tiles]
        buffers = [each.buffer_nbytes for each in tiles]  # earlier runs may have left larger ones
        state = first.tile, len(self._reading), *buffers, *self.staging.free
        now = self._sight(state, first.count, flights)
        for earlier in reversed(self._seen):
            if now.repeats(earlier):
                period = earlier.waiting - now.waiting
                times = (first.count - 1) // period
                self._world.repeat(earlier.reading, times, flights)
                first.count -= times * period
                for _ in range(times * period if first.is_told else 0):
                    first.stepped()
                    first.written()
                self._seen.clear()
                return
        self._seen.append(now)

    def _skip_runs_that_repeat(self) -> None:
        """The same for whole runs, as one of them has come to an end."""
        first, tiles = self._waiting[0], (*self._reading, *self._writing)
        flights = [each.flight for each in tiles]
        known = [(*each.tile[1:], each.buffer_nbytes) for each in tiles]
        state = first.count, len(self._reading), *known, *self.staging.free
        now = self._sight(state, len(self._waiting), flights)
        for earlier in reversed(self._rounds):
            if not now.repeats(earlier):
                continue
            period = earlier.waiting - now.waiting
            if times := self._rounds_to_come(period):
                self._world.repeat(earlier.reading, times, flights)
                for _ in range(times * period):
                    self._waiting.popleft()
                self._waiting[0] = first  # the one there is like it
                self._rounds.clear()
                self._seen.clear()
                return
        self._rounds.append(now)

    def _rounds_to_come(self, period: int) -> int:
        """How often the last ``period`` runs come again; what is read ahead then is the same."""
        runs = self._runs
        start = end = len(runs) - len(self._waiting)
        while end < len(runs) and runs[end] == runs[end - period]:
            end += 1
        return max(end - 1 - start, 0) // period

    def _sight(self, state: tuple[object, ...], waiting: int, flights: list[Flight]) -> _Sight:
        return _Sight(state, waiting, self._world.ahead_s(flights), self._world.reading())
