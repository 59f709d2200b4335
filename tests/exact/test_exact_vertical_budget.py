"""Micro-batches that go through the model together stay within the budget, in bytes and bits."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = """
import json, sys
import torch, xxhash
from torch import nn
from torch.nn import functional as F
import offload
from offload.tiers import hostmem
from offload.tiers.events import ListRecorder, Move

budget, place, way, in_backward, count = sys.argv[1:]
count = int(count)
torch.manual_seed(0)
torch.set_num_threads(1)

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(768)
        self.up = nn.Linear(768, 3072)
        self.down = nn.Linear(3072, 768)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(4096, 768)
        self.blocks = nn.ModuleList(Block() for _ in range(6))
        self.head = nn.Linear(768, 4096, bias=False)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), tokens.flatten())

with offload.init(budget=f"host={budget}MiB", nvme=place):
    model = Model()
optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
config = {}
if in_backward == "in backward":
    config = {"step_in_backward": True, "accumulation_steps": count}
with offload.attach(model, optimizer, commit="never", config=config) as engine:
    for step in range(4):
        engine._journal.recorder = recorder = ListRecorder()
        generator = torch.Generator().manual_seed(step)
        batches = torch.randint(4096, (count, 1, 64), generator=generator)
        if way == "vertical":
            engine.accumulate(batches, lambda tokens: model(tokens) / count)
        else:
            for tokens in batches:
                (model(tokens) / count).backward()
        engine._runtime.lanes.drain()
        moved = {}
        for event in recorder.events:
            if isinstance(event, Move):
                key = f"{event.role} {'in' if event.dst == 'host' else 'out'}"
                moved[key] = moved.get(key, 0) + event.nbytes
        optimizer.step()
        optimizer.zero_grad()
    peak = hostmem.peak_resident_nbytes()
    digest = xxhash.xxh3_64()
    for parameter in model.parameters():
        digest.update(parameter.detach().numpy().tobytes())
print(json.dumps({
    "digest": digest.hexdigest(), "peak_nbytes": peak, "moved": moved, "notices": engine.notices,
    "baseline_nbytes": engine.plan.baseline_nbytes, "resident": len(engine.plan.resident),
}))
"""
MIB = 1 << 20
GRADIENTS_NBYTES = 6 * 2 * 768 * 3072 * 4 + 2 * 4096 * 768 * 4
LOOKED_UP_NBYTES = 4 * 64 * 768 * 4  # of the tokens of four micro-batches


def run(budget_mib: int, place: Path, *options: str) -> dict[str, Any]:
    place.mkdir()
    script = place / "train.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(budget_mib), str(place / "nvme"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.slow
@pytest.mark.parametrize("step", ["behind", "in backward"])
def test_a_tight_budget_holds(step: str, tmp_path: Path) -> None:
    ample = run(4096, tmp_path / "ample", "horizontal", "behind", "4")
    budget_mib = ample["baseline_nbytes"] // MIB + (150 if step == "behind" else 200)
    loop = run(budget_mib, tmp_path / "loop", "horizontal", step, "4")
    together = run(budget_mib, tmp_path / "together", "vertical", step, "4")
    for result in (loop, together):
        assert result["digest"] == ample["digest"]
        assert result["peak_nbytes"] <= budget_mib * MIB
    moved = [sum(result["moved"].values()) for result in (together, loop)]
    assert moved[0] < moved[1]
    if step == "behind":
        assert together["moved"]["gradient out"] <= GRADIENTS_NBYTES
    else:
        assert together["moved"]["gradient out"] <= LOOKED_UP_NBYTES  # nothing but these rows
