"""States stay in memory as far as a budget reaches, and the process never outgrows it."""

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
import offload
from offload.tiers import hostmem

budget, place, commit, foreach = sys.argv[1:]
torch.manual_seed(0)
torch.set_num_threads(1)
with offload.init(budget=f"host={budget}MiB", nvme=place):
    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(16)))
optimizer = torch.optim.AdamW(model.parameters(), 1e-3, foreach=foreach == "foreach")
with offload.attach(model, optimizer, commit=commit) as engine:
    for step in range(5):
        x = torch.randn(16, 1024, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 3 and commit == "manual":
            engine.commit()
    digest = xxhash.xxh3_64()
    for parameter in model.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    plan = engine.plan
    peak = hostmem.peak_resident_nbytes()
print(json.dumps({
    "digest": digest.hexdigest(), "peak_nbytes": peak, "weights": len(plan.resident),
    "states": len(plan.resident_states), "baseline_nbytes": plan.baseline_nbytes,
}))
"""
MIB = 1 << 20
LAYERS = 16


def run(budget_mib: int, place: Path, *options: str) -> dict[str, Any]:
    script = place / "train.py"
    place.mkdir(exist_ok=True)
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(budget_mib), str(place / "nvme"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize("kernels", [pytest.param("foreach", marks=pytest.mark.slow), "one by one"])
def test_more_budget_keeps_more_and_none_is_exceeded(kernels: str, tmp_path: Path) -> None:
    ample = run(4096, tmp_path / "ample", "never", kernels)
    assert (ample["weights"], ample["states"]) == (2 * LAYERS, 2 * LAYERS)
    baseline_mib = ample["baseline_nbytes"] // MIB
    kept = []
    # 64 MiB of weights, 192 MiB of gradients and states, beside what a step needs at once.
    for spare, commit in ((110, "manual"), (260, "step"), (320, "manual"), (520, "step")):
        budget_mib = baseline_mib + spare
        result = run(budget_mib, tmp_path / str(spare), commit, kernels)
        assert result["digest"] == ample["digest"]
        assert result["peak_nbytes"] <= budget_mib * MIB
        kept.append((result["weights"], result["states"]))
    assert kept == sorted(kept)
    assert kept[0][1] == 0
    assert any(0 < states < 2 * LAYERS for _, states in kept)
    assert kept[-1] == (2 * LAYERS, 2 * LAYERS)
