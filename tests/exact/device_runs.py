"""Training on a device that torch takes for the CPU: what is on it is apart from what is not."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import offload
from offload.engine import Engine
from offload.tiers.accelerator import Accelerator
from offload.tiers.events import ListRecorder, Move
from offload.tiers.simulated.deferred import Deferred

Loop = Callable[[Any, Any, Engine | None], list[float]]


def attach_starved(
    model: nn.Module, optimizer: Any, accelerator: Accelerator, nvme: Path, **options: Any
) -> Engine:
    """Attach with a window, gradients and activations of (nearly) no bytes."""
    options.setdefault("budget", "host=8GiB,device=1GiB")
    engine = offload.attach(model, optimizer, nvme=nvme, accelerator=accelerator, **options)
    engine._journal.recorder = ListRecorder()
    engine.keep_streaming()
    computing = engine.computing
    assert computing is not None
    computing.weights.window_nbytes = 1 << 18
    computing.finish_step = lambda: None  # type: ignore[method-assign]
    computing.gradients.limit_nbytes = 1 << 18
    engine.gradients.limit_nbytes = 64 << 10
    engine.activations.limit_nbytes = 128 << 10
    engine.activations.spiller._in_flight_nbytes = 64 << 10
    return engine


def computing_on(accelerator: Accelerator, engine: Engine) -> Deferred:
    """Inside, operations with tensors of ``accelerator`` are its kernels.

    None may get a weight in host memory: torch would refuse it, if the two were different to it.
    """

    def host_storages() -> set[int]:
        weights = engine.weights.weights.values()
        return {weight.mapped.tensor.untyped_storage()._cdata for weight in weights}

    known = host_storages()
    return Deferred(accelerator, beside_host=True, apart=lambda: known)


def train_both(
    make_model: Callable[[], nn.Module],
    make_optimizer: Callable[[nn.Module], Any],
    loop: Loop,
    accelerator: Accelerator,
    nvme: Path,
    **options: Any,
) -> Engine:
    """Run ``loop`` in memory and on the device; assert that nothing differs in any bit."""
    torch.manual_seed(0)
    model = make_model()
    twin = copy.deepcopy(model)
    optimizer = make_optimizer(model)
    torch.manual_seed(1)
    right = loop(model, optimizer, None)
    twin_optimizer = make_optimizer(twin)
    engine = attach_starved(twin, twin_optimizer, accelerator, nvme, **options)
    try:
        torch.manual_seed(1)
        with computing_on(accelerator, engine):
            values = loop(twin, twin_optimizer, engine)
        assert values == right
        accelerator.synchronize()
        assert_same(model.state_dict(), twin.state_dict())
        for one, other in zip(
            optimizer.state_dict()["state"].values(),
            twin_optimizer.state_dict()["state"].values(),
            strict=True,
        ):
            assert_same(one, other)
    finally:
        engine.detach()
    assert_same(model.state_dict(), twin.state_dict())
    assert not any(accelerator.owns(value) for value in twin.state_dict().values())
    return engine


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Equal in content and order, bit by bit."""
    assert list(one) == list(other)
    for name, value in one.items():
        same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
        assert same(value, other[name]), name


def moved_roles(engine: Engine, accelerator: Accelerator) -> set[str]:
    """Roles of tensors that travelled to or from the device."""
    events = engine._journal.recorder.events  # type: ignore[attr-defined]
    return {
        event.role
        for event in events
        if isinstance(event, Move) and accelerator.name in (event.src, event.dst)
    }
