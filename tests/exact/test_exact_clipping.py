"""Loops that clip and scale gradients, in memory and with gradients in scratch: the same bits."""

import json
import math
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_  # by name, before anything is attached

from offload.engine import Engine
from offload.tiers.events import Move

STEPS = 8


class Net(nn.Module):
    """Large and small weights, one in bfloat16, one that is never used and a tied one."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(300, 128)
        self.up = nn.Linear(128, 512)
        self.low = nn.Linear(512, 128).bfloat16()
        self.unused = nn.Linear(200, 200)
        self.head = nn.Linear(128, 300, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.up(self.table(tokens)))
        logits: torch.Tensor = self.head(self.low(x.bfloat16()).float())
        return logits


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 1e-2)


def fused(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 1e-2, fused=True)


def loss_of(model: nn.Module) -> torch.Tensor:
    tokens = torch.randint(300, (64,))
    return F.cross_entropy(model(tokens), tokens)


def digests(model: nn.Module) -> list[float]:
    """Of every gradient's bits, as the user's code sees them."""
    return [
        float(zlib.crc32(one.grad.contiguous().view(torch.uint8).numpy().tobytes()))
        for one in model.parameters()
        if one.grad is not None
    ]


def read_nbytes(engine: Engine | None) -> int:
    events = engine._journal.recorder.events if engine else []  # type: ignore[attr-defined]
    return sum(
        event.nbytes
        for event in events
        if isinstance(event, Move) and event.role == "gradient" and event.dst == "host"
    )


@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize(
    ("most", "order"), [(0.1, 2.0), (1e6, 2.0), (0.1, math.inf), (0.5, 1.0), (math.inf, 2.0)]
)
def test_clipping_by_norm(compare: Any, most: float, order: float, foreach: bool | None) -> None:
    def loop(model: Any, optimizer: Any, engine: Engine | None) -> list[float]:
        values: list[float] = []
        for step in range(STEPS):
            loss_of(model).backward()
            if step == 5:  # what counts no version
                model.up.weight.grad.data[0] += 1
                model.table.weight.grad.detach().numpy()[3] *= 2
            values.append(clip_grad_norm_(model.parameters(), most, order, foreach=foreach).item())
            values += digests(model) if step % 2 else []
            optimizer.step()
            optimizer.zero_grad()
        return values

    compare(Net, adamw, loop)


def test_norms_are_taken_as_gradients_leave(compare: Any) -> None:
    """From the second step on clipping reads nothing, as long as nobody writes to gradients."""
    read: list[int] = []

    def loop(model: Any, optimizer: Any, engine: Engine | None) -> list[float]:
        values = []
        for step in range(6):
            loss_of(model).backward()
            if step == 4:
                model.up.weight.grad.data[0] += 1
            before = read_nbytes(engine)
            values.append(clip_grad_norm_(model.parameters(), 1e6).item())
            read.append(read_nbytes(engine) - before)
            optimizer.step()
            optimizer.zero_grad()
        return values

    same = compare(Net, adamw, loop)
    whole = same.engine.gradients
    if not whole.scratch.file.stamp():
        pytest.skip("this file system does not tell of writes through mappings")
    every = sum(home.nbytes for home in whole.homes.values())
    assert read[6:] == [every, 0, 0, 0, every, 0]


def test_accumulated_gradients_are_clipped(compare: Any) -> None:
    read: list[int] = []

    def loop(model: Any, optimizer: Any, engine: Engine | None) -> list[float]:
        values = []
        for step in range(5):
            for _ in range(3):
                loss_of(model).backward()
            before = read_nbytes(engine)
            values.append(clip_grad_norm_(model.parameters(), 1e-4).item())
            read.append(read_nbytes(engine) - before)
            values += digests(model)
            optimizer.step()
            optimizer.zero_grad(set_to_none=step % 2 == 0)
        return values

    same = compare(Net, adamw, loop)
    if same.engine.gradients.scratch.file.stamp():
        every = sum(home.nbytes for home in same.engine.gradients.homes.values())
        assert read[5:] == [2 * every, every, every, every, every]


def test_gradients_that_hooks_change_in_backward(compare: Any) -> None:
    """Those that have left are written to when their norms have been taken."""

    def loop(model: Any, optimizer: Any, engine: Engine | None) -> list[float]:
        def change(_parameter: torch.Tensor) -> None:
            if engine is not None:
                engine.gradients.drain()
            if model.low.weight.grad is not None:
                model.low.weight.grad.data[1:5].mul_(7)

        handle = model.up.weight.register_post_accumulate_grad_hook(change)
        values = []
        for _ in range(STEPS):
            loss_of(model).backward()
            values.append(clip_grad_norm_(model.parameters(), 0.1).item())
            values += digests(model)
            optimizer.step()
            optimizer.zero_grad()
        handle.remove()
        return values

    compare(Net, adamw, loop)


def test_clipping_by_value_and_separate_calls(compare: Any) -> None:
    def loop(model: Any, optimizer: Any, _engine: Engine | None) -> list[float]:
        values = []
        for step in range(STEPS):
            loss_of(model).backward()
            if step % 2:
                nn.utils.clip_grad_value_(model.parameters(), 1e-3)
            grads = [one.grad for one in model.parameters() if one.grad is not None]
            norm = nn.utils.get_total_norm(grads)
            nn.utils.clip_grads_with_norm_(model.parameters(), 0.01, norm)
            values += [norm.item(), *digests(model)]
            optimizer.step()
            optimizer.zero_grad()
        return values

    compare(Net, adamw, loop)


def test_gradients_that_are_not_finite(compare: Any) -> None:
    def loop(model: Any, optimizer: Any, _engine: Engine | None) -> list[float]:
        values: list[float] = []
        for step in range(4):
            loss_of(model).backward()
            if step == 2:
                model.up.weight.grad[3, 3] = math.nan
                with pytest.raises(RuntimeError, match="non-finite"):
                    clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
                values += digests(model)
                model.up.weight.grad[3, 3] = 0
            values.append(clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True).item())
            optimizer.step()
            optimizer.zero_grad()
        return values

    compare(Net, adamw, loop)


@pytest.mark.usefixtures("many_tiles")
@pytest.mark.parametrize("make", [adamw, fused])
@pytest.mark.parametrize("clips", [True, False])
def test_a_loss_scale_that_grows_and_skips_steps(compare: Any, make: Any, clips: bool) -> None:
    def loop(model: Any, optimizer: Any, _engine: Engine | None) -> list[float]:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        values = []
        for step in range(STEPS):
            loss = loss_of(model) * (math.inf if step == 3 else 1)
            scaler.scale(loss).backward()
            if clips:
                scaler.unscale_(optimizer)
                values.append(clip_grad_norm_(model.parameters(), 0.1).nan_to_num().item())
            values += digests(model)
            scaler.step(optimizer)
            scaler.update()
            values += digests(model)  # a fused step has unscaled them by itself
            optimizer.zero_grad()
            values.append(scaler.get_scale())
        return values

    same = compare(Net, make, loop)
    assert 2.0**11 in same.values


SCRIPT = """
import json, sys
import torch
from torch import nn
import offload
from offload.tiers import hostmem

