"""A prediction corrected by a run: what it took against what the planner says that it takes.

The recorded run is predicted as it was, and both are looked at in the same way. Their ratios
correct the rates of the processor and of the drive; the memory that the process held before its
model, and what its first step took beyond the prediction, correct the baseline. The run must be one
of the same step.
"""

import dataclasses
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from offload.allocator.errors import BudgetError, ConfigError
from offload.allocator.units import format_nbytes, format_seconds
from offload.config import OffloadConfig
from offload.planner.baseline import RUNNING_NBYTES
from offload.report.reader import read_run
from offload.swap.planning.predict import Baseline, Prediction, Settings, predict
from offload.swap.planning.program import Program
from offload.swap.planning.striping import drives_of
from offload.swap.planning.whatif import changed
from offload.tiers.engines.registry import AUTO, DEFAULT
from offload.tiers.events import Event, ListRecorder, Move, StepFinished
from offload.tiers.hostmem import HUGE_PAGE, PAGE
from offload.tiers.machine import Machine, read_machine

_WARM_STEPS = 2  # the first learns, the second has grown
_BUSY = 0.2  # of the time: a lane that is busy for less says little about its rate
# Not what compute_s counts.
_APART = frozenset(
    {
        "optimizer", "optimizer thread", "checksum", "tiles", "flush", "bf16 states",
        "8bit states", "masters",
    }
)  # fmt: skip
_DEFAULTS = OffloadConfig()
_UNKNOWN = ("io_threads", "recompute")


def unpredicted(config: OffloadConfig) -> list[str]:
    """The settings of ``config`` that the simulated run knows nothing of."""
    names = [name for name in _UNKNOWN if getattr(config, name) != getattr(_DEFAULTS, name)]
    if config.device not in {None, "cpu"}:
        names.append("device")
    if config.io_engine not in {AUTO, DEFAULT}:
        names.append("io_engine")
    if config.commit == "manual":
        names.append("commit=manual")
    return names


def told_micro_batches(config: OffloadConfig) -> int | None:
    """Of a step of a run with ``config``; None: only a step in backward has to know them."""
    return config.accumulation_steps if config.step_in_backward else None


def settings_of(
    config: OffloadConfig, drive: str, budget_nbytes: int, *, micro_batches: int = 1
) -> Settings:
    """What a run with ``config`` is predicted with, beside the program of a micro-batch."""
    return Settings(
        budget_nbytes=budget_nbytes,
        drive=drive,
        commits=config.commit != "never",
        min_swap_nbytes=config.min_swap_nbytes,
        step_in_backward=config.step_in_backward,
        step_in_forward=config.step_in_forward,
        align_nbytes=HUGE_PAGE if len(config.nvme) > 1 else PAGE,
        write_budget_nbytes=config.nvme_write_budget,
        micro_batches=micro_batches,
    )


