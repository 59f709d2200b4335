"""Where memory is short, tiles of the step in backward go on before anything else has to leave."""

from typing import Any

import pytest
import torch
from torch import nn
from vertical_runs import IN_BACKWARD, TwoTowers, adamw, moves_of

from offload.swap.backward_step import BackwardStep
from offload.swap.governor import Governor
from offload.tiers.lanes import Transfer

pytestmark = pytest.mark.usefixtures("many_tiles", "patience")
MIB = 1 << 20
COUNT = 4
WEIGHT_NBYTES = 200 * 200 * 4


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """No transfer has ended before somebody waited for it: the slowest drive there can be."""
    awaited: dict[int, Transfer] = {}
    settle, done = Transfer.settle, Transfer.done

    def wait_for(self: Transfer) -> None:
        settle(self)
        awaited[id(self)] = self

    monkeypatch.setattr(Transfer, "settle", wait_for)
    monkeypatch.setattr(Transfer, "done", lambda self: id(self) in awaited and done(self))


def batches_of(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(5, 200, generator=generator) for _ in range(COUNT)]


def attach(starve: Any, model: nn.Module) -> tuple[Any, BackwardStep]:
    config = {**IN_BACKWARD, "accumulation_steps": COUNT}
    engine = starve(model, adamw(model), config=config)
    stepper = engine.gradients.stepper
    assert isinstance(stepper, BackwardStep)
    return engine, stepper


def test_gradients_wait_for_tiles_that_make_room(
    starve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tile is written anyway. A gradient that leaves is written, read, and read by its tile."""
    steppers: list[BackwardStep] = []

    def room(_governor: Governor) -> int:
        return 2 * MIB if any(each._pipeline.is_busy for each in steppers) else 1 << 30

    monkeypatch.setattr(Governor, "room", room)
    model = TwoTowers()
    engine, stepper = attach(starve, model)
    steppers.append(stepper)
    stepper.limit_nbytes = 1 << 30
    engine.gradients._incomplete._reserve_nbytes = 4 * MIB
    for step in range(3):
        engine._journal.recorder.events.clear()
        engine.accumulate(batches_of(step), lambda x: model(x).square().mean() / COUNT)
        engine.optimizer.step()
        engine.optimizer.zero_grad()
    assert moves_of(engine, "state", "dst")
    assert not moves_of(engine, "gradient", "dst")


def held_nbytes(stepper: BackwardStep) -> int:
    """Of weights in memory whose tiles are not all stepped."""
    pipeline = stepper._pipeline
    with pipeline._lock:
        waiting = {target.weight for each in pipeline._waiting for target in each.targets}
        reading = {part.target.weight for tile in pipeline._reading for part in tile.parts}
    return sum(weight.nbytes for weight in waiting | reading if weight.in_memory)


def test_weights_whose_gradients_are_in_scratch_wait_within_the_limit(
    starve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of them could be given up while its tiles wait."""
    model = TwoTowers()
    engine, stepper = attach(starve, model)
    stepper.limit_nbytes = 3 * WEIGHT_NBYTES // 2
    engine.weights.window_nbytes = 8 * WEIGHT_NBYTES
    seen: list[int] = []
    take = BackwardStep.take

    def watched(self: BackwardStep, *arguments: Any, **options: Any) -> bool:
        result = take(self, *arguments, **options)
        seen.append(held_nbytes(self))
        return result

    monkeypatch.setattr(BackwardStep, "take", watched)
    for batch in batches_of(0):
        (model(batch).square().mean() / COUNT).backward()
    engine.optimizer.step()
    assert moves_of(engine, "gradient", "dst")
    assert 0 < max(seen) <= stepper.limit_nbytes
