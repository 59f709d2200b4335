"""Predictions of the planner against real runs: peak resident set and step time.

Each configuration is predicted from this machine's measured rates, then trained for some steps in a
child process (``plan_job``). Its budget is the least that is predicted to fit, times a factor, so
that small factors are hard on both. Peaks are the kernel's, building the model included: the
highest of all runs. The machine must be quiet.

A shared machine changes its speed within seconds, and more within minutes. So a configuration runs
several times, and the rates, those of the processor, of a hypervisor's host and of a rehearsal, are
measured before, between and behind: rates, run, rates, run, run, rates, which are also the first
ones of the next configuration. A run's time is the median of its steps behind the second; short
steps are many, long ones few. The median of the runs is held against the median of what the rates
around them predict. How far runs, and predictions, are apart is told beside: no prediction can be
closer to a run than runs are to each other. What the very first rates said alone is told as well,
for that is what a user gets. Links are measured once, at the start. Every run counts and none is
done again; all rates are the measured ones, and nothing is fitted to a run.
"""

import importlib.util
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchlib import Result, arguments, finish, quantiles
from offload.allocator.errors import OffloadError
from offload.doctor.examine import bench_links
from offload.planner.baseline import measure_baseline
from offload.planner.rehearsal import add_rehearsal
from offload.swap.planning.predict import Prediction, Settings, least_budget, predict
from offload.tiers.hostmem import HUGE_PAGE, PAGE
from offload.tiers.inventory import file_tier_name
from offload.tiers.machine import Machine
from offload.tiers.probe.compute import add_compute
from offload.tiers.probe.pace import Effort
from offload.tiers.probe.reclaim import add_reclaimed
from plan_cases import FULL, QUICK, Case, program_of, spread, throttled
from plan_job import WARM

_JOB = Path(__file__).with_name("plan_job.py")
_MIB = 1 << 20
_RATES_S = 4.0  # seconds of measuring what the processor computes, for one type
_STEPS, _ENOUGH_S = 9, 4.0  # of a run, behind the steps that are not counted


