"""The weights of a simulated run: ``swap.weights`` on a virtual clock.

Every decision is that of ``WeightSwapper``: what is fetched ahead, in which order, as far as the
window and the budget reach, and what is given up for it (Belady's rule). What is expected next, and
which weights are used last, is found by the runtime's own ``Trace`` and ``Streaming``; keys are
numbers.
"""

import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from offload.swap.planning.world import Flight, World
from offload.swap.streaming import Streaming
from offload.swap.trace import Trace
from offload.tiers.hostmem import page_ceil

_ROLE = "weight"


@dataclass(slots=True, eq=False)
class SimWeight:
    """One weight; absent unless ``ready`` or in ``flight``.

    Attributes:
        used: the number of its latest use.
    """

    name: str
    nbytes: int
    number: int
    resident: bool = False
    ready: bool = False
    flight: Flight | None = None
    held: bool = False  # a step is changing it: neither fetched nor evicted
    used: int = -2
    padded_nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.padded_nbytes = page_ceil(self.nbytes)

    @property
    def in_memory(self) -> bool:
        """Whether memory has it, or it is arriving."""
        return self.ready or self.flight is not None


class SimWeights:
    """All weights, in memory or on their way.

    Args:
        sizes: bytes by name.
        order: of the first use, as the model's structure suggests it.
        checksum_bytes_per_s: at which a weight is compared with its version before it goes.
        fetch_s: of the training thread, for each that comes and will go again.
    """

    def __init__(
        self,
        world: World,
        sizes: Mapping[str, int],
        order: Sequence[str],
        *,
        window_nbytes: int,
        checksum_bytes_per_s: float,
        fetch_s: float = 0.0,
    ) -> None:
        self.weights = {
            name: SimWeight(name, nbytes, number)
            for number, (name, nbytes) in enumerate(sizes.items())
        }
        self._numbered = list(self.weights.values())
        numbers = [self.weights[name].number for name in order]
        self.trace: Trace[int] = Trace(numbers)
        self._streaming: Streaming[int, SimWeight] = Streaming(self.trace)
        self._world = world
        self._memory = world.memory
        self.window_nbytes = window_nbytes
        self._checksum_bytes_per_s = checksum_bytes_per_s
        self._fetch_s = fetch_s
        self._uses = 0
        self._pool: dict[int, int] = {}  # ranges that wait for use, by their size
        self._pool_nbytes = 0

    def begin_pass(self) -> None:
        """A forward begins; the last pass is expected to repeat."""
        self.trace.begin("step")

    def end_pass(self) -> None:
        """Backward has ended."""
        self.trace.end()

    def standing(self) -> tuple[object, ...]:
        """What the next step depends on, between two steps."""
        last = self._uses  # of later ones ``_farthest`` asks no more
        used = [(one.number, last - one.used) for one in self._numbered if last - one.used < 2]
        known = [
            (one.ready, one.flight is not None, one.resident, one.held) for one in self._numbered
        ]
        streaming = [weight.number for weight in self._streaming]
        return known, used, streaming, list(self._pool.items()), self.trace.passes > 0

    def keep(self, names: Collection[str]) -> None:
        """Make ``names`` the resident weights, fetched at their next use."""
        for weight in self._numbered:
            weight.resident = weight.name in names
            if weight.resident:
                self._streaming.leave(weight.number)
            elif weight.in_memory:
                self._streaming.join(weight.number, weight)

    # Uses.

    def use(self, weights: Sequence[SimWeight]) -> None:
        """Have ``weights`` in memory now, and the next ones on their way."""
        trace = self.trace
        uses = self._uses = self._uses + 1
        for weight in weights:
            weight.used = uses
        arriving: list[SimWeight] = []
        for weight in weights:
            trace.use(weight.number)
            if not weight.ready:
                if weight.flight is None:
                    self.fetch_now(weight)
                else:
                    arriving.append(weight)
        for weight in arriving:
            self._await(weight, "late")
        if not trace.is_settled:
            self._prefetch()

    def fetch_now(self, weight: SimWeight) -> None:
        """Have ``weight`` in memory, if it is not on its way."""
        if not weight.ready and weight.flight is None and not weight.held:
            self._make_room(weight, -1, force=True)
            self._take_room(weight)
            world = self._world
            world.compute(self._fetch_s)
            world.move(world.reads, weight.name, _ROLE, weight.nbytes, "cold")
            weight.ready = True

    def _await(self, weight: SimWeight, reason: str) -> None:
        if weight.flight is not None:
            self._world.wait(self._world.reads, weight.flight, reason)
            weight.flight, weight.ready = None, True

    def _prefetch(self) -> None:
        # What is nearer than a weight is never given up for it: its place says so.
        trace, numbered = self.trace, self._numbered
        for place, number in trace.unsettled():
            weight = numbered[number]
            if weight.ready or weight.flight is not None or weight.held:
                continue
            if not self._make_room(weight, trace.place(number)):
                trace.settle(place)
                return
            self._begin_fetch(weight)
        trace.settle(sys.maxsize)

    def _excess_nbytes(self, weight: SimWeight) -> int:
        """Bytes that have to go before ``weight`` comes."""
        if weight.resident:
            return 0
        window = self.window_nbytes - self._streaming.nbytes
        room = self._pool_nbytes + self._memory.room()
        return weight.nbytes - (window if window < room else room)

    def _farthest(self, nbytes: int, limit: int) -> tuple[list[SimWeight], int]:
        """Of the streaming weights those whose next use is behind the place ``limit``.

        So many bytes, if there are; and how many there are.
        """
        found: list[SimWeight] = []
        found_nbytes = 0
        before = self._uses - 1  # what this use or the one before needs stays, and what is coming
        for other in self._streaming.farthest(limit):
            if other.used < before and other.ready and not other.held:
                found.append(other)
                found_nbytes += other.nbytes
                if found_nbytes >= nbytes:
                    break
        return found, found_nbytes

    # While a step in backward changes weights.

    def hold(self, weight: SimWeight, *, wait: bool = True) -> None:
        """Keep ``weight`` where it is until ``let_go``; ``wait`` until it is there, if it comes."""
        weight.held = True
        if wait:
            self.arrive(weight)

    def arrive(self, weight: SimWeight) -> None:
        """Wait for ``weight`` if it is on its way."""
        self._await(weight, "late")

    def bring(self, weight: SimWeight) -> None:
        """Begin to fetch ``weight``, whatever has to go for it."""
        if not weight.in_memory and not weight.held:
            self._make_room(weight, -1, force=True)
            self._begin_fetch(weight)

    def fetch_ahead(self, weight: SimWeight) -> bool:
        """Begin to fetch ``weight`` if there is room for it; whether it is here or coming."""
        if not weight.in_memory and not weight.held:
            if not self._make_room(weight, self.trace.place(weight.number)):
                return False
            self._begin_fetch(weight)
        return weight.in_memory

    def _make_room(self, weight: SimWeight, limit: int, *, force: bool = False) -> bool:
        """Evict what is used behind the place ``limit`` until ``weight`` fits; False: it can't."""
        excess = self._excess_nbytes(weight)
        if excess > 0:
            victims, nbytes = self._farthest(excess, limit)
            if excess > nbytes and not force:
                return False
            for victim in victims:
                self.evict(victim)
        return True

    def _begin_fetch(self, weight: SimWeight) -> None:
        self._take_room(weight)
        self._world.compute(self._fetch_s)
        weight.flight = self._world.submit(self._world.reads, weight.name, _ROLE, weight.nbytes)

    def let_go(self, weight: SimWeight) -> None:
        """``weight`` may be fetched and evicted again."""
        weight.held = False
        if not weight.in_memory:
            self.trace.unsettle(weight.number)

    def give_up(self, nbytes: int) -> None:
        """Evict so many bytes of streaming weights, those used last first."""
        self._trim(0)
        if nbytes > 0:
            for victim in self._farthest(nbytes, -1)[0]:
                self.evict(victim)
        self._trim(0)

    def settle(self) -> None:
        """Wait for what is on its way."""
        for weight in self._numbered:
            self._await(weight, "drain")

    def _take_room(self, weight: SimWeight) -> None:
        """``weight`` is coming."""
        memory, coming = self._world.memory, weight.padded_nbytes
        if not weight.resident:
            self._streaming.join(weight.number, weight)
            if self._pool.get(coming):
                self._pool[coming] -= 1
                self._pool_nbytes -= coming
                coming = 0
        if self._pool_nbytes:
            window, room = self.window_nbytes - self._streaming.nbytes, memory.room() - coming
            self._trim(window if window < room else room)
        if coming:
            memory.add("weights", weight.padded_nbytes)

    def evict(self, weight: SimWeight) -> None:
        """Give the memory of ``weight`` back."""
        if weight.flight is not None:
            self._await(weight, "drain")
        elif not weight.ready:
            return
        self._world.compute(weight.nbytes / self._checksum_bytes_per_s)
        weight.ready = False
        self.trace.unsettle(weight.number)
        self._streaming.leave(weight.number)
        if weight.resident:
            self._world.memory.drop("weights", weight.padded_nbytes)
        else:
            padded = weight.padded_nbytes
            self._pool[padded] = self._pool.get(padded, 0) + 1
            self._pool_nbytes += padded

    def evict_streaming(self) -> None:
        """Give back the memory of all weights that are not resident."""
        self._uses += 2  # nothing is in use
        for weight in list(self._streaming):
            self.evict(weight)
        self._trim(0)

    def _trim(self, limit_nbytes: int) -> None:
        if self._pool_nbytes <= limit_nbytes:
            return
        for padded in self._pool:
            while self._pool[padded] and self._pool_nbytes > limit_nbytes:
                self._pool[padded] -= 1
                self._pool_nbytes -= padded
                self._world.memory.drop("weights", padded)
