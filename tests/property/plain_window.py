"""The window's policy as one would write it down first: everything is looked for at each use.

``test_swap_window`` holds ``swap.window`` to it.
"""

import contextlib
from collections.abc import Hashable, Iterable, Iterator, Sequence

from offload.swap.residency import Residency


class PlainTrace:
    """``Trace`` by looking through what is expected."""

    def __init__(self, order: Sequence[str]) -> None:
        self._default = [*order, *reversed(order)]
        self._learned: dict[Hashable, list[str]] = {}
        self._kind: Hashable = None
        self._now: list[str] = []
        self._expected = self._default
        self._position = 0

    def begin(self, kind: Hashable, uses: Sequence[str] | None = None) -> None:
        self.end()
        self._kind = kind
        self._expected = self._learned.get(kind, self._default if uses is None else list(uses))
        self._position = 0

    def end(self) -> None:
        if self._now:
            self._learned[self._kind] = self._now
        self._now = []
        self._expected = []
        self._position = 0

    def use(self, key: str) -> bool:
        if self._now and self._now[-1] == key:
            return True
        self._now.append(key)
        expected = next(self.upcoming(), key)
        with contextlib.suppress(ValueError):
            self._position = self._expected.index(key, self._position) + 1
        return key == expected or self._kind not in self._learned

    def upcoming(self) -> Iterator[str]:
        yield from self._expected[self._position :]

    def distance(self, key: str) -> int:
        try:
            return self._expected.index(key, self._position) - self._position
        except ValueError:
            return len(self._expected) + 1 - self._position


class PlainWindow:
    """``Window`` by sums over all weights, and by sorting them; moves are up to a subclass."""

    def __init__(self, weights, window_nbytes, room, order):
        self.weights = weights
        self.window_nbytes = window_nbytes
        self.trace = PlainTrace(order)
        self.room = room
        self.streaming = {}
        self._in_use: list[tuple[str, ...]] = []

    @property
    def streaming_nbytes(self):
        return sum(weight.nbytes for weight in self.streaming.values())

    @property
    def landing_nbytes(self):
        return sum(
            weight.landing_nbytes
            for weight in self.streaming.values()
            if weight.residency is Residency.FETCHING
        )

    def use(self, names: Sequence[str]) -> None:
        self._in_use = [*self._in_use[-1:], tuple(names)]
        for name in names:
            self.trace.use(name)
            weight = self.weights[name]
            if weight.residency is Residency.ABSENT and not weight.held:
                self._make_room(weight, force=True)
                self._fetch(weight, urgent=True)
                self._await(weight)
        for name in names:
            self._await(self.weights[name])
        self._prefetch()

    def touch(self, name: str) -> None:
        self.trace.use(name)

    def keep(self, names: Iterable[str]) -> None:
        for weight in self.weights.values():
            weight.resident = weight.name in names
            if weight.resident:
                self.streaming.pop(weight.name, None)
            elif weight.residency is not Residency.ABSENT:
                self.streaming[weight.name] = weight

    def let_go(self, weight) -> None:
        weight.held = False

    def give_up(self, nbytes: int) -> None:
        for victim in self._farthest(nbytes, -1):
            self.evict(victim)

    def evict_streaming(self) -> None:
        self._in_use = []
        for weight in list(self.streaming.values()):
            self.evict(weight)

    def _prefetch(self) -> None:
        nearer = {name for names in self._in_use for name in names}
        for name in self.trace.upcoming():
            if name in nearer:
                continue
            weight = self.weights[name]
            absent = weight.residency is Residency.ABSENT and not weight.held
            if absent and not (self._make_room(weight, nearer=nearer) and self._fetch(weight)):
                return
            nearer.add(name)

    def _make_room(self, weight, *, force: bool = False, nearer: Iterable[str] = ()) -> bool:
        if weight.resident:
            return True
        beyond_window = self.streaming_nbytes + weight.nbytes - self.window_nbytes
        beyond_budget = weight.nbytes + self.landing_nbytes - self.room()
        excess = max(beyond_window, beyond_budget)
        victims = self._farthest(excess, -1 if force else self.trace.distance(weight.name), nearer)
        if excess > sum(victim.nbytes for victim in victims) and not force:
            return False
        for victim in victims:
            self.evict(victim)
        return True

    def _farthest(self, nbytes: int, limit: int, nearer: Iterable[str] = ()) -> list:
        if nbytes <= 0:
            return []
        protected = {name for names in self._in_use for name in names}.union(nearer)
        distances = {
            other: self.trace.distance(other.name)
            for other in self.streaming.values()
            if other.name not in protected and other.in_memory and not other.held
        }
        found = []
        for other in sorted(distances, key=lambda other: -distances[other]):
            if nbytes <= 0 or distances[other] <= limit:
                break
            found.append(other)
            nbytes -= other.nbytes
        return found

    def _fetch(self, weight, *, urgent: bool = False) -> bool:
        raise NotImplementedError

    def evict(self, weight) -> None:
        raise NotImplementedError

    def _await(self, weight) -> None:
        raise NotImplementedError
