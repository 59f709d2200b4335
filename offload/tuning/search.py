"""The search: trials in rounds that grow smaller, each held against the baseline of its round.

Pure: how a trial is run is the caller's.

[Note: rounds] In each round the baseline and every candidate that is left run once, in an order
that is rotated from round to round, so that what else the machine does meets all of them. A step
time is divided by the baseline's of the same round: a machine that has become slower meanwhile has
no say. Behind each round a third of the candidates goes on (successive halving: Jamieson and
Talwalkar, AISTATS 2016, arXiv 1502.07943, section 2), so that what differs little is measured most
often. Behind the first one what won by itself is put together as one more candidate. There are at
least two rounds, and nobody wins who was measured once.

[Note: noise] A candidate wins only by more than the noise: by more than 2 %, more than the baseline
varied over its own rounds, and more than the candidate's ratios varied over theirs.
"""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from offload.tuning.candidates import BASELINE, Candidate

LEAST_NOISE = 0.02
_KEEP = 3  # one of so many goes on to the next round
_LIMIT = 5.0  # a trial that takes so much longer than the baseline's is ended
_LEAST_LIMIT_S = 60.0
_GIVE_UP = 3  # trials that fail alike before any has worked: the settings have no part in it

Status: TypeAlias = Literal[
    "done",
    "failed",
    "does not fit",
    "never fits",  # and with no other settings either
    "exceeds the budget",
    "too slow",
    "ended early",  # the script, by itself
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One run of the script: seconds and bytes are medians over the steps behind the warm-up.

    Attributes:
        reason: why it is not done.
        steps: optimizer steps that it finished.
        peak_nbytes: the kernel's peak resident set of the process.
        wall_s: from start to end, imports and building the model included.
    """

    status: Status
    reason: str = ""
    steps: int = 0
    step_s: float = 0.0
    compute_s: float = 0.0
    stall_s: float = 0.0
    optimizer_s: float = 0.0
    commit_s: float = 0.0
    read_nbytes: int = 0
    written_nbytes: int = 0
    peak_nbytes: int = 0
    wall_s: float = 0.0

    @property
    def done(self) -> bool:
        """Whether it may be compared."""
        return self.status == "done"


@dataclass(slots=True, kw_only=True, eq=False)
class Standing:
    """A candidate and its trials, by round."""

    candidate: Candidate
    trials: dict[int, Trial] = field(default_factory=dict)

    @property
    def alive(self) -> bool:
        """Whether all its trials worked."""
        return bool(self.trials) and all(trial.done for trial in self.trials.values())

    @property
    def failure(self) -> Trial | None:
        """The trial that did not work."""
        return next((trial for trial in self.trials.values() if not trial.done), None)

    def median(self, name: str) -> float:
        """Over its trials that worked; 0 where none did."""
        found = [getattr(trial, name) for trial in self.trials.values() if trial.done]
        return float(statistics.median(found)) if found else 0.0

    @property
    def peak_nbytes(self) -> int:
        """The highest of its trials."""
        return max((trial.peak_nbytes for trial in self.trials.values()), default=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What the search has seen.

    Attributes:
        others: in the order of their first trials.
    """

    baseline: Standing
    others: tuple[Standing, ...]
    rounds: int

    @property
    def standings(self) -> tuple[Standing, ...]:
        """The baseline and all others."""
        return (self.baseline, *self.others)

    def ratios(self, standing: Standing) -> list[float]:
        """Step times over the baseline's of the same round."""
        base = self.baseline.trials
        return [
            trial.step_s / base[number].step_s
            for number, trial in standing.trials.items()
            if trial.done and number in base and base[number].done
        ]

    def ratio(self, standing: Standing) -> float | None:
        """The median of ``ratios``; None where there is nothing to compare."""
        ratios = self.ratios(standing)
        return statistics.median(ratios) if ratios else None

    def score(self, standing: Standing) -> float:
        """What is to be small: its ratio, or its step time where the baseline does not run."""
        ratio = self.ratio(standing) if self.baseline.alive else None
        return standing.median("step_s") if ratio is None else ratio

    def noise(self, standing: Standing) -> float:
        """By how much its ratio may be off ([Note: noise])."""
        own = [trial.step_s for trial in self.baseline.trials.values() if trial.done]
        return max(LEAST_NOISE, _spread(own), _spread(self.ratios(standing)))

    @property
    def best(self) -> Standing | None:
        """The shortest step, if it is shorter by more than the noise, or else the baseline.

        Of those that differ by no more than the least noise, the one that changes least. None
        where nothing worked.
        """
        measured = [one for one in self.others if one.alive and len(one.trials) > 1]
        if not self.baseline.alive:
            return min(measured, key=self.score, default=None)
        winners = [
            (ratio, one)
            for one in measured
            if (ratio := self.ratio(one)) is not None and 1 - ratio > self.noise(one)
        ]
        if not winners:
            return self.baseline
        least = min(ratio for ratio, _ in winners)
        alike = [(ratio, one) for ratio, one in winners if ratio <= least + LEAST_NOISE]
        return min(alike, key=lambda each: (len(each[1].candidate.changes), each[0]))[1]


def _spread(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    return (max(values) - min(values)) / statistics.median(values)


def search(
    variants: Iterable[Candidate],
    run: Callable[[Candidate, float | None], Trial],
    *,
    combine: Callable[[Iterable[Candidate]], Candidate | None],
    say: Callable[[str], None] = lambda _text: None,
) -> Found:
    """Run the trials.

    Args:
        variants: single changes of the baseline.
        run: runs a candidate, for so many seconds at most (None: without a limit).
        combine: puts winners together, the best first.
        say: is told how each trial went.
    """
    looking = _Search(variants, run, say)
    while looking.round():
        looking.halve(combine)
    return looking.found()


class _Search:
    def __init__(
        self,
        variants: Iterable[Candidate],
        run: Callable[[Candidate, float | None], Trial],
        say: Callable[[str], None],
    ) -> None:
        self._run = run
        self._say = say
        self._baseline = Standing(candidate=BASELINE)
        self._others = [Standing(candidate=variant) for variant in variants]
        self._left = list(self._others)
        self._rounds = 0
        self._hopeless = False

    def found(self) -> Found:
        tried = tuple(one for one in self._others if one.trials)
        return Found(baseline=self._baseline, others=tried, rounds=self._rounds)

    def round(self) -> bool:
        """Run all that is left once; False if the search is over."""
        entries = [self._baseline, *self._left] if self._may_run(self._baseline) else self._left
        first = self._rounds % max(len(entries), 1)
        order = [*entries[first:], *entries[:first]]
        for number, standing in enumerate(order, 1):
            self._try(standing, f"round {self._rounds + 1}, {number} of {len(order)}")
            if self._hopeless:
                break
        self._rounds += 1
        self._left = [one for one in self._left if one.alive]
        return not self._hopeless and not self._settled()

    def _may_run(self, standing: Standing) -> bool:
        return not standing.trials or standing.alive

    def _settled(self) -> bool:
        if not self._left:
            return self._rounds > 1 or not self._baseline.alive
        return len(self._left) == 1 and len(self._left[0].trials) > 1

    def _try(self, standing: Standing, place: str) -> None:
        name = standing.candidate.name
        self._say(f"{place}: {name}")
        trial = self._run(standing.candidate, self._limit_s())
        standing.trials[self._rounds] = trial
        self._hopeless = self._tells_all(trial)
        if not trial.done:
            self._say(f"{name} {trial.status}: {trial.reason}")

    def _limit_s(self) -> float | None:
        known = [trial.wall_s for trial in self._baseline.trials.values() if trial.done]
        return max(_LIMIT * max(known), _LEAST_LIMIT_S) if known else None

    def _tells_all(self, trial: Trial) -> bool:
        """Whether no other settings would change how ``trial`` ended."""
        trials = [each for one in self._standings() for each in one.trials.values()]
        if any(each.done for each in trials):
            return False
        if trial.status in {"ended early", "never fits"}:
            return True
        reasons = [(each.status, each.reason) for each in trials]
        return len(reasons) >= _GIVE_UP and len(set(reasons)) == 1

    def _standings(self) -> list[Standing]:
        return [self._baseline, *self._others]

    def halve(self, combine: Callable[[Iterable[Candidate]], Candidate | None]) -> None:
        """Keep the best third; behind the first round, with what wins together."""
        found = self.found()
        ranked = sorted(self._left, key=found.score)
        self._left = ranked[: max(1, -(-len(ranked) // _KEEP))]
        if self._rounds > 1:
            return
        winners = [
            one.candidate
            for one in ranked
            if (ratio := found.ratio(one)) is not None and 1 - ratio > LEAST_NOISE
        ]
        if (together := combine(winners)) is not None:
            standing = Standing(candidate=together)
            self._others.append(standing)
            self._left.append(standing)
