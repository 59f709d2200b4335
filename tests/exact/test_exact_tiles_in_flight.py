"""Tiles take the staging memory of others that a slow drive is still writing: the bits stay."""

import os
import threading
import time
from functools import partial
from typing import Any

import pytest
import torch
from step_runs import adamw, loop, loss_of
from test_exact_optimizers import make_model

from offload.swap.pipeline import TilePipeline
from offload.tiers.engines.registry import wrapping
from offload.tiers.lanes import Lane
from offload.tiers.wrappers import Verb, WrapperEngine

pytestmark = pytest.mark.usefixtures("many_tiles")
PATIENCE_S = 60  # far above any wait of a right implementation


class SlowWrites(WrapperEngine):
    """A write looks at its memory late: what is read there before shows in the file."""

    def move(self, verb: Verb, offset: int, address: int, nbytes: int) -> int:
        if verb == "write":
            time.sleep(0.002)
        return super().move(verb, offset, address, nbytes)


class GatedWrites(WrapperEngine):
    """Writes wait while the gate is closed."""

    gate = threading.Event()

    def move(self, verb: Verb, offset: int, address: int, nbytes: int) -> int:
        if verb == "write":
            assert self.gate.wait(PATIENCE_S)
        return super().move(verb, offset, address, nbytes)


@pytest.fixture
def followers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The transfers that were to begin after another."""
    found: list[Any] = []
    submit = Lane.submit

    def watched(self: Lane, *arguments: Any, after: Any = None, **options: Any) -> Any:
        transfer = submit(self, *arguments, after=after, **options)
        if after is not None:
            found.append(transfer)
        return transfer

    monkeypatch.setattr(Lane, "submit", watched)
    return found


@pytest.fixture(params=["one", "three"])
def few_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Staging for so many tiles of 10,240 elements with two or four numbers for each."""
    nbytes = 1 if request.param == "one" else 3 * 64 * 160 * 4 * 4
    begin = TilePipeline.add

    def add(self: TilePipeline, *arguments: Any, **options: Any) -> None:
        self.staging.limit_nbytes = nbytes
        begin(self, *arguments, **options)

    monkeypatch.setattr(TilePipeline, "add", add)


@pytest.mark.usefixtures("few_tiles")
@pytest.mark.parametrize("in_backward", [False, True])
def test_a_tile_in_the_memory_of_one_that_is_being_written(
    in_backward: bool, followers: list[Any], compare: Any
) -> None:
    """The first step included: its tiles have nothing to read, and must wait all the same."""
    with wrapping(SlowWrites):
        compare(
            make_model, adamw, partial(loop, steps=12), config={"step_in_backward": in_backward}
        )
    assert followers


def step_beside_first(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever the training thread comes by, the thread beside has just stepped all there is."""

    def advance() -> None:
        with pipeline._lock:
            pipeline._move_on()
        while pipeline._reading:
            os.sched_yield()

    monkeypatch.setattr(pipeline, "advance", advance)


@pytest.mark.parametrize("is_beside", [False, True])
def test_a_gradient_goes_when_its_tiles_are_stepped_not_when_they_are_written(
    is_beside: bool, starve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else backward would wait here for writes that wait for its end."""
    torch.manual_seed(0)
    model: Any = make_model()
    optimizer = adamw(model)
    GatedWrites.gate.set()
    with wrapping(GatedWrites):
        engine = starve(model, optimizer, config={"step_in_backward": True})
    loss_of(model, torch.randn(32, 300)).backward()
    optimizer.step()
    optimizer.zero_grad()
    seen: list[bool] = []

    def last(_parameter: torch.Tensor) -> None:
        seen.append(GatedWrites.gate.is_set())
        GatedWrites.gate.set()

    model[0].weight.register_post_accumulate_grad_hook(last)
    loss = loss_of(model, torch.randn(32, 300))
    assert engine._optimizing is not None
    assert engine._optimizing.in_backward is not None
    engine._optimizing.in_backward.limit_nbytes = 0  # no gradient may wait for its step
    engine._optimizing.streamed.pipeline.staging.limit_nbytes = 1 << 30  # all tiles may
    if is_beside:
        step_beside_first(engine._optimizing.streamed.pipeline, monkeypatch)
    GatedWrites.gate.clear()
    deadlock = threading.Timer(PATIENCE_S / 2, GatedWrites.gate.set)
    deadlock.start()
    loss.backward()
    deadlock.cancel()
    optimizer.step()
    assert seen == [False]
