"""The steps of a simulated run with token-wise recompute: what the first learn, what follows.

A first step swaps all, rebuilds rows at the end of each block's forward and compares them (a second
one too, where the first did not keep what that takes). A fixed ``alpha`` is used from then on. An
automatic one is solved, and then tried in whole passes against rebuilding all and swapping all, as
``tokenwise.trials`` does; here one pass of each tells as much as five, for nothing disturbs them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, TypeAlias

from offload.allocator.errors import UnsupportedError
from offload.swap.planning.compiled import Compiled, compile_program
from offload.swap.planning.program import Program  # noqa: TC001 (as all of ours)
from offload.swap.planning.row_alpha import Solved, links_of, probed_cuts, solve_kind
from offload.swap.planning.row_events import Choice, RowEvents
from offload.swap.planning.row_records import RowProgram  # noqa: TC001 (as all of ours)
from offload.swap.planning.simulate import SimulatedStep, Simulation
from offload.swap.tokenwise.plans import why_whole
from offload.swap.tokenwise.replay import nearest_cut
from offload.swap.tokenwise.trials import ROUNDS, Trials
from offload.swap.tokenwise.trials import Choice as Trial

Alpha: TypeAlias = float | Literal["auto"]
_SETTLED_STEPS = 3  # the second has grown, the third may shrink, the last repeats


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsFound:
    """What is rebuilt of the blocks of one kind.

    Attributes:
        blocks: forwards of such blocks in a step.
        cut: rows of each sequence that are swapped, of ``rows``.
        target_nbytes: what can be rebuilt of a block, all rows.
        whole_nbytes: what is swapped of it whatever the cut.
        why: all rows are swapped.
    """

    blocks: int
    rows: int
    cut: int
    target_nbytes: int
    whole_nbytes: int
    why: str

    @property
    def alpha(self) -> float:
        """The share of the rows that is swapped."""
        return self.cut / self.rows


def row_steps(
    compiled: Compiled, alpha: Alpha, *, memory_nbytes: int, drive_nbytes: int
) -> "RowSteps":
    """As ``RowSteps``: the last ones again, where they are asked for as often as budgets are tried.

    Raises:
        UnsupportedError: as ``RowSteps``.
    """
    if alpha != "auto":
        memory_nbytes = drive_nbytes = 0  # they change nothing
    return _known(compiled, alpha, memory_nbytes, drive_nbytes)


@lru_cache(maxsize=1)
def _known(compiled: Compiled, alpha: Alpha, memory_nbytes: int, drive_nbytes: int) -> "RowSteps":
    return RowSteps(compiled, alpha, memory_nbytes=memory_nbytes, drive_nbytes=drive_nbytes)


class RowSteps:
    """Makes a program's steps ready; ``run`` simulates them.

    Args:
        compiled: the plain step, with what can be rebuilt.
        memory_nbytes: of saved tensors that may stay in memory.
        drive_nbytes: that the drive takes of them.

    Attributes:
        compiled: with the tables of all steps.

    Raises:
        UnsupportedError: the program does not tell what can be rebuilt.
    """

    def __init__(
        self, compiled: Compiled, alpha: Alpha, *, memory_nbytes: int, drive_nbytes: int
    ) -> None:
        program, costs = compiled.program, compiled.costs
        if program.rows is None:
            raise UnsupportedError("the step was traced without its blocks: trace it with them")
        self._costs = costs
        self._rows: RowProgram = program.rows
        self._alpha = alpha
        self._solved: dict[int, Solved] = {}
        if alpha == "auto":
            links = links_of(program, costs, memory_nbytes=memory_nbytes, drive_nbytes=drive_nbytes)
            self._solved = {
                number: solve_kind(program, costs, number, links)
                for number, kind in enumerate(self._rows.kinds)
                if kind.targets
            }
        self._choices = self._choices_to_try()
        events = RowEvents(program)
        learning = [
            [self._learning(number, step) for number in range(len(self._rows.kinds))]
            for step in range(1 if all(kind.at_once for kind in self._rows.kinds) else 2)
        ]
        self._cuts: dict[Trial, list[int]] = {
            trial: [self._cut(number, trial) for number in range(len(self._rows.kinds))]
            for trial in self._choices
        }
        steps = [
            *(events.step(choices) for choices in learning),
            *(events.step(self._choices_of(trial)) for trial in self._choices),
        ]
        whole: Program = events.program(steps[-1])
        self.compiled = compile_program(whole, costs)
        moments = [compile_program(replace(whole, events=step), costs).moments for step in steps]
        self._learning_moments = moments[: len(learning)]
        self._moments = dict(zip(self._choices, moments[len(learning) :], strict=True))

    def run(
        self, simulation: Simulation
    ) -> tuple[tuple[SimulatedStep, ...], tuple[RowsFound, ...]]:
        """Simulate the first steps; the last one is what follows. And what is rebuilt in that.

        Raises:
            BudgetError: as ``Simulation.step``.
        """
        steps: list[SimulatedStep] = []
        for moments in self._learning_moments:
            simulation.follow(moments)
            steps.append(simulation.step())
        trials = Trials(self._choices)
        while trials.settled is None:
            trial = trials.present()
            simulation.follow(self._moments[trial])
            steps.append(simulation.step())
            finished = steps[-1].finished
            for _ in range(ROUNDS):
                trials.took(trial, finished.compute_s + finished.stall_s)
        simulation.follow(self._moments[trials.settled])
        steps += [simulation.step() for _ in range(_SETTLED_STEPS)]
        return tuple(steps), tuple(self._found(trials.settled))

    # Choices.

    def _choices_to_try(self) -> Sequence[Trial]:
        """Those of the first block of a pass, which are for all."""
        first = next((one.kind for one in self._rows.forwards if one.kind in self._solved), None)
        if first is None:
            return [Trial.SOLVED]
        extremes = [Trial.REBUILT]
        if self._solved[first].room_for_all:
            extremes.append(Trial.SWAPPED)
        by_cut = {self._cut(first, trial): trial for trial in (*extremes, Trial.SOLVED)}
        return sorted(by_cut.values())

    def _cut(self, number: int, trial: Trial) -> int:
        kind = self._rows.kinds[number]
        if not kind.targets:
            return kind.rows
        if self._alpha != "auto":
            return nearest_cut(kind.rows, self._alpha)
        if trial is Trial.SOLVED:
            return self._solved[number].cut
        return 0 if trial is Trial.REBUILT else kind.rows

    def _choices_of(self, trial: Trial) -> list[Choice]:
        return [
            Choice(cut=None if cut == kind.rows else cut)
            for cut, kind in zip(self._cuts[trial], self._rows.kinds, strict=True)
        ]

    def _learning(self, number: int, step: int) -> Choice:
        """Of a kind, in the first step or the second."""
        kind = self._rows.kinds[number]
        learns_in = 0 if kind.at_once else 1
        if not kind.targets or why_whole(kind.rows, self._alpha) is not None or step < learns_in:
            return Choice()
        cut = self._cut(number, Trial.SOLVED)
        then = Choice(cut=None if cut == kind.rows else cut)
        if step > learns_in:
            return then
        measured = probed_cuts(kind.rows) if self._alpha == "auto" else ()
        return replace(then, learns=self._looks(number), rehearses=measured[::-1])

    def _looks(self, number: int) -> tuple[int, ...]:
        """The cuts behind which rows are compared."""
        kind = self._rows.kinds[number]
        if self._alpha != "auto":
            return (self._cut(number, Trial.SOLVED),)
        tried = (*probed_cuts(kind.rows), 0, self._solved[number].cut)
        return tuple(cut for cut in dict.fromkeys(tried) if cut != kind.rows)

    def _found(self, settled: Trial) -> list[RowsFound]:
        found = []
        for number, kind in enumerate(self._rows.kinds):
            why = kind.why or why_whole(kind.rows, self._alpha) or ""
            cut = self._cuts[settled][number]
            if cut == kind.rows and not why:
                why = "swapping all rows is as fast"
            found.append(
                RowsFound(
                    blocks=sum(one.kind == number for one in self._rows.forwards),
                    rows=kind.rows,
                    cut=cut,
                    target_nbytes=kind.target_nbytes,
                    whole_nbytes=kind.whole_nbytes,
                    why=why,
                )
            )
        return found
