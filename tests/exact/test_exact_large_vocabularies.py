"""Embeddings whose gradients are made of rows train as in memory, and within less of it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from torch import nn
from torch.nn import functional as F

import offload
from forked import Forked
from offload.allocator.errors import ConsumedGradientError
from offload.engine import Engine

STEPS = 20
VOCABULARY = 3000
TABLE = 100_000, 512
SCRIPT = """
import json, sys
import offload
from offload.tiers import hostmem
from test_exact_large_vocabularies import adamw, digest_of, mostly_a_table, train_table

budget, place, in_backward, parts = sys.argv[1:]
with offload.init(budget=f"host={budget}MiB", nvme=place):
    model = mostly_a_table()
optimizer = adamw(model)
config = {"step_in_backward": True, "accumulation_steps": int(parts)}
config = config if in_backward == "in backward" else {}
with offload.attach(model, optimizer, commit="never", config=config) as engine:
    if parts == "0":  # nothing but the baseline is asked for
        print(json.dumps({"baseline_nbytes": engine.plan.baseline_nbytes}))
        sys.exit()
    train_table(model, optimizer, int(parts))
    peak = hostmem.peak_resident_nbytes()
    digest = digest_of(model)
print(json.dumps({
    "digest": digest, "peak_nbytes": peak, "baseline_nbytes": engine.plan.baseline_nbytes,
    "notices": engine.notices,
}))
"""
SMALLEST = """
import json, sys
from torch import nn
import offload
from offload.allocator.errors import BudgetError
from offload.tiers.hostmem import resident_nbytes
from test_exact_large_vocabularies import adamw

table, place = sys.argv[1:]
model = nn.Sequential(getattr(nn, table)(1_000_000, 64), nn.Linear(64, 8))
optimizer, before = adamw(model), resident_nbytes()[0]
try:
    offload.attach(model, optimizer, budget="host=1MiB", nvme=place)
except BudgetError as error:
    print(json.dumps({"needed_nbytes": error.needed_nbytes - before}))