def other_precision(program: Program, config: OffloadConfig) -> list[str]:
    """The settings of ``config`` with which ``program`` was not traced."""
    stepping, names = program.stepping, ("state_precision", "master_weights")
    if stepping is None:
        return []
    return [name for name in names if getattr(config, name) != getattr(stepping, name)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """A run that was recorded.

    Attributes:
        attach_nbytes: the resident set before the model, as ``attach`` found it.
        weight_forms: as of a ``Program``; none where the run was recorded before these were.
    """

    path: Path
    config: OffloadConfig
    budget_nbytes: int
    attach_nbytes: int
    processor: str
    events: tuple[Event, ...]
    weight_forms: Mapping[str, str] = field(default_factory=dict)

    @property
    def micro_batches(self) -> int | None:
        """Of a step; None where the run tells nothing of them."""
        return told_micro_batches(self.config)


@dataclass(frozen=True, slots=True, kw_only=True)
class Refined:
    """Machine and baseline as the run has shown them; ``note`` tells by how much that differs."""

    machine: Machine
    baseline: Baseline
    note: str


def read_recorded(path: Path) -> Recorded:
    """The run in the directory ``path``.

    Raises:
        ConfigError: there is none, it is too short, or it ran with settings that aren't predicted.
    """
    events = read_run(path).segments[-1]
    plan, given = _read(path / "plan.json"), _read(path / "config.json")
    forms = _read(path / "weights.json") if (path / "weights.json").exists() else {}
    defaults = _DEFAULTS.model_dump(mode="json")
    try:
        config = OffloadConfig(
            **{name: value for name, value in given.items() if value != defaults.get(name)}
        )
        recorded = Recorded(
            path=path,
            config=config,
            budget_nbytes=int(plan["budget_nbytes"]),
            attach_nbytes=int(plan["baseline_nbytes"]),
            processor=read_machine(path / "machine.json").processors[0].model,
            events=events,
            weight_forms=forms,
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ConfigError(f"{path} is damaged: {error}") from error
    if names := unpredicted(config):
        raise ConfigError(
            f"{path} ran with {', '.join(names)}, which is not predicted: record a run without"
        )
    steps = sum(isinstance(event, StepFinished) for event in events)
    if steps <= _WARM_STEPS:
        raise ConfigError(
            f"{path} has {steps} steps: {_WARM_STEPS + 1} are the least, for two are the warm-up"
        )
    return recorded


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{file.parent} is not the record of a real run ({file.name}: {error.strerror}); "
            "record one with: offload run --record DIR script.py"
        ) from error
    except ValueError as error:
        raise ConfigError(f"{file} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} is damaged: it holds no keys and values")
    return content


def refine(
    program: Program, machine: Machine, drive: str, recorded: Recorded, *, micro_batches: int = 1
) -> Refined:
    """What ``recorded`` says of ``machine`` and of the process.

    Args:
        program: of a micro-batch of the step that was recorded.
        drive: the name of the file tier that it ran on.
        micro_batches: of that step, unless ``recorded`` tells how many it had.

    Raises:
        ConfigError: it ran on another processor, or another model.
    """
    _check_same(program, machine, drive, recorded)
    settings = settings_of(
        recorded.config,
        drive,
        recorded.budget_nbytes,
        micro_batches=recorded.micro_batches or micro_batches,
    )
    baseline = Baseline(attach_nbytes=recorded.attach_nbytes, running_nbytes=RUNNING_NBYTES)
    real = _look_at(recorded.events)
    before, simulated = _predict(program, machine, settings, baseline)
    compute = _ratio(simulated.compute_s, real.compute_s)
    refined = _scaled(machine, compute)
    rates = {
        name: machine.link(*ends).bytes_per_s * factor
        for name, ends, factor in (
            ("nvme-read", (drive, "host"), _lane_ratio(real, simulated, "read")),
            ("nvme-write", ("host", drive), _lane_ratio(real, simulated, "write")),
        )
        if factor is not None
    }
    if rates:
        refined = changed(refined, drive, rates)
    after, _ = _predict(program, refined, settings, baseline)
    extra = _missing_nbytes(after, real)
    running = max(baseline.running_nbytes + extra, 0)
    baseline = dataclasses.replace(baseline, running_nbytes=running)
    factors = [f"compute x{compute:.2f}"] + [
        f"{name} x{rate / machine.link(*_ends(name, drive)).bytes_per_s:.2f}"
        for name, rate in rates.items()
    ]
    error = after.step_s / real.step_s - 1
    return Refined(
        machine=refined,
        baseline=baseline,
        note=(
            f"corrected by {recorded.path}: {', '.join(factors)}, memory "
            f"{'+' if extra >= 0 else '-'}{format_nbytes(abs(extra))}. Its own step was predicted "
            f"as {format_seconds(before.step_s)}, corrected {format_seconds(after.step_s)}, "
            f"measured {format_seconds(real.step_s)} ({error:+.0%})"
        ),
    )


def _ends(name: str, drive: str) -> tuple[str, str]:
    return (drive, "host") if name == "nvme-read" else ("host", drive)


def _check_same(program: Program, machine: Machine, drive: str, recorded: Recorded) -> None:
    if recorded.processor != machine.processors[0].model:
        raise ConfigError(
            f"{recorded.path} ran on another processor, {recorded.processor}: "
            f"it says nothing of {machine.processors[0].model}"
        )
    paths, planned = max(len(recorded.config.nvme), 1), len(drives_of(drive))
    if paths != planned:
        raise ConfigError(
            f"{recorded.path} ran on {paths} directories, this plan on {planned}: give --nvme for "
            "each of them"
        )
    for name in other_precision(program, recorded.config):
        option, ran = f"--{name.replace('_', '-')}", getattr(recorded.config, name)
        raise ConfigError(
            f"{recorded.path} ran with {name}={ran}: plan with {option} {ran}, or record a run "
            f"with {name}={getattr(program.stepping, name)}"
        )
    _check_weights(program, recorded)
    names = {weight.name for weight in program.census.weights}
    moved = {e.key for e in recorded.events if isinstance(e, Move) and e.role == "gradient"}
    if moved and not moved & names:
        raise ConfigError(
            f"{recorded.path} trained another model: it has no weight {min(moved)!r} that this has"
        )


def _check_weights(program: Program, recorded: Recorded) -> None:
    """Those of the run are those of ``program``, as far as the record tells them."""
    ran, planned = recorded.weight_forms, program.weight_forms
    if not ran.keys() & planned.keys():
        return  # adapters of another library have other names
    for name in {**planned, **ran}:
        if ran.get(name) != planned.get(name):
            raise ConfigError(
                f"{recorded.path} trained another model: its {_described(name, ran)}, "
                f"this one's {_described(name, planned)}. Plan that model, or record a run of this"
            )


def _described(name: str, forms: Mapping[str, str]) -> str:
    return f"weight {name!r} is {forms[name]}" if name in forms else f"weight {name!r} is not there"


def _predict(
    program: Program, machine: Machine, settings: Settings, baseline: Baseline
) -> tuple[Prediction, "_Look"]:
    recorder = ListRecorder()
    try:
        found = predict(program, machine, settings, baseline, recorder=recorder)
    except BudgetError as error:
        raise ConfigError(
            f"the recorded run is predicted not to fit, so it can't correct anything: {error}"
        ) from error
    return found, _look_at(recorder.events)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Look:
    """A run behind its warm-up: medians of its steps, and (bytes, busy seconds) of each lane."""

    step_s: float
    compute_s: float
    span_s: float
    first_peak_nbytes: int
    read: tuple[int, float]
    write: tuple[int, float]


def _look_at(events: Sequence[Event]) -> _Look:
    steps = [event for event in events if isinstance(event, StepFinished)]
    began_s, ended_s = steps[_WARM_STEPS - 1].t_s, steps[-1].t_s
    moves = [
        event for event in events if isinstance(event, Move) and began_s < event.t_s <= ended_s
    ]
    later = steps[_WARM_STEPS:]
    return _Look(
        step_s=statistics.median(step.step_s for step in later),
        compute_s=statistics.median(step.compute_s for step in later),
        span_s=ended_s - began_s,
        first_peak_nbytes=steps[0].peak_nbytes,
        read=_busy(move for move in moves if move.src.startswith("file")),
        write=_busy(move for move in moves if move.dst.startswith("file")),
    )


def _busy(moves: Iterable[Move]) -> tuple[int, float]:
    """Bytes, and the seconds in which at least one of ``moves`` was under way."""
    nbytes, busy_s, until_s = 0, 0.0, float("-inf")
    for move in sorted(moves, key=lambda move: move.t_s - move.duration_s):
        busy_s += max(move.t_s - max(move.t_s - move.duration_s, until_s), 0.0)
        until_s = max(until_s, move.t_s)
        nbytes += move.nbytes
    return nbytes, busy_s


def _ratio(simulated_s: float, real_s: float) -> float:
    return simulated_s / real_s if simulated_s > 0 and real_s > 0 else 1.0


def _lane_ratio(real: _Look, simulated: _Look, lane: str) -> float | None:
    """The rate of a lane over what was simulated; None where it had little to do."""
    (nbytes, busy_s), (other_nbytes, other_s) = getattr(real, lane), getattr(simulated, lane)
    if busy_s < _BUSY * real.span_s or not (nbytes and other_nbytes and other_s):
        return None
    rate: float = nbytes / busy_s
    predicted: float = other_nbytes / other_s
    return rate / predicted


def _scaled(machine: Machine, factor: float) -> Machine:
    return dataclasses.replace(
        machine,
        compute=tuple(
            rate if rate.work in _APART else dataclasses.replace(rate, per_s=rate.per_s * factor)
            for rate in machine.compute
        ),
    )


def _missing_nbytes(found: Prediction, real: _Look) -> int:
    """What the first step took beyond its prediction: it keeps nothing, so nothing makes up for it.

    Peaks are those of the process: where building the model took more, the step's is not known.
    """
    first = found.steps[0].finished.peak_nbytes
    return real.first_peak_nbytes - first if first >= found.building_nbytes else 0
