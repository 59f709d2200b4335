"""What the planner says of candidates, beside what is measured of them.

The planner predicts the step behind backward on the CPU, with one drive and the default engine;
other settings have no prediction. Nor has a script that can't be traced: it is measured all the
same.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from offload.allocator.errors import BudgetError, OffloadError
from offload.config import OffloadConfig
from offload.planner.baseline import measure_baseline
from offload.planner.refine import unpredicted
from offload.planner.scripts import TrainingScript
from offload.planner.sources import Batch
from offload.swap.planning.predict import Baseline, Prediction, Settings, predict
from offload.swap.planning.program import Program
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
    """

    def __init__(
        self, program: Program, baseline: Baseline, machines: Mapping[Path, Machine]
    ) -> None:
        self._program = program
        self._baseline = baseline
        self._machines = machines

    def predict(self, config: OffloadConfig) -> Prediction | None:
        """None where the planner knows nothing of such settings.

        Raises:
            BudgetError: they don't fit.
        """
        if unpredicted(config):
            return None
        (directory,) = config.nvme
        settings = Settings(
            budget_nbytes=config.budget["host"],
            drive=file_tier_name(directory),
            commits=config.commit != "never",
            min_swap_nbytes=config.min_swap_nbytes,
        )
        return predict(self._program, self._machines[directory], settings, self._baseline)


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
        source = TrainingScript(script, arguments, given=undecided)
        program = source.trace(Batch(sequences=1, length=1))
        return Predictor(program, measure_baseline(source.imports), machines)
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
