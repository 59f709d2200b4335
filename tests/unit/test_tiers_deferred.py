"""Deferred: eager code on an accelerator, whose bits are those of the CPU."""

import pytest
import torch
from torch import nn

from offload.tiers.cpudevice import CpuAccelerator
from offload.tiers.simulated.accelerator import SimulatedAccelerator
from offload.tiers.simulated.deferred import Deferred

DEVICES = {"cpu": CpuAccelerator, "simulated": SimulatedAccelerator}


@pytest.fixture(params=DEVICES)
def device(request):
    with DEVICES[request.param]() as opened:
        yield opened


def train(steps=3):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.5), nn.LayerNorm(16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    losses = []
    for _ in range(steps):
        x = torch.randn(4, 8)
        loss = model(x)[:, ::2].square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, list(model.parameters())


def test_training_has_the_same_bits(device):
    losses, weights = train()
    with Deferred(device):
        found_losses, found = train()
    device.synchronize()
    assert found_losses == losses
    for one, other in zip(found, weights, strict=True):
        assert device.owns(one)
        assert not device.owns(other)
        assert torch.equal(one.detach(), other.detach())


def test_what_is_computed_comes_late():
    device = SimulatedAccelerator()
    with Deferred(device):
        x = torch.ones(4)
        y = x * 2
        z = y.view(2, 2).t()  # no work: the same bytes
    assert y.isnan().all()
    device.synchronize()
    assert torch.equal(z, torch.full((2, 2), 2.0))


def test_values_are_waited_for(device):
    with Deferred(device):
        x = torch.ones(4) * 3
        assert x.sum().item() == 12
        assert torch.equal(x, torch.full((4,), 3.0))


def test_a_kernel_that_fails_is_told():
    device = SimulatedAccelerator()
    device.launch(lambda: torch.ones(2).view(3))
    with pytest.raises(RuntimeError, match="shape"):
        device.synchronize()


def test_memory_of_dead_tensors_comes_back(device):
    with Deferred(device):
        x = torch.ones(1 << 16)
        for _ in range(4):
            x = x + 1
    device.synchronize()
    assert device.peak_nbytes() >= 2 * x.nbytes
    assert device._pool.used_nbytes <= 2 * x.nbytes
