"""The device budget is kept, said to be too small before the first step, and survives a kill."""

import copy
import os
import signal
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from device_runs import assert_same, computing_on
from torch import nn
from torch.nn import functional as F

import offload
from offload import launcher
from offload.allocator.errors import BudgetError, ConfigError, UnsupportedError
from offload.allocator.segment import ArenaStats
from offload.attaching import attach_in
from offload.config import make_config
from offload.tiers.cpudevice import CpuAccelerator
from offload.tiers.events import ListRecorder, Move

WIDTH, LAYERS = 256, 6
MIB = 1 << 20


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Deep(nn.Module):
    """12 MiB of weights, and as many of gradients, in layers of 1 MiB."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.register_buffer("scale", torch.full((WIDTH,), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x * self.scale


def loop(model: Any, optimizer: Any, steps: int = 6) -> list[float]:
    values = []
    for _ in range(steps):
        x = torch.randn(96, WIDTH)
        loss = model(x).square().mean()
        loss.backward()
        values.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
        optimizer.zero_grad()
        values.append(loss.item())
    return values


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 1e-3)


def test_a_fraction_of_what_the_model_needs_is_enough(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Deep()
    twin = copy.deepcopy(model)
    torch.manual_seed(1)
    right = loop(model, adamw(model))
    budget = 8 * MIB
    assert budget < sum(parameter.nbytes for parameter in model.parameters())
    accelerator = CpuAccelerator(64 * MIB)
    optimizer = adamw(twin)
    engine = offload.attach(
        twin, optimizer, budget=f"host=8GiB,device={budget}", nvme=tmp_path, accelerator=accelerator
    )
    with engine, computing_on(accelerator, engine):
        torch.manual_seed(1)
        assert loop(twin, optimizer) == right
        assert engine.computing is not None
        assert engine.computing.plan.window_nbytes < budget
    assert 3 * MIB < accelerator.peak_nbytes() <= budget
    assert_same(model.state_dict(), twin.state_dict())


def test_what_is_spare_after_a_step_holds_more_weights(tmp_path: Path) -> None:
    accelerator = CpuAccelerator(256 * MIB)
    model = Deep()
    optimizer = adamw(model)
    engine = offload.attach(
        model, optimizer, budget="host=8GiB,device=128MiB", nvme=tmp_path, accelerator=accelerator
    )
    with engine, computing_on(accelerator, engine):
        assert engine.computing is not None
        before = engine.computing.plan
        loop(model, optimizer, 2)
        after = engine.computing.plan
        assert before.window_nbytes < after.window_nbytes == engine.computing.weights.window_nbytes
        assert after.window_nbytes >= sum(parameter.nbytes for parameter in model.parameters())
        assert after.activations_nbytes > before.activations_nbytes


def test_what_is_on_the_device_already_counts(tmp_path: Path) -> None:
    model, accelerator = Deep(), CpuAccelerator()
    mine = accelerator.allocate(3 * MIB)
    with pytest.raises(BudgetError, match=r"what was there before hold 3\.0") as refusal:
        offload.attach(
            model,
            adamw(model),
            budget="host=8GiB,device=4MiB",
            nvme=tmp_path,
            accelerator=accelerator,
        )
    assert refusal.value.needed_nbytes > 4 * MIB
    del mine
    budget = "host=8GiB,device=4MiB"
    with offload.attach(
        model, adamw(model), budget=budget, nvme=tmp_path, accelerator=accelerator
    ) as engine:
        assert engine.computing is not None
        assert engine.computing.plan.fixed_nbytes < MIB


def test_a_budget_that_the_largest_layer_exceeds_is_refused(tmp_path: Path) -> None:
    model = Deep()
    with pytest.raises(BudgetError, match=r"largest layer \(blocks.0.up\)") as refusal:
        offload.attach(
            model,
            adamw(model),
            budget="host=8GiB,device=2MiB",
            nvme=tmp_path,
            accelerator=CpuAccelerator(),
        )
    assert refusal.value.needed_nbytes == 2 * (4 * WIDTH * (WIDTH + 1) * 4) + 4 * WIDTH
    assert "device=3MiB" in str(refusal.value)
    attached = offload.attach(
        model,
        adamw(model),
        budget="host=8GiB,device=3MiB",
        nvme=tmp_path,
        accelerator=CpuAccelerator(),
    )
    attached.detach()


@pytest.mark.parametrize("name", ["step_in_backward", "recompute"])
def test_what_works_on_the_cpu_only_is_refused(name: str, tmp_path: Path) -> None:
    setting = {"step_in_backward": True} if name == "step_in_backward" else {name: "tokenwise"}
    model = Deep()
    with pytest.raises(ConfigError, match=f"{name} works for models that compute on the CPU"):
        offload.attach(
            model,
            adamw(model),
            budget="host=8GiB",
            nvme=tmp_path,
            config=setting,
            accelerator=CpuAccelerator(),
        )


def test_micro_batches_in_turns_are_refused(tmp_path: Path) -> None:
    model = Deep()
    with (
        offload.attach(
            model, adamw(model), budget="8GiB", nvme=tmp_path, accelerator=CpuAccelerator()
        ) as engine,
        pytest.raises(UnsupportedError, match="share a thread there"),
    ):
        engine.accumulate([torch.ones(1)], lambda x: x.sum())


class ArenaOnPaper:
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def begin(self, form: Any) -> None:
        self.told.append(form)

    def end(self) -> None:
        self.told.append("end")

    def close(self) -> None:
        self.told.append("close")

    def stats(self) -> ArenaStats:
        steps = self.told.count("end")
        return ArenaStats(steps=steps, off="no room" if steps > 1 else None)


def test_the_arena_is_told_where_steps_compute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arena = ArenaOnPaper()
    monkeypatch.setattr(CpuAccelerator, "step_arena", lambda _self: arena)
    accelerator, model = CpuAccelerator(), Deep()
    optimizer = adamw(model)
    engine = offload.attach(
        model,
        optimizer,
        budget="host=8GiB,device=64MiB",
        nvme=tmp_path,
        config={"device_arena": True},
        accelerator=accelerator,
    )
    assert engine.computing is not None
    assert engine.computing.arena is arena
    with engine, computing_on(accelerator, engine):
        loop(model, optimizer, 2)
        with torch.no_grad():
            model(torch.randn(8, WIDTH))  # no step
        model(torch.randn(8, WIDTH)).sum().backward()
        loop(model, optimizer, 1)
    big, small = [(((96, WIDTH), torch.float32),)], [(((8, WIDTH), torch.float32),)]
    assert [text for text in engine.notices if "arena" in text] == ["device arena: none: no room"]
    assert arena.told == [*big, "end", *big, "end", *small, *big, "end", "close"]


def test_an_arena_is_refused_before_anything_moves(tmp_path: Path) -> None:
    model = Deep()
    weights = [parameter.data_ptr() for parameter in model.parameters()]
    options: dict[str, Any] = {
        "budget": "8GiB",
        "nvme": tmp_path,
        "config": {"device_arena": True},
    }
    with pytest.raises(UnsupportedError, match=r"device_arena needs a CUDA device, .* on cpu"):
        offload.attach(model, adamw(model), accelerator=CpuAccelerator(), **options)
    with pytest.raises(ConfigError, match=r"device_arena needs .* device='cuda'"):
        offload.attach(model, adamw(model), **options)
    assert [parameter.data_ptr() for parameter in model.parameters()] == weights
    offload.attach(model, adamw(model), budget="8GiB", nvme=tmp_path).detach()


def test_a_step_on_the_device_is_refused(tmp_path: Path) -> None:
    model = Deep()
    optimizer = adamw(model)
    optimizer.param_groups[0]["capturable"] = True
    with pytest.raises(ConfigError, match="capturable"):
        offload.attach(model, optimizer, budget="8GiB", nvme=tmp_path, accelerator=CpuAccelerator())


def test_compiled_models_are_refused(tmp_path: Path) -> None:
    model = Deep()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch itself, as it imports its compiler
        model.blocks[1].compile()
    with pytest.raises(UnsupportedError, match="made by torch"):
        offload.attach(
            model, adamw(model), budget="8GiB", nvme=tmp_path, accelerator=CpuAccelerator()
        )


def test_a_machine_without_the_device_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = Deep()
    with pytest.raises(UnsupportedError, match="finds no CUDA device"):
        offload.attach(model, adamw(model), budget="8GiB", nvme=tmp_path, device="cuda")


def test_a_failed_backward_leaves_no_gradient_behind(tmp_path: Path) -> None:
    accelerator = CpuAccelerator()
    torch.manual_seed(0)
    model = Deep()
    twin = copy.deepcopy(model)

    def train(trained: nn.Module, optimizer: Any) -> list[float]:
        x = torch.randn(96, WIDTH)

        def fail(_gradient: torch.Tensor) -> None:
            raise KeyError("the user's own")

        out = trained.blocks[0](x)
        if out.requires_grad:
            out.register_hook(fail)
        for block in trained.blocks[1:]:
            out = block(out)
        with pytest.raises(KeyError):
            out.square().mean().backward()
        optimizer.zero_grad()
        return loop(trained, optimizer, 2)

    torch.manual_seed(1)
    right = train(model, adamw(model))
    optimizer = adamw(twin)
    engine = offload.attach(
        twin, optimizer, budget="host=8GiB", nvme=tmp_path, accelerator=accelerator
    )
    with engine, computing_on(accelerator, engine):
        torch.manual_seed(1)
        assert train(twin, optimizer) == right


def test_frozen_weights_stay_on_a_device_that_has_room_for_them(tmp_path: Path) -> None:
    accelerator = CpuAccelerator(256 * MIB)
    torch.manual_seed(0)
    model = Deep()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("blocks.5.down"))
    twin = copy.deepcopy(model)
    torch.manual_seed(1)
    right = loop(twin, adamw(twin))
    optimizer = adamw(model)
    engine = offload.attach(
        model, optimizer, budget="host=8GiB,device=128MiB", nvme=tmp_path, accelerator=accelerator
    )
    recorder = engine._journal.recorder = ListRecorder()
    with engine, computing_on(accelerator, engine):
        torch.manual_seed(1)
        assert loop(model, optimizer, 4) == right[:8]
        recorder.events.clear()
        assert loop(model, optimizer, 2) == right[8:]
        fetched = {
            event.key
            for event in recorder.events
            if isinstance(event, Move) and event.role == "weight" and event.dst == "cpu"
        }
        assert fetched == {"blocks.5.down.weight", "blocks.5.down.bias"}
        model.blocks[0].up.weight.data.mul_(2)  # is seen all the same
        twin.blocks[0].up.weight.data.mul_(2)
        x = torch.randn(4, WIDTH)
        assert torch.equal(model(x), twin(x))


def test_autocast_keeps_no_copies_beyond_the_budget(tmp_path: Path) -> None:
    accelerator = CpuAccelerator(64 * MIB)
    model = Deep()
    twin = copy.deepcopy(model)
    x = torch.randn(96, WIDTH)
    optimizer, plain = adamw(model), adamw(twin)
    engine = offload.attach(
        model, optimizer, budget="host=8GiB,device=8MiB", nvme=tmp_path, accelerator=accelerator
    )

    def run(trained: nn.Module, stepping: Any) -> list[float]:
        values = []
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16):
                with torch.no_grad():
                    values.append(trained(x).float().square().mean().item())
                loss = trained(x).float().square().mean()
            loss.backward()
            stepping.step()
            stepping.zero_grad()
            values.append(loss.item())
        return values

    with engine, computing_on(accelerator, engine):
        got = run(model, optimizer)
    assert got == run(twin, plain)
    assert accelerator.peak_nbytes() <= 8 * MIB
    assert_same(model.state_dict(), twin.state_dict())


def test_the_model_is_seen_as_it_is(tmp_path: Path) -> None:
    """Outside of its calls: parameters in host memory, a plain copy, buffers on the device."""
    accelerator = CpuAccelerator()
    model = Deep()
    twin = copy.deepcopy(model)
    engine = offload.attach(model, None, budget="8GiB", nvme=tmp_path, accelerator=accelerator)
    with engine, torch.no_grad(), computing_on(accelerator, engine):
        assert accelerator.owns(model.scale)
        assert engine.device == accelerator.torch_device
        weight = model.blocks[0].up.weight
        assert isinstance(weight, nn.Parameter)
        assert weight is next(p for n, p in model.named_parameters() if n.endswith("up.weight"))
        assert accelerator.owns(model(torch.randn(4, WIDTH)))
        seen = []
        model.blocks[2].up.register_forward_pre_hook(
            lambda module, _args: seen.append(module.weight)
        )
        model(torch.randn(4, WIDTH))
        assert accelerator.owns(seen[0])
        assert not accelerator.owns(model.blocks[2].up.weight)
        plain = copy.deepcopy(model)
        assert type(plain.blocks[0].up._parameters) is dict
        assert_same(plain.state_dict(), twin.state_dict())
    assert type(model.blocks[0].up._parameters) is dict
    assert not accelerator.owns(model.scale)


SCRIPT = """
import os, signal, sys
sys.path[:0] = sys.argv[1:2]
from test_exact_device_budget import *
folder, steps, kill = Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
torch.manual_seed(0)
model = Deep()
optimizer = adamw(model)
accelerator = CpuAccelerator(64 * MIB)
engine = offload.attach(model, optimizer, budget=f"host=8GiB,device={8 * MIB}", nvme=folder,
                        accelerator=accelerator)
