"""What a model that computes on a device can't be asked for, and who is told of it."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from deep_on_device import WIDTH, Deep, adamw, loop
from device_runs import computing_on

import offload
from offload.allocator.errors import ConfigError, UnsupportedError
from offload.allocator.segment import ArenaStats
from offload.tiers.cpudevice import CpuAccelerator


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
