"""Training by each I/O engine gives the very bits of the same training in memory."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from offload.engine import Engine
from offload.tiers.engines.registry import wrapping
from offload.tiers.wrappers import (
    Fault,
    FaultKind,
    FaultyEngine,
    Link,
    RecordingEngine,
    Request,
    SeededFaults,
    ThrottledEngine,
)

STEPS = 20
ENGINES = [
    "threads",
    "aiofiles",
    pytest.param("deepspeed", marks=pytest.mark.peers),
    pytest.param("kvikio", marks=pytest.mark.gpu),
]


def make_model() -> nn.Module:
    return nn.Sequential(
        nn.Linear(256, 512), nn.GELU(), nn.Dropout(0.1), nn.Linear(512, 512), nn.Linear(512, 256)
    )


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 1e-3, fused=True)


def loop(
    model: nn.Module, optimizer: Any, _engine: Engine | None, *, steps: int = STEPS
) -> list[float]:
    losses = []
    for step in range(steps):
        x = torch.randn(128, 256, generator=torch.Generator().manual_seed(step))
        loss = F.mse_loss(model(x), x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_is_exact(name: str, compare: Callable[..., Any]) -> None:
    requests: list[Request] = []
    with wrapping(lambda engine: RecordingEngine(engine, requests)):
        found = compare(make_model, adamw, loop, config={"io_engine": name})
    assert found.moved_roles() == {"weight", "gradient", "state", "activation"}
    assert {request.verb for request in requests} == {"read", "write"}
    assert found.engine._runtime.store.tier.file.engine.inner.name == name


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))]
)
def test_short_and_late_requests_change_no_bit(seed: int, compare: Callable[..., Any]) -> None:
    plan = SeededFaults(
        seed, 0.3, Fault(kind=FaultKind.SHORT), Fault(kind=FaultKind.STALL, seconds=0.001)
    )
    with wrapping(lambda engine: FaultyEngine(engine, plan)):
        compare(make_model, adamw, partial(loop, steps=6))
    assert plan.met > 30


def test_a_throttled_link_changes_no_bit_and_bounds_the_rate(compare: Callable[..., Any]) -> None:
    slept: list[float] = []
    link = Link(bytes_per_s=1e9, latency_s=1e-4, clock=lambda: sum(slept), sleep=slept.append)
    with wrapping(lambda engine: ThrottledEngine(engine, link)):
        found = compare(make_model, adamw, partial(loop, steps=6))
    totals = found.engine._journal.totals
    assert link.book(0) >= (totals.read_nbytes + totals.written_nbytes) / 1e9 * 0.9
