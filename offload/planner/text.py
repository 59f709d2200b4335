"""A plan as text for a terminal of 80 columns, and as versioned JSON."""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from offload.allocator.units import format_nbytes, format_rate, format_seconds
from offload.swap.planning.predict import Prediction, Settings
from offload.swap.planning.program import Program
from offload.swap.planning.sim_writes import must_write_nbytes
from offload.tiers.machine import Machine

if TYPE_CHECKING:
    from offload.planner.on_device import PlacementAnswer

WIDTH = 80
FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """A change, and what a step would take with it."""

    change: str
    step_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Everything that ``offload plan`` tells.

    Attributes:
        title: the model, the method, the batch.
        machine_name: where it would run.
        solved: what ``--solve`` found.
        advice: what to change, the best first.
        notes: what the user should know of the prediction.
        placement: on the GPU that the machine has, or why there is none.
    """

    title: str
    machine_name: str
    program: Program
    machine: Machine
    prediction: Prediction
    solved: str | None
    advice: tuple[Advice, ...]
    notes: tuple[str, ...]
    placement: "PlacementAnswer | str | None" = None


def print_answer(answer: Answer, *, explain: bool, console: Console | None = None) -> None:
    """Print the first screen: does it fit, how slow, bound by what, what to change."""
    console = console or Console(width=WIDTH, highlight=False)
    found, settings = answer.prediction, answer.prediction.settings
    console.print(answer.title, style="bold", markup=False)
    console.print(answer.machine_name, markup=False)
    console.print(_table(answer))
    peak, budget = found.peak_nbytes, settings.budget_nbytes
    console.print(
        f"peak         {format_nbytes(peak)} of a budget of {format_nbytes(budget)} "
        f"({peak / budget:.0%}): FITS"
    )
    step = found.last.finished
    console.print(
        f"step         {format_seconds(found.step_s)}, {found.tokens / found.step_s:,.0f} tokens/s "
        f"= compute {format_seconds(step.compute_s)} · stall {format_seconds(step.stall_s)} · "
        f"optimizer {format_seconds(step.optimizer_s)} · commit {format_seconds(step.commit_s)}"
    )
    busy = " · ".join(
        f"{name} {seconds / found.step_s:.0%}" for name, seconds in found.last.busy_s.items()
    )
    console.print(f"bound by     {found.bound_by} (busy: {busy})")
    console.print(
        f"moved        {format_nbytes(step.read_nbytes)} read, "
        f"{format_nbytes(step.written_nbytes)} written per step{_written_at_most(settings)}"
    )
    if found.last.mapped_nbytes:
        console.print(
            f"added        gradients of {format_nbytes(found.last.mapped_nbytes)} to others in "
            "scratch per step"
        )
    for line in rebuilt(found):
        console.print(f"recompute    {line}", markup=False)
    if answer.solved is not None:
        console.print(f"solved       {answer.solved}", markup=False)
    for advice in answer.advice:
        console.print(f"try          {advice.change} → {format_seconds(advice.step_s)} a step")
    if explain:
        for line in explanation(answer):
            console.print(f"why          {line}", markup=False)
    for note in answer.notes:
        console.print(f"note: {note}", markup=False)
    if isinstance(answer.placement, str):
        console.print(f"note: no placement on the GPU: {answer.placement}", markup=False)
    elif answer.placement is not None:
        from offload.planner.placement_text import print_placement

        console.print()
        print_placement(answer.placement, explain=explain, console=console)


def _written_at_most(settings: Settings) -> str:
    most = settings.write_budget_nbytes
    return "" if most is None else f" (at most {format_nbytes(most)})"


def rebuilt(found: Prediction) -> Iterator[str]:
    """What token-wise recompute does with each kind of blocks."""
    if found.settings.alpha is not None and not found.rebuilt:
        yield "no module repeats in a list, so nothing is rebuilt"
    for kind in found.rebuilt:
        blocks = f"{kind.blocks} blocks" if kind.blocks > 1 else "1 block"
        told = f"{kind.cut:,} of {kind.rows:,} rows swapped, others rebuilt"
        yield f"{blocks}: alpha {kind.alpha:.3g} ({kind.why or told})"


def _table(answer: Answer) -> Table:
    table = Table(width=WIDTH)
    table.add_column("")
    table.add_column("memory", justify="right")
    table.add_column("drive", justify="right")
    table.add_column("")
    for row in rows(answer):
        drive = "-" if row["drive_nbytes"] is None else format_nbytes(row["drive_nbytes"])
        table.add_row(row["name"], format_nbytes(row["memory_nbytes"]), drive, row["how"])
    return table


def rows(answer: Answer) -> list[dict[str, Any]]:
    """Each class of bytes: in memory at the peak of a step, on the drive, and how it is kept."""
    found, program = answer.prediction, answer.program
    roles, plan, drive = found.peak_roles, found.plan, found.drive
    weights = len(program.census.weights)
    budget = found.settings
    listed = (
        (
            "weights", roles.get("weights", 0) + roles.get("pages", 0), drive.weights_nbytes,
            f"{len(plan.resident)} of {weights} stay; window {format_nbytes(plan.window_nbytes)}",
        ),
        (
            "gradients", roles.get("gradients", 0), drive.gradients_nbytes,
            _gradients(budget),
        ),
        (
            "optimizer states", roles.get("states", 0), drive.states_nbytes,
            f"of {len(plan.resident_states)} weights stay; others by tile",
        ),
        (
            "activations", roles.get("saved", 0), drive.activations_nbytes,
            f"{format_nbytes(plan.activations_nbytes)} may stay",
        ),
        ("workspace", roles.get("transients", 0), None, "results of kernels"),
        ("staging", roles.get("staging", 0), None, "tiles of the optimizer step"),
        ("process", roles.get("fixed", 0), None, "Python, libraries, the runtime"),
        (
            "in all", found.last.finished.peak_nbytes, drive.nbytes,
            f"of {format_nbytes(answer.machine.tier(budget.drive).free_nbytes)} free",
        ),
    )  # fmt: skip
    return [
        {"name": name, "memory_nbytes": memory, "drive_nbytes": on_drive, "how": how}
        for name, memory, on_drive, how in listed
    ]


def _gradients(settings: Settings) -> str:
    count = settings.micro_batches
    if settings.step_in_backward:
        return "used up in backward" if count == 1 else f"used up in backward {count}"
    until = ", until the next forward steps" if settings.step_in_forward else ""
    return f"leave as they are produced{until}"


def explanation(answer: Answer) -> Iterator[str]:
    """Why each class of bytes went where it did."""
    found, program, plan = answer.prediction, answer.program, answer.prediction.plan
    first = found.steps[0].finished.peak_nbytes
    yield (
        f"the first step keeps nothing and peaks at {format_nbytes(first)}; what the budget "
        "leaves above that is handed out after it, smallest first"
    )
    total = format_nbytes(program.census.weight_nbytes)
    if len(plan.resident) == len(program.census.weights):
        yield f"weights: all {total} fit beside a step's peak, so they stay"
    else:
        yield (
            f"weights: {format_nbytes(plan.resident_nbytes)} of {total} fit beside a step's peak; "
            "the others are read in forward, in backward and by the optimizer, each time ahead "
            "of their use"
        )
    if program.stepping is None or plan.resident_states:
        yield (
            f"states: {format_nbytes(plan.resident_states_nbytes)} of gradients and states stay, "
            "for all weights do; they are stepped in place and written at the commit"
        )
    elif not program.stepping.is_exact:
        yield (
            f"states: {format_nbytes(program.stepping.nbytes)} stream by tile, as all do that are "
            "rounded or have masters: else the bits would depend on the budget"
        )
    else:
        yield (
            f"states: {format_nbytes(program.stepping.nbytes)} stream by tile: memory goes to "
            "weights first, which save three reads a step against one"
        )
    spilled = found.drive.activations_nbytes
    if spilled:
        yield (
            f"activations: autograd saves {format_nbytes(program.saved_nbytes)}, the plan keeps "
            f"{format_nbytes(plan.activations_nbytes)} of it; the oldest leave first, for they "
            "are used last"
        )
    else:
        yield f"activations: all {format_nbytes(program.saved_nbytes)} stay within their share"
    for kind in found.rebuilt:
        if kind.cut < kind.rows:
            yield (
                f"recompute: a block saves {format_nbytes(kind.target_nbytes)} that rows can be "
                f"rebuilt of, {kind.alpha:.0%} of it is swapped, besides "
                f"{format_nbytes(kind.whole_nbytes)} that can't be, or that rows are rebuilt from; "
                "a run sees in its first step whether the bits are right, and swaps whole what "
                "differs"
            )
    if found.settings.write_budget_nbytes is not None:
        most, other = found.settings.write_budget_nbytes, must_write_nbytes(program)
        yield (
            f"writes: of {format_nbytes(most)} that a step may write, weights, gradients and "
            f"states take {format_nbytes(other)} at most; what else would leave memory stays there"
        )
    if found.last.mapped_nbytes:
        yield (
            f"micro-batches: gradients of the first of {found.settings.micro_batches} leave, those "
            "of each other one are added through the mapping of where they are"
        )
    flops = program.flops * found.settings.micro_batches
    yield f"compute: {flops / 1e9:,.0f} GFLOP in matrix products a step, at measured rates"


def to_json(answer: Answer) -> str:
    """The same figures as JSON; sizes in bytes, times in seconds."""
    found = answer.prediction
    document = {
        "format": FORMAT_VERSION,
        "fits": True,
        "title": answer.title,
        "machine": answer.machine_name,
        "parameters": answer.program.parameters,
        "micro_batches": found.settings.micro_batches,
        "flops": answer.program.flops * found.settings.micro_batches,
        "budget_nbytes": found.settings.budget_nbytes,
        "write_budget_nbytes": found.settings.write_budget_nbytes,
        "peak_nbytes": found.peak_nbytes,
        "building_nbytes": found.building_nbytes,
        "step_s": found.step_s,
        "tokens_per_s": found.tokens / found.step_s,
        "bound_by": found.bound_by,
        "busy_s": dict(found.last.busy_s),
        "step": dataclasses.asdict(found.last.finished),
        "accumulated_nbytes": found.last.mapped_nbytes,
        "rows": rows(answer),
        "rebuilt": [{**dataclasses.asdict(kind), "alpha": kind.alpha} for kind in found.rebuilt],
        "plan": json.loads(found.plan.to_json()),
        "solved": answer.solved,
        "advice": [dataclasses.asdict(advice) for advice in answer.advice],
        "why": list(explanation(answer)),
        "notes": list(answer.notes),
        "placement": _placement(answer.placement),
    }
    return json.dumps(document, indent=2)


def _placement(found: "PlacementAnswer | str | None") -> dict[str, Any] | None:
    from offload.planner.placement_text import placement_document

    if found is None:
        return None
    if isinstance(found, str):
        return {"fits": False, "message": found}
    return {"fits": True, **placement_document(found)}


def refusal_to_json(message: str, needed_nbytes: int, budget_nbytes: int) -> str:
    """The answer that it does not fit, as JSON."""
    document = {
        "format": FORMAT_VERSION,
        "fits": False,
        "message": message,
        "needed_nbytes": needed_nbytes,
        "budget_nbytes": budget_nbytes,
    }
    return json.dumps(document, indent=2)


def describe_machine(name: str, machine: Machine, drive: str) -> str:
    """One line about where it would run."""
    cpu = machine.processors[0]
    read, write = machine.link(drive, "host"), machine.link("host", drive)
    return (
        f"{name}: {cpu.model}, {format_nbytes(machine.tier('host').capacity_nbytes)}; "
        f"{drive} {format_rate(read.bytes_per_s)} read, {format_rate(write.bytes_per_s)} write"
    )
