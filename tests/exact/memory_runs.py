"""What the tests of steps in memory share: training, what is held, what moved."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from offload.engine import Engine
from offload.tiers.events import Move

STEPS = 12
IN_BACKWARD = {"step_in_backward": True}
# Of ``make_model``; the others are ``2.bias`` and ``2.weight``.
SOME = ("scale", "0.bias", "0.weight")


def adamw(model: nn.Module) -> Any:
    return torch.optim.AdamW(model.parameters(), 1e-3, fused=True)


def loss_of(model: Any, x: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(model(x) * model.scale, x) + model.empty.sum()


def hold(engine: Engine | None, names: Iterable[str] | None = None) -> None:
    """Have ``names`` in memory, or everything, whatever the plan says."""
    if engine is not None:
        engine.keep_streaming()
        chosen = engine.weights.weights if names is None else names
        engine.weights.keep(chosen)
        engine._optimizing.streamed.memory.keep(chosen)


def train(
    model: Any, optimizer: Any, steps: range, between: Callable[[int], None] = lambda _step: None
) -> list[float]:
    losses = []
    for step in steps:
        x = torch.randn(32, 300, generator=torch.Generator().manual_seed(step))
        loss = loss_of(model, x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        between(step)
    return losses


def loop_with(names: Iterable[str] | None, after: int = 1) -> Callable[..., list[float]]:
    """Some steps that stream, then those with ``names`` in memory."""

    def loop(model: Any, optimizer: Any, engine: Engine | None) -> list[float]:
        losses = train(model, optimizer, range(after))
        hold(engine, names)
        return losses + train(model, optimizer, range(after, STEPS))

    return loop


def assert_same(plain: Any, plain_optimizer: Any, model: Any, optimizer: Any) -> None:
    """Weights and their states have the same bits."""
    for parameter, twin in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(parameter, twin)
        theirs = optimizer.state[twin]
        if parameter.numel():  # a store knows nothing of the others
            for name, value in plain_optimizer.state[parameter].items():
                assert torch.equal(value, theirs[name]), (parameter.shape, name)


def moves(engine: Engine) -> list[Move]:
    events = engine._journal.recorder.events  # type: ignore[attr-defined]
    return [event for event in events if isinstance(event, Move)]


def held_names(engine: Engine) -> set[str]:
    """The weights of which a large state is in memory."""
    keeper = engine._optimizing.keeper
    assert keeper is not None
    return {
        keeper.names[parameter]
        for parameter, states in keeper.states.items()
        if any(state.held for state in states.values())
    }


def forget_moves(engine: Engine) -> None:
    engine._journal.recorder.events.clear()  # type: ignore[attr-defined]
