"""What the planner says of candidates, beside what is measured of them.

The planner predicts what computes on the CPU, with the default engine; other settings have no
prediction. Nor has a script that can't be traced: it is measured all the
same.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from offload.allocator.errors import BudgetError, OffloadError
from offload.config import OffloadConfig
from offload.planner.baseline import measure_baseline
from offload.planner.refine import other_precision, settings_of, told_micro_batches, unpredicted
from offload.planner.scripts import TrainingScript
from offload.planner.sources import Batch
from offload.swap.planning.predict import Baseline, Prediction, predict
from offload.swap.planning.program import Program
from offload.swap.planning.striping import joined, striped
from offload.swap.state_precision import Precision
from offload.tiers.inventory import file_tier_name
from offload.tiers.machine import Machine
from offload.tuning.candidates import BASELINE, Candidate


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """Of a candidate, before it ran."""

    step_s: float
    peak_nbytes: int


class Predictor:
    """Predicts candidates of one script.

    Args:
        program: of its step.
        baseline: of the process without a model.
        machines: measured, by the directory of the store.
        micro_batches: of a step.
    """

    def __init__(
        self,
        program: Program,
        baseline: Baseline,
        machines: Mapping[Path, Machine],
        *,
        micro_batches: int = 1,
    ) -> None:
        self._program = program
        self._baseline = baseline
        self._machines = machines
        self._micro_batches = micro_batches

    def predict(self, config: OffloadConfig) -> Prediction | None:
        """None where the planner knows nothing of such settings.

        Raises:
            BudgetError: they don't fit.
        """
        if unpredicted(config) or other_precision(self._program, config):
            return None
        machine, drive = self._machine_of(config.nvme)
        settings = settings_of(
            config, drive, config.budget["host"], micro_batches=self._micro_batches
        )
        return predict(self._program, machine, settings, self._baseline)

    def _machine_of(self, directories: Sequence[Path]) -> tuple[Machine, str]:
        """With the drive that a store in ``directories`` is on, and the name of that."""
        machines = [self._machines[directory] for directory in directories]
        drives = [file_tier_name(directory) for directory in directories]
        if len(drives) == 1:
            return machines[0], drives[0]
        found = striped(joined(machines), drives)
        return found.machine, found.drive


def make_predictor(
    script: Path,
    arguments: Sequence[str],
    base: OffloadConfig,
    machines: Mapping[Path, Machine],
    say: Callable[[str], None],
) -> Predictor | None:
    """What predicts a script's steps; None, with the reason told, where it can't be traced."""
    if base.device not in {None, "cpu"}:
        say(f"nothing is predicted: the planner knows the CPU, the model computes on {base.device}")
        return None
    say(f"running {script} until its first backward, without bytes")
    undecided = argparse.Namespace(
        seq=None, batch=None, optim=None, dtype=None, method=None, solve=None
    )
    try:
        precision = Precision(states=base.state_precision, masters=base.master_weights)
        source = TrainingScript(script, arguments, given=undecided, precision=precision)
        program = source.trace(Batch(sequences=1, length=1))
        return Predictor(
            program,
            measure_baseline(source.held, program.products),
            machines,
            micro_batches=told_micro_batches(base) or 1,
        )
    except OffloadError as error:
        say(f"nothing is predicted: {error}")
        return None


def check_drive(predictor: Predictor, base: OffloadConfig) -> None:
    """Raise if a trial would fill the drive, before one begins.

    A budget of memory that is predicted not to hold is not refused: a trial tells for certain,
    before its first step.

    Raises:
        BudgetError: how many bytes a trial takes of which drive, and how many are free.
    """
    try:
        predictor.predict(base)
    except BudgetError as error:
        if error.budget_nbytes != base.budget["host"]:
            raise


def predict_all(
    predictor: Predictor | None, base: OffloadConfig, candidates: Sequence[Candidate]
) -> dict[str, Predicted]:
    """By the names of those that can be predicted, the baseline among them."""
    predicted: dict[str, Predicted] = {}
    if predictor is None:
        return predicted
    for candidate in (BASELINE, *candidates):
        try:
            found = predictor.predict(candidate.config(base))
        except OffloadError:
            continue  # told by its trial
        if found is not None:
            predicted[candidate.name] = Predicted(
                step_s=found.step_s, peak_nbytes=found.peak_nbytes
            )
    return predicted
