"""A real run beside the simulated one, with the same shares of memory; the bytes that both move."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from planning_models import DRIVE, MIB, loss_of, machine, model_in, tokens_of
from torch import nn

import offload
from offload.engine import Engine
from offload.swap.plan import Plan
from offload.swap.planning.compiled import compile_program
from offload.swap.planning.cost import Costs
from offload.swap.planning.program import Program
from offload.swap.planning.row_steps import RowSteps
from offload.swap.planning.simulate import Simulation
from offload.tiers.events import Event, ListRecorder, Move, StepFinished

_STEPS = 4
ACTIVATIONS_NBYTES = 256 << 10


def moved(events: Sequence[Event], step: int) -> Counter[tuple[str, str]]:
    """Bytes by role and direction between the ends of two steps."""
    ends = [-math.inf, *(event.t_s for event in events if isinstance(event, StepFinished))]
    found: Counter[tuple[str, str]] = Counter()
    for event in events:
        if isinstance(event, Move) and ends[step] < event.t_s <= ends[step + 1]:
            to_memory = not event.dst.startswith("file")
            found[event.role, "read" if to_memory else "written"] += event.nbytes
    return found


def both(
    program: Program,
    stores: Path | Sequence[Path],
    *,
    window_nbytes: int = 1 << 20,
    dtype: torch.dtype = torch.float32,
    drive_nbytes: int | None = None,
    micro_batches: int = 1,
    **config: Any,
) -> tuple[Counter[tuple[str, str]], Counter[tuple[str, str]]]:
    """What a step of a real run moves and one of the simulated run, where all weights stream.

    A step that is put off counts to the one in whose forward it is made.

    Args:
        program: of ``planning_models.Model`` in ``dtype``, with these settings.
        config: of the real run.
        drive_nbytes: see ``events_of_both``.
    """
    torch.manual_seed(0)
    real, virtual = events_of_both(
        program,
        model_in(dtype),
        tokens_of(),
        stores,
        window_nbytes=window_nbytes,
        drive_nbytes=drive_nbytes,
        micro_batches=micro_batches,
        config=config,
    )
    return moved(real, _STEPS - 1), moved(virtual, _STEPS - 1)


def events_of_both(
    program: Program,
    model: nn.Module,
    tokens: torch.Tensor,
    stores: Path | Sequence[Path],
    *,
    config: Mapping[str, Any],
    window_nbytes: int = 1 << 20,
    activations_nbytes: int = ACTIVATIONS_NBYTES,
    drive_nbytes: int | None = None,
    micro_batches: int = 1,
) -> tuple[Sequence[Event], Sequence[Event]]:
    """What happens in the first steps of a real run, and of the simulated one.

    Args:
        program: of ``model`` on ``tokens``, with these settings.
        drive_nbytes: what saved activations may take of the drive at once.
    """
    if micro_batches > 1 and config.get("step_in_backward"):
        config = {**config, "accumulation_steps": micro_batches}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    engine = offload.attach(model, optimizer, budget="host=8GiB", nvme=stores, config=config)
    real = engine._journal.recorder = ListRecorder()
    engine.weights.window_nbytes = window_nbytes
    engine.keep_streaming()
    if drive_nbytes is not None:
        fill_up_to(engine, drive_nbytes)
    for _ in range(_STEPS):
        engine.activations.limit_nbytes = activations_nbytes  # whatever was planned anew
        for _ in range(micro_batches):
            (loss_of(model, tokens) / micro_batches).backward()
        optimizer.step()
        optimizer.zero_grad()
    chunk_numel, given = engine._runtime.chunk_numel, engine.plan
    engine.detach()
    plan = Plan(
        budget_nbytes=8 << 30,
        baseline_nbytes=300 * MIB,
        working_nbytes=0,
        window_nbytes=window_nbytes,
        gradients_nbytes=given.gradients_nbytes,
        activations_nbytes=activations_nbytes,
        staging_nbytes=given.staging_nbytes,
        step_in_backward=given.step_in_backward,
        step_in_forward=given.step_in_forward,
    )
    virtual = ListRecorder()
    compiled = compile_program(program, Costs(machine(), DRIVE))
    rows = None
    if "alpha" in config:
        rows = RowSteps(
            compiled, config["alpha"], memory_nbytes=activations_nbytes, drive_nbytes=1 << 40
        )
    simulation = Simulation(
        compiled if rows is None else rows.compiled,
        plan,
        chunk_numel=chunk_numel,
        write_budget_nbytes=config.get("nvme_write_budget"),
        drive_nbytes=drive_nbytes,
        micro_batches=micro_batches,
        recorder=virtual,
    )
    simulation._replan = lambda _peak_nbytes: None  # type: ignore[method-assign]
    if rows is not None:
        rows.run(simulation)
    else:
        for _ in range(_STEPS):
            simulation.step()
    return real.events, virtual.events


def fill_up_to(engine: Engine, nbytes: int) -> None:
    """Let the drive have room for ``nbytes`` of saved activations, and no more."""
    file = engine._runtime.activation_scratch.file
    file.growth_nbytes = lambda: nbytes - file.nbytes  # type: ignore[method-assign]


def check_moved(
    real: Counter[tuple[str, str]],
    virtual: Counter[tuple[str, str]],
    *,
    in_backward: bool,
    itemsize: int = 4,
) -> None:
    """Raise unless the simulated run moves what the real one does."""
    assert virtual["gradient", "read"] == real["gradient", "read"] == 0
    assert real["gradient", "written"] >= 64 * 256 * itemsize  # the rows that are looked up
    largest_nbytes = 1000 * 256 * itemsize
    # What backward holds while it is written can't be given up: what is instead, the clock decides.
    missed = abs(virtual["weight", "read"] - real["weight", "read"])
    assert missed <= (2 * largest_nbytes if in_backward else 0)
    for role, way in (("weight", "written"), ("gradient", "written"), ("state", "written")):
        assert virtual[role, way] == real[role, way] > 0, (role, way)
    # Gradients that are still on their way when the step begins are not read back.
    assert abs(virtual["state", "read"] - real["state", "read"]) <= 3 * largest_nbytes
    # What backward meets on its way out is not read back either.
    for way in ("read", "written"):
        assert virtual["activation", way] == pytest.approx(real["activation", way], rel=0.25)


def check_moved_in_forward(
    real: Counter[tuple[str, str]], virtual: Counter[tuple[str, str]]
) -> None:
    """As ``check_moved``, of steps that are made in the next forward."""
    for role in ("weight", "gradient", "state"):
        assert virtual[role, "written"] == real[role, "written"] > 0, role
    largest_nbytes = 1000 * 256 * 4
    # Which weights are stepped in staging, and read again for their use, the clock decides.
    read = [sum(each[role, "read"] for role in ("weight", "state")) for each in (virtual, real)]
    assert abs(read[0] - read[1]) <= 3 * largest_nbytes
