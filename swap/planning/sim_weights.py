"""The weights of a simulated run: ``swap.weights`` and ``swap.trace`` on a virtual clock.

Every decision is that of ``WeightSwapper``: what is fetched ahead, in which order, as far as the
window and the budget reach, and what is given up for it (Belady's rule).
"""

import sys
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from offload.swap.planning.world import Flight, World
from offload.tiers.hostmem import page_ceil
from offload.tiers.journal import Label


class SimTrace:
    """``Trace`` for one kind of pass, with distances found by bisection."""

    def __init__(self, order: Sequence[str]) -> None:
        self._now: list[str] = []
        self._position = 0
        self._expected: list[str] = []
        self._settled = 0  # uses before it need no fetch
        self._places: dict[str, list[int]] = {}
        self._learned = [*order, *reversed(order)]

    def begin(self) -> None:
        """A pass begins; the last one is learned."""
        self.end()
        self._expect(self._learned)

    def end(self) -> None:
        """The pass is over."""
        if self._now:
            self._learned = self._now
        self._now = []
        self._expect([])

    def _expect(self, expected: list[str]) -> None:
        self._expected, self._position, self._places = expected, 0, {}
        self._settled = 0
        for place, key in enumerate(expected):
            self._places.setdefault(key, []).append(place)

    def use(self, key: str) -> None:
        """``key`` is used now."""
        if self._now and self._now[-1] == key:
            return
        self._now.append(key)
        if (place := self._next(key)) is not None:
            self._position = place + 1

    def _next(self, key: str) -> int | None:
        places = self._places.get(key, ())
        at = bisect_left(places, self._position)
        return places[at] if at < len(places) else None

    def upcoming(self) -> Iterator[tuple[int, str]]:
        """The keys expected next, nearest first, from where nothing is known to be in memory."""
        for place in range(max(self._position, self._settled), len(self._expected)):
            yield place, self._expected[place]

    def settle(self, place: int) -> None:
        """What is used before ``place`` is in memory."""
        self._settled = place

    def unsettle(self, key: str) -> None:
        """``key`` has left memory."""
        if (place := self._next(key)) is not None:
            self._settled = min(self._settled, place)

    def distance(self, key: str) -> int:
        """Uses until ``key`` is expected; one past the end of the pass when it is not."""
        place = self._next(key)
        return (len(self._expected) + 1 if place is None else place) - self._position


@dataclass(slots=True, eq=False)
class SimWeight:
    """One weight; absent unless ``ready`` or in ``flight``."""

    name: str
    nbytes: int
    resident: bool = False
    ready: bool = False
    flight: Flight | None = None

    @property
    def in_memory(self) -> bool:
        """Whether memory has it, or it is arriving."""
        return self.ready or self.flight is not None


