"""What is rebuilt of one block for one shape of input: found, verified, and how much of it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from offload.swap.tokenwise.cuts import Cuts
from offload.swap.tokenwise.measure import Measurements
from offload.swap.tokenwise.passes import BlockPass
from offload.swap.tokenwise.program import Program
from offload.swap.tokenwise.record import Recorder
from offload.swap.tokenwise.replay import GRID_ROWS, Replay, measurable_cut, nearest_cut
from offload.swap.tokenwise.solve import BlockCost, Link, Solution, step_s, thriftiest
from offload.swap.tokenwise.timing import Stopwatch, Timer
from offload.swap.tokenwise.trials import ALIKE, Choice, Trials
from offload.swap.tokenwise.verify import KeptForward

_MOST_DIVERGENCES = 3
_MEASURED_PASSES = 16  # all of the first ones, then each so many-th
_WORTHWHILE = 0.95  # another cut is verified and taken if its step is this much shorter
PROBES = (0.75, 0.25, 0.5, 0.0)  # in turn, until two are right: these tell how time grows by rows


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
        refused: cuts that are not used: rows differ behind them that are right behind others.
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
    refused: tuple[int, ...] = ()


def why_whole(rows: int, alpha: float | Literal["auto"]) -> str | None:
    """Why sequences of ``rows`` tokens are swapped whole, whatever the block; None if not."""
    if rows < GRID_ROWS:
        return f"sequences of {rows} tokens are too few rows, {GRID_ROWS} are needed"
    if alpha == "auto" or nearest_cut(rows, alpha) != rows:
        return None
    if alpha == 1:
        return "alpha is 1: all rows are swapped"
    return (
        f"sequences of {rows} tokens have no cut near alpha {alpha}: it takes {GRID_ROWS} rows on "
        "each side"
    )


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
        self.gave_up = why_whole(rows, settings.alpha)
        self._settings = settings
        self._share = share
        self._timer = timer
        self._cuts: Cuts | None = None
        self._cut = self._solved_cut = rows
        self.trials: Trials | None = None
        self._passes = 0  # begun with this block, since alpha was solved last
        self._divergences = 0
        self._worst_error = 0.0
        self._solution: Solution | None = None
        self._backward_guessed = False  # when it was found
        self._shared = shared
        self.measurements = Measurements()

    def wants_a_look(self, links: Callable[[], Sequence[Link]], choice: Choice) -> bool:
        """Whether a forward that begins is to be recorded: not where nothing would be rebuilt."""
        if self.gave_up is not None:
            return False
        if self._cuts is None:
            return True
        if self._settings.alpha == "auto":
            self._solve(self._cuts, links())
            self._cut = self._cut_of(choice, self._cuts)
        return self._cut != self.rows

    def _cut_of(self, choice: Choice, found: Cuts) -> int:
        if self._solution is None:
            return self._cut
        extremes = {Choice.REBUILT: found.usable()[0], Choice.SWAPPED: self.rows}
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
        if self._cuts is None:
            return None, True
        tried = self._cuts.at(self._cut)
        return tried.replay, not tried.verified

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
        if self._cuts is None:
            self._cuts = self._found(recorder)
        forward.tell(self.measurements.recorded_forward)
        if not block_pass.keeps:
            return None
        kept = KeptForward(block_pass, self._timer, relaxed=self._settings.relaxed)
        advice = ""
        if self._settings.alpha == "auto":
            self._find_alpha(self._cuts, kept, links)
        elif kept.verify(self._cuts, self._cut):
            advice = self._advice(self._cuts, kept)
            self._cuts.choose(self._cut)
        self._worst_error = max(self._worst_error, kept.worst_error)
        return self._notice(self._cuts, advice)

    def _found(self, recorder: Recorder) -> Cuts:
        """The first forward has ended."""
        self.program = recorder.program()
        alpha = self._settings.alpha
        self._cut = (
            measurable_cut(self.rows, PROBES[0])
            if alpha == "auto"
            else nearest_cut(self.rows, alpha)
        )
        self.measurements = self._shared.setdefault(self.program, self.measurements)
        self.measurements.recording(recorder.own_s)
        return Cuts(self.program, min_nbytes=self._settings.min_nbytes)

    def _notice(self, found: Cuts, advice: str) -> str | None:
        """What the user should know of what was compared."""
        chosen = found.chosen
        if chosen is None:
            return None  # the next forward goes on with it
        if not chosen.chain.targets:
            self.gave_up = "none of its saved tensors can be rebuilt row by row: " + "; ".join(
                reason for reason, _ in self.report().whole
            )
            return f"token-wise recompute: {self.block} is swapped whole: {self.gave_up}{advice}"
        if chosen.failed:
            return (
                f"token-wise recompute: {chosen.failed_nbytes} bytes of {self.block} are swapped "
                f"whole: behind cut {chosen.replay.cut} of {self.rows} they are not rebuilt to the "
                f"bit{advice}"
            )
        if self._worst_error:
            return (
                f"token-wise recompute: relaxed: rebuilt rows of {self.block} differ from saved "
                f"ones by up to {self._worst_error:.1e} of the largest value"
            )
        return None

    def _advice(self, found: Cuts, kept: KeptForward) -> str:
        """Where rows differ behind the cut that was asked for: which smaller alpha is better."""
        asked = found.at(self._cut)
        probes = {measurable_cut(self.rows, alpha) for alpha in PROBES}
        smaller = [cut for cut in probes if cut < self._cut and asked.failed]
        for cut in sorted(smaller, reverse=True):
            if kept.verify(found, cut):
                more = found.at(cut).chain.target_nbytes - asked.chain.target_nbytes
                if more > 0:
                    return f"; alpha {cut / self.rows:g} would rebuild {more} bytes more"
        return ""

    def report(self) -> PlanReport:
        """What is rebuilt and what is not."""
        found = self._cuts
        chain = found.chain if found is not None else None
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
            cost=self._cost(found) if found is not None else None,
            solution=self._solution,
            trial_s=tuple(self.trials.shortest_s().items()) if self.trials is not None else (),
            settled=self.trials.settled if self.trials is not None else None,
            refused=tuple(found.refused()) if found is not None else (),
        )

    def _diverged(self, why: str) -> str:
        self._divergences += 1
        self.program = self._cuts = self._solution = self.trials = None
        self._cut = self.rows
        if self._divergences == _MOST_DIVERGENCES:
            self.gave_up = f"what it does changes from forward to forward: {why}"
            return f"token-wise recompute: {self.block} is swapped whole: {self.gave_up}"
        return f"token-wise recompute: {self.block} is recorded anew: {why}"

    # How much.

    def _cost(self, found: Cuts) -> BlockCost | None:
        return self.measurements.cost(found.chain) if found.chosen is not None else None

    def _find_alpha(
        self, found: Cuts, kept: KeptForward, links: Callable[[], Sequence[Link]]
    ) -> None:
        """Measure, and solve if all is known: a device may tell before the next forward only."""
        if found.chosen is None:
            if not self._probe(found, kept):
                return
            found.choose()
            self._cut = self._any_cut(found)
            for cut in found.verified():  # warm by now
                kept.rehearse(found.at(cut).replay)
        known = links()
        self._timer.tell()
        if self._solution or self.measurements.of(found.chain).tells(found.verified()):
            self._verify_choices(found, kept, known)

    def _probe(self, found: Cuts, kept: KeptForward) -> bool:
        """Look behind which cuts rows are right; whether all were looked at that are needed."""
        for alpha in PROBES:
            if len(found.right()) < 2:
                self._cut = measurable_cut(self.rows, alpha)
                if not kept.verify(found, self._cut):
                    return False
        return True

    def _verify_choices(self, found: Cuts, kept: KeptForward, links: Sequence[Link]) -> None:
        """Verify the cuts of all choices; alpha is solved again without one that is refused."""
        self._solve(found, links)
        while self._solution is not None:
            refused = found.refused()
            for choice in (Choice.REBUILT, Choice.SOLVED):
                self._cut = self._cut_of(choice, found)
                if self._cut != self.rows:
                    kept.verify(found, self._cut)
            if found.refused() == refused:
                return
            self._solution = self.trials = None
            self._cut = self._any_cut(found)
            self._solve(found, links)

    def _any_cut(self, found: Cuts) -> int:
        """A cut that is right, as long as alpha is not solved."""
        return next(iter(found.verified()), self.rows)

    def _solve(self, found: Cuts, links: Sequence[Link]) -> None:
        self._timer.tell()
        cost = self._cost(found)
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
        best = thriftiest(cost, mine, found.usable(), within=ALIKE)
        now_s, whole_s = (
            step_s(cost, mine, cut / self.rows) for cut in (self._solved_cut, self.rows)
        )
        guessed = self._backward_guessed and math.isfinite(self.measurements.backward_s)
        if self._solution is None or guessed or best.step_s < _WORTHWHILE * now_s:
            self._solution = best
            self._backward_guessed = math.isinf(self.measurements.backward_s)
            if self.trials is None or self._solved_cut != best.cut:
                self._solved_cut = best.cut
                self._passes = 0
                self.trials = self._new_trials(found, room_for_all=math.isfinite(whole_s))

    def _new_trials(self, found: Cuts, *, room_for_all: bool) -> Trials:
        """[Note: trials] in ``trials``; choices that cut alike are one."""
        extremes = [Choice.REBUILT, *([Choice.SWAPPED] if room_for_all else [])]
        by_cut = {self._cut_of(choice, found): choice for choice in (*extremes, Choice.SOLVED)}
        return Trials(list(by_cut.values()))