with engine, computing_on(accelerator, engine):
    while engine.step < steps:
        torch.manual_seed(engine.step)
        loss = model(torch.randn(96, WIDTH)).square().mean()
        loss.backward()
        if engine.step == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.step()
        optimizer.zero_grad()
torch.save(model.state_dict(), sys.argv[5])
"""


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    def run(name: str, kill: int) -> int:
        return subprocess.run(
            [sys.executable, "-c", SCRIPT, Path(__file__).parent, tmp_path / name, "5", str(kill),
             tmp_path / f"{name}.pt"],
            check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
        ).returncode  # fmt: skip

    assert run("whole", -1) == 0
    assert run("killed", 3) == -signal.SIGKILL
    assert run("killed", -1) == 0
    assert_same(*(torch.load(tmp_path / f"{name}.pt") for name in ("whole", "killed")))


class Asking(nn.Module):
    """Is called by keyword, and tells where its input is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.seen: list[torch.Tensor] = []

    def forward(self, *, batch: dict[str, list[torch.Tensor]]) -> torch.Tensor:
        self.seen.append(batch["x"][0])
        return self.layer(batch["x"][0])


def test_inputs_follow_the_model_from_the_first_call_of_a_script_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerator = CpuAccelerator()
    monkeypatch.setattr(launcher, "attach_in", partial(attach_in, accelerator=accelerator))
    config = make_config(budget="8GiB", nvme=tmp_path)
    with launcher._Session(config) as session:
        model = Asking()
        optimizer = adamw(model)
        for _ in range(2):
            loss = model(batch={"x": [torch.randn(4, WIDTH)]}).square().mean()
            loss.backward()
            optimizer.step()
        assert session.engine is not None
        assert all(map(accelerator.owns, model.seen))
        assert len(model.seen) == 2
        assert not model._forward_pre_hooks_with_kwargs.keys() & {one.id for one in session._hooks}
