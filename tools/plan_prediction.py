"""Predictions of the planner against real runs: peak resident set and step time.

Each configuration is predicted from this machine's measured rates, then trained for some steps in a
child process (``plan_job``). Its budget is the least that is predicted to fit, times a factor, so
that small factors are hard on both. Peaks are the kernel's, building the model included. A step is
the median of those after the second. The machine must be quiet. Links are measured at the start,
the processor's rates and a rehearsal before and behind each run: a shared machine changes by
minutes. The time that is held against a run is the mean of what both say; what the first said alone
is told as well, for that is what a user gets.
"""

import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchlib import Result, arguments, finish
from fit_job import Decoder, Shape, loss_of
from offload.allocator.errors import OffloadError
from offload.config import OffloadConfig
from offload.doctor.examine import bench_links
from offload.planner.baseline import measure_baseline
from offload.planner.rehearsal import add_rehearsal
from offload.swap.planning.predict import Baseline, Prediction, Settings, least_budget, predict
from offload.swap.planning.program import Program
from offload.swap.planning.row_steps import Alpha
from offload.swap.planning.striping import striped
from offload.swap.planning.tracing import fake_mode, trace_step
from offload.swap.state_precision import MasterWeights, Precision, StatePrecision
from offload.tiers.hostmem import HUGE_PAGE, PAGE
from offload.tiers.inventory import file_tier_name
from offload.tiers.machine import Link, Machine
from offload.tiers.probe.compute import add_compute
from offload.tiers.probe.pace import Effort
from plan_job import making

_JOB = Path(__file__).with_name("plan_job.py")
_MIB = 1 << 20
_REBUILD_NBYTES = OffloadConfig().min_swap_nbytes
_WARM = 2  # steps: the first learns, the second has grown


@dataclass(frozen=True)
class Case:
    """A model, a batch, a budget by its factor over the least one, a drive, settings."""

    layers: int
    width: int
    heads: int
    sequence: int
    factor: float
    batch: int = 1
    bytes_per_s: float | None = None  # throttled to that
    dtype: str = "float32"
    states: StatePrecision = "exact"
    masters: MasterWeights = "none"
    in_backward: bool = False
    paths: int = 1  # directories of the store, all on the one drive
    alpha: Alpha | None = None  # of token-wise recompute

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch * self.sequence

    @property
    def precision(self) -> Precision:
        """Of what the optimizer keeps."""
        return Precision(states=self.states, masters=self.masters)

    @property
    def config(self) -> dict[str, Any]:
        """The settings of its run."""
        rows = {} if self.alpha is None else {"recompute": "tokenwise", "alpha": self.alpha}
        return {
            "step_in_backward": self.in_backward,
            "state_precision": self.states,
            "master_weights": self.masters,
            **rows,
        }

    @property
    def settings(self) -> str:
        """What it has beside the defaults, for people."""
        names: dict[str, object] = {
            "dtype": "float32", "states": "exact", "masters": "none", "paths": 1, "alpha": None
        }  # fmt: skip
        given = [
            f"{n}={getattr(self, n)}" for n, usual in names.items() if getattr(self, n) != usual
        ]
        return ", ".join(given + ["in backward"] * self.in_backward) or "-"


_M10, _M20, _M70 = (2, 128, 4), (4, 256, 4), (12, 512, 8)
_STATES: tuple[StatePrecision, ...] = ("exact", "bf16", "8bit")
_ALPHAS: tuple[Alpha, ...] = (0.0, 0.5, "auto")
_MASTERS: tuple[MasterWeights, ...] = ("none", "fp32")
_M134, _M350 = (12, 768, 12), (24, 1024, 16)
QUICK = (
    Case(*_M10, sequence=64, factor=1.3),
    Case(*_M20, sequence=128, factor=1.1),
    Case(*_M20, sequence=128, factor=1.5, bytes_per_s=500e6),
)
FULL = (
    *(Case(*_M10, sequence=64, factor=factor) for factor in (1.1, 1.5)),
    Case(*_M10, sequence=512, factor=1.2, batch=2),
    *(Case(*_M20, sequence=128, factor=factor) for factor in (1.1, 1.5, 2.0)),
    *(Case(*_M20, sequence=length, factor=1.2) for length in (512, 1024, 4096)),
    *(Case(*_M70, sequence=128, factor=factor) for factor in (1.1, 1.5, 3.0)),
    *(Case(*_M70, sequence=length, factor=1.2) for length in (512, 1024, 2048)),
    Case(*_M70, sequence=256, factor=1.2, batch=4),
    *(Case(*_M70, sequence=128, factor=1.2, bytes_per_s=rate) for rate in (250e6, 500e6, 1e9)),
    *(Case(*_M134, sequence=128, factor=factor) for factor in (1.1, 1.5, 3.0)),
    Case(*_M134, sequence=1024, factor=1.3),
    Case(*_M134, sequence=128, factor=1.2, bytes_per_s=500e6),
    *(Case(*_M350, sequence=128, factor=factor) for factor in (1.1, 2.0)),
    Case(*_M350, sequence=64, factor=1.2, bytes_per_s=1e9),
    *(Case(*_M70, sequence=128, factor=1.2, in_backward=True, states=s) for s in _STATES),
    *(Case(*_M70, sequence=128, factor=1.2, bytes_per_s=500e6, states=s) for s in _STATES[1:]),
    *(Case(*_M70, sequence=128, factor=1.2, dtype="bfloat16", masters=m) for m in _MASTERS),
    Case(*_M70, 128, 1.2, dtype="bfloat16", masters="fp32", states="8bit", in_backward=True),
    *(Case(*_M70, sequence=128, factor=1.2, paths=2, in_backward=each) for each in (False, True)),
    *(Case(*_M20, sequence=1024, factor=1.2, alpha=alpha) for alpha in _ALPHAS),
    Case(*_M20, sequence=2048, factor=1.2, alpha=0.5),
    Case(*_M70, sequence=1024, factor=1.2, alpha=0.25),
)


