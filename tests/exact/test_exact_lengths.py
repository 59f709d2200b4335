"""Batches of many lengths: the bits of training in memory, within a budget, each with its plan."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from offload.engine import Engine

SCRIPT = """
import contextlib, json, random, sys
import torch, xxhash
from torch import nn
from torch.nn import functional as F
import offload
from offload.tiers import hostmem
from offload.tiers.events import ListRecorder, StepFinished

budget, place, lengths, accumulate, options, width, blocks = sys.argv[1:]
torch.manual_seed(0)
torch.set_num_threads(1)
VOCABULARY, WIDTH = 8192, int(width)

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        heads = self.qkv(self.norm(x)).unflatten(-1, (3, -1, 64)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        return x + F.dropout(self.down(F.gelu(self.up(x))), 0.1)

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(int(blocks)))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens, labels):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())

def batch(length):
    tokens = torch.randint(VOCABULARY, (2, length))
    return {"tokens": tokens, "labels": tokens}

in_memory = budget == "none"
with contextlib.ExitStack() as opened:
    if not in_memory:
        opened.enter_context(offload.init(budget=f"host={budget}MiB", nvme=place))
    model = Model()
optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
engine, refusals, losses, kept, before_nbytes = None, [], [], [], hostmem.peak_resident_nbytes()
if not in_memory:
    engine = offload.attach(model, optimizer, commit="never", config=json.loads(options))
    engine._journal.recorder = recorder = ListRecorder()
for count, length in enumerate(map(int, lengths.split(","))):
    if length < 0 and engine is not None:
        try:
            model(**batch(-length)).backward()
            optimizer.step()
        except offload.errors.BudgetError as error:
            refusals.append(str(error))
        torch.manual_seed(count)
        optimizer.zero_grad()
        continue
    torch.manual_seed(count)
    if length < 0:
        continue
    loss = model(**batch(length))
    loss.backward()
    losses.append(loss.item())
    if count % int(accumulate) == int(accumulate) - 1:
        optimizer.step()
        optimizer.zero_grad()
    if engine is not None:
        kept.append(engine.plan.kept_nbytes)
digest = xxhash.xxh3_64()
for parameter in model.parameters():
    digest.update(parameter.detach().numpy().tobytes())
result = {
    "digest": digest.hexdigest(), "losses": losses, "peak_nbytes": hostmem.peak_resident_nbytes()
}
if engine is not None:
    steps = [event for event in recorder.events if isinstance(event, StepFinished)]
    result |= {
        "refusals": refusals, "kept": kept, "buckets": [step.bucket for step in steps],
        "baseline_nbytes": engine.plan.baseline_nbytes, "notices": engine.notices,
    }
    engine.detach()
print(json.dumps(result))
"""
MIB = 1 << 20
LENGTHS = (96, 40, 512, 33, 480, 40, 40, 512, 40, 512)
TOO_LONG = 65536


def run(
    budget_mib: int | None,
    place: Path,
    lengths: tuple[int, ...],
    accumulate: int = 1,
    shape: tuple[int, int] = (384, 4),
    **options: Any,
) -> dict[str, Any]:
    place.mkdir()
    script = place / "train.py"
    script.write_text(SCRIPT)
    budget = "none" if budget_mib is None else str(budget_mib)
    listed, settings = ",".join(map(str, lengths)), json.dumps(options)
    command = [sys.executable, str(script), budget, str(place / "nvme"), listed, str(accumulate)]
    done = subprocess.run(
        [*command, settings, *map(str, shape)],
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.fixture(scope="module")
def baseline_mib(tmp_path_factory: pytest.TempPathFactory) -> int:
    ample = run(4096, tmp_path_factory.mktemp("ample") / "run", (40,))
    return int(ample["baseline_nbytes"]) // MIB


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("where", ["behind", "in backward"])
def test_lengths_at_random_keep_bits_and_budget(
    baseline_mib: int, where: str, accumulate: int, tmp_path: Path
) -> None:
    plain = run(None, tmp_path / "plain", LENGTHS, accumulate)
    options: dict[str, Any] = {}
    if where == "in backward":
        options = {"step_in_backward": True, "accumulation_steps": accumulate}
    budget_mib = baseline_mib + 260
    got = run(budget_mib, tmp_path / "tight", LENGTHS, accumulate, **options)
    assert got["losses"] == plain["losses"]
    assert got["digest"] == plain["digest"]
    assert got["peak_nbytes"] <= budget_mib * MIB < plain["peak_nbytes"]
    assert "2x512" in got["buckets"]
    if accumulate == 1:
        assert got["buckets"][:4] == ["2x96", "2x40", "2x512", "2x36"]
        short, long = (
            [kept for kept, found in zip(got["kept"], LENGTHS, strict=True) if found == length]
            for length in (40, 512)
        )
        assert short[-1] > long[-1]


def test_a_batch_that_cannot_fit_is_refused_before_its_forward(
    baseline_mib: int, tmp_path: Path
) -> None:
    lengths = (24, 2048, -TOO_LONG, 300, -TOO_LONG, 40)
    plain = run(None, tmp_path / "plain", lengths, shape=(64, 1))
    budget_mib = baseline_mib + 700
    got = run(budget_mib, tmp_path / "tight", lengths, shape=(64, 1))
    assert (got["losses"], got["digest"]) == (plain["losses"], plain["digest"])
    assert got["peak_nbytes"] <= budget_mib * MIB
    assert len(got["refusals"]) == 2
    for text in got["refusals"]:
        assert f"too small for a batch of 2x{TOO_LONG} ({2 * 2 * TOO_LONG * 8} bytes" in text
        assert "for 2x2048 took" in text
        assert "Nothing was computed" in text
        assert 2048 <= int(text.partition("Batches up to 2x")[2].partition(" ")[0]) < TOO_LONG


class Forks(nn.Module):
    """Takes one of two ways, as its input says."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(256, 256)
        self.ways = nn.ModuleList(nn.Linear(256, 256) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        ways = self.ways if x.shape[0] % 2 else reversed(self.ways)
        for way in ways:
            x = way(x).relu()
        return x


@pytest.mark.parametrize("counts", [(8, 8, 8, 8), (8, 9, 10, 11, 8, 9)])
def test_a_model_that_takes_another_way_is_told_of_once_and_has_the_same_bits(
    compare: Callable[..., Any], counts: tuple[int, ...]
) -> None:
    def loop(model: nn.Module, optimizer: Any, _engine: Engine | None) -> list[float]:
        losses = []
        for count in counts:
            loss = model(torch.randn(count, 256)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    got = compare(Forks, lambda model: torch.optim.AdamW(model.parameters(), 1e-3), loop)
    told = [text for text in got.engine.notices if "does not take the same way" in text]
    assert len(told) == (1 if len(set(counts)) > 1 else 0)
