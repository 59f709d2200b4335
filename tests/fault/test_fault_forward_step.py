"""Steps that are put off until the next forward: killed, interrupted, and with a failing disk."""

import errno
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import offload
from forked import Forked
from offload.allocator.errors import StepInterruptedError, TierIOError

SCRIPT = """
import sys
from pathlib import Path
import torch, xxhash
from torch import nn
from torch.nn import functional as F
import offload

place, steps = Path(sys.argv[1]), int(sys.argv[2])
torch.manual_seed(0)
torch.set_num_threads(1)
model = nn.Sequential(
    nn.Linear(400, 600), nn.BatchNorm1d(600), nn.Dropout(0.2), nn.Linear(600, 400)
)
optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
config = {"step_in_forward": True}
engine = offload.attach(model, optimizer, budget="8GiB", nvme=place / "nvme", config=config)
engine.keep_streaming()
while engine.step < steps:
    for group in optimizer.param_groups:
        group["lr"] = 1e-3 / (1 + engine.step)
    x = torch.randn(32, 400, generator=torch.Generator().manual_seed(engine.step))
    F.mse_loss(model(x), x).backward()
    assert not engine.step_pending
    optimizer.step()
    assert engine.step_pending == (engine.step > 1)
    optimizer.zero_grad()
    print(engine.step, flush=True)
digest = xxhash.xxh3_64()
for value in model.state_dict().values():
    digest.update(value.numpy().tobytes())
for state in optimizer.state.values():
    digest.update(state["exp_avg_sq"].numpy().tobytes())
    digest.update(state["step"].numpy().tobytes())
print("digest", digest.hexdigest(), flush=True)
"""


def words_of(place: Path, steps: int) -> list[str]:
    script = place / "train.py"
    script.write_text(SCRIPT)
    return [str(script), str(place), str(steps)]


def finish(place: Path, steps: int) -> str:
    """The last line of a run in a process that nothing is known of."""
    command = [sys.executable, *words_of(place, steps)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("kills", "steps"), [(4, 40), pytest.param(20, 200, marks=pytest.mark.slow)]
)
def test_killed_runs_end_like_an_undisturbed_one(kills: int, steps: int, tmp_path: Path) -> None:
    """Generators, statistics and settings are those of the step, not of the next forward."""
    for name in ("killed", "undisturbed"):
        (tmp_path / name).mkdir()
    moments = random.Random(kills)
    for _ in range(kills):
        child = Forked(*words_of(tmp_path / "killed", steps))
        assert child.output.readline()
        for _ in range(moments.randint(0, 2)):
            child.output.readline()
        child.process.join(moments.uniform(0, 0.03))
        child.kill()
    assert finish(tmp_path / "killed", steps) == finish(tmp_path / "undisturbed", steps)


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 300), nn.GELU(), nn.Linear(300, 256))


def attach(model: nn.Module, place: Path, **options: Any) -> tuple[Any, Any]:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    config = {"step_in_forward": True}
    engine = offload.attach(model, optimizer, budget="8GiB", nvme=place, config=config, **options)
    engine.keep_streaming()
    return engine, optimizer


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    x = torch.randn(16, 256, generator=torch.Generator().manual_seed(step))
    return F.mse_loss(model(x), x)


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()


def in_memory(steps: int) -> dict[str, torch.Tensor]:
    model = make_model()
    train(model, torch.optim.AdamW(model.parameters(), 1e-3), range(steps))
    return model.state_dict()


def same(one: nn.Module, values: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, values[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize("verb", ["read", "write"])
@pytest.mark.parametrize("passing", [0, 2, 5])
def test_a_disk_that_fails_in_forward(
    verb: str, passing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing goes on from a torn step, and the last finished one is what a new start finds."""
    monkeypatch.setattr("offload.runtime.choose_chunk_numel", lambda _budget: 64 * 160)
    model = make_model()
    engine, optimizer = attach(model, tmp_path)
    engine._optimizing.streamed.pipeline.staging.limit_nbytes = 1  # a tile at a time
    train(model, optimizer, range(3))
    assert engine.step_pending
    file, left = engine.weights.store.tier.file, [passing]
    call = getattr(file, verb)

    def failing(*arguments: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise TierIOError(errno.EIO, "the disk is gone")
        return call(*arguments)

    with monkeypatch.context() as broken:
        broken.setattr(file, verb, failing)
        with pytest.raises(TierIOError, match="the disk is gone"):
            loss_of(model, 3)
    for use in (lambda: loss_of(model, 3), engine.commit, optimizer.step):
        with pytest.raises(StepInterruptedError, match="continues from the last commit"):
            use()
    engine.detach()
    fresh = make_model()
    again, optimizer = attach(fresh, tmp_path)
    assert again.step == 2
    assert same(fresh, in_memory(2))
    train(fresh, optimizer, range(2, 5))
    assert same(fresh, in_memory(5))
    again.detach()


def test_a_forward_that_fails_between_two_modules(tmp_path: Path) -> None:
    """It is not the step's: that is finished, and training goes on."""
    model = make_model()
    engine, optimizer = attach(model, tmp_path)
    train(model, optimizer, range(3))
    handle = model[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss_of(model, 3)
    handle.remove()
    assert not engine.step_pending
    train(model, optimizer, range(3, 5))
    assert same(model, in_memory(5))
    engine.detach()


@pytest.mark.parametrize("ending", ["detach", "error", "commit"])
def test_what_ends_a_run_finishes_its_last_step(ending: str, tmp_path: Path) -> None:
    model = make_model()
    engine, optimizer = attach(model, tmp_path)
    train(model, optimizer, range(3))
    assert engine.step_pending
    if ending == "commit":
        engine.commit({"epoch": 1})
    if ending == "error":
        with pytest.raises(ZeroDivisionError), engine:
            raise ZeroDivisionError
    else:
        engine.detach()
        assert same(model, in_memory(3))
    fresh = make_model()
    again, _ = attach(fresh, tmp_path)
    assert again.step == 3
    assert again.extra == ({"epoch": 1} if ending == "commit" else {})
    assert same(fresh, in_memory(3))
    again.detach()


def test_a_weight_that_forward_writes_and_gives_up(tmp_path: Path) -> None:
    """There is no commit of the step then: what is there is of the step before."""

    class Counting(nn.Module):
        """Changes a frozen weight of its own in each forward, as codebooks do."""

        def __init__(self) -> None:
            super().__init__()
            self.codes = nn.Parameter(torch.zeros(64, 256), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.codes.data += 1
            with engine._optimizing.in_forward.guards.aside():
                engine.weights.evict(engine.weights.weights["0.codes"])
            return x + self.codes.sum() * 1e-6

    model = make_model()
    model.insert(0, Counting())
    engine, optimizer = attach(model, tmp_path)
    train(model, optimizer, range(1))
    engine.commit()
    train(model, optimizer, range(1, 3))
    loss_of(model, 3)
    assert not engine.step_pending
    engine.detach()
    fresh = make_model()
    fresh.insert(0, Counting())
    again, _ = attach(fresh, tmp_path)
    assert again.step == 1
    assert float(fresh[0].codes[0, 0]) == 1.0
    again.detach()
