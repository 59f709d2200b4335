"""Steps on the device inside backward: no gradient goes to scratch."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from device_runs import computing_on
from device_steps import (
    IN_BACKWARD,
    Elsewhere,
    attach,
    unclipped,
    weights_and_states,
)
from exact_models import Net, adamw, loss_of, tokens_of
from torch import nn

from offload.allocator.errors import ConsumedGradientError, StepInterruptedError
from offload.engine import Engine
from offload.tiers.cpudevice import CpuAccelerator
from offload.tiers.events import Move
from offload.tiers.lanes import Transfer

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.parametrize(
    ("who", "recompute"), [("host", None), ("host", True), ("device", None), ("device", False)]
)
def test_a_step_in_backward(who: str, recompute: bool | None, same: Any) -> None:
    engine, accelerator = same(lambda: Net(recompute), loop=unclipped, who=who, config=IN_BACKWARD)
    gradients = [move for move in engine._journal.recorder.events if moves_gradient(move)]
    assert {move.src for move in gradients} == {accelerator.name}
    assert {move.dst for move in gradients} == {"host"}  # none goes to scratch


def moves_gradient(event: Any) -> bool:
    return isinstance(event, Move) and event.role == "gradient"


def test_a_shared_step_in_backward_after_several_passes(same: Any) -> None:
    run = partial(unclipped, passes=3, steps=4)

    def both(model: Any, optimizer: Any, engine: Engine | None) -> list[float]:
        return weights_and_states(run, engine, model, optimizer)

    same(loop=both, who=0.5, config={**IN_BACKWARD, "accumulation_steps": 3})


@pytest.mark.usefixtures("other_kernels")
def test_a_step_in_backward_has_the_devices_bits(same: Any) -> None:
    def run(model: Any, optimizer: Any, engine: Engine | None) -> list[float]:
        if engine is None:
            optimizer = Elsewhere(optimizer)
        return weights_and_states(unclipped, engine, model, optimizer)

    same(loop=run, config=IN_BACKWARD)


def test_a_gradient_that_a_step_has_used_up(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, accelerator = Net(), CpuAccelerator()
    optimizer = adamw(model)
    with (
        attach(model, optimizer, tmp_path, accelerator=accelerator, config=IN_BACKWARD) as engine,
        computing_on(accelerator, engine),
    ):
        loss_of(model, tokens_of(4, 32)).backward()
        with pytest.raises(ConsumedGradientError, match="has used up already"):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with pytest.raises(ConsumedGradientError, match="has used up already"):
            loss_of(model, tokens_of(4, 32)).backward()  # names no accumulation_steps


class Detached(nn.Module):
    """Backward reads the weight once more after its gradient has come."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(300, 300) / 17)
        self.is_read_again = False
        self.between: Callable[[], None] = lambda: None  # behind its step

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.is_read_again:
            x = nn.functional.linear(x, self.weight.detach())
            x.register_hook(lambda _gradient: self.between())
        return nn.functional.linear(x, self.weight)


def squares(model: Any, optimizer: Any, engine: Engine | None) -> list[float]:
    """Some steps, all but the first of which read a weight behind its step."""
    losses = []
    for step in range(3):
        model[1].is_read_again = step > 0
        loss = model(torch.randn(8, 300)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def with_detached() -> nn.Module:
    return nn.Sequential(nn.Linear(300, 300), Detached(), nn.Linear(300, 300))


@pytest.mark.parametrize("who", ["host", "device"])
@pytest.mark.parametrize("is_quick", [False, True])  # moves have ended when somebody asks
def test_what_is_read_after_a_step_is_the_copy_from_before_it(
    who: str, is_quick: bool, same: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU it is refused: memory has one weight."""
    if is_quick:
        monkeypatch.setattr(Transfer, "done", lambda transfer: transfer.settle() is None)
    same(with_detached, loop=squares, who=who, config=IN_BACKWARD)


def test_what_is_read_after_a_step_and_has_left_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, accelerator = with_detached(), CpuAccelerator()
    optimizer = adamw(model)
    engine = attach(model, optimizer, tmp_path, accelerator=accelerator, config=IN_BACKWARD)
    copies = engine.computing.weights
    model[1].between = lambda: copies.evict(copies.weights["1.weight"])
    with (
        pytest.raises(StepInterruptedError, match=r"reads 1\.weight after it has stepped it"),
        engine,
        computing_on(accelerator, engine),
    ):
        squares(model, optimizer, engine)
