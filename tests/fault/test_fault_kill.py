"""kill -9 at random moments, again and again: the end is as if nothing had happened."""

import random
from pathlib import Path

import pytest

from forked import Forked

SCRIPT = """
import sys, time
from pathlib import Path
import torch, xxhash
from torch import nn
from torch.nn import functional as F
import offload
from offload.tiers import home

place, steps, paths = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
home.UNIT_NBYTES = 16 << 10  # every weight is on every path
nvme = [place / f"nvme{path}" for path in range(paths)]
config = {"step_in_backward": "in backward" in sys.argv[4]}
rounded = [precision for precision in ("bf16", "8bit") if precision in sys.argv[4]]
config["state_precision"] = (*rounded, "exact")[0]
half = torch.bfloat16 if "masters" in sys.argv[4] else torch.float32
config["master_weights"] = "fp32" if "masters" in sys.argv[4] else "none"
streaming = "streaming" in sys.argv[4]
torch.manual_seed(0)
torch.set_num_threads(1)
model = nn.Sequential(nn.Linear(400, 600), nn.Dropout(0.2), nn.Linear(600, 400)).to(half)
optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
engine = offload.attach(
    model, optimizer, budget="8GiB", nvme=nvme, commit="manual", config=config
)
if streaming:
    engine.keep_streaming()
if engine.resumed:
    schedule.load_state_dict(engine.extra["schedule"])
begun = engine.step
while engine.step < steps:
    generator = torch.Generator().manual_seed(engine.step)
    x = torch.randn(32, 400, generator=generator).to(half)
    F.mse_loss(model(x), x).backward()
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    engine.commit({"schedule": schedule.state_dict()})
    print(engine.step, flush=True)
kept = 0 if rounded or "masters" in sys.argv[4] else 4
assert streaming or begun == steps or len(engine.plan.resident_states) == kept
digest = xxhash.xxh3_64()
for parameter in model.parameters():
    digest.update(parameter.detach().view(torch.uint8).numpy().tobytes())
for state in optimizer.state.values():
    digest.update(state["exp_avg_sq"].view(torch.uint8).numpy().tobytes())
    if "master_low" in state:
        digest.update(state["master_low"].numpy().tobytes())
print("digest", digest.hexdigest(), flush=True)
"""


def words_of(place: Path, steps: int, paths: int, step: str) -> list[str]:
    script = place / "train.py"
    script.write_text(SCRIPT)
    return [str(script), str(place), str(steps), str(paths), step]


def finish(place: Path, steps: int, paths: int, step: str) -> str:
    """The last line of a run in a process that nothing happens to."""
    return Forked(*words_of(place, steps, paths, step)).finish().splitlines()[-1]


def killed_and_resumed(place: Path, steps: int, paths: int, step: str, kills: int) -> str:
    """Kill the run ``kills`` times, each a random instant after a random number of steps."""
    moments = random.Random(kills)
    for _ in range(kills):
        child = Forked(*words_of(place, steps, paths, step))
        assert child.output.readline()
        for _ in range(moments.randint(0, 2)):
            child.output.readline()
        # Somewhere inside a later step: forward, optimizer, commit, whatever it meets.
        child.process.join(moments.uniform(0, 0.03))
        child.kill()
    return finish(place, steps, paths, step)


@pytest.mark.parametrize(
    ("kills", "steps", "paths", "step"),
    [
        (4, 40, 1, "behind backward"),
        (3, 30, 1, "streaming"),
        pytest.param(3, 30, 1, "in backward", marks=pytest.mark.slow),
        pytest.param(3, 20, 1, "in backward, masters", marks=pytest.mark.slow),
        pytest.param(3, 20, 1, "in backward, bf16", marks=pytest.mark.slow),
        pytest.param(3, 20, 2, "in backward, 8bit", marks=pytest.mark.slow),
        pytest.param(3, 20, 2, "behind backward", marks=pytest.mark.slow),
        pytest.param(20, 200, 1, "behind backward", marks=pytest.mark.slow),
        pytest.param(20, 200, 1, "streaming", marks=pytest.mark.slow),
        pytest.param(20, 200, 3, "behind backward", marks=pytest.mark.slow),
        pytest.param(20, 200, 1, "in backward", marks=pytest.mark.slow),
    ],
)
def test_killed_runs_end_like_an_undisturbed_one(
    kills: int, steps: int, paths: int, step: str, tmp_path: Path
) -> None:
    calm, disturbed = tmp_path / "calm", tmp_path / "disturbed"
    for place in (calm, disturbed):
        place.mkdir()
    # Over several paths, with a step in backward, and with states in memory the same comes out.
    way = f"streaming, {step.partition(', ')[2]}"
    expected = finish(calm, steps, 1, way)
    assert expected.startswith("digest ")
    assert killed_and_resumed(disturbed, steps, paths, step, kills) == expected
    for path in range(1, paths):
        data = disturbed / f"nvme{path}" / "offload-store" / "data"
        assert data.stat().st_size > 1 << 20