budget, place = sys.argv[1:]
torch.manual_seed(0)
torch.set_num_threads(1)
with offload.init(budget=f"host={budget}MiB", nvme=place):
    model = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(12)))
optimizer = torch.optim.SGD(model.parameters(), 1e-3)
norms = []
with offload.attach(model, optimizer, commit="never") as engine:
    for step in range(2):
        model(torch.ones(4, 2048) * (1 + step)).square().mean().backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 1e-6).item())
        nn.utils.clip_grad_value_(model.parameters(), 1e-10)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale(torch.ones(()))
        scaler.unscale_(optimizer)
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 1e-9, 1.0).item())
        optimizer.step()
        optimizer.zero_grad()
    peak = hostmem.peak_resident_nbytes()
    baseline = engine.plan.baseline_nbytes
print(json.dumps({"peak_nbytes": peak, "baseline_nbytes": baseline, "norms": norms}))
"""
MIB = 1 << 20


@pytest.mark.slow
def test_the_budget_is_kept(tmp_path: Path) -> None:
    """Gradients of 192 MiB, in what 112 MiB leave of them."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    first = _run(script, tmp_path / "first", 8192)
    budget_mib = first["baseline_nbytes"] // MIB + 112
    second = _run(script, tmp_path / "second", budget_mib)
    assert second["peak_nbytes"] <= budget_mib * MIB
    assert second["norms"] == first["norms"]


def _run(script: Path, place: Path, budget_mib: int) -> dict[str, Any]:
    place.mkdir()
    command = [sys.executable, str(script), str(budget_mib), str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found
