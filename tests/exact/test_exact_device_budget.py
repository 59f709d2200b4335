"""The device budget is kept, said to be too small before the first step, and survives a kill."""

import copy
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deep_on_device import MIB, WIDTH, Deep, adamw, loop
from device_runs import assert_same, computing_on
from torch import nn

import offload
from forked import python
from offload.allocator.errors import BudgetError
from offload.tiers.accelerator import Accelerator
from offload.tiers.cpudevice import CpuAccelerator
from offload.tiers.events import ListRecorder, Move
from offload.tiers.simulated.accelerator import SimulatedAccelerator


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


@pytest.mark.parametrize("make", [CpuAccelerator, SimulatedAccelerator], ids=["cpu", "simulated"])
def test_a_longer_batch_finds_room_that_short_ones_had_taken(
    make: Callable[..., Accelerator], tmp_path: Path
) -> None:
    """With what 64 rows leave to weights and saved activations, 1000 rows would not fit."""

    def run(trained: nn.Module, stepping: Any, rows: int) -> float:
        loss = trained(torch.randn(rows, WIDTH)).square().mean()
        loss.backward()
        stepping.step()
        stepping.zero_grad()
        return loss.item()

    torch.manual_seed(0)
    model = Deep()
    twin = copy.deepcopy(model)
    budget, lengths = 24 * MIB, [64, 64, 64, 64, 1000, 64, 1000, 500]
    torch.manual_seed(1)
    plain = adamw(model)
    right = [run(model, plain, rows) for rows in lengths]
    accelerator = make(capacity=256 * MIB)
    optimizer = adamw(twin)
    engine = offload.attach(
        twin, optimizer, budget=f"host=8GiB,device={budget}", nvme=tmp_path, accelerator=accelerator
    )
    shares = []
    with engine, computing_on(accelerator, engine):
        assert engine.computing is not None
        torch.manual_seed(1)
        values = []
        for rows in lengths:
            values.append(run(twin, optimizer, rows))
            plan = engine.computing.plan
            shares.append(plan.window_nbytes + plan.activations_nbytes)
    assert values == right
    assert accelerator.peak_nbytes() <= budget
    assert shares[0] < shares[3]
    assert shares[4] < shares[3] / 2
    assert shares[5] == shares[3]
    assert_same(model.state_dict(), twin.state_dict())


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


SCRIPT = """
import os, signal, sys
sys.path[:0] = sys.argv[1:2]
from pathlib import Path
import torch
import offload
from deep_on_device import MIB, WIDTH, Deep, adamw
from device_runs import computing_on
from offload.tiers.cpudevice import CpuAccelerator
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


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    def run(name: str, kill: int) -> int:
        words = [Path(__file__).parent, tmp_path / name, 5, kill, tmp_path / f"{name}.pt"]
        return python("-c", SCRIPT, *words, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode

    assert run("whole", -1) == 0
    assert run("killed", 3) == -signal.SIGKILL
    assert run("killed", -1) == 0
    assert_same(*(torch.load(tmp_path / f"{name}.pt") for name in ("whole", "killed")))
