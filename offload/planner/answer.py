"""From a model, a machine and settings to an answer: predictions, and what changes would give."""

import dataclasses
from collections.abc import Callable, Sequence

from offload.allocator.errors import BudgetError
from offload.allocator.units import format_nbytes, format_rate
from offload.planner.sources import Batch
from offload.planner.text import Advice
from offload.swap.planning.predict import (
    Baseline,
    Prediction,
    Settings,
    largest,
    least_budget,
    predict,
)
from offload.swap.planning.program import Program
from offload.swap.planning.whatif import changed
from offload.tiers.machine import Machine

_LENGTH_GRID = 64
_WORTH = 0.97  # a change that saves less is none


def refused(
    error: BudgetError,
    program: Program,
    machine: Machine,
    settings: Settings,
    baseline: Baseline,
) -> BudgetError:
    """``error`` with the smallest budget that was found to fit by whole simulated steps."""
    if error.budget_nbytes != settings.budget_nbytes:
        return error  # the drive is too small: a larger budget does not help
    least = least_budget(program, machine, settings, baseline).settings.budget_nbytes
    return BudgetError(
        f"does not fit: {error}. Planned whole: --budget host={least >> 20}MiB fits",
        needed_nbytes=least,
        budget_nbytes=error.budget_nbytes,
    )


def solve_length(
    trace: Callable[[Batch], Program],
    batch: Batch,
    fits: Callable[[Program], bool],
    *,
    longest: int | None,
) -> int | None:
    """The longest sequence, on a grid of 64 tokens, whose step fits."""
    return largest(
        lambda length: fits(trace(dataclasses.replace(batch, length=length))),
        start=batch.length,
        grid=_LENGTH_GRID,
        most=longest or 1 << 20,
    )


def solve_batch(
    trace: Callable[[Batch], Program], batch: Batch, fits: Callable[[Program], bool]
) -> int | None:
    """The largest number of sequences whose step fits."""
    return largest(
        lambda sequences: fits(trace(dataclasses.replace(batch, sequences=sequences))),
        start=batch.sequences,
        grid=1,
        most=1 << 16,
    )


def advise(
    program: Program,
    machine: Machine,
    settings: Settings,
    baseline: Baseline,
    found: Prediction,
) -> tuple[Advice, ...]:
    """What would make a step shorter: more memory, a faster drive, a faster processor."""
    options: list[tuple[str, Machine, Settings]] = []
    room = machine.tier("host").capacity_nbytes
    for factor in (1.5, 2.0, 4.0):
        budget = int(settings.budget_nbytes * factor)
        name = f"--budget host={budget >> 20}MiB"
        if budget > room:
            name += f" (the machine has {format_nbytes(room)})"
        options.append((name, machine, dataclasses.replace(settings, budget_nbytes=budget)))
    read = machine.link(settings.drive, "host").bytes_per_s
    write = machine.link("host", settings.drive).bytes_per_s
    rates = {"nvme-read": 2 * read, "nvme-write": 2 * write}
    faster = changed(machine, settings.drive, rates)
    options.append((f"a drive that reads {format_rate(2 * read)}", faster, settings))
    twice = changed(machine, settings.drive, {"compute": 2.0})
    options.append(("a processor twice as fast", twice, settings))
    return _worth_trying(program, baseline, found, options)


def _worth_trying(
    program: Program,
    baseline: Baseline,
    found: Prediction,
    options: Sequence[tuple[str, Machine, Settings]],
) -> tuple[Advice, ...]:
    advice: list[Advice] = []
    best_of_budgets = found.step_s
    for name, machine, settings in options:
        try:
            step_s = predict(program, machine, settings, baseline).step_s
        except BudgetError:
            continue
        if name.startswith("--budget"):
            if step_s > _WORTH * best_of_budgets:
                continue
            best_of_budgets = step_s
        if step_s < _WORTH * found.step_s:
            advice.append(Advice(change=name, step_s=step_s))
    return tuple(sorted(advice, key=lambda one: one.step_s)[:3])
