"""The user's own code, touching swapped tensors at any time, sees and leaves right values."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from offload.engine import Engine

STEPS = 8
Touch = Callable[[nn.Module, Any, int], list[float]]


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(256, 512), nn.Tanh(), nn.Linear(512, 256))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 1e-2, fused=True)


def touching(
    *, before: Touch | None = None, backward: Touch | None = None, after: Touch | None = None
) -> Callable[..., list[float]]:
    """A loop that calls the user's code before forward, after backward, after the step."""

    def loop(model: Any, optimizer: Any, _engine: Engine | None) -> list[float]:
        values: list[float] = []
        for step in range(STEPS):
            if before:
                values += before(model, optimizer, step)
            x = torch.randn(64, 256)
            loss = F.mse_loss(model(x), x)
            loss.backward()
            if backward:
                values += backward(model, optimizer, step)
            optimizer.step()
            optimizer.zero_grad()
            if after:
                values += after(model, optimizer, step)
            values.append(loss.item())
        return values

    return loop


def test_logging_of_weights_and_gradients(compare: Any) -> None:
    kept: list[Any] = []

    def norms(model: nn.Module, _optimizer: Any, _step: int) -> list[float]:
        kept.append([p.grad for p in model.parameters()])  # without a clone
        values = [p.norm().item() for p in model.parameters()]
        values += [p.grad.abs().max().item() for p in model.parameters() if p.grad is not None]
        return values

    def old(model: nn.Module, _optimizer: Any, _step: int) -> list[float]:
        return [grad.sum().item() for grads in kept[-3:] for grad in grads]

    def loop(model: Any, optimizer: Any, engine: Engine | None) -> list[float]:
        kept.clear()
        return touching(backward=norms, before=old)(model, optimizer, engine)

    compare(make_model, adamw, loop)


def test_clipping_and_scaling_of_gradients(compare: Any) -> None:
    def clip(model: nn.Module, _optimizer: Any, step: int) -> list[float]:
        nn.utils.clip_grad_value_(model.parameters(), 1e-3)
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad.mul_(1 + step)
        return [nn.utils.clip_grad_norm_(model.parameters(), 0.01).item()]

    same = compare(make_model, adamw, touching(backward=clip))
    assert "gradient" in same.moved_roles()


def test_replaced_and_dropped_gradients(compare: Any) -> None:
    def replace(model: nn.Module, _optimizer: Any, step: int) -> list[float]:
        first, *_, last = model.parameters()
        assert first.grad is not None
        first.grad = first.grad.clone() * 2 if step % 2 else None
        assert last.grad is not None
        last.grad = torch.ones_like(last)
        return []

    compare(make_model, adamw, touching(backward=replace))


def test_writes_to_weights_between_steps(compare: Any) -> None:
    def clamp(model: nn.Module, _optimizer: Any, step: int) -> list[float]:
        first, *_ = model.parameters()
        first.data.clamp_(-0.05, 0.05)  # invisible to version counters
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.001 * step)
        first.detach().numpy()[0, 0] = step  # and to torch
        return [first.sum().item()]

    compare(make_model, adamw, touching(after=clamp))


def test_weights_swapped_around_forward_and_backward(compare: Any) -> None:
    """BinaryConnect (Courbariaux et al., 2015): signs for the passes, real values for the step."""
    saved: list[torch.Tensor] = []

    def binarise(model: nn.Module, _optimizer: Any, _step: int) -> list[float]:
        saved[:] = [parameter.detach().clone() for parameter in model.parameters()]
        for parameter in model.parameters():
            parameter.data.copy_(parameter.data.sign() * 0.05)
        return []

    def restore(model: nn.Module, _optimizer: Any, _step: int) -> list[float]:
        for parameter, values in zip(model.parameters(), saved, strict=True):
            parameter.data.copy_(values)
        return []

    compare(make_model, adamw, touching(before=binarise, backward=restore))


def test_averages_of_weights(compare: Any) -> None:
    average: list[torch.Tensor] = []

    def follow(model: nn.Module, _optimizer: Any, step: int) -> list[float]:
        if step == 0:
            average[:] = [parameter.detach().clone() for parameter in model.parameters()]
        torch._foreach_lerp_(average, [p.detach() for p in model.parameters()], 0.1)
        if step == STEPS - 2:
            with torch.no_grad():
                for parameter, value in zip(model.parameters(), average, strict=True):
                    parameter.copy_(value)
        return [value.sum().item() for value in average]

    compare(make_model, adamw, touching(after=follow))


def test_optimizer_states_read_and_written(compare: Any) -> None:
    def damp(model: nn.Module, optimizer: Any, step: int) -> list[float]:
        values = []
        for state in optimizer.state.values():
            values.append(state["exp_avg"].abs().sum().item())
            if step % 3 == 1:
                state["exp_avg"].mul_(0.5)
            if step % 3 == 2:
                state["exp_avg_sq"] = state["exp_avg_sq"] * 2
        return values

    compare(make_model, adamw, touching(after=damp))


def test_saving_and_loading_in_the_middle(compare: Any) -> None:
    saved: list[bytes] = []

    def reload(model: nn.Module, optimizer: Any, step: int) -> list[float]:
        if step == 2:
            buffer = io.BytesIO()
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
            saved[:] = [buffer.getvalue()]
        if step == 5:
            state = torch.load(io.BytesIO(saved[0]), weights_only=True)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
        return []

    compare(make_model, adamw, touching(after=reload))


def test_the_users_own_hooks_see_whole_gradients(compare: Any) -> None:
    seen: list[float] = []

    def loop(model: Any, optimizer: Any, engine: Engine | None) -> list[float]:
        seen.clear()
        for parameter in model.parameters():
            parameter.register_hook(lambda grad: grad * 2)
            parameter.register_post_accumulate_grad_hook(
                lambda parameter: seen.append(parameter.grad.sum().item())
            )
        return [*touching()(model, optimizer, engine), *seen]

    compare(make_model, adamw, loop)


def test_steps_without_gradients_and_retained_graphs_after_a_step(starve: Any) -> None:
    model = make_model()
    optimizer = adamw(model)
    starve(model, optimizer)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer.step()  # nothing to do
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    loss = model(torch.randn(64, 256)).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # the weights that this graph saved have changed
