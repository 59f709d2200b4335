"""Which tensor is used next: the order of uses, learned from the last pass of the same kind.

A training step repeats. The uses of a pass (one forward, with its backward if there is one) are
recorded; the next pass of the same kind is predicted to repeat them. A wrong prediction costs
time, never correctness.
"""

import contextlib
from collections.abc import Hashable, Iterator, Sequence


class Trace:
    """Predicts uses of keys within passes.

    Args:
        order: the keys in the order of their first forward use, as far as it can be guessed
            (the model's own order); the first training pass is predicted as this order and back.
    """

    def __init__(self, order: Sequence[str]) -> None:
        self._default = [*order, *reversed(order)]
        self._learned: dict[Hashable, list[str]] = {}
        self._kind: Hashable = None
        self._now: list[str] = []
        self._expected = self._default
        self._position = 0

    def begin(self, kind: Hashable, uses: Sequence[str] | None = None) -> None:
        """A pass of ``kind`` begins (training or evaluation, say); the last one is learned.

        Args:
            uses: what the first pass of this kind is predicted as.
        """
        self.end()
        self._kind = kind
        self._expected = self._learned.get(kind, self._default if uses is None else list(uses))
        self._position = 0

    def end(self) -> None:
        """The pass is over: nothing more is predicted until the next one begins."""
        if self._now:
            self._learned[self._kind] = self._now
        self._now = []
        self._expected = []
        self._position = 0

    def use(self, key: str) -> bool:
        """``key`` is used now; the prediction moves on to just after its next expected use.

        Returns:
            Whether the last pass of this kind used it here, too, if there was one.
        """
        if self._now and self._now[-1] == key:
            return True
        self._now.append(key)
        expected = next(self.upcoming(), key)
        with contextlib.suppress(ValueError):  # unexpected: the prediction stays where it is
            self._position = self._expected.index(key, self._position) + 1
        return key == expected or self._kind not in self._learned

    def upcoming(self) -> Iterator[str]:
        """The keys expected next, nearest first; a key may come more than once."""
        for position in range(self._position, len(self._expected)):
            yield self._expected[position]

    def distance(self, key: str) -> int:
        """Uses until ``key`` is expected; one past the end of the pass when it is not."""
        try:
            return self._expected.index(key, self._position) - self._position
        except ValueError:
            return len(self._expected) + 1 - self._position
