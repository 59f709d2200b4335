"""The optimizer's step on the device gives the bits of a loop that steps there, whatever moves."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from device_runs import assert_same, computing_on, moved_roles
from device_steps import (
    STEPS,
    loop,
    trained,
    weights_and_states,
)
from exact_models import Net, loss_of, tokens_of
from torch import nn

import offload
from offload.engine import Engine
from offload.tiers.cpudevice import CpuAccelerator


@pytest.mark.parametrize("who", ["device", 0.5, 0.3])
def test_streaming_and_in_memory(who: str | float, same: Any, stepped_there: list[int]) -> None:
    def both(model: Any, optimizer: Any, engine: Engine | None) -> list[float]:
        return weights_and_states(loop, engine, model, optimizer)

    engine, accelerator = same(loop=both, who=who)
    assert "state" in moved_roles(engine, accelerator)
    model: Any = engine.model
    numel = sum(p.numel() for p in trained(model)) - sum(
        p.numel() for p in model.unused.parameters()
    )
    found = sum(stepped_there) / (2 * STEPS * numel)
    assert found == 1 if who == "device" else abs(found - who) < 0.15


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "adam": lambda parameters: torch.optim.Adam(parameters, 1e-3, amsgrad=True),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, 1e-2),
    "asgd": lambda parameters: torch.optim.ASGD(parameters, 1e-2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_with_states_of_other_kinds(
    name: str, same: Any, stepped_there: list[int]
) -> None:
    def make(model: nn.Module) -> Any:
        halves = trained(model)
        return OPTIMIZERS[name]([{"params": halves[::2]}, {"params": halves[1::2], "lr": 2e-3}])

    same(make_optimizer=make, loop=partial(loop, steps=3))
    assert stepped_there


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.complex64])
def test_other_types(dtype: torch.dtype, same: Any) -> None:
    def run(model: Any, optimizer: Any, _engine: Engine | None) -> list[float]:
        values = []
        for _ in range(STEPS):
            loss = model(torch.randn(16, 100, dtype=dtype)).abs().float().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            values.append(loss.item())
        return values

    make = partial(nn.Linear, 100, 100, dtype=dtype)
    same(make, lambda model: torch.optim.Adam(model.parameters(), 1e-3), run)


@pytest.mark.parametrize("config", [{"state_precision": "bf16"}, {"state_precision": "8bit"}])
def test_states_are_rounded_by_the_same_bits(
    config: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What 8 bits take of a tile is whole pages.
    monkeypatch.setattr("offload.runtime.choose_chunk_numel", lambda _budget: 1 << 18)

    def run(who: str) -> list[float]:
        torch.manual_seed(0)
        model, accelerator = Net(), CpuAccelerator()
        optimizer = torch.optim.AdamW(trained(model), 1e-3)
        engine = offload.attach(
            model,
            optimizer,
            budget="8GiB",
            nvme=tmp_path / who,
            accelerator=accelerator,
            config={"optimizer_device": who, **config},
        )
        with engine, computing_on(accelerator, engine):
            torch.manual_seed(1)
            return loop(model, optimizer, engine)

    assert run("device") == run("host")


def test_masters_of_bfloat16_weights(tmp_path: Path) -> None:
    def run(who: str) -> tuple[list[float], dict[str, torch.Tensor]]:
        torch.manual_seed(0)
        model, accelerator = nn.Linear(100, 100).bfloat16(), CpuAccelerator()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        engine = offload.attach(
            model,
            optimizer,
            budget="8GiB",
            nvme=tmp_path / who,
            accelerator=accelerator,
            config={"optimizer_device": who, "master_weights": "fp32"},
        )
        losses = []
        with engine, computing_on(accelerator, engine):
            for _ in range(STEPS):
                loss = model(torch.randn(16, 100).bfloat16()).float().square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
            masters = {name: engine.master_weight(name) for name in ("weight", "bias")}
        return losses, masters

    (losses, masters), (right, right_masters) = run("device"), run("host")
    assert losses == right
    assert_same(masters, right_masters)


@pytest.mark.parametrize("keeps", [False, True])
def test_a_loss_scale_is_divided_out_where_the_step_is(keeps: bool, same: Any) -> None:
    def run(model: Any, optimizer: Any, engine: Engine | None) -> list[float]:
        if engine is not None and keeps:
            weights_and_states(lambda *_: [], engine, model, optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=2)
        values = []
        for _ in range(STEPS):
            scaler.scale(loss_of(model, tokens_of(2, 32))).backward()
            scaler.step(optimizer)
            if keeps:
                values += [p.grad.norm().item() for p in trained(model) if p.grad is not None]
            scaler.update()
            optimizer.zero_grad()
            values.append(scaler.get_scale())
        return values

    same(loop=run)
