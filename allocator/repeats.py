"""Where a sequence repeats: the runs of equal blocks that follow each other."""

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

_GRAM = 4  # tokens that are looked up together: single ones recur within a block
_CANDIDATES = 8


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Run:
    """Tokens ``start`` to ``end`` (excluded), each equal to the one ``period`` before it."""

    start: int
    end: int
    period: int

    @property
    def repeated(self) -> int:
        """Tokens that repeat others of the run."""
        return self.end - self.start - self.period


def find_runs(tokens: Sequence[Hashable], *, shortest: int = _GRAM) -> list[Run]:
    """Runs of blocks, from left to right, none overlapping.

    The run that repeats most tokens comes first, then what is left of it and right of it is
    searched; of a run's periods the shortest is taken. A period that recurs nowhere as the
    distance of ``_GRAM`` equal tokens to the next such is not seen.

    Args:
        shortest: tokens of a block, at least.
    """
    return sorted(_search(tokens, 0, len(tokens), shortest))


def _search(tokens: Sequence[Hashable], start: int, end: int, shortest: int) -> Iterator[Run]:
    ranges = [(start, end)]
    while ranges:
        start, end = ranges.pop()
        runs = [
            run
            for period in _periods(tokens, start, end, shortest)
            for run in _runs_of(tokens, start, end, period)
        ]
        best = max(runs, key=lambda run: (run.repeated, -run.period), default=None)
        if best is not None and best.repeated >= best.period:
            yield best
            ranges += [(start, best.start), (best.end, end)]


def _periods(tokens: Sequence[Hashable], start: int, end: int, shortest: int) -> list[int]:
    """Distances at which most tokens recur next."""
    votes: Counter[int] = Counter()
    seen: dict[tuple[Hashable, ...], int] = {}
    for position in range(start, end - _GRAM + 1):
        gram = tuple(tokens[position : position + _GRAM])
        if gram in seen:
            votes[position - seen[gram]] += 1
        seen[gram] = position
    ranked = sorted(votes.items(), key=lambda item: (-item[1], item[0]))
    return [period for period, _ in ranked if period >= shortest][:_CANDIDATES]


def _runs_of(tokens: Sequence[Hashable], start: int, end: int, period: int) -> Iterator[Run]:
    first = start
    for position in range(start, end - period + 1):
        if position == end - period or tokens[position] != tokens[position + period]:
            if position > first:
                yield Run(start=first, end=position + period, period=period)
            first = position + 1
