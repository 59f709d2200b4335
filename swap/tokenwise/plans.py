"""What is rebuilt of one block for one shape of input: found, verified, and how much of it.

[Note: verified cuts] A cut is used only after the rows behind it were rebuilt once and compared
with what was saved. A storage that differs is swapped whole from then on; it becomes a source, so
that what comes after it is rebuilt from its saved rows and gets its own comparison.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from offload.swap.tokenwise.analyse import Chain, find_chain
from offload.swap.tokenwise.compare import Comparison, Rehearsal
from offload.swap.tokenwise.measure import Measurements
from offload.swap.tokenwise.passes import BlockPass
from offload.swap.tokenwise.program import Program
from offload.swap.tokenwise.record import Recorder
from offload.swap.tokenwise.replay import GRID_ROWS, Replay, Sink, cuts
from offload.swap.tokenwise.solve import BlockCost, Link, Solution, step_s, thriftiest
from offload.swap.tokenwise.timing import Stopwatch, Timer
from offload.swap.tokenwise.trials import ALIKE, Choice, Trials

_MOST_DIVERGENCES = 3
_MEASURED_PASSES = 16  # all of the first ones, then each so many-th
_WORTHWHILE = 0.95  # another cut is verified and taken if its step is this much shorter


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the user chose.

    Attributes:
        alpha: the fraction of rows that is swapped, or ``auto``.
        relaxed: accept rows that differ in the last bits.
        blocks: names of blocks or of lists of blocks; empty: they are found.
        min_nbytes: smaller storages are swapped whole.
    """

    alpha: float | Literal["auto"] = "auto"
    relaxed: bool = False
    blocks: tuple[str, ...] = ()
    min_nbytes: int = 64 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanReport:
    """One block at one shape of input.

    Attributes:
        cut: rows of each sequence that are swapped; ``rows`` of them: nothing is rebuilt.
        rebuilt_nbytes: bytes of the storages that are rebuilt, all rows.
        whole_nbytes: bytes that are swapped whole, sources included.
        whole: reasons for which saved storages are swapped whole, with their bytes.
        gave_up: why the whole block is swapped whole, if it is.
        worst_error: largest relative difference of rebuilt rows; 0 unless ``relaxed``.
        cost, solution: what was measured, and what ``alpha`` was solved from it.
        trial_s: for each choice that was tried, the shortest pass that began with this block.
        settled: the choice that the trials have found.
    """

    block: str
    rows: int
    cut: int
    rebuilt_nbytes: int
    whole_nbytes: int
    whole: tuple[tuple[str, int], ...]
    gave_up: str | None
    worst_error: float
    cost: BlockCost | None
    solution: Solution | None
    trial_s: tuple[tuple[Choice, float], ...] = ()
    settled: Choice | None = None


