"""A model that computes on a device as the user's code sees it."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from deep_on_device import WIDTH, Deep, adamw, loop
from device_runs import assert_same, computing_on
from torch import nn

import offload
from offload import launcher
from offload.attaching import attach_in
from offload.config import make_config
from offload.tiers.cpudevice import CpuAccelerator


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
