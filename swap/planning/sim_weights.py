"""The weights of a simulated run: ``swap.weights`` and ``swap.trace`` on a virtual clock.

Every decision is that of ``WeightSwapper``: what is fetched ahead, in which order, as far as the
window and the budget reach, and what is given up for it (Belady's rule).

[Note: places of next uses] Distances are counted from the present use, which moves; the *place* of
a weight's next use in the expected pass stays until it is used. So weights are kept in the order of
these places: what is used last stands at the end, and nothing is sorted when room is needed.
"""

import sys
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from offload.swap.planning.world import Flight, World
from offload.tiers.hostmem import page_ceil
from offload.tiers.journal import Label


class SimTrace:
    """``Trace`` for one kind of pass; keys are numbers.

    Args:
        order: of the first uses, as far as it can be guessed.
        count: of all keys.
        moved: called with a key whose next use is another from now on, within a pass.

    Attributes:
        places: of the next expected use of each key; one past the end of the pass, and one more,
            where none is expected.
    """

    def __init__(
        self, order: Sequence[int], count: int, moved: Callable[[int], None] = lambda _key: None
    ) -> None:
        self._count = count
        self._moved = moved
        self._now: list[int] = []
        self._expected: list[int] = []
        self._following: list[int] = []  # the place of the same key's next use behind each place
        self._position = 0
        self._settled = 0  # uses before it need no fetch
        self._learned = [*order, *reversed(order)]
        self.places = [1] * count

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

    def _expect(self, expected: list[int]) -> None:
        self._expected, self._position, self._settled = expected, 0, 0
        self.places = places = [len(expected) + 1] * self._count
        self._following = following = [0] * len(expected)
        for place in range(len(expected) - 1, -1, -1):
            key = expected[place]
            following[place], places[key] = places[key], place

    def use(self, key: int) -> None:
        """``key`` is used now."""
        if self._now and self._now[-1] == key:
            return
        self._now.append(key)
        place = self.places[key]
        if place >= len(self._expected):
            return  # unexpected: the prediction stays where it is
        for passed in range(self._position, place + 1):
            other = self._expected[passed]
            self.places[other] = self._following[passed]
            self._moved(other)
        self._position = place + 1

    def upcoming(self) -> Iterator[tuple[int, int]]:
        """Places and keys expected next, nearest first, behind what is known to be in memory."""
        for place in range(max(self._position, self._settled), len(self._expected)):
            yield place, self._expected[place]

    @property
    def is_settled(self) -> bool:
        """Whether all that is expected is known to be in memory."""
        return self._settled >= len(self._expected)

    def settle(self, place: int) -> None:
        """What is used before ``place`` is in memory."""
        self._settled = place

    def unsettle(self, key: int) -> None:
        """``key`` has left memory."""
        self._settled = min(self._settled, self.places[key])


