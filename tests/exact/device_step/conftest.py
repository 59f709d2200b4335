"""Steps on the device in small tiles, and who stepped them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from device_runs import train_both
from device_steps import (
    CHUNK,
    FACTOR,
    loop,
)
from exact_models import Net, adamw
from torch import nn

from offload.engine import Engine
from offload.swap import device_step
from offload.swap.device_step import DeviceStep
from offload.tiers.cpudevice import CpuAccelerator


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload.runtime.choose_chunk_numel", lambda _budget: CHUNK)


@pytest.fixture
def stepped_there(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Elements of each tile that the device steps."""
    numels: list[int] = []
    original = DeviceStep.send

    def send(self: DeviceStep, group: Any, parts: Any, done: Any) -> None:
        numels.append(sum(part.parameter.numel() for part in parts))
        original(self, group, parts, done)

    monkeypatch.setattr(DeviceStep, "send", send)
    return numels


@pytest.fixture
def same(tmp_path: Path) -> Callable[..., tuple[Engine, CpuAccelerator]]:
    """Trains in memory and on a device of its own; nothing may differ."""

    def run(
        make_model: Callable[[], nn.Module] = Net,
        make_optimizer: Callable[[nn.Module], Any] = adamw,
        loop: Any = loop,
        *,
        who: str | float = "device",
        config: Mapping[str, Any] | None = None,
    ) -> tuple[Engine, CpuAccelerator]:
        accelerator = CpuAccelerator()
        settings = {"optimizer_device": who, **(config or {})}
        engine = train_both(
            make_model, make_optimizer, loop, accelerator, tmp_path / "nvme", config=settings
        )
        return engine, accelerator

    return run


@pytest.fixture
def other_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is stepped on the device is a little larger: this tells who stepped what."""
    original = device_step.step_on

    def step_on(optimizer: Any, group: Any, parameters: Any, states: Any) -> Any:
        after = original(optimizer, group, parameters, states)
        for parameter in parameters:
            parameter.mul_(FACTOR)
        return after

    monkeypatch.setattr(device_step, "step_on", step_on)
