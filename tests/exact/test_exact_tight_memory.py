"""What moves near a budget: pages of a last window, pages of a table, before what comes next."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import offload
from offload.engine import Engine
from offload.swap.residency import Residency
from offload.tiers.lanes import Lane

SMALL, LARGE = 512, 2048


class Growing(nn.Sequential):
    """Small layers, and a head that takes the window of all of them."""

    def __init__(self) -> None:
        small = [nn.Linear(SMALL, SMALL) for _ in range(8)]
        super().__init__(*small, nn.Linear(SMALL, LARGE))


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    torch.manual_seed(0)
    with offload.init(budget="host=8GiB", nvme=tmp_path):
        model = Growing()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with offload.attach(model, optimizer) as engine:
        engine.keep_streaming()
        yield engine


def train(engine: Engine) -> None:
    engine.model(torch.ones(2, SMALL)).sum().backward()
    assert engine.optimizer is not None
    engine.optimizer.step()
    engine.optimizer.zero_grad()


def test_what_is_left_of_a_window_goes_before_a_read_begins(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(engine)
    weights = engine.weights
    # Weights of the head and of the layer before it, both in use.
    used = [each for name, each in weights.weights.items() if name[0] in "78"]
    weights.window_nbytes = most = sum(each.nbytes for each in used)
    held: list[int] = []
    plain = Lane.submit

    def submit(lane: Lane, jobs: Any, label: Any, nbytes: int, **options: Any) -> Any:
        if lane is weights._lane:
            here = [each for each in weights.weights.values() if each.in_memory]
            coming = nbytes + sum(each.nbytes for each in weights._fetching.values())
            held.append(sum(each.nbytes for each in here) + coming + weights.pool.nbytes)
        return plain(lane, jobs, label, nbytes, **options)

    monkeypatch.setattr(Lane, "submit", submit)
    with torch.no_grad():
        engine.model(torch.ones(2, SMALL))
    assert 0 < max(held) <= most


def test_backward_tells_what_gradients_will_take(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    monkeypatch.setattr(engine.weights, "_expect", told.append)
    with torch.no_grad():
        engine.model(torch.ones(2, SMALL))
    assert told == []
    engine.model[3].weight.requires_grad_(False)  # type: ignore[index]
    train(engine)
    whole, part = SMALL * LARGE * 4, SMALL * SMALL * 4
    assert sorted(told) == [part] * 6 + [whole]  # the first layer's input needs no gradient


def test_a_step_meets_no_fetch_of_a_weight_that_stays(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read before the step would land over what it has made."""
    train(engine)
    weights, streamed = engine.weights, engine._optimizing.streamed  # type: ignore[union-attr]
    weights.keep(weights.weights)
    engine.model(torch.ones(2, SMALL)).sum().backward()
    weight = weights.weights["3.weight"]
    weights.evict(weight)
    weights.fetch_ahead(weight)
    assert weight.residency is Residency.FETCHING
    met: list[Residency] = []
    plain = streamed.step

    def step() -> None:
        met.extend(each.residency for each in weights.weights.values())
        plain()

    monkeypatch.setattr(streamed, "step", step)
    assert engine.optimizer is not None
    engine.optimizer.step()
    assert met
    assert Residency.FETCHING not in met
