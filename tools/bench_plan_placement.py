"""Placements over all tiers: how long they take to plan, and how far fixed rules are from them."""

import json
import math
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchlib import Result, median_of
from offload.allocator.errors import BudgetError
from offload.planner.machines import library_machine
from offload.planner.on_device import Placing
from offload.planner.sources import Batch, HuggingFaceModel
from offload.swap.planning.placing.check import check
from offload.swap.planning.placing.choices import Rules
from offload.swap.planning.placing.network import Network
from offload.swap.planning.placing.solve import place
from offload.swap.planning.placing.work import Role, Work
from offload.swap.planning.predict import Baseline
from offload.swap.planning.program import Program, What

_BASELINE = Baseline(attach_nbytes=600 << 20, running_nbytes=25 << 20)
_MACHINES = ("desktop-3060", "desktop-4090", "server-h100")
_DEEP = {
    "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
    "vocab_size": 32000, "max_position_embeddings": 32768, "dtype": "bfloat16",
}  # fmt: skip
_SMALL = {
    **_DEEP, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8,
    "num_attention_heads": 16,
}  # fmt: skip
_REPEATS = 5


def measure(result: Result, *, quick: bool) -> None:
    """A row for each machine and length, and the checks."""
    slowest, tensors = 0.0, math.inf
    ratios: list[float] = []
    config = _SMALL if quick else _DEEP
    for length in (512,) if quick else (1024, 4096):
        batch = Batch(sequences=1, length=length)
        program = _trace(config, batch)
        for name in _MACHINES[:1] if quick else _MACHINES:
            placing = _placing(name, batch, program)
            try:
                works, network, placement = placing.place(batch)
            except BudgetError as error:
                result.add(machine=name, tokens=length, device_needs_nbytes=error.needed_nbytes)
                continue
            check(placement, works[0], network)
            plan_s = median_of(_REPEATS, partial(_planning_s, name, batch, program))
            fixed = {
                "keep_or_rebuild": _step_s(works, network, Rules(homes=_kept(network))),
                "keep_or_swap": _step_s(works, network, Rules(rebuild=False)),
                "host_steps": _step_s(works, network, Rules(steppers=("cpu",))),
                "weights_stream": _step_s(works, network, Rules(homes=_streamed(network))),
            }
            over = {rule: step_s / placement.step_s for rule, step_s in fixed.items()}
            result.add(
                machine=name,
                tokens=length,
                stages=works[0].blocks,
                kinds=len(works[0].kinds),
                tensors=_tensors(program),
                plan_cpu_s=plan_s,
                step_s=placement.step_s,
                bound_by=placement.bound_by,
                **{rule: None if math.isinf(ratio) else ratio for rule, ratio in over.items()},
            )
            slowest, tensors = max(slowest, plan_s), min(tensors, _tensors(program))
            ratios += over.values()
    if not quick:
        result.at_most("seconds to plan 80 blocks, the slowest", slowest, 1)
        result.check("tensors of these blocks", tensors, 2000)
    result.check("step of the best fixed rule over the plan's", min(ratios), 1 - 1e-6)
    result.notes.append(
        "plan_cpu_s: from the traced program to the placement; step_s: of the time model, at "
        "published rates; the last columns: the best step under a fixed rule over the plan's "
        "(activations kept or rebuilt, kept or swapped; the host steps; no weight stays), - where "
        "nothing fits under the rule; device_needs_nbytes: what would fit, where nothing does"
    )


def _trace(config: dict[str, object], batch: Batch) -> Program:
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "config.json"
        file.write_text(json.dumps(config))
        model = HuggingFaceModel(file, dtype=None, method="full", optimizer="adamw")
    return model.trace(batch)


def _placing(name: str, batch: Batch, program: Program) -> Placing:
    machine = library_machine(name)
    drive = next(tier.name for tier in machine.tiers if tier.kind == "file")
    return Placing(
        lambda _batch: program,
        machine,
        drive,
        {},
        _BASELINE,
        commits=True,
        known={batch: program},
    )


def _planning_s(name: str, batch: Batch, program: Program) -> float:
    placing = _placing(name, batch, program)
    began_s = time.process_time()  # one thread computes: other processes' work is not counted
    placing.place(batch)
    return time.process_time() - began_s


def _step_s(works: Sequence[Work], network: Network, rules: Rules) -> float:
    try:
        return place(works, network, rules).step_s
    except BudgetError:
        return math.inf


def _kept(network: Network) -> dict[Role, tuple[str, ...]]:
    return {"saved": (network.compute,)}


def _streamed(network: Network) -> dict[Role, tuple[str, ...]]:
    below = tuple(tier for tier in network.budgets if tier != network.compute)
    return {"weights": below, "frozen": below}


def _tensors(program: Program) -> int:
    """Weights, and distinct storages that autograd saves."""
    saved = {which for what, which in program.events if what is What.SAVE}
    return len(program.census.weights) + len(saved)