@dataclass(slots=True, eq=False)
class SimWeight:
    """One weight; absent unless ``ready`` or in ``flight``.

    Attributes:
        used: the number of its latest use.
        rank: where it stands among the streaming ones; see [Note: places of next uses].
    """

    name: str
    nbytes: int
    number: int
    resident: bool = False
    ready: bool = False
    flight: Flight | None = None
    held: bool = False  # a step is changing it: neither fetched nor evicted
    used: int = -2
    rank: tuple[int, int] | None = None
    padded_nbytes: int = field(init=False)
    label: Label = field(init=False)

    def __post_init__(self) -> None:
        self.padded_nbytes = page_ceil(self.nbytes)
        self.label = Label(self.name, "weight", "file", "host")

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
    """

    def __init__(
        self,
        world: World,
        sizes: Mapping[str, int],
        order: Sequence[str],
        *,
        window_nbytes: int,
        checksum_bytes_per_s: float,
    ) -> None:
        self.weights = {
            name: SimWeight(name, nbytes, number)
            for number, (name, nbytes) in enumerate(sizes.items())
        }
        self._numbered = list(self.weights.values())
        numbers = [self.weights[name].number for name in order]
        self.trace = SimTrace(numbers, len(sizes), self._rerank)
        self._world = world
        self.window_nbytes = window_nbytes
        self._checksum_bytes_per_s = checksum_bytes_per_s
        self._streaming: dict[str, SimWeight] = {}
        self._streaming_nbytes = 0
        self._ranked: list[tuple[tuple[int, int], int]] = []  # of streaming ones, with the number
        self._joined = 0  # so many have, one after the other
        self._uses = 0
        self._pool: Counter[int] = Counter()  # ranges that wait for use, by their size
        self._pool_nbytes = 0

    def begin_pass(self) -> None:
        """A forward begins; the last pass is expected to repeat."""
        self.trace.begin()
        self._rerank_all()

    def end_pass(self) -> None:
        """Backward has ended."""
        self.trace.end()
        self._rerank_all()

    def keep(self, names: Collection[str]) -> None:
        """Make ``names`` the resident weights, fetched at their next use."""
        for weight in self._numbered:
            weight.resident = weight.name in names
            known = weight.rank is not None
            if weight.resident and known:
                self._leave_streaming(weight)
            elif not weight.resident and weight.in_memory and not known:
                self._join_streaming(weight)

    # Which of the streaming ones is used last.

    def _join_streaming(self, weight: SimWeight) -> None:
        self._streaming[weight.name] = weight
        self._streaming_nbytes += weight.nbytes
        self._joined += 1
        self._rank(weight, -self._joined)

    def _leave_streaming(self, weight: SimWeight) -> None:
        if weight.rank is not None:
            del self._streaming[weight.name]
            self._streaming_nbytes -= weight.nbytes
            self._unrank(weight)

    def _rank(self, weight: SimWeight, order: int) -> None:
        """Of two whose next use is not known, the one that joined first goes first."""
        weight.rank = self.trace.places[weight.number], order
        insort(self._ranked, (weight.rank, weight.number))

    def _unrank(self, weight: SimWeight) -> None:
        assert weight.rank is not None
        del self._ranked[bisect_left(self._ranked, (weight.rank, weight.number))]
        weight.rank = None

    def _rerank(self, number: int) -> None:
        weight = self._numbered[number]
        if weight.rank is not None:
            order = weight.rank[1]
            self._unrank(weight)
            self._rank(weight, order)

    def _rerank_all(self) -> None:
        self._ranked.clear()
        for weight in self._streaming.values():
            assert weight.rank is not None
            self._rank(weight, weight.rank[1])

    # Uses.

    def use(self, weights: Sequence[SimWeight]) -> None:
        """Have ``weights`` in memory now, and the next ones on their way."""
        self._uses += 1
        for weight in weights:
            weight.used = self._uses
        for weight in weights:
            self.trace.use(weight.number)
            if not weight.ready and weight.flight is None:
                self.fetch_now(weight)
        for weight in weights:
            if weight.flight is not None:
                self._await(weight, "late")
        if not self.trace.is_settled:
            self._prefetch()

    def fetch_now(self, weight: SimWeight) -> None:
        """Have ``weight`` in memory, if it is not on its way."""
        if not weight.in_memory and not weight.held:
            self._make_room(weight, force=True)
            self._fetch(weight, urgent=True)
            self._await(weight, "cold")

    def _await(self, weight: SimWeight, reason: str) -> None:
        if weight.flight is not None:
            self._world.wait(self._world.reads, weight.flight, reason)
            weight.flight, weight.ready = None, True

    def _prefetch(self) -> None:
        # What is nearer than a weight is never given up for it: its place says so.
        for place, number in self.trace.upcoming():
            weight = self._numbered[number]
            if weight.ready or weight.flight is not None or weight.held:
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
        victims = self._farthest(excess, -1 if force else self.trace.places[weight.number])
        if excess > sum(victim.nbytes for victim in victims) and not force:
            return False
        for victim in victims:
            self.evict(victim)
        return True

    def _farthest(self, nbytes: int, limit: int) -> list[SimWeight]:
        """So many bytes of the streaming weights whose next use is behind the place ``limit``."""
        found: list[SimWeight] = []
        for (place, _), number in reversed(self._ranked):
            if nbytes <= 0 or place <= limit:
                break
            other = self._numbered[number]
            if other.used < self._uses - 1 and not other.held:  # not by this use or the one before
                found.append(other)
                nbytes -= other.nbytes
        return found

    # While a step in backward changes weights.

    def hold(self, weight: SimWeight) -> None:
        """Keep ``weight`` where it is until ``let_go``."""
        weight.held = True
        self._await(weight, "late")

    def let_go(self, weight: SimWeight) -> None:
        """``weight`` may be fetched and evicted again."""
        weight.held = False
        if not weight.in_memory:
            self.trace.unsettle(weight.number)

    def give_up(self, nbytes: int) -> None:
        """Evict so many bytes of streaming weights, those used last first."""
        self._trim(0)
        for victim in self._farthest(nbytes, -1):
            self.evict(victim)
        self._trim(0)

    def settle(self) -> None:
        """Wait for what is on its way."""
        for weight in self._numbered:
            self._await(weight, "drain")

    def _fetch(self, weight: SimWeight, *, urgent: bool = False) -> None:
        world, padded = self._world, weight.padded_nbytes
        if not weight.resident and self._pool[padded]:
            self._pool[padded] -= 1
            self._pool_nbytes -= padded
            world.memory.add("weights", -padded)
        world.memory.add("weights", padded)
        weight.flight = world.submit(world.reads, weight.label, weight.nbytes, urgent=urgent)
        if not weight.resident:
            self._join_streaming(weight)
        if self._pool_nbytes:
            self._trim(min(self.window_nbytes - self._streaming_nbytes, world.memory.room()))

    def evict(self, weight: SimWeight) -> None:
        """Give the memory of ``weight`` back."""
        self._await(weight, "drain")
        if not weight.ready:
            return
        self._world.compute(weight.nbytes / self._checksum_bytes_per_s)
        weight.ready = False
        self.trace.unsettle(weight.number)
        self._leave_streaming(weight)
        if weight.resident:
            self._world.memory.add("weights", -weight.padded_nbytes)
        else:
            self._pool[weight.padded_nbytes] += 1
            self._pool_nbytes += weight.padded_nbytes

    def evict_streaming(self) -> None:
        """Give back the memory of all weights that are not resident."""
        self._uses += 2  # nothing is in use
        for weight in list(self._streaming.values()):
            self.evict(weight)
        self._trim(0)

    def _trim(self, limit_nbytes: int) -> None:
        if self._pool_nbytes <= limit_nbytes:
            return
        for padded in self._pool:
            while self._pool[padded] and self._pool_nbytes > limit_nbytes:
                self._pool[padded] -= 1
                self._pool_nbytes -= padded
                self._world.memory.add("weights", -padded)