class SimWeights:
    """All weights, in memory or on their way.

    Args:
        sizes: bytes by name.
        order: of the first use, as the model's structure suggests it.
        hook_s: what one use costs the training thread.
        checksum_bytes_per_s: at which a weight is compared with its version before it goes.
    """

    def __init__(
        self,
        world: World,
        sizes: dict[str, int],
        order: Sequence[str],
        *,
        window_nbytes: int,
        hook_s: float,
        checksum_bytes_per_s: float,
    ) -> None:
        self.weights = {name: SimWeight(name, nbytes) for name, nbytes in sizes.items()}
        self.trace = SimTrace(order)
        self._world = world
        self.window_nbytes = window_nbytes
        self._hook_s = hook_s
        self._checksum_bytes_per_s = checksum_bytes_per_s
        self._streaming: dict[str, SimWeight] = {}
        self._streaming_nbytes = 0
        self._in_use: list[tuple[str, ...]] = []
        self._pool: Counter[int] = Counter()  # ranges that wait for use, by their size
        self._pool_nbytes = 0

    def keep(self, names: Collection[str]) -> None:
        """Make ``names`` the resident weights, fetched at their next use."""
        for weight in self.weights.values():
            weight.resident = weight.name in names
            known = weight.name in self._streaming
            if weight.resident and known:
                self._leave_streaming(weight)
            elif not weight.resident and weight.in_memory and not known:
                self._join_streaming(weight)

    def _join_streaming(self, weight: SimWeight) -> None:
        self._streaming[weight.name] = weight
        self._streaming_nbytes += weight.nbytes

    def _leave_streaming(self, weight: SimWeight) -> None:
        if self._streaming.pop(weight.name, None) is not None:
            self._streaming_nbytes -= weight.nbytes

    def use(self, names: tuple[str, ...]) -> None:
        """Have ``names`` in memory now, and the next ones on their way."""
        self._world.compute(self._hook_s)
        self._in_use = [*self._in_use[-1:], names]
        for name in names:
            self.trace.use(name)
            self.fetch_now(self.weights[name])
        for name in names:
            self._await(self.weights[name], "late")
        self._prefetch()

    def fetch_now(self, weight: SimWeight) -> None:
        """Have ``weight`` in memory, if it is not on its way."""
        if not weight.in_memory:
            self._make_room(weight, force=True)
            self._fetch(weight, urgent=True)
            self._await(weight, "cold")

    def _await(self, weight: SimWeight, reason: str) -> None:
        if weight.flight is not None:
            self._world.wait(self._world.reads, weight.flight, reason)
            weight.flight, weight.ready = None, True

    def _prefetch(self) -> None:
        # What is nearer than a weight is never given up for it: its distance says so.
        for place, name in self.trace.upcoming():
            weight = self.weights[name]
            if weight.in_memory:
                continue
            if not self._make_room(weight):
                self.trace.settle(place)
                return
            self._fetch(weight)
        self.trace.settle(sys.maxsize)

    def _make_room(self, weight: SimWeight, *, force: bool = False) -> bool:
        if weight.resident:
            return True
        beyond_window = self._streaming_nbytes + weight.nbytes - self.window_nbytes
        beyond_budget = weight.nbytes - self._pool_nbytes - self._world.memory.room()
        excess = max(beyond_window, beyond_budget)
        if excess <= 0:
            return True
        protected = {name for names in self._in_use for name in names}
        distances = [
            (self.trace.distance(other.name), other)
            for other in self._streaming.values()
            if other.in_memory and other.name not in protected
        ]
        limit = -1 if force else self.trace.distance(weight.name)
        victims: list[SimWeight] = []
        for distance, other in sorted(distances, key=lambda one: -one[0]):
            if excess <= 0 or distance <= limit:
                break
            victims.append(other)
            excess -= other.nbytes
        if excess > 0 and not force:
            return False
        for victim in victims:
            self.evict(victim)
        return True

    def _fetch(self, weight: SimWeight, *, urgent: bool = False) -> None:
        world, padded = self._world, page_ceil(weight.nbytes)
        if not weight.resident and self._pool[padded]:
            self._pool[padded] -= 1
            self._pool_nbytes -= padded
            world.memory.add("weights", -padded)
        world.memory.add("weights", padded)
        label = Label(weight.name, "weight", "file", "host")
        weight.flight = world.submit(world.reads, label, weight.nbytes, urgent=urgent)
        if not weight.resident:
            self._join_streaming(weight)
        self._trim(min(self.window_nbytes - self._streaming_nbytes, world.memory.room()))

    def evict(self, weight: SimWeight) -> None:
        """Give the memory of ``weight`` back."""
        self._await(weight, "drain")
        if not weight.ready:
            return
        self._world.compute(weight.nbytes / self._checksum_bytes_per_s)
        weight.ready = False
        self.trace.unsettle(weight.name)
        self._leave_streaming(weight)
        padded = page_ceil(weight.nbytes)
        if weight.resident:
            self._world.memory.add("weights", -padded)
        else:
            self._pool[padded] += 1
            self._pool_nbytes += padded

    def evict_streaming(self) -> None:
        """Give back the memory of all weights that are not resident."""
        self._in_use = []
        for weight in list(self._streaming.values()):
            self.evict(weight)
        self._trim(0)

    def _trim(self, limit_nbytes: int) -> None:
        for padded in self._pool:
            while self._pool[padded] and self._pool_nbytes > limit_nbytes:
                self._pool[padded] -= 1
                self._pool_nbytes -= padded
                self._world.memory.add("weights", -padded)