def main() -> int:
    """Run and print."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw it; needs matplotlib")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each configuration")
    parser.add_argument("--least-tokens", type=int, default=0, help="only steps of so many")
    parser.add_argument("--rebuilt", action="store_true", help="token-wise recompute alone")
    parser.add_argument("--usual", action="store_true", help="only float32, on one drive")
    parser.add_argument("--others", action="store_true", help="neither of these")
    options = parser.parse_args()
    if options.plot is not None and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install 'offload[plots]'")
    result = Result("Predictions of the planner against real runs")
    measure(
        result,
        quick=options.quick,
        nvme=options.nvme,
        repeats=options.repeats,
        least_tokens=options.least_tokens,
        kinds=[kind for kind in ("usual", "rebuilt", "others") if getattr(options, kind)],
    )
    if options.plot is not None:
        draw(result.rows, options.plot)
    return finish(result, options.json)


def measure(
    result: Result,
    *,
    quick: bool,
    nvme: Path,
    repeats: int = 3,
    least_tokens: int = 0,
    kinds: Collection[str] = (),
) -> None:
    """Predict and train every configuration of so many tokens, with stores in ``nvme``.

    Args:
        kinds: of configurations; by default all.
    """
    cases = [
        case
        for case in (QUICK if quick else FULL)
        if case.tokens >= least_tokens and (not kinds or case.kind in kinds)
    ]
    nvme.mkdir(parents=True, exist_ok=True)
    links = bench_links([nvme], effort=Effort()).machine
    drive = file_tier_name(nvme)
    dtypes = list(dict.fromkeys(["float32", *(case.dtype for case in cases)]))

    def measured() -> Machine:
        rates = add_compute(links, seconds=_RATES_S * len(dtypes), dtypes=dtypes)
        return add_rehearsal(add_reclaimed(rates), nvme, drive, quick=True)

    errors: dict[str, list[float]] = {"peak": [], "step": []}
    before = measured()
    for case in cases:
        trial = Trial(case, drive, before)
        try:
            before = trial.repeat(repeats, nvme, measured)
        except (OffloadError, RuntimeError) as error:
            result.add(**trial.described(), failed=str(error))
            result.notes.append(f"{case}: {error}")
            continue
        row = trial.told()
        result.add(**trial.described(), **row)
        sys.stderr.write(f"{case}: step {row['step_error']:+.0%}, peak {row['peak_error']:+.1%}\n")
        for name, found in errors.items():
            found.append(abs(row[f"{name}_error"]))
    for name, found, median, worst in (
        ("peak", errors["peak"], 0.03, 0.08),
        ("step time", errors["step"], 0.10, 0.25),
    ):
        result.at_most(f"{name}: median error", statistics.median(found or [1.0]), median)
        result.at_most(f"{name}: worst error", max(found or [1.0]), worst)
    result.check("configurations that ran", len(errors["peak"]), len(cases))


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Measured against predicted, peaks and steps, on logarithmic scales."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    panels = (
        ("peak_nbytes", "predicted_nbytes", "peak, MiB", _MIB, 0.08),
        ("step_s", "predicted_s", "step, seconds", 1, 0.25),
    )
    for axes, (real, predicted, name, unit, worst) in zip(
        figure.subplots(1, 2), panels, strict=True
    ):
        pairs = [(row[real] / unit, row[predicted] / unit) for row in rows if real in row]
        ends = min(map(min, pairs)), max(map(max, pairs))
        axes.fill_between(
            ends, *([(1 + way * worst) * end for end in ends] for way in (-1, 1)), alpha=0.15
        )
        axes.plot(ends, ends, linewidth=0.8)
        axes.scatter(*zip(*pairs, strict=True), s=16)
        axes.set(xscale="log", yscale="log", xlabel=f"measured {name}", ylabel=f"predicted {name}")
    figure.savefig(path)


class Run(NamedTuple):
    """What one run of a configuration took."""

    step_s: float
    peak_nbytes: int


class Trial:
    """A configuration: predicted, and run.

    Args:
        machine: decides upon the budget.
    """

    def __init__(self, case: Case, drive: str, machine: Machine) -> None:
        self._case, self._drive = case, drive
        self._program = program_of(case)
        self._baseline = measure_baseline(products=self._program.products)
        seen, path = self._seen(machine)
        least = least_budget(self._program, seen, self._settings(0, path), self._baseline)
        self.mib = int(least.settings.budget_nbytes * case.factor) // _MIB
        self._predicted = [self.predict(machine)]
        self._runs: list[Run] = []

    def _settings(self, mib: int, drive: str) -> Settings:
        return Settings(
            budget_nbytes=mib * _MIB,
            drive=drive,
            step_in_backward=self._case.in_backward,
            step_in_forward=self._case.in_forward,
            align_nbytes=HUGE_PAGE if self._case.paths > 1 else PAGE,
            alpha=self._case.alpha,
            micro_batches=self._case.micro_batches,
        )

    def _seen(self, machine: Machine) -> tuple[Machine, str]:
        """The machine as its run sees it, and the name of the drive."""
        machine = throttled(machine, self._drive, self._case.bytes_per_s)
        return spread(machine, self._drive, self._case.paths)

    def predict(self, machine: Machine) -> Prediction:
        """What ``machine`` would make of it, within the budget that the runs get."""
        machine, drive = self._seen(machine)
        return predict(self._program, machine, self._settings(self.mib, drive), self._baseline)

    def repeat(self, repeats: int, directory: Path, measured: Callable[[], Machine]) -> Machine:
        """Run, and measure the machine behind runs; what it was measured as at last.

        Raises:
            OffloadError, RuntimeError: a run failed, or does not fit.
        """
        for number in range(repeats):
            self._runs.append(run_once(self._case, self.mib, directory))
            if number % 2 == 0 or number == repeats - 1:
                machine = measured()
                self._predicted.append(self.predict(machine))
        return machine

    def described(self) -> dict[str, Any]:
        """The configuration, for a row."""
        return {
            "parameters": f"{self._program.parameters / 1e6:.0f}M",
            "sequence": self._case.sequence,
            "batch": self._case.batch,
            "drive_bytes_per_s": self._case.bytes_per_s,
            "settings": self._case.settings,
            "budget_nbytes": self.mib * _MIB,
        }

    def told(self) -> dict[str, Any]:
        """The predictions, held against the runs."""
        return held_against(self._predicted, self._runs)


def held_against(predicted: Sequence[Prediction], runs: Sequence[Run]) -> dict[str, Any]:
    """Times by their medians; the first prediction's peak by the highest that was seen."""
    first, peak = predicted[0], max(run.peak_nbytes for run in runs)
    real, found = [run.step_s for run in runs], [each.step_s for each in predicted]
    step_s, predicted_s = statistics.median(real), statistics.median(found)
    return {
        "predicted_nbytes": first.peak_nbytes,
        "peak_nbytes": peak,
        "peak_error": first.peak_nbytes / peak - 1,
        "predicted_s": predicted_s,
        "step_s": step_s,
        "step_error": predicted_s / step_s - 1,
        "predictions": quantiles(found),
        "runs": quantiles(real),
        "before_error": first.step_s / step_s - 1,
        "bound_by": first.bound_by,
    }


def run_once(case: Case, mib: int, directory: Path) -> Run:
    """Train ``case`` for some steps in a child process.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    store = directory / "plan"
    shutil.rmtree(store, ignore_errors=True)
    command = [sys.executable, str(_JOB), "--shape", f"{case.layers},{case.width},{case.heads}"]
    command += ["--sequence", str(case.sequence), "--batch", str(case.batch)]
    command += ["--micro-batches", str(case.micro_batches)]
    command += ["--budget", f"host={mib}MiB", "--nvme", str(store)]
    command += ["--steps", str(WARM + _STEPS), "--enough-s", str(_ENOUGH_S)]
    command += ["--dtype", case.dtype, "--paths", str(case.paths)]
    command += ["--config", json.dumps(case.config)]
    if case.bytes_per_s is not None:
        command += ["--bytes-per-s", str(case.bytes_per_s)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    finally:
        shutil.rmtree(store, ignore_errors=True)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise RuntimeError(lines[-1] if lines else f"exit code {done.returncode}")
    real = json.loads(done.stdout)
    return Run(statistics.median(real["steps_s"][WARM:]), max(real["peaks_nbytes"]))


if __name__ == "__main__":
    sys.exit(main())
