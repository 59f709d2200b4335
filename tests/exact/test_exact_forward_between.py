"""Whatever is done between a step that is put off and the next forward meets what is new."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from step_runs import PutOff, adamw, loss_of
from test_exact_optimizers import make_model
from torch import nn

from offload.allocator.errors import StepInterruptedError
from offload.engine import Engine

pytestmark = pytest.mark.usefixtures("many_tiles")
STEPS = 8
IN_FORWARD = {"step_in_forward": True}


def _norm(model: Any, _optimizer: Any) -> Any:
    return float(model[0].weight.norm().detach())


def _write(model: Any, _optimizer: Any) -> None:
    model[2].weight.data.mul_(0.5)
    with torch.no_grad():
        model[0].weight.add_(1e-3)


def _state(model: Any, optimizer: Any) -> Any:
    state = optimizer.state[model[0].weight]
    return [float(state["step"]), float(state["exp_avg_sq"].sum())]


def _write_state(model: Any, optimizer: Any) -> None:
    optimizer.state[model[2].weight]["exp_avg"].mul_(0.5)


def _gradient(model: Any, _optimizer: Any) -> Any:
    return float(model[0].weight.grad.abs().sum())


def _change_gradient(model: Any, _optimizer: Any) -> None:
    model[0].weight.grad.mul_(2.0)


def _load(model: Any, optimizer: Any) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    model.load_state_dict({name: value * 1.5 for name, value in model.state_dict().items()})


def _freeze(model: Any, _optimizer: Any) -> None:
    model[2].weight.requires_grad_(False)


def _copy(model: Any, _optimizer: Any) -> Any:
    twin = copy.deepcopy(model)
    assert type(twin[0].weight) is nn.Parameter
    return float((twin[0].weight.sum() + twin[2].weight.sum()).detach())


def _zero(_model: Any, optimizer: Any) -> None:
    optimizer.zero_grad(set_to_none=False)


def _vector(model: Any, _optimizer: Any) -> Any:
    return float(nn.utils.parameters_to_vector(model.parameters()).detach().sum())


def _forget(_model: Any, optimizer: Any) -> None:
    optimizer.state.clear()


def _replace(model: Any, _optimizer: Any) -> None:
    model[0].weight.grad = torch.ones_like(model[0].weight)


BETWEEN: dict[str, Callable[[Any, Any], Any]] = {
    "reads a weight": _norm,
    "writes weights": _write,
    "reads a state": _state,
    "writes a state": _write_state,
    "reads a gradient": _gradient,
    "changes a gradient": _change_gradient,
    "replaces a gradient": _replace,
    "loads": _load,
    "freezes": _freeze,
    "copies": _copy,
    "zeroes gradients": _zero,
    "makes a vector": _vector,
    "forgets states": _forget,
}


@pytest.mark.parametrize("use", BETWEEN)
def test_what_happens_between_a_step_and_the_next_forward(
    use: str, compare: Any, put_off: PutOff
) -> None:
    def touching(model: Any, optimizer: Any, _engine: Engine | None) -> list[Any]:
        values = []
        for step in range(5):
            loss = loss_of(model, torch.randn(32, 300))
            loss.backward()
            optimizer.step()
            if step in (2, 3):
                values.append(BETWEEN[use](model, optimizer))
            optimizer.zero_grad()
            values.append(loss.item())
        return values

    compare(make_model, adamw, touching, config=IN_FORWARD)
    assert put_off.count


HELD: dict[str, tuple[Callable[[Any, Any], Any], Callable[[Any, Any], Any]]] = {
    "a view": (lambda m, _: m[0].weight.data.view(-1)[7:9], lambda v, _: v.tolist()),
    "numpy": (lambda m, _: m[0].weight.detach().numpy(), lambda v, _: float(v.sum())),
    "a state_dict": (lambda m, _: m.state_dict(), lambda v, _: float(v["0.weight"].sum())),
    "a state": (
        lambda m, optimizer: optimizer.state[m[0].weight]["exp_avg"],
        lambda v, _: float(v.sum()),
    ),
    "all states": (
        lambda _, optimizer: optimizer.state,
        lambda v, model: float(v[model[0].weight]["step"]),
    ),
}


@pytest.mark.parametrize("held", HELD)
def test_what_the_user_has_held_since_before_the_step_is_new(held: str, compare: Any) -> None:
    hold, look = HELD[held]

    def holding(model: Any, optimizer: Any, _engine: Engine | None) -> list[Any]:
        values: list[Any] = []
        for _ in range(4):
            loss = loss_of(model, torch.randn(32, 300))
            loss.backward()
            kept = hold(model, optimizer) if values else None
            optimizer.step()
            optimizer.zero_grad()
            values += [loss.item(), look(kept, model) if values else None]
        return values

    compare(make_model, adamw, holding, config=IN_FORWARD)


def test_steps_without_a_forward_between_them(compare: Any, put_off: PutOff) -> None:
    def twice(model: Any, optimizer: Any, _engine: Engine | None) -> list[float]:
        for _ in range(STEPS):
            loss_of(model, torch.randn(32, 300)).backward()
            optimizer.step()
            optimizer.step()  # with the same gradients
            optimizer.zero_grad()
        return []

    compare(make_model, adamw, twice, config=IN_FORWARD)
    assert put_off.count


def test_a_gradient_that_an_older_forward_adds_to(starve: Any) -> None:
    model: Any = nn.Linear(300, 300)
    optimizer = adamw(model)
    engine = starve(model, optimizer, config=IN_FORWARD)
    engine._optimizing.streamed.pipeline.staging.limit_nbytes = 1  # a tile at a time
    for _ in range(2):
        optimizer.zero_grad()
        losses = [model(torch.randn(8, 300)).square().mean() for _ in range(2)]
        losses[0].backward()
        optimizer.step()
    with pytest.raises(StepInterruptedError, match=r"zero_grad\(\) behind"):
        losses[1].backward()


def test_a_backward_of_an_older_forward(compare: Any, put_off: PutOff) -> None:
    """It needs no weight, so torch allows it."""

    def older(model: Any, optimizer: Any, _engine: Engine | None) -> list[float]:
        for _ in range(4):
            losses = [model(torch.randn(8, 300)).square().mean() for _ in range(2)]
            for loss in losses:
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        return []

    compare(lambda: nn.Linear(300, 300), adamw, older, config=IN_FORWARD)
    assert put_off.count


def test_weights_of_an_older_forward_have_changed(starve: Any) -> None:
    """As torch says of a step in memory."""
    model: Any = make_model()
    optimizer = adamw(model)
    starve(model, optimizer, config=IN_FORWARD)
    for _ in range(2):
        optimizer.zero_grad()
        losses = [loss_of(model, torch.randn(8, 300)) for _ in range(2)]
        losses[0].backward()
        optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses[1].backward()