def main() -> int:
    """Run and print."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw it; needs matplotlib")
    parser.add_argument("--least-tokens", type=int, default=0, help="only steps of so many")
    parser.add_argument("--rebuilt", action="store_true", help="token-wise recompute alone")
    parser.add_argument("--usual", action="store_true", help="only float32, on one drive")
    options = parser.parse_args()
    result = Result("Predictions of the planner against real runs")
    measure(
        result,
        quick=options.quick,
        nvme=options.nvme,
        least_tokens=options.least_tokens,
        rebuilt=options.rebuilt,
        usual=options.usual,
    )
    if options.plot is not None:
        draw(result.rows, options.plot)
    return finish(result, options.json)


def measure(
    result: Result,
    *,
    quick: bool,
    nvme: Path,
    least_tokens: int = 0,
    rebuilt: bool = False,
    usual: bool = False,
) -> None:
    """Predict and train every configuration of so many tokens, with stores in ``nvme``."""
    cases = [case for case in (QUICK if quick else FULL) if case.tokens >= least_tokens]
    cases = [case for case in cases if case.alpha is not None] if rebuilt else cases
    cases = [case for case in cases if case.settings == "-"] if usual else cases
    nvme.mkdir(parents=True, exist_ok=True)
    links = bench_links([nvme], effort=Effort()).machine
    drive, baseline = file_tier_name(nvme), measure_baseline()
    errors: dict[str, list[float]] = {"peak": [], "step": []}

    def measured() -> Machine:
        return add_rehearsal(add_compute(links, seconds=5.0), nvme, drive)

    after = measured()
    for case in cases:
        before, trial = after, Trial(case, baseline, drive)
        row = trial.run(before, nvme, steps=4 if quick else 7)
        after = measured()
        if "step_s" in row:
            row |= _held_against(row, trial.predict(after).step_s)
        result.add(**row)
        for name, found in errors.items():
            if f"{name}_error" in row:
                found.append(abs(row[f"{name}_error"]))
            elif name == "peak":
                result.notes.append(f"{case}: {row['failed']}")
    for name, found, median, worst in (
        ("peak", errors["peak"], 0.03, 0.08),
        ("step time", errors["step"], 0.10, 0.25),
    ):
        result.at_most(f"{name}: median error", statistics.median(found or [1.0]), median)
        result.at_most(f"{name}: worst error", max(found or [1.0]), worst)
    result.check("configurations that ran", len(errors["peak"]), min(len(cases), 24))


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


class Trial:
    """A configuration: predicted, and run."""

    def __init__(self, case: Case, baseline: Baseline, drive: str) -> None:
        self._case, self._baseline, self._drive = case, baseline, drive
        self._program = program_of(case)
        self._mib = 0

    def _settings(self, drive: str) -> Settings:
        return Settings(
            budget_nbytes=self._mib * _MIB,
            drive=drive,
            step_in_backward=self._case.in_backward,
            align_nbytes=HUGE_PAGE if self._case.paths > 1 else PAGE,
            alpha=self._case.alpha,
        )

    def predict(self, machine: Machine) -> Prediction:
        """What ``machine`` would make of it, within the budget that the run got."""
        machine, drive = self._seen(machine)
        return predict(self._program, machine, self._settings(drive), self._baseline)

    def run(self, machine: Machine, directory: Path, steps: int) -> dict[str, Any]:
        """Choose its budget and predict it by ``machine``, train, and tell both."""
        seen, drive = self._seen(machine)
        least = least_budget(self._program, seen, self._settings(drive), self._baseline)
        self._mib = int(least.settings.budget_nbytes * self._case.factor) // _MIB
        row: dict[str, Any] = {
            "parameters": f"{self._program.parameters / 1e6:.0f}M",
            "sequence": self._case.sequence,
            "batch": self._case.batch,
            "drive_bytes_per_s": self._case.bytes_per_s,
            "settings": self._case.settings,
            "budget_nbytes": self._mib * _MIB,
        }
        try:
            found = self.predict(machine)
            real = _train(self._case, self._mib, directory, steps)
        except (OffloadError, RuntimeError) as error:
            return row | {"failed": str(error)}
        peak = max(real["peaks_nbytes"])
        return row | {
            "predicted_nbytes": found.peak_nbytes,
            "peak_nbytes": peak,
            "peak_error": found.peak_nbytes / peak - 1,
            "before_s": found.step_s,
            "step_s": statistics.median(real["steps_s"][_WARM:]),
            "bound_by": found.bound_by,
        }

    def _seen(self, machine: Machine) -> tuple[Machine, str]:
        """The machine as its run sees it, and the name of the drive."""
        machine = throttled(machine, self._drive, self._case.bytes_per_s)
        return spread(machine, self._drive, self._case.paths)


def _held_against(row: dict[str, Any], after_s: float) -> dict[str, Any]:
    """The time predicted from the mean of both measurements, against the run between them."""
    predicted_s = (row["before_s"] + after_s) / 2
    return {
        "predicted_s": predicted_s,
        "step_error": predicted_s / row["step_s"] - 1,
        "before_error": row["before_s"] / row["step_s"] - 1,
    }


def program_of(case: Case) -> Program:
    """The program of one of its steps."""
    with fake_mode(), making(getattr(torch, case.dtype)):
        model = Decoder(Shape(case.layers, case.width, case.heads))
        tokens = torch.zeros(case.batch, case.sequence + 1, dtype=torch.int64)
        return trace_step(
            model,
            lambda model: loss_of(model, tokens),
            tokens=case.tokens,
            optimizer=torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True),
            precision=case.precision,
            rebuild_nbytes=None if case.alpha is None else _REBUILD_NBYTES,
        )


def throttled(machine: Machine, drive: str, bytes_per_s: float | None) -> Machine:
    """``machine`` with a drive whose reads and writes share ``bytes_per_s``."""
    if bytes_per_s is None:
        return machine
    return replace(machine, links=tuple(_slower(machine.links, drive, bytes_per_s)))


def spread(machine: Machine, drive: str, paths: int) -> tuple[Machine, str]:
    """``machine`` with a tier for so many directories of ``drive`` together, and its name."""
    if paths == 1:
        return machine, drive
    names = [f"{drive}/{number}" for number in range(paths)]
    tiers = tuple(replace(machine.tier(drive), name=name) for name in names)
    links = tuple(
        replace(
            link,
            source=name if link.source == drive else link.source,
            target=name if link.target == drive else link.target,
        )
        for name in names
        for link in machine.links
        if drive in {link.source, link.target}
    )
    several = replace(machine, tiers=(*machine.tiers, *tiers), links=(*machine.links, *links))
    found = striped(several, names)
    return found.machine, found.drive


def _slower(links: tuple[Link, ...], drive: str, bytes_per_s: float) -> Iterator[Link]:
    for link in links:
        if drive not in {link.source, link.target}:
            yield link
            continue
        most = bytes_per_s / 2 if link.source == link.target else bytes_per_s
        rates = (link.low_bytes_per_s, link.bytes_per_s, link.high_bytes_per_s)
        low, median, high = (min(rate, most) for rate in rates)
        yield replace(link, low_bytes_per_s=low, bytes_per_s=median, high_bytes_per_s=high)


def _train(case: Case, mib: int, directory: Path, steps: int) -> dict[str, Any]:
    store = directory / "plan"
    shutil.rmtree(store, ignore_errors=True)
    command = [sys.executable, str(_JOB), "--shape", f"{case.layers},{case.width},{case.heads}"]
    command += ["--sequence", str(case.sequence), "--batch", str(case.batch)]
    command += ["--budget", f"host={mib}MiB", "--nvme", str(store), "--steps", str(steps)]
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
    result: dict[str, Any] = json.loads(done.stdout)
    return result


if __name__ == "__main__":
    sys.exit(main())
