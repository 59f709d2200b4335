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
SLOW_WRITES_SCRIPT = """
import json, sys
import torch, xxhash
from torch import nn
import offload
from offload.tiers import hostmem
from offload.tiers.engines.registry import wrapping
from offload.tiers.wrappers import Link, ThrottledEngine

class SlowWrites(ThrottledEngine):
    def read(self, offset, address, nbytes):
        return self.inner.read(offset, address, nbytes)

budget, place, way = sys.argv[1:]
torch.manual_seed(0)
torch.set_num_threads(1)
slow = Link(bytes_per_s=150e6)
with wrapping(lambda engine: SlowWrites(engine, slow)):
    init = offload.init(budget=f"host={budget}MiB", nvme=place)
with init:
    model = nn.Sequential(
        nn.Embedding(4096, 2048), *(nn.Linear(2048, 2048) for _ in range(4)), nn.Linear(2048, 4096)
    )
optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
config = {"step_in_backward": way == "in backward", "step_in_forward": way == "in forward"}
with offload.attach(model, optimizer, commit="never", config=config) as engine:
    for step in range(3):
        x = torch.randint(4096, (16,), generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    peak = hostmem.peak_resident_nbytes()
    digest = xxhash.xxh3_64()
    for parameter in model.parameters():
        digest.update(parameter.detach().numpy().tobytes())  # copies of the script's own
print(json.dumps({
    "digest": digest.hexdigest(), "peak_nbytes": peak,
    "baseline_nbytes": engine.plan.baseline_nbytes,
}))
"""
MIB = 1 << 20
LAYERS = 16


def run(budget_mib: int, place: Path, *options: str, text: str = SCRIPT) -> dict[str, Any]:
    script = place / "train.py"
    place.mkdir(exist_ok=True)
    script.write_text(text)
    command = [sys.executable, str(script), str(budget_mib), str(place / "nvme"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["foreach", "one by one"])
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


@pytest.mark.slow
@pytest.mark.parametrize("way", ["in backward", "in forward"])
def test_a_step_beside_a_pass_waits_where_writes_are_slow(way: str, tmp_path: Path) -> None:
    """Held weights and tiles wait in memory, in backward gradients, too, the largest one last."""
    ample = run(4096, tmp_path / "ample", "behind", text=SLOW_WRITES_SCRIPT)
    budget_mib = ample["baseline_nbytes"] // MIB + 130
    result = run(budget_mib, tmp_path / "tight", way, text=SLOW_WRITES_SCRIPT)
    assert result["digest"] == ample["digest"]
    assert result["peak_nbytes"] <= budget_mib * MIB
