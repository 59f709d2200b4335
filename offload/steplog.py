"""The steps of a run: where their time went and what they moved."""

import dataclasses
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from offload.tiers import hostmem
from offload.tiers.events import StepFinished
from offload.tiers.journal import Journal


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """Totals of a run; seconds and bytes per step are medians over its steps.

    ``compute_s`` is what remains of ``step_s`` without stalls, the optimizer and the commit;
    ``peak_nbytes`` is the kernel's peak resident set of the process.
    """

    steps: int
    peak_nbytes: int
    budget_nbytes: int
    step_s: float
    compute_s: float
    stall_s: float
    optimizer_s: float
    read_bytes_per_step: int
    written_bytes_per_step: int


class StepLog:
    """Closes the books of each step."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._steps: list[StepFinished] = []
        self.begin()

    def __len__(self) -> int:
        return len(self._steps)

    def begin(self) -> None:
        """A step begins now."""
        self._began_s = self._journal.now()
        self._before = dataclasses.replace(self._journal.totals)

    def finish(
        self,
        step: int,
        *,
        optimizer_s: float,
        optimizer_stall_s: float,
        commit_s: float,
        resident_nbytes: Mapping[str, int],
        bucket: str = "",
    ) -> None:
        """The step has ended; the next one begins."""
        totals, before = self._journal.totals, self._before
        step_s = self._journal.now() - self._began_s
        stall_s = totals.stall_s - before.stall_s - optimizer_stall_s
        finished = StepFinished(
            t_s=self._journal.now(),
            step=step,
            step_s=step_s,
            compute_s=step_s - stall_s - optimizer_s - commit_s,
            stall_s=stall_s,
            optimizer_s=optimizer_s,
            commit_s=commit_s,
            read_nbytes=totals.read_nbytes - before.read_nbytes,
            written_nbytes=totals.written_nbytes - before.written_nbytes,
            peak_nbytes=hostmem.peak_resident_nbytes(),
            resident_nbytes=resident_nbytes,
            bucket=bucket,
        )
        self._steps.append(finished)
        self._journal.record(finished)
        self._journal.recorder.flush()
        self.begin()

    def stats(self, budget_nbytes: int) -> Stats:
        """Totals so far."""

        def median(name: str) -> float:
            return float(statistics.median([getattr(s, name) for s in self._steps] or [0.0]))

        return Stats(
            steps=len(self._steps),
            peak_nbytes=hostmem.peak_resident_nbytes(),
            budget_nbytes=budget_nbytes,
            step_s=median("step_s"),
            compute_s=median("compute_s"),
            stall_s=median("stall_s"),
            optimizer_s=median("optimizer_s"),
            read_bytes_per_step=int(median("read_nbytes")),
            written_bytes_per_step=int(median("written_nbytes")),
        )
