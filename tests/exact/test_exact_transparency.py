"""The user's own code, touching swapped tensors at any time, sees and leaves right values."""

import errno
import io
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from offload.allocator.errors import TierIOError
from offload.engine import Engine
from offload.swap.residency import Residency
from offload.swap.weights import Weight
from offload.tiers.engines.registry import wrapping
from offload.tiers.wrappers import Verb, WrapperEngine

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


class Gate(WrapperEngine):
    """Keeps the next read at ``shut`` until it is opened."""

    shut: int | None = None
    opened = threading.Event()

    def move(self, verb: Verb, offset: int, address: int, nbytes: int) -> int:
        if verb == "read" and offset == Gate.shut:
            assert Gate.opened.wait(60)
        return super().move(verb, offset, address, nbytes)

    @classmethod
    def shut_at(cls, weight: Weight) -> None:
        """The next read of ``weight`` is on its way until ``open``."""
        assert weight.stored.current is not None
        cls.opened.clear()
        cls.shut = weight.stored.current.extent.offset

    @classmethod
    def open(cls) -> None:
        cls.shut = None
        cls.opened.set()


def deep() -> nn.Module:
    return nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(6)))


def disturbing(write: Callable[[Any], object], met: list[Residency]) -> Callable[..., list[float]]:
    """A loop in which a hook behind the first layer does ``write`` with the second one's weight."""

    def loop(model: Any, optimizer: Any, engine: Engine | None) -> list[float]:
        weight = None if engine is None else engine.weights.weights["1.weight"]
        if engine is not None:
            engine.weights.window_nbytes = 2 * model[0].weight.nbytes

        def shut(_model: Any, _optimizer: Any, _step: int) -> list[float]:
            if engine is not None and not engine._runtime.config.step_in_forward:
                engine.weights.evict_streaming()
                Gate.shut_at(engine.weights.weights["1.weight"])
            return []

        def disturb(_module: Any, _args: Any, _output: Any) -> None:
            if weight is not None:
                met.append(weight.residency)
            write(model[1].weight)
            Gate.open()

        handle = model[0].register_forward_hook(disturb)
        values = touching(before=shut)(model, optimizer, engine)
        handle.remove()
        return values

    return loop


def scale(weight: torch.Tensor) -> None:
    weight.data.mul_(1.01)
    weight.data[3, 5] = 0.5


def set_one_element(weight: torch.Tensor) -> None:
    weight.detach().numpy()[7, 9] = 0.25


@pytest.mark.parametrize("write", [scale, set_one_element])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"commit": "never"},
        {"step_in_backward": True},
        {"step_in_backward": True, "commit": "never"},
        {"step_in_forward": True},
    ],
    ids=["behind", "never stored", "in backward", "in backward, never stored", "in forward"],
)
def test_writes_to_a_weight_that_is_on_its_way(
    config: dict[str, Any], write: Callable[[Any], object], compare: Any
) -> None:
    met: list[Residency] = []
    with wrapping(Gate):
        compare(deep, adamw, disturbing(write, met), config=config)
    assert set(met) == {Residency.FETCHING} or "step_in_forward" in config


class Broken(WrapperEngine):
    """Reads at ``bad`` fail."""

    bad: int | None = None

    def move(self, verb: Verb, offset: int, address: int, nbytes: int) -> int:
        if verb == "read" and offset == Broken.bad:
            raise TierIOError(errno.EIO, "the disk is ill")
        return super().move(verb, offset, address, nbytes)


def test_what_was_written_is_kept_where_the_read_fails(starve: Any) -> None:
    model: Any = deep()
    with wrapping(Broken):
        engine = starve(model, adamw(model))
        weight = engine.weights.weights["1.weight"]
        engine.weights.window_nbytes = 2 * weight.nbytes
        Broken.bad = weight.stored.current.extent.offset
        assert engine.weights.fetch_ahead(weight)
        scale(model[1].weight)
        written = model[1].weight.detach().clone()
        with pytest.raises(TierIOError, match="the disk is ill"):
            engine.weights.use(["1.weight"])
        assert weight.residency is Residency.ABSENT
        assert torch.equal(model[1].weight, written)
        Broken.bad = None
        engine.weights.use(["1.weight"])
        assert weight.mapped.held
        assert torch.equal(model[1].weight, written)


def test_what_has_been_read_is_in_memory_where_no_hook_tells_its_use(starve: Any) -> None:
    model: Any = deep()
    engine = starve(model, adamw(model))
    weight = engine.weights.weights["1.weight"]
    engine.weights.window_nbytes = 2 * weight.nbytes
    assert engine.weights.fetch_ahead(weight)
    weight.transfer.settle()
    engine.weights.use(["0.weight"])
    assert weight.mapped.held
    assert weight.residency is Residency.FETCHING
    scale(model[1].weight)  # it is still told to nobody that the weight has arrived
    written = model[1].weight.detach().clone()
    assert engine.weights.absorb(weight)
    engine.weights.evict(weight)
    assert torch.equal(model[1].weight, written)


def test_a_small_weight_that_is_on_its_way_is_stepped(compare: Any, monkeypatch: Any) -> None:
    """It is stepped whole where it is, and what was read of it is older."""
    met: list[Residency] = []

    def loop(model: Any, optimizer: Any, engine: Engine | None) -> list[float]:
        if engine is None:
            return touching()(model, optimizer, engine)
        bias, streamed = engine.weights.weights["0.bias"], engine._optimizing.streamed
        engine.weights.window_nbytes = 1 << 30
        plain = streamed.step

        def step() -> None:
            engine.weights.evict(bias)
            engine.weights.fetch_ahead(bias)
            met.append(bias.residency)
            plain()

        monkeypatch.setattr(streamed, "step", step)
        return touching()(model, optimizer, engine)

    compare(make_model, adamw, loop)
    assert met == [Residency.FETCHING] * STEPS


def test_a_weight_that_is_on_its_way_stays_as_it_is_when_offload_leaves(starve: Any) -> None:
    model: Any = deep()
    engine = starve(model, adamw(model))
    weight = engine.weights.weights["1.weight"]
    engine.weights.keep(["1.weight"])
    assert engine.weights.fetch_ahead(weight)
    scale(model[1].weight)
    written = model[1].weight.detach().clone()
    engine.detach()
    assert torch.equal(model[1].weight, written)
    assert weight.mapped.held