class BlockPlan:
    """The plan of one block for one shape of input.

    Args:
        rows: tokens of each sequence.
        share: blocks that the keeper's free bytes are for.
        shared: figures by program; blocks that do the same add to the same ones.
        timer: measures what alpha is solved from.

    Attributes:
        program: what the block executes, once it is known.
        measurements: what it costs.
        gave_up: why nothing is rebuilt, if that is settled.
        trials: of passes that begin with this block, once alpha is solved.
    """

    def __init__(
        self,
        block: str,
        rows: int,
        settings: Settings,
        share: int,
        shared: dict[Program, Measurements],
        timer: Timer,
    ) -> None:
        self.block = block
        self.rows = rows
        self.program: Program | None = None
        self.gave_up: str | None = None
        self._settings = settings
        self._share = share
        self._timer = timer
        self._chain: Chain | None = None
        self._failed: dict[int, str] = {}
        self._verified: dict[int, Replay] = {}
        self._cut = self._solved_cut = rows
        self.trials: Trials | None = None
        self._passes = 0  # begun with this block, since alpha was solved last
        self._divergences = 0
        self._worst_error = 0.0
        self._solution: Solution | None = None
        self._backward_guessed = False  # when it was found
        self._shared = shared
        self.measurements = Measurements()
        if rows < GRID_ROWS:
            self.gave_up = f"sequences of {rows} tokens are too few rows, {GRID_ROWS} are needed"
        elif isinstance(settings.alpha, float) and self._nearest(settings.alpha) == rows:
            self.gave_up = (
                "alpha is 1: all rows are swapped"
                if settings.alpha == 1
                else f"sequences of {rows} tokens have no cut near alpha {settings.alpha}: it "
                f"takes {GRID_ROWS} rows on each side"
            )

    def wants_a_look(self, links: Callable[[], Sequence[Link]], choice: Choice) -> bool:
        """Whether a forward that begins is to be recorded: not where nothing would be rebuilt."""
        if self.gave_up is not None:
            return False
        if self._chain is None:
            return True
        if self._settings.alpha == "auto":
            self._solve(links())
            self._cut = self._cut_of(choice)
        return self._cut != self.rows

    def _cut_of(self, choice: Choice) -> int:
        if self._solution is None:
            return self._cut
        extremes = {Choice.REBUILT: cuts(self.rows)[0], Choice.SWAPPED: self.rows}
        return extremes.get(choice, self._solved_cut)

    def begin_pass(self) -> tuple[Choice, bool]:
        """A pass begins with this block: where its cuts are, and whether it is measured.

        Once all is settled only some are: each time takes two events of a device.
        """
        self._passes += 1
        young = self._passes <= _MEASURED_PASSES or self._passes % _MEASURED_PASSES == 0
        trials = self.trials
        if trials is None:
            unsolved = self._settings.alpha == "auto" and self.gave_up is None
            return Choice.SOLVED, young or unsolved
        return trials.present(), young or trials.settled is None

    def begin(self) -> tuple[Replay | None, bool]:
        """A forward begins: what it may leave to be rebuilt, and whether that is to be verified."""
        if self._chain is None:
            return None, True
        replay = self._verified.get(self._cut)
        return replay or Replay(self._chain, self._cut), replay is None

    def end(
        self,
        block_pass: BlockPass,
        recorder: Recorder,
        forward: Stopwatch,
        links: Callable[[], Sequence[Link]],
    ) -> str | None:
        """A forward has ended, timed by ``forward``; what the user should know, if anything."""
        recorder.finish()
        if recorder.diverged is not None:
            return self._diverged(recorder.diverged)
        if self._chain is None:
            self.program = recorder.program()
            self._chain = find_chain(self.program, min_nbytes=self._settings.min_nbytes)
            alpha = self._settings.alpha
            self._cut = self._measurable(0.75) if alpha == "auto" else self._nearest(alpha)
            self.measurements = self._shared.setdefault(self.program, self.measurements)
            self.measurements.recording(recorder.own_s)
        forward.tell(self.measurements.recorded_forward)
        if block_pass.keeps:
            self._verify(block_pass)
            if self._settings.alpha == "auto" and self._verified and not self._solution:
                self._solve_first(block_pass, links)
        if not self._chain.targets:
            self.gave_up = "none of its saved tensors can be rebuilt row by row: " + "; ".join(
                reason for reason, _ in self.report().whole
            )
            return f"token-wise recompute: {self.block} is swapped whole: {self.gave_up}"
        if block_pass.keeps and self._worst_error:
            return (
                f"token-wise recompute: relaxed: rebuilt rows of {self.block} differ from saved "
                f"ones by up to {self._worst_error:.1e} of the largest value"
            )
        return None

    def report(self) -> PlanReport:
        """What is rebuilt and what is not."""
        chain = self._chain
        reasons: dict[str, int] = {}
        if chain is not None:
            for storage, reason in chain.whole.items():
                nbytes = chain.program.storage_nbytes[storage]
                reasons[reason] = reasons.get(reason, 0) + nbytes
        return PlanReport(
            block=self.block,
            rows=self.rows,
            cut=self._cut if self.gave_up is None else self.rows,
            rebuilt_nbytes=chain.target_nbytes if chain else 0,
            whole_nbytes=chain.whole_nbytes if chain else 0,
            whole=tuple(sorted(reasons.items(), key=lambda item: -item[1])),
            gave_up=self.gave_up,
            worst_error=self._worst_error,
            cost=self._cost(),
            solution=self._solution,
            trial_s=tuple(self.trials.shortest_s().items()) if self.trials is not None else (),
            settled=self.trials.settled if self.trials is not None else None,
        )

    def _diverged(self, why: str) -> str:
        self._divergences += 1
        self.program = self._chain = None
        self._failed.clear()
        self._verified.clear()
        self._cut = self.rows
        if self._divergences == _MOST_DIVERGENCES:
            self.gave_up = f"what it does changes from forward to forward: {why}"
            return f"token-wise recompute: {self.block} is swapped whole: {self.gave_up}"
        return f"token-wise recompute: {self.block} is recorded anew: {why}"

    def _nearest(self, alpha: float) -> int:
        return min(cuts(self.rows), key=lambda cut: (abs(cut - alpha * self.rows), -cut))

    def _measurable(self, alpha: float) -> int:
        """The cut nearest to ``alpha`` behind which there is something to rebuild."""
        return min(cuts(self.rows)[:-1], key=lambda cut: (abs(cut - alpha * self.rows), -cut))

    # How much.

    def _cost(self) -> BlockCost | None:
        if self._chain is None:
            return None
        return self.measurements.cost(
            self.rows, self._chain.whole_nbytes, self._chain.target_nbytes
        )

    def _solve_first(self, block_pass: BlockPass, links: Callable[[], Sequence[Link]]) -> None:
        """Measure, and solve if all is known: a device may tell before the next forward only."""
        self._cut = self._measurable(0.25)  # a second measurement
        self._verify(block_pass)
        for replay in self._verified.values():  # warm by now
            self._rehearse(replay, block_pass)
        self._timer.tell()
        found = links()
        if self._verified.keys() <= self.measurements.rebuild_s.keys():
            self._solve(found)
        if self._solution is not None:
            for choice in (Choice.REBUILT, Choice.SOLVED):
                self._cut = self._cut_of(choice)
                self._verify(block_pass)

    def _solve(self, links: Sequence[Link]) -> None:
        self._timer.tell()
        cost = self._cost()
        if cost is None or not links:
            return
        mine = [
            Link(
                name=link.name,
                bytes_per_s=link.bytes_per_s,
                free_nbytes=link.free_nbytes / self._share,
            )
            for link in links
        ]
        found = thriftiest(cost, mine, cuts(self.rows), within=ALIKE)
        now_s = step_s(cost, mine, self._solved_cut / self.rows)
        guessed = self._backward_guessed and math.isfinite(self.measurements.backward_s)
        if self._solution is None or guessed or found.step_s < _WORTHWHILE * now_s:
            self._solution = found
            self._backward_guessed = math.isinf(self.measurements.backward_s)
            if self.trials is None or self._solved_cut != found.cut:
                self._solved_cut = found.cut
                self._passes = 0
                self.trials = self._new_trials(room_for_all=math.isfinite(step_s(cost, mine, 1)))

    def _new_trials(self, *, room_for_all: bool) -> Trials:
        """[Note: trials] in ``trials``; choices that cut alike are one."""
        extremes = [Choice.REBUILT, *([Choice.SWAPPED] if room_for_all else [])]
        by_cut = {self._cut_of(choice): choice for choice in (*extremes, Choice.SOLVED)}
        return Trials(list(by_cut.values()))

    # Whether it is right.

    def _verify(self, block_pass: BlockPass) -> None:
        """Rebuild and compare: [Note: verified cuts]."""
        while (
            self._chain is not None
            and self._chain.targets
            and self._cut != self.rows
            and self._cut not in self._verified
        ):
            chain = self._chain
            if not _keeps_sources(chain, block_pass):
                return  # the next forward keeps them
            replay = Replay(chain, self._cut)
            failed = self._compare(replay, block_pass)
            if not failed:
                self._verified[self._cut] = replay
                return
            self._failed |= failed
            self._verified.clear()
            self._chain = find_chain(
                chain.program, min_nbytes=self._settings.min_nbytes, failed=self._failed
            )

    def _compare(self, replay: Replay, block_pass: BlockPass) -> dict[int, str]:
        """The targets whose rebuilt rows differ from the saved ones, with the reason."""
        chain = replay.chain
        comparison = Comparison(
            replay,
            block_pass.saved,
            block_pass.device,
            relaxed=self._settings.relaxed,
        )
        try:
            self._rebuild_kept(replay, block_pass, comparison, self._timer.stopwatch())
        except RuntimeError as fault:
            reason = f"its operations can't be executed on fewer rows: {fault}"
            return {target.storage: reason for target in chain.targets}
        self._worst_error = max(self._worst_error, comparison.worst_error)
        return comparison.failed

    def _rebuild_kept(
        self, replay: Replay, block_pass: BlockPass, sink: Sink, computing: Stopwatch
    ) -> None:
        """Rebuild every target, part by part, from what this forward has kept."""
        chain = replay.chain
        for part in sorted({target.part for target in chain.targets}):
            roots = [target.root for target in chain.targets if target.part == part]
            sources = {
                value: _kept_source(chain, block_pass, value) for value in replay.sources_of(roots)
            }
            block_pass.run(replay, roots, sources, sink, computing)

    def _rehearse(self, replay: Replay, block_pass: BlockPass) -> None:
        """Measure the rebuild behind a verified cut, and estimate what copying heads takes.

        All rows of every target are copied twice: the largest one is, once.
        """
        rebuilding, copying = self._timer.stopwatch(), self._timer.stopwatch()
        rehearsal = Rehearsal(replay, block_pass.device)
        self._rebuild_kept(replay, block_pass, rehearsal, rebuilding)
        rebuilding.tell(partial(self.measurements.rebuild, replay.cut))
        targets = replay.chain.targets
        tensor = block_pass.saved(max(targets, key=lambda target: target.nbytes).storage)
        copy = torch.empty_like(tensor)
        with copying:
            copy.copy_(tensor)
        scale = 2 * sum(target.nbytes for target in targets) / tensor.nbytes
        measurements, rows = self.measurements, self.rows
        copying.tell(lambda seconds: measurements.estimate_heads(rows, scale * seconds))


def _keeps_sources(chain: Chain, block_pass: BlockPass) -> bool:
    """Whether this forward has kept all tensors that the chain starts from."""
    values = chain.program.values
    return all(
        value in block_pass.packed_sources
        or (values[value].kind == "made" and values[value].storage in block_pass.packed_saved)
        for value in chain.sources
    )


def _kept_source(chain: Chain, block_pass: BlockPass, value: int) -> torch.Tensor:
    if value in block_pass.packed_sources:
        return block_pass.keeper.unpack(block_pass.packed_sources[value])
    return block_pass.saved(chain.program.values[value].storage)
