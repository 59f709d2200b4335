"""Who steps a tile, on a device whose kernels round in another way: by its number alone."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from device_runs import assert_same
from device_steps import (
    STEPS,
    Elsewhere,
    loop,
    train,
    trained,
    weights_and_states,
)
from exact_models import Net

import offload
from offload import sharing
from offload.engine import Engine
from offload.swap.tile_share import StepRates
from offload.tiers.cpudevice import CpuAccelerator


@pytest.mark.usefixtures("other_kernels")
@pytest.mark.parametrize("config", [{}, {"state_precision": "exact", "commit": "manual"}])
def test_every_bit_is_the_devices(config: dict[str, Any], same: Any) -> None:
    """Small parameters, and those in memory, too."""

    def run(model: Any, optimizer: Any, engine: Engine | None) -> list[float]:
        if engine is None:
            optimizer = Elsewhere(optimizer)
        return weights_and_states(loop, engine, model, optimizer)

    same(loop=run, config=config)


@pytest.mark.usefixtures("other_kernels")
def test_a_share_does_not_depend_on_what_is_in_memory(tmp_path: Path) -> None:
    runs = [train(tmp_path / str(keeps), 0.4, keeps=keeps) for keeps in (1, 2, STEPS + 1)]
    for losses, weights, _ in runs[1:]:
        assert losses == runs[0][0]
        assert_same(weights, runs[0][1])
    for who in ("host", "device"):
        assert train(tmp_path / who, who)[0] != runs[0][0]


def rated(monkeypatch: pytest.MonkeyPatch, host_s: float, device_s: float) -> None:
    rates = StepRates(host_s=host_s, device_s=device_s)
    monkeypatch.setattr(sharing, "measure_rates", lambda *_arguments: rates)


@pytest.mark.usefixtures("other_kernels")
def test_a_choice_goes_on_with_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rated(monkeypatch, 1e-9, 2e-9)
    right, weights, engine = train(tmp_path / "whole", "auto")
    (notice,) = [text for text in engine.notices if "optimizer_device" in text]
    assert "the device steps 1/3 of the tiles" in notice
    assert "1.00 ns on the host, and 2.00 ns there and back" in notice
    assert "optimizer_device=0.3333 chooses the same" in notice
    first, _, _ = train(tmp_path / "parts", "auto", steps=2)
    rated(monkeypatch, 5e-9, 1e-9)  # a resumed run does not look at it
    rest, end, engine = train(tmp_path / "parts", "auto")
    assert first + rest == right
    assert_same(end, weights)
    assert not [text for text in engine.notices if "optimizer_device" in text]
    named, end, _ = train(tmp_path / "named", 0.3333)
    assert named == right
    assert_same(end, weights)


def test_a_choice_that_changes_is_told(tmp_path: Path) -> None:
    train(tmp_path, 0.5, steps=1)
    _, _, engine = train(tmp_path, "host", steps=2)
    assert any(
        "until the last commit the device stepped 1/2 of the tiles, from now on no tile" in text
        for text in engine.notices
    )


@pytest.mark.parametrize(
    ("host_s", "device_s", "setting"), [(1e-9, 1e-7, "'host'"), (1e-7, 1e-9, "'device'")]
)
def test_one_alone_is_chosen_where_the_other_is_slow(
    host_s: float, device_s: float, setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    stepped_there: list[int],
) -> None:  # fmt: skip
    rated(monkeypatch, host_s, device_s)
    _, _, engine = train(tmp_path, "auto", steps=1)
    assert any(f"optimizer_device={setting} chooses the same" in text for text in engine.notices)
    assert bool(stepped_there) is (setting == "'device'")


def test_rates_are_measured_and_nothing_else_changes(tmp_path: Path, same: Any) -> None:
    torch.manual_seed(0)
    model = Net()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.Adagrad(trained(model), 1e-2)  # has states from the beginning
    states = copy.deepcopy(optimizer.state_dict())
    engine = offload.attach(
        model,
        optimizer,
        budget="8GiB",
        nvme=tmp_path / "measured",
        accelerator=CpuAccelerator(),
        config={"optimizer_device": "auto"},
    )
    assert any("ns there and back" in text for text in engine.notices)
    assert_same(model.state_dict(), before)
    for one, other in zip(
        optimizer.state_dict()["state"].values(), states["state"].values(), strict=True
    ):
        assert_same(one, other)
    engine.detach()
    same(who="auto")
