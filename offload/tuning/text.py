"""What a search found: as text for a terminal of 80 columns, as versioned JSON, as settings."""

import dataclasses
import json
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from offload.allocator.units import format_nbytes, format_seconds
from offload.config import OffloadConfig
from offload.tuning.predicting import Predicted
from offload.tuning.search import Found, Standing
from offload.tuning.settings_file import HEADER, commented, settings_of
from offload.tuning.settings_file import to_yaml as settings_text

WIDTH = 80
FORMAT_VERSION = 1
_FIGURES = ("step_s", "compute_s", "stall_s", "optimizer_s", "commit_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A search that came to an end.

    Attributes:
        command: as the user typed it.
        machine: where it ran, in words.
        steps: of a trial.
        predicted: by the name of a candidate.
        best: what is written: the baseline, or what beats it.
        config: its settings.
        file: where they are written.
    """

    command: str
    machine: str
    steps: int
    found: Found
    predicted: Mapping[str, Predicted]
    best: Standing
    config: OffloadConfig
    file: str
    when: datetime


def print_outcome(outcome: Outcome, console: Console | None = None) -> None:
    """The table of all candidates, and the baseline against the best."""
    console = console or Console(width=WIDTH, highlight=False)
    found = outcome.found
    console.print(outcome.command, style="bold", markup=False)
    console.print(outcome.machine, markup=False)
    console.print(
        f"{found.rounds} rounds of {outcome.steps} steps each; medians of those behind the warm-up",
        markup=False,
    )
    console.print(_table(outcome))
    for standing in found.standings:
        if (failure := standing.failure) is not None:
            line = f"{standing.candidate.name} {failure.status}: {failure.reason}"
            console.print(textwrap.fill(line, WIDTH, subsequent_indent="  "), markup=False)
    console.print(textwrap.fill(verdict(outcome), WIDTH), markup=False)
    console.print(f"next         offload run --config {outcome.file} …", markup=False)


def _table(outcome: Outcome) -> Table:
    # Names are long: no lines between the columns.
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("settings")
    for name in ("step", "ratio", "stall", "peak", "moved", "predicted"):
        table.add_column(name, justify="right", no_wrap=True)
    for standing in outcome.found.standings:
        table.add_row(*_cells(outcome, standing))
    return table


def _cells(outcome: Outcome, standing: Standing) -> tuple[str, ...]:
    name = standing.candidate.name
    label = f"{name} *" if standing is outcome.best else name
    known = outcome.predicted.get(name)
    predicted = format_seconds(known.step_s) if known is not None else "-"
    if not any(trial.done for trial in standing.trials.values()):
        return (label, "-", "-", "-", "-", "-", predicted)
    ratio = outcome.found.ratio(standing)
    moved = standing.median("read_nbytes") + standing.median("written_nbytes")
    return (
        label,
        format_seconds(standing.median("step_s")),
        "-" if ratio is None else f"{ratio:.3f}",
        format_seconds(standing.median("stall_s")),
        format_nbytes(standing.peak_nbytes),
        format_nbytes(int(moved)),
        predicted,
    )


def verdict(outcome: Outcome) -> str:
    """In a sentence: the baseline against the best."""
    found, best = outcome.found, outcome.best
    step = format_seconds(best.median("step_s"))
    base = format_seconds(found.baseline.median("step_s"))
    if best is found.baseline:
        noise = max((found.noise(one) for one in found.others if one.alive), default=0.0)
        return (
            f"Nothing beats the baseline ({base} a step) by more than the noise "
            f"({noise:.1%}): {outcome.file} holds the baseline."
        )
    ratio = found.ratio(best)
    if ratio is None or not found.baseline.alive:
        return (
            f"The baseline does not run ({_why(found.baseline)}). With {best.candidate.name} a "
            f"step takes {step}: {outcome.file} holds that."
        )
    return (
        f"{best.candidate.name}: {step} a step against {base} of the baseline, {1 - ratio:.1%} "
        f"less (noise {found.noise(best):.1%}): {outcome.file} holds it."
    )


def _why(standing: Standing) -> str:
    return standing.failure.status if standing.failure is not None else "not measured"


def to_json(outcome: Outcome) -> str:
    """All figures; sizes in bytes, times in seconds."""
    found = outcome.found
    document = {
        "format": FORMAT_VERSION,
        "command": outcome.command,
        "machine": outcome.machine,
        "date": outcome.when.isoformat(timespec="seconds"),
        "steps": outcome.steps,
        "rounds": found.rounds,
        "best": outcome.best.candidate.name,
        "improved": outcome.best is not found.baseline,
        "verdict": verdict(outcome),
        "file": outcome.file,
        "config": settings_of(outcome.config),
        "candidates": [_row(outcome, standing) for standing in found.standings],
    }
    return json.dumps(document, indent=2)


def _row(outcome: Outcome, standing: Standing) -> dict[str, Any]:
    found, failure = outcome.found, standing.failure
    known = outcome.predicted.get(standing.candidate.name)
    ratio = found.ratio(standing)
    return {
        "name": standing.candidate.name,
        "changes": {name: _plain(value) for name, value in standing.candidate.changes.items()},
        "status": failure.status if failure is not None else "done",
        "reason": failure.reason if failure is not None else "",
        "ratio": ratio,
        "noise": None if ratio is None else found.noise(standing),
        **{name: standing.median(name) for name in _FIGURES},
        "read_nbytes": int(standing.median("read_nbytes")),
        "written_nbytes": int(standing.median("written_nbytes")),
        "peak_nbytes": standing.peak_nbytes,
        "predicted_step_s": None if known is None else known.step_s,
        "predicted_peak_nbytes": None if known is None else known.peak_nbytes,
        "trials": [
            {"round": number, **dataclasses.asdict(trial)}
            for number, trial in standing.trials.items()
        ],
    }


def to_yaml(outcome: Outcome) -> str:
    """The settings of the best as a file for ``--config``, with what they were found by on top."""
    found, best = outcome.found, outcome.best
    lines = [
        f"{HEADER} tune, {outcome.when:%Y-%m-%d}:",
        f"#   {outcome.command}",
        *commented(f"Machine: {outcome.machine}"),
        *commented(verdict(outcome)),
        *commented(
            f"Medians of {found.rounds} rounds of {outcome.steps} steps. Baseline: "
            f"{_figures(found.baseline)}. Here: {_figures(best)}."
        ),
    ]
    return settings_text(lines, outcome.config)


def _figures(standing: Standing) -> str:
    if not standing.alive:
        return _why(standing)
    return (
        f"{format_seconds(standing.median('step_s'))} a step, stall "
        f"{format_seconds(standing.median('stall_s'))}, peak {format_nbytes(standing.peak_nbytes)}"
    )


def _plain(value: Any) -> Any:
    return [str(each) for each in value] if isinstance(value, tuple) else value
