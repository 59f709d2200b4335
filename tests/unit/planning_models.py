"""Small programs, machines and settings that the planning tests share."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from offload.planner.machines import library_machine
from offload.swap.planning.predict import Baseline, Prediction, Settings
from offload.swap.planning.program import Program
from offload.swap.planning.tracing import fake_mode, trace_step
from offload.swap.state_precision import EXACT, Precision
from offload.tiers.machine import Machine

MIB = 1 << 20
BASELINE = Baseline(attach_nbytes=300 * MIB, running_nbytes=20 * MIB)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unsqueeze(1) for part in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)
        return x + self.down(nn.functional.gelu(self.up(x)))


class Model(nn.Module):
    def __init__(self, width: int = 256, blocks: int = 3, vocabulary: int = 1000) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.register_buffer("scale", torch.ones(width))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens) * self.scale
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def model_in(dtype: torch.dtype) -> Model:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return Model()
    finally:
        torch.set_default_dtype(before)


def loss_of(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())


def tokens_of(length: int = 64) -> torch.Tensor:
    return torch.arange(length).remainder(1000).reshape(1, length)


def trace(
    make: Callable[[], nn.Module] = Model,
    length: int = 64,
    loss: Callable[..., torch.Tensor] = loss_of,
    precision: Precision = EXACT,
    rebuild_nbytes: int | None = None,
    **optimizer: Any,
) -> Program:
    with fake_mode():
        model = make()
        tokens = tokens_of(length)
        options = {"lr": 1e-3, "fused": True} | optimizer
        return trace_step(
            model,
            lambda model: loss(model, tokens),
            tokens=length,
            optimizer=torch.optim.AdamW(model.parameters(), **options),
            precision=precision,
            rebuild_nbytes=rebuild_nbytes,
        )


def machine() -> Machine:
    return library_machine("laptop-16gb")


DRIVE = "file:samsung-970-evo-plus-2tb"


def settings(mib: int) -> Settings:
    return Settings(budget_nbytes=mib * MIB, drive=DRIVE)


def check_books(found: Prediction) -> None:
    """Raise unless the parts of each step add up, and nothing is less than nothing."""
    for each in found.steps:
        step = each.finished
        parts = (step.compute_s, step.stall_s, step.optimizer_s, step.commit_s)
        assert sum(parts) == pytest.approx(step.step_s)
        assert all(part >= 0 for part in parts)
        assert each.busy_s["optimizer"] >= 0
        assert all(nbytes >= 0 for nbytes in each.peak_roles.values())
        assert step.peak_nbytes <= each.plan.budget_nbytes
