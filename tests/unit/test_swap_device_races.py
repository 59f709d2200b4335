"""Training on a device whose work ends late and in any order that no edge forbids."""

import errno
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import offload
from offload.allocator.errors import TierIOError
from offload.swap.ferry import Ferry
from offload.tiers import hostmem
from offload.tiers.accelerator import Accelerator, DeviceMemory
from offload.tiers.cpudevice import CpuAccelerator, DoneEvent
from offload.tiers.simulated.accelerator import SimulatedAccelerator
from offload.tiers.simulated.deferred import Deferred
from offload.tiers.testing import assert_no_race, find_race

WIDTH = 160  # a weight is larger than what stays as it is
SEEDS = 8
MANY_SEEDS = 300


class Tied(nn.Module):
    """A weight that two modules use, one that writes to its weight, a buffer that changes."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WIDTH, WIDTH, max_norm=2.0)
        self.middle = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.head = nn.Linear(WIDTH, WIDTH, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(F.gelu(self.middle(self.table(tokens)))))


def train(device: Accelerator, **config: Any) -> list[torch.Tensor]:
    """Losses, weights and buffers of two steps, with accumulation and clipping."""
    torch.manual_seed(0)
    model = Tied()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    results = []
    with TemporaryDirectory() as folder:
        engine = offload.attach(
            model,
            optimizer,
            budget="host=8GiB,device=1GiB",
            nvme=Path(folder),
            accelerator=device,
            config=config or None,
        )
        engine.keep_streaming()
        computing = engine.computing
        assert computing is not None
        computing.weights.window_nbytes = computing.gradients.limit_nbytes = WIDTH * WIDTH * 4
        engine.activations.limit_nbytes = WIDTH * 64
        with engine, Deferred(device, beside_host=True):
            for _ in range(2):
                for _ in range(2):
                    tokens = torch.randint(WIDTH, (64,))
                    loss = F.cross_entropy(model(tokens), tokens)
                    loss.backward()
                if not config:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
                results.append(torch.tensor(loss.item()))
    return [*results, *(value.clone() for value in model.state_dict().values())]


def test_no_order_of_the_device_changes_a_bit() -> None:
    assert_no_race(train, seeds=range(SEEDS))


STEPPING: list[dict[str, Any]] = [
    {"optimizer_device": "device"},
    {"optimizer_device": 0.5},
    {"optimizer_device": "device", "step_in_backward": True, "accumulation_steps": 2},
    {"step_in_backward": True, "accumulation_steps": 2},
]


@pytest.mark.parametrize("config", STEPPING, ids=["device", "half", "in backward", "on the host"])
def test_no_order_changes_a_bit_of_the_optimizers_step(config: dict[str, Any]) -> None:
    assert_no_race(partial(train, **config), seeds=range(SEEDS))


@pytest.mark.slow
def test_no_order_of_the_device_changes_a_bit_under_many_seeds() -> None:
    assert_no_race(train, seeds=range(MANY_SEEDS))


def test_the_reference_trains_as_memory_does() -> None:
    torch.manual_seed(0)
    model = Tied()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    losses = []
    for _ in range(2):
        for _ in range(2):
            tokens = torch.randint(WIDTH, (64,))
            loss = F.cross_entropy(model(tokens), tokens)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    right = [*losses, *model.state_dict().values()]
    for one, other in zip(train(CpuAccelerator()), right, strict=True):
        assert torch.equal(one, other)


def gradients_wait_for_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Ferry.copy_out

    def copy_out(self, source, at, address, nbytes):
        source = DeviceMemory(tensor=source.tensor, ready=DoneEvent())
        return original(self, source, at, address, nbytes)

    monkeypatch.setattr(Ferry, "copy_out", copy_out)


def nobody_waits_for_a_fetch(monkeypatch: pytest.MonkeyPatch) -> None:
    def carry_in(self, target, fill, at, nbytes):
        address = hostmem.map_anonymous(nbytes)  # never given back: its bytes stay as they are
        fill(at, address, nbytes)
        self.copy_in(target.memory, at, address, nbytes)

    monkeypatch.setattr(Ferry, "_carry_in", carry_in)


def nobody_waits_for_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    def carry_out(self, source, drain, at, nbytes):
        address = hostmem.map_anonymous(nbytes)
        self.copy_out(source.memory, at, address, nbytes)
        drain(at, address, nbytes)

    monkeypatch.setattr(Ferry, "_carry_out", carry_out)


LEFT_OUT: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "gradients wait for kernels": gradients_wait_for_no_kernel,
    "weights have arrived": nobody_waits_for_a_fetch,
    "gradients have arrived": nobody_waits_for_a_gradient,
}


@pytest.mark.parametrize("edge", LEFT_OUT)
def test_right_code_without_one_edge_is_found_out(
    edge: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    LEFT_OUT[edge](monkeypatch)
    assert find_race(train, seeds=range(40)) is not None


@pytest.mark.parametrize("link", ["host→device", "device→host"])
def test_a_copy_that_fails_is_told_and_nothing_is_lost(link: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, device = Tied(), SimulatedAccelerator(3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    engine = offload.attach(model, optimizer, budget="host=8GiB", nvme=tmp_path, accelerator=device)
    tokens = torch.arange(64)
    with engine, Deferred(device, beside_host=True):
        model.eval()
        if link == "host→device":
            device.fail_next(link, TierIOError(errno.EIO, "the device failed"))
            with pytest.raises(TierIOError, match="the device failed"):
                model(tokens)
            loss = model(tokens).square().mean()
            loss.backward()
        else:
            loss = model(tokens).square().mean()
            device.fail_next(link, TierIOError(errno.EIO, "the device failed"))
            with pytest.raises(TierIOError, match="the device failed"):
                loss.backward()
            assert model.head.weight.grad is None  # the first that left
            optimizer.zero_grad()
            loss = model(tokens).square().mean()
            loss.backward()
        device.synchronize()
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
    twin = Tied()
    twin.load_state_dict(before)
    twin.eval()
    twin(tokens).square().mean().backward()
    for parameter, gradient in zip(twin.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)
