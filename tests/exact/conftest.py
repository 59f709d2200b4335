"""Training the same thing twice: in memory, and under Offload with next to no memory."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from step_runs import PutOff
from torch import nn

import offload
from offload.engine import Engine
from offload.tiers.events import ListRecorder, Move

STEPS = 20
Loop = Callable[[nn.Module, Any, Engine | None], list[float]]


class Comparison:
    """What both runs left."""

    def __init__(self, engine: Engine, plain: Any, offloaded: Any, values: Any) -> None:
        self.engine = engine
        self.plain_model, self.plain_optimizer = plain
        self.model, self.optimizer = offloaded
        self.plain_values, self.values = values

    def moved_roles(self) -> set[str]:
        """The roles of which at least one tensor really travelled."""
        events = self.engine._journal.recorder.events  # type: ignore[attr-defined]
        return {event.role for event in events if isinstance(event, Move)}


@pytest.fixture(autouse=True, scope="module")
def _threads(several_threads: None) -> None:
    """Whatever a thread computes of a tensor, the bits are the same."""


@pytest.fixture
def starve(tmp_path: Path) -> Iterator[Callable[..., Engine]]:
    """Attaches with a window, gradients and activations of (nearly) no bytes."""
    engines: list[Engine] = []

    def attach(model: nn.Module, optimizer: Any, **options: Any) -> Engine:
        options.setdefault("nvme", tmp_path / "nvme")
        engine = offload.attach(model, optimizer, budget="host=8GiB", **options)
        engine._journal.recorder = ListRecorder()
        engine.weights.window_nbytes = 1 << 20
        engine.gradients.limit_nbytes = 64 << 10
        engine.activations.limit_nbytes = 128 << 10
        engine.keep_streaming()
        engines.append(engine)
        return engine

    yield attach
    for engine in engines:
        engine.detach()


@pytest.fixture
def compare(starve: Callable[..., Engine]) -> Callable[..., Comparison]:
    """Runs ``loop`` on two copies of a model; asserts that nothing differs in any bit."""

    def run(
        make_model: Callable[[], nn.Module],
        make_optimizer: Callable[[nn.Module], Any],
        loop: Loop,
        **options: Any,
    ) -> Comparison:
        torch.manual_seed(0)
        model = make_model()
        twin = copy.deepcopy(model)
        optimizer = make_optimizer(model)
        torch.manual_seed(1)
        plain_values = loop(model, optimizer, None)
        twin_optimizer = make_optimizer(twin)
        engine = starve(twin, twin_optimizer, **options)
        torch.manual_seed(1)
        values = loop(twin, twin_optimizer, engine)
        assert values == plain_values
        assert_same_weights(model, twin)
        assert_same_states(optimizer, twin_optimizer)
        return Comparison(
            engine, (model, optimizer), (twin, twin_optimizer), (plain_values, values)
        )

    return run


@pytest.fixture
def many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """With an end that is off every grid: 300 * 257 = 77,100 elements."""
    monkeypatch.setattr("offload.runtime.choose_chunk_numel", lambda _budget: 64 * 160)


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    """Every weight and buffer has the same bits."""
    mine, theirs = one.state_dict(), other.state_dict()
    assert list(mine) == list(theirs)
    for name, value in mine.items():
        assert torch.equal(value, theirs[name]), name


def assert_same_states(one: Any, other: Any) -> None:
    """The optimizers' state dictionaries are the same, in content and order."""
    mine, theirs = one.state_dict(), other.state_dict()
    assert list(mine["state"]) == list(theirs["state"])
    for index, state in mine["state"].items():
        assert list(state) == list(theirs["state"][index])
        for name, value in state.items():
            found = theirs["state"][index][name]
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, found), (index, name)
            else:
                assert value == found, (index, name)
    assert mine["param_groups"] == theirs["param_groups"]


@pytest.fixture
def put_off(monkeypatch: pytest.MonkeyPatch) -> PutOff:
    """Counts while the test runs."""
    from offload.swap.forward_step import ForwardStep

    counted, start = PutOff(), ForwardStep.start

    def counting(self: ForwardStep) -> None:
        counted.count += len(self._put)
        start(self)

    monkeypatch.setattr(ForwardStep, "start", counting)
    return counted
