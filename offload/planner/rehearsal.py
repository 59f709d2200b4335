"""What only training shows: a small model is trained in a child process.

Kernels are slower than alone where operands come from memory and not from a cache. Lanes take
processor time and memory traffic from them, hooks and mappings take time for each tensor that
moves; all of that grows with the bytes. So steps of few tokens and of many tell both: how much
slower kernels are, and the bytes that lanes move for each second that computing loses by it. The
optimizer's step shows how fast tiles come and go while they are stepped, a commit what the drive
takes to make files durable. And what states and masters take to change their form (``recoding``).
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from offload.allocator.errors import OffloadError
from offload.swap.planning.cost import FLUSHES, Costs
from offload.tiers.machine import ComputeRate, Machine, Work

if TYPE_CHECKING:
    import torch
    from torch import nn

    from offload.swap.planning.program import Program
    from offload.tiers.events import StepFinished

RECODED: tuple[Work, ...] = ("bf16 states", "8bit states", "masters")
# Of each thing that moves, whatever its bytes (``fixed_costs``).
FIXED: tuple[Work, ...] = ("gradients", "fetches", "tile parts", "small steps")
# Of pages of mapped files, by how many pages they are apart (``mapped_pages``).
MAPPED: tuple[Work, ...] = ("page writes", "page reads")
REHEARSED: tuple[Work, ...] = (
    "moves",
    "tiles",
    "flush",
    *MAPPED,
    *FIXED,
    *RECODED,
)  # all that it measures
_KERNELS: tuple[Work, ...] = (
    "matmul",
    "thin matmul",
    "attention",
    "attention backward",
    "pointwise",
    "heavy",
)
_MOST_SLOWNESS = 2.0
_FEW, _MANY = 128, 512  # tokens: of the first, moving takes more than computing
_STEPS = {_FEW: 7, _MANY: 5}
_QUICK_STEPS = {_FEW: 4, _MANY: 3}
_WARM = 1  # steps of each: the first learns, and has no states to read
_WIDTH, _BLOCKS, _VOCABULARY = 512, 12, 4096
_BUDGET = "host=64GiB"  # its weights stream in any case


class _Step(NamedTuple):
    """One step of the small model.

    Attributes:
        compute_s: forward and backward without their stalls.
        moved: bytes that lanes moved meanwhile.
        optimizer_s: of the streamed step of the optimizer.
    """

    tokens: int
    compute_s: float
    moved: int
    optimizer_s: float
    commit_s: float


def add_rehearsal(machine: Machine, directory: Path, drive: str, *, quick: bool = False) -> Machine:
    """``machine``, which is this one, with the rates that only training shows.

    Args:
        directory: for the store of the small model; on the drive ``drive``.
        quick: fewer steps, for who rehearses often.

    Raises:
        OffloadError: the child failed; with the end of what it said.
        ConfigError: other rates, or the links of the drive, are not measured yet.
    """
    with TemporaryDirectory(dir=directory, prefix="offload-rehearsal-") as store:
        command = [sys.executable, "-m", __spec__.name, store, *["--quick"] * quick]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise OffloadError(
            f"a rehearsal of training in {directory} failed: "
            f"{lines[-1] if lines else f'exit code {done.returncode}'}"
        )
    said = json.loads(done.stdout)
    steps = [_Step(*figures) for figures in said["steps"]]
    few, many = (_median(steps, tokens) for tokens in (_FEW, _MANY))
    alone: dict[Work, float] = {
        "flush": FLUSHES / few.commit_s,
        **said["fixed"],
        **said["recoding"],
    }
    apart = {
        work: {int(pages): per_s for pages, per_s in said["mapped_pages"][work].items()}
        for work in MAPPED
    }
    bare = _with(machine, alone, apart=apart)
    alone_few, alone_many = (_simulated(bare, drive, tokens) for tokens in (_FEW, _MANY))
    slowness, lost_s = _solved(few, alone_few.compute_s, many, alone_many.compute_s)
    both = Costs(bare, drive).both_bytes_per_s
    found: dict[Work, float] = {
        **alone,
        "tiles": both * alone_few.optimizer_s / few.optimizer_s,
    }
    if lost_s > 0.0:
        found["moves"] = 1 / lost_s
    return _with(machine, found, slowness, apart=apart)


def _median(steps: list[_Step], tokens: int) -> _Step:
    alike = [step for step in steps if step.tokens == tokens][_WARM:]
    return _Step(*map(statistics.median, zip(*alike, strict=True)))


def _solved(few: _Step, few_s: float, many: _Step, many_s: float) -> tuple[float, float]:
    """How much slower operations are than measured alone, and the seconds lost for each byte.

    From two equations: seconds of computing = slowness * those of the operations + loss * bytes.
    """
    both_ways = few_s * many.moved - many_s * few.moved
    slowness = (few.compute_s * many.moved - many.compute_s * few.moved) / both_ways
    slowness = min(max(slowness, 1.0), _MOST_SLOWNESS)
    return slowness, (few.compute_s - slowness * few_s) / few.moved


def _with(
    machine: Machine,
    found: Mapping[Work, float],
    slowness: float = 1.0,
    *,
    apart: Mapping[Work, Mapping[int, float]] = MappingProxyType({}),
) -> Machine:
    """The machine with these rates and none of a former rehearsal, its kernels so much slower.

    Args:
        apart: rates of work on pages, by how many pages these are apart.
    """
    former = (
        replace(rate, per_s=rate.per_s / slowness) if rate.work in _KERNELS else rate
        for rate in machine.compute
        if rate.work not in REHEARSED
    )
    sized: list[tuple[Work, int, float]] = [(work, 1, per_s) for work, per_s in found.items()]
    for work, by_pages in apart.items():
        sized += [(work, pages, per_s) for pages, per_s in by_pages.items()]
    rates = (
        ComputeRate(processor="cpu", work=work, dtype="float32", size=size, per_s=per_s)
        for work, size, per_s in sized
    )
    return replace(machine, compute=(*former, *rates))


def _simulated(machine: Machine, drive: str, tokens: int) -> "StepFinished":
    """The second step of the small model, whose weights stream."""
    from offload.allocator.units import parse_nbytes
    from offload.swap.plan import choose_chunk_numel, make_plan
    from offload.swap.planning.compiled import compile_program
    from offload.swap.planning.simulate import Simulation

    program, budget_nbytes = _program(tokens), parse_nbytes(_BUDGET.removeprefix("host="))
    chunk_numel = choose_chunk_numel(budget_nbytes)
    plan = make_plan(
        program.census, budget_nbytes=budget_nbytes, baseline_nbytes=0, chunk_numel=chunk_numel
    )
    compiled = compile_program(program, Costs(machine, drive))
    simulation = Simulation(compiled, plan, chunk_numel=chunk_numel)
    simulation.step()
    return simulation.keep_streaming().step().finished


@cache
def _program(tokens: int) -> "Program":
    import torch

    from offload.swap.planning.tracing import fake_mode, trace_step

    with fake_mode():
        model = _model()
        batch = torch.zeros(1, tokens, dtype=torch.int64)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        return trace_step(
            model, lambda model: _loss(model, batch), tokens=tokens, optimizer=optimizer
        )


def _model() -> "nn.Module":
    """A decoder: what is trained here most."""
    from torch import nn

    blocks = [
        nn.TransformerEncoderLayer(
            _WIDTH, 8, 4 * _WIDTH, dropout=0.0, activation="gelu", norm_first=True, bias=False
        )
        for _ in range(_BLOCKS)
    ]
    return nn.Sequential(nn.Embedding(_VOCABULARY, _WIDTH), *blocks, nn.Linear(_WIDTH, _VOCABULARY))


def _loss(model: "nn.Module", tokens: "torch.Tensor") -> "torch.Tensor":
    from torch.nn.functional import cross_entropy

    logits: torch.Tensor = model(tokens)
    return cross_entropy(logits.flatten(0, 1), tokens.flatten())


def _rehearse(directory: str, counts: Mapping[int, int]) -> list[_Step]:
    import torch

    import offload
    from offload.tiers.events import StepFinished, from_json

    torch.manual_seed(0)
    with offload.init(budget=_BUDGET, nvme=directory):
        model = _model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    run = Path(directory, "run")
    engine = offload.attach(model, optimizer, record=run)
    engine.keep_streaming()
    totals, moved = engine.gradients.journal.totals, []
    lengths = [tokens for tokens, count in counts.items() for _ in range(count)]
    for tokens in lengths:
        before = totals.read_nbytes + totals.written_nbytes
        _loss(model, torch.randint(_VOCABULARY, (1, tokens))).backward()
        moved.append(totals.read_nbytes + totals.written_nbytes - before)
        optimizer.step()
        optimizer.zero_grad()
    engine.detach()
    (log,) = run.glob("*.jsonl")
    events = map(from_json, log.read_text().splitlines())
    steps = [event for event in events if isinstance(event, StepFinished)]
    return [
        _Step(tokens, step.compute_s, nbytes, step.optimizer_s, step.commit_s)
        for tokens, step, nbytes in zip(lengths, steps, moved, strict=True)
    ]


if __name__ == "__main__":
    from offload.planner.fixed_costs import measure_fixed_costs
    from offload.planner.mapped_pages import measure_mapped_pages
    from offload.planner.recoding import measure_recoding

    said = {
        "recoding": measure_recoding(),
        "mapped_pages": measure_mapped_pages(Path(sys.argv[1])),
        "fixed": measure_fixed_costs(Path(sys.argv[1], "small"), _BUDGET),
    }
    counts = _QUICK_STEPS if "--quick" in sys.argv else _STEPS
    sys.stdout.write(json.dumps({**said, "steps": _rehearse(sys.argv[1], counts)}))
