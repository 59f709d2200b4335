"""Tiles are stepped while the training thread is inside a kernel: the bits stay, and the rest."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from step_runs import adamw, loss_of
from test_exact_optimizers import OPTIMIZERS, make_model

from offload.allocator.errors import StepInterruptedError
from offload.engine import Engine
from offload.swap import pipeline
from offload.swap.pipeline import TilePipeline
from offload.tiers.engines.registry import wrapping
from offload.tiers.pages import OWN_THREAD
from offload.tiers.wrappers import Verb, WrapperEngine

pytestmark = pytest.mark.usefixtures("many_tiles", "several_threads")
PATIENCE_S = 60  # far above any wait of a right implementation
IN_BACKWARD = {"step_in_backward": True}
BESIDE = f"{OWN_THREAD}beside kernels"


class SlowReads(WrapperEngine):
    """The training thread has gone on when they end."""

    def move(self, verb: Verb, offset: int, address: int, nbytes: int) -> int:
        if verb == "read":
            time.sleep(0.002)
        return super().move(verb, offset, address, nbytes)


@pytest.fixture(autouse=True)
def _slow_reads() -> Iterator[None]:
    with wrapping(SlowReads):
        yield


@pytest.fixture(autouse=True)
def steppers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The threads that stepped, by their names."""
    names: list[str] = []
    step_on = pipeline.step_on

    def watched(*arguments: Any) -> Any:
        names.append(threading.current_thread().name)
        return step_on(*arguments)

    monkeypatch.setattr(pipeline, "step_on", watched)
    return names


def pipeline_of(engine: Engine) -> TilePipeline:
    assert engine._optimizing is not None
    return engine._optimizing.streamed.pipeline


def long_kernels(model: Any, engine: Engine | None) -> None:
    """Have backward stay between two layers until all tiles so far have been stepped."""
    if engine is None:
        return
    tiles = pipeline_of(engine)

    def stay(_gradient: torch.Tensor) -> None:
        begun_s = time.monotonic()
        while (tiles.is_waiting or tiles._reading) and not tiles._failed:
            assert time.monotonic() < begun_s + PATIENCE_S, "nobody steps"
            os.sched_yield()

    for layer in model:
        layer.register_forward_hook(lambda _layer, _args, out: out.register_hook(stay) and None)


def loop(
    model: Any, optimizer: Any, engine: Engine | None, *, steps: int, scale: float = 1.0
) -> list[float]:
    long_kernels(model, engine)
    losses = []
    for _ in range(steps):
        loss = loss_of(model, torch.randn(32, 300)) * scale
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


NO_TILES = ("adafactor", "third-party")
NO_READS = ("sgd",)  # of a weight in memory there is nothing to wait for
ELEMENTWISE = [name for name in OPTIMIZERS if name not in NO_TILES + NO_READS]


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_tiles_stepped_beside_kernels_have_the_same_bits(
    name: str, compare: Any, steppers: list[str]
) -> None:
    compare(
        make_model,
        lambda model: OPTIMIZERS[name](list(model.parameters())),
        partial(loop, steps=6),
        config=IN_BACKWARD,
    )
    assert BESIDE in steppers


def test_rounded_states_have_the_bits_of_a_step_behind_backward(
    starve: Callable[..., Engine], steppers: list[str], tmp_path: Path
) -> None:
    def weights_of(in_backward: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = make_model()
        optimizer = adamw(model)
        settings = {"step_in_backward": in_backward, "state_precision": "bf16"}
        nvme = tmp_path / str(in_backward)
        engine = starve(model, optimizer, config=settings, nvme=nvme)
        loop(model, optimizer, engine if in_backward else None, steps=4)
        return [weight.clone() for weight in model.parameters()]

    behind = weights_of(in_backward=False)
    assert BESIDE not in steppers
    beside = weights_of(in_backward=True)
    assert all(torch.equal(one, other) for one, other in zip(behind, beside, strict=True))


def test_what_is_flushed_to_zero_on_the_training_thread_is_flushed_there(
    compare: Any, several_threads: None, steppers: list[str]
) -> None:
    """Squares of these gradients are denormal."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor can't flush denormal numbers")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # torch sets it for one thread alone
    try:
        same = compare(make_model, adamw, partial(loop, steps=3, scale=1e-17), config=IN_BACKWARD)
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(False)
    states = same.optimizer.state_dict()["state"].values()
    assert any(not state["exp_avg_sq"].count_nonzero() for state in states)
    assert BESIDE in steppers


@pytest.fixture
def engine(starve: Callable[..., Engine]) -> Engine:
    torch.manual_seed(0)
    model = make_model()
    return starve(model, adamw(model), config=IN_BACKWARD)


def test_other_threads_keep_theirs(engine: Engine) -> None:
    threads, seen = torch.get_num_threads(), []
    long_kernels(engine.model, engine)
    assert threads > 1

    def look() -> None:
        seen.append(torch.get_num_threads())

    def look_there(_gradient: torch.Tensor) -> None:
        assert BESIDE in [thread.name for thread in threading.enumerate()]
        other = threading.Thread(target=look)
        other.start()
        other.join()
        look()

    x = torch.randn(32, 300, requires_grad=True)
    x.register_hook(look_there)
    loss_of(engine.model, x).backward()
    assert seen == [threads, threads]
    assert BESIDE not in [thread.name for thread in threading.enumerate()]


def test_an_error_there_is_raised_on_the_training_thread(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    step_on = pipeline.step_on
    model, optimizer = engine.model, engine.optimizer
    loop(model, optimizer, engine, steps=1)  # a first step has nothing to read
    tiles = pipeline_of(engine)

    def fails(*arguments: Any) -> Any:
        if threading.current_thread().name == BESIDE:
            raise ArithmeticError("a step failed")
        return step_on(*arguments)

    monkeypatch.setattr(pipeline, "step_on", fails)
    with pytest.raises(ArithmeticError, match="a step failed"):
        loss_of(model, torch.randn(32, 300)).backward()
    assert tiles.is_busy
    with pytest.raises(StepInterruptedError):
        loss_of(model, torch.randn(32, 300))
    engine.detach()
    assert BESIDE not in [thread.name for thread in threading.enumerate()]
