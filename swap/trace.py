"""Which tensor is used next: the order of uses, learned from the last pass of the same kind.

A training step repeats. The uses of a pass (one forward, with its backward if there is one) are
recorded; the next pass of the same kind is predicted to repeat them. A wrong prediction costs
time, never correctness. A run and its simulation share all of it.

[Note: places of next uses] Distances are counted from the present use, which moves. The *place* of
a key's next use in the expected pass stays until it is used, so places are kept for all keys, and
only those of keys that a use passes by are looked up anew.
"""

from collections.abc import Callable, Container, Hashable, Iterator, Sequence
from typing import Generic, TypeVar

_Key = TypeVar("_Key", bound=Hashable)


class Trace(Generic[_Key]):
    """Predicts uses of keys within passes.

    Args:
        order: the keys in the order of their first forward use, as far as it can be guessed
            (the model's own order); the first training pass is predicted as this order and back.

    Attributes:
        watched: keys of which it is told when
        moved: called with one of them whose next use is another from now on, and with its place.
        restarted: called when all places are new.
        passes: that have begun.
    """

    def __init__(self, order: Sequence[_Key]) -> None:
        self.watched: Container[_Key] = ()
        self.moved: Callable[[_Key, int], None] = lambda _key, _place: None
        self.restarted: Callable[[], None] = lambda: None
        self.passes = 0
        self._default = [*order, *reversed(order)]
        self._learned: dict[Hashable, list[_Key]] = {}
        self._kind: Hashable = None
        self._now: list[_Key] = []
        self._laid_out: list[_Key] = []
        self._first: dict[_Key, int] = {}
        self._following: list[int] = []
        self._expect(self._default)

    def begin(self, kind: Hashable, uses: Sequence[_Key] | None = None) -> None:
        """A pass of ``kind`` begins (training or evaluation, say); the last one is learned.

        Args:
            uses: what the first pass of this kind is predicted as.
        """
        self._learn()
        self.passes += 1
        self._kind = kind
        self._expect(self._learned.get(kind, self._default if uses is None else list(uses)))

    def end(self) -> None:
        """The pass is over: nothing more is predicted until the next one begins."""
        self._learn()
        self._expect([])

    def _learn(self) -> None:
        if self._now:
            self._learned[self._kind] = self._now
        self._now = []

    def _expect(self, expected: list[_Key]) -> None:
        self._expected = expected
        self._position = 0
        self._settled = 0  # uses before it need no fetch
        self._never = len(expected) + 1
        if expected and expected != self._laid_out:
            self._lay_out(expected)
        self._places = dict(self._first) if expected else {}
        self.restarted()

    def _lay_out(self, expected: list[_Key]) -> None:
        """Find the first use of each key, and the next use of the same key behind each place."""
        never = len(expected) + 1
        first: dict[_Key, int] = {}
        following = [never] * len(expected)
        for place in range(len(expected) - 1, -1, -1):
            key = expected[place]
            following[place] = first.get(key, never)
            first[key] = place
        self._laid_out, self._first, self._following = expected, first, following

    def use(self, key: _Key) -> bool:
        """``key`` is used now; the prediction moves on to just after its next expected use.

        Returns:
            Whether the last pass of this kind used it here, too, if there was one.
        """
        now, places, expected = self._now, self._places, self._expected
        if now and now[-1] == key:
            return True
        now.append(key)
        place, began = places.get(key, self._never), self._position
        if place == began:  # most often
            places[key] = behind = self._following[place]
            if key in self.watched:
                self.moved(key, behind)
            self._position = place + 1
            return True
        as_before = began >= len(expected)
        if place < self._never:  # else it is unexpected: the prediction stays where it is
            following = self._following
            for passed in range(began, place + 1):
                other = expected[passed]
                places[other] = behind = following[passed]
                if other in self.watched:
                    self.moved(other, behind)
            self._position = place + 1
        return as_before or self._kind not in self._learned

    def upcoming(self) -> Iterator[_Key]:
        """The keys expected next, nearest first; a key may come more than once."""
        for position in range(self._position, len(self._expected)):
            yield self._expected[position]

    def place(self, key: _Key) -> int:
        """Where ``key`` is expected next; behind the end of the pass when it is not."""
        return self._places.get(key, self._never)

    def distance(self, key: _Key) -> int:
        """Uses until ``key`` is expected; one past the end of the pass when it is not."""
        return self.place(key) - self._position

    # What needs no fetch is not looked at again.

    def unsettled(self) -> Iterator[tuple[int, _Key]]:
        """Places and keys expected next, behind what is settled."""
        expected, begin = self._expected, self._settled
        if begin < self._position:
            begin = self._position
        for place in range(begin, len(expected)):
            yield place, expected[place]

    @property
    def is_settled(self) -> bool:
        """Whether all that is expected is settled."""
        return self._settled >= len(self._expected)

    def settle(self, place: int) -> None:
        """What is used before ``place`` needs no fetch."""
        self._settled = place

    def unsettle(self, key: _Key) -> None:
        """``key`` has gone: it needs a fetch before its next use."""
        place = self._places.get(key, self._never)
        if place < self._settled:
            self._settled = place