"""
TABLE_NBYTES = TABLE[0] * TABLE[1] * 4


class Net(nn.Module):
    """Token and position lookups; a head that is tied, or of its own."""

    def __init__(self, *, tied: bool = True, padding: int | None = None, twice: bool = False):
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, 64, padding_idx=padding)
        self.positions = nn.Embedding(512, 64)
        self.body = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 256), nn.GELU())
        self.down = nn.Linear(256, 64)
        self.head = nn.Linear(64, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.tokens.weight
        self.twice = twice

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        if self.twice:
            x = x + 0.5 * self.tokens(tokens.flip(1))
        return self.head(x + self.down(self.body(x)))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 1e-3, fused=True)


def loss_of(model: Any, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCABULARY, (4, 32), generator=generator) // (1 + step % 3 * 50)
    return F.cross_entropy(model(tokens).float().flatten(0, 1), tokens.flatten())


def loop(model: Any, optimizer: Any, _engine: Engine | None) -> list[float]:
    losses = []
    for step in range(STEPS):
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def clipped_loop(model: Any, optimizer: Any, _engine: Engine | None) -> list[float]:
    """Accumulation, clipping, and a gradient that is looked at."""
    values = []
    for step in range(STEPS):
        for part in range(1 + step % 3):
            (loss_of(model, 7 * step + part) / 3).backward()
            values.append(float(model.tokens.weight.grad.norm()))
        values.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        optimizer.step()
        optimizer.zero_grad(set_to_none=step % 2 == 0)
    return values


VARIANTS: dict[str, Any] = {
    "tied": Net,
    "untied": lambda: Net(tied=False),
    "padded": lambda: Net(tied=False, padding=0),
    "tied, padded": lambda: Net(padding=0),
    "twice": lambda: Net(tied=False, twice=True),
    "tied, twice": lambda: Net(twice=True),
    "bfloat16": lambda: Net(tied=False).bfloat16(),
    "tied bfloat16": lambda: Net().bfloat16(),
}


@pytest.mark.parametrize("run", [loop, clipped_loop])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_bits_as_in_memory(variant: str, run: Any, compare: Any) -> None:
    same = compare(VARIANTS[variant], adamw, run)
    assert same.moved_roles() >= {"weight", "gradient", "state"}


@pytest.mark.parametrize("variant", ["tied", "untied", "twice", "bfloat16"])
def test_the_same_bits_as_in_memory_when_stepped_in_backward(variant: str, compare: Any) -> None:
    compare(VARIANTS[variant], adamw, loop, config={"step_in_backward": True})


@pytest.mark.parametrize("variant", ["untied", "tied"])
def test_accumulated_and_then_stepped_in_backward(variant: str, compare: Any) -> None:
    def accumulated(model: Any, optimizer: Any, _engine: Engine | None) -> list[float]:
        for step, (parts, dropped) in enumerate([(3, 0), (2, 1), (3, 0), (1, 1), (3, 0), (2, 0)]):
            for part in range(parts):
                loss_of(model, 7 * step + part).backward()
            if not dropped:
                optimizer.step()
            optimizer.zero_grad()
        return []

    config = {"step_in_backward": True, "accumulation_steps": 3}
    compare(VARIANTS[variant], adamw, accumulated, config=config)


def test_a_gradient_that_was_used_up_says_so(starve: Any) -> None:
    model = Net(tied=False)
    optimizer = adamw(model)
    starve(model, optimizer, config={"step_in_backward": True})
    for step in range(2):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.requires_grad_(False)
    model.tokens.requires_grad_(True)
    loss_of(model, 3).backward()
    with pytest.raises(ConsumedGradientError, match=r"tokens\.weight"):
        loss_of(model, 4).backward()


def test_the_same_bits_in_memory_that_suffices(tmp_path: Path) -> None:
    models = []
    for attached in (False, True):
        torch.manual_seed(0)
        model = Net(tied=False)
        optimizer = adamw(model)
        if attached:
            with offload.attach(model, optimizer, budget="host=8GiB", nvme=tmp_path) as engine:
                losses = clipped_loop(model, optimizer, engine)
                assert "tokens.weight" in engine.plan.resident_states
        else:
            expected = clipped_loop(model, optimizer, None)
        models.append(model)
    assert losses == expected
    for mine, theirs in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(mine, theirs)


def mostly_a_table() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(*TABLE), nn.Linear(TABLE[1], 256), nn.Linear(256, 8))


def train_table(model: Any, optimizer: Any, parts: int) -> None:
    for step in range(2):
        for part in range(parts):
            generator = torch.Generator().manual_seed(10 * step + part)
            model(torch.randint(TABLE[0], (2, 256), generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def digest_of(model: nn.Module) -> str:
    digest = xxhash.xxh3_64()
    for parameter in model.parameters():
        for part in parameter.detach().flatten().split(1 << 20):
            digest.update(part.numpy().tobytes())  # copies of the test's own
    return digest.hexdigest()


def train(budget_mib: int, place: Path, *arguments: str) -> dict[str, Any]:
    """What a process of its own tells: nothing that other tests left is in its memory."""
    paths = f"{Path(__file__).parent}:{Path(__file__).parents[1]}"
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(budget_mib), str(place), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("mode", "parts"),
    [
        ("behind it", 2),
        pytest.param("behind it", 1, marks=SLOW),
        pytest.param("in backward", 1, marks=SLOW),
        pytest.param("in backward", 2, marks=SLOW),
    ],
)
def test_a_model_that_is_mostly_a_table_trains_in_less_than_the_table(
    mode: str, parts: int, tmp_path: Path
) -> None:
    """Where a table's gradient in memory would take more than all that the budget leaves."""
    before = train(4096, tmp_path / "ample", "behind it", "0")["baseline_nbytes"]
    budget = (before + TABLE_NBYTES * 3 // 4) >> 20
    small = train(budget, tmp_path / "small", mode, str(parts))
    assert small["peak_nbytes"] <= budget << 20
    assert small["notices"] == []
    model = mostly_a_table()
    train_table(model, adamw(model), parts)
    assert small["digest"] == digest_of(model)


def test_the_smallest_budget_counts_no_table_that_is_only_looked_up(tmp_path: Path) -> None:
    rows, whole = (
        json.loads(Forked("-c", SMALLEST, table, tmp_path).finish())["needed_nbytes"]
        for table in ("Embedding", "EmbeddingBag")
    )
    assert 200 << 20 < whole - rows <= 256 << 20
