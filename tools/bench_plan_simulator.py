"""The simulator: blocks of a step simulated each second, and what planning a deep model takes."""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchlib import Result, median_of
from offload.planner.machines import library_machine
from offload.swap.planning.predict import Baseline, Settings, least_budget, predict
from offload.swap.planning.program import Program
from offload.swap.planning.tracing import fake_mode, trace_step
from offload.tiers.machine import Machine
from plan_traces import Shape, model_of

_REPEATS = 5
_BASELINE = Baseline(attach_nbytes=400 << 20, running_nbytes=25 << 20)
_GPT2 = (
    Shape(family="gpt2", layers=12, width=768, tokens=512),
    Shape(family="gpt2", layers=36, width=1280, tokens=1024),
)
_LLAMA = (
    Shape(family="llama", layers=16, width=2048, tokens=512),
    Shape(family="llama", layers=32, width=4096, tokens=1024),
    Shape(family="llama", layers=80, width=8192, tokens=2048),
)
_FACTORS = (1.1, 2.0)  # of the least budget: much waits for each other's room, and little


@dataclass(frozen=True)
class _Case:
    name: str
    layers: int
    program: Callable[[], Program]


class _Block(nn.Module):
    """25 tensors: all linear layers with biases, norms of queries and keys, scaled branches."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.projections = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        self.query_norm, self.key_norm = nn.LayerNorm(64), nn.LayerNorm(64)
        self.gate, self.up = nn.Linear(width, 3 * width), nn.Linear(width, 3 * width)
        self.down = nn.Linear(3 * width, width)
        self.scale = nn.ParameterList(torch.ones(width) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (batch, sequence, width)
        query, key, value, out = self.projections
        h = self.norms[0](x)
        q, k, v = (each(h).unflatten(-1, (-1, 64)).transpose(1, 2) for each in (query, key, value))
        mixed = F.scaled_dot_product_attention(
            self.query_norm(q), self.key_norm(k), v, is_causal=True
        )
        x = x * self.scale[2] + out(mixed.transpose(1, 2).flatten(2)) * self.scale[0]
        h = self.norms[1](x)
        y: torch.Tensor = x + self.down(F.silu(self.gate(h)) * self.up(h)) * self.scale[1]
        return y


class _Decoder(nn.Module):
    def __init__(self, layers: int, width: int, vocabulary: int = 32_000) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(layers))
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:  # (batch, sequence) of int64
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(x)
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def measure(result: Result, *, quick: bool) -> None:
    """A row for each model and budget, and the checks."""
    machine = _with_room(library_machine("server-h200"))
    shapes = _GPT2[:1] if quick else (*_GPT2, *_LLAMA)
    cases = [_Case(shape.name, shape.layers, partial(_traced, shape)) for shape in shapes]
    layers = 8 if quick else 80
    many = _Case(f"{layers} blocks of 25 tensors", layers, partial(_traced_many, layers))
    rates: list[float] = []
    for case in (*cases, many):
        rows = _rows(case, machine)
        for row in rows:
            result.add(**row)
        rates += [row["blocks_per_s"] for row in rows]
    result.check("blocks of a step simulated each second, least", min(rates), 2000)
    planned_s = max(row["predict_cpu_s"] for row in rows)
    result.at_most(f"seconds to plan and simulate {many.name}", planned_s, 1)
    result.notes.append(
        "blocks_per_s: blocks x the four steps of a prediction, over its seconds; budget: over the "
        "least; predict: plan, and simulation of four steps; solve: finding the least budget, of "
        "so many predictions; trace: the step on fake tensors; seconds of the processor, the "
        "median of five but for trace and solve"
    )


def _rows(case: _Case, machine: Machine) -> list[dict[str, Any]]:
    drive = next(tier.name for tier in machine.tiers if tier.kind == "file")
    began_s = time.process_time()
    program = case.program()
    traced_s = time.process_time() - began_s
    settings = Settings(budget_nbytes=0, drive=drive)
    began_s = time.process_time()
    least = least_budget(program, machine, settings, _BASELINE).settings.budget_nbytes
    solved_s = time.process_time() - began_s
    rows = []
    for factor in _FACTORS:
        settings = Settings(budget_nbytes=int(least * factor), drive=drive)
        found = predict(program, machine, settings, _BASELINE)
        predict_s = median_of(
            _REPEATS, partial(_seconds, partial(predict, program, machine, settings, _BASELINE))
        )
        rows.append(
            {
                "model": case.name,
                "parameters": f"{program.parameters / 1e6:,.0f}M",
                "tensors": len(program.census.weights),
                "events": len(program.events),
                "budget": factor,
                "trace_cpu_s": traced_s,
                "predict_cpu_s": predict_s,
                "blocks_per_s": case.layers * len(found.steps) / predict_s,
                "solve_cpu_s": solved_s,
                "moved_nbytes": found.last.finished.read_nbytes
                + found.last.finished.written_nbytes,
            }
        )
    return rows


def _seconds(call: Callable[[], Any]) -> float:
    began_s = time.process_time()  # one thread computes: other processes' work is not counted
    call()
    return time.process_time() - began_s


def _with_room(machine: Machine) -> Machine:
    """``machine`` with drives of any size: only rates count here."""
    tiers = tuple(
        dataclasses.replace(tier, capacity_nbytes=1 << 50, free_nbytes=1 << 50)
        for tier in machine.tiers
    )
    return dataclasses.replace(machine, tiers=tiers)


def _traced(shape: Shape) -> Program:
    with fake_mode():
        model = model_of(shape).train()
        tokens = torch.zeros((shape.batch, shape.tokens), dtype=torch.int64)
        return _program(model, lambda model: model(input_ids=tokens, labels=tokens).loss, tokens)


def _traced_many(layers: int) -> Program:
    with fake_mode():
        tokens = torch.zeros((1, 512), dtype=torch.int64)
        return _program(_Decoder(layers, 1024), lambda model: model(tokens), tokens)


def _program(model: nn.Module, loss_of: Callable[..., Any], tokens: torch.Tensor) -> Program:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    return trace_step(model, loss_of, tokens=tokens.numel(), optimizer=optimizer)
