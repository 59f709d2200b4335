"""Every optimizer, streamed, gives the bits it gives in memory."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from offload.allocator.errors import UnsupportedError
from offload.engine import Engine
from offload.tiers.events import Notice

STEPS = 20


class Lion(torch.optim.Optimizer):
    """A third-party optimizer: sign of an interpolated momentum (Chen et al., 2023)."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                p.add_(torch.sign(0.9 * momentum + 0.1 * p.grad), alpha=-group["lr"])
                momentum.mul_(0.99).add_(p.grad, alpha=0.01)
        return loss


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "sgd-momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 1e-3, weight_decay=0.1),
    "adam-amsgrad": lambda p: torch.optim.Adam(p, 1e-3, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-3),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, 1e-3, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, 1e-3, fused=True),
    "adamw-maximize": lambda p: torch.optim.AdamW(p, 1e-4, maximize=True),
    "nadam": lambda p: torch.optim.NAdam(p, 1e-3),
    "radam": lambda p: torch.optim.RAdam(p, 1e-3),
    "adamax": lambda p: torch.optim.Adamax(p, 1e-3),
    "adadelta": torch.optim.Adadelta,
    "adagrad": lambda p: torch.optim.Adagrad(p, 1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3, centered=True, momentum=0.5),
    "rprop": lambda p: torch.optim.Rprop(p, 1e-3),
    "asgd": lambda p: torch.optim.ASGD(p, 1e-2),
    "adafactor": lambda p: torch.optim.Adafactor(p, 1e-2),
    "third-party": Lion,
}


def make_model() -> nn.Module:
    """Sizes that no tile divides, a weight of one element, one of none."""
    model = nn.Sequential(nn.Linear(300, 257), nn.GELU(), nn.Linear(257, 300))
    model.register_parameter("scale", nn.Parameter(torch.ones(1)))
    model.register_parameter("empty", nn.Parameter(torch.ones(0)))
    return model


def loop(model: Any, optimizer: Any, _engine: Engine | None) -> list[float]:
    losses = []
    for _ in range(STEPS):
        x = torch.randn(32, 300)
        loss = F.mse_loss(model(x) * model.scale, x) + model.empty.sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_streamed_step_is_bit_identical(
    name: str, compare: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Many tiles, with an end that is off every grid: 300 * 257 = 77,100 elements.
    monkeypatch.setattr("offload.runtime.choose_chunk_numel", lambda _budget: 64 * 160)

    def make_optimizer(model: Any) -> Any:
        # torch's Adafactor divides by the number of elements: plainly, too, it can't step none.
        return OPTIMIZERS[name]([p for p in model.parameters() if p.numel() or name != "adafactor"])

    same = compare(make_model, make_optimizer, loop)
    assert same.moved_roles() >= {"weight", "gradient"}
    assert same.engine.step == STEPS


def test_an_optimizer_that_is_not_known_to_be_elementwise_says_so(compare: Any) -> None:
    same = compare(make_model, lambda model: Lion(model.parameters()), loop)
    notices = [n for n in same.engine.notices if n.startswith("Lion")]
    assert notices
    assert "whole parameter" in notices[0]


def test_lbfgs_is_refused_before_anything_moves(starve: Any) -> None:
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    with pytest.raises(UnsupportedError, match="LBFGS"):
        starve(model, torch.optim.LBFGS(model.parameters()))
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def two_groups(model: Any) -> Any:
    """An optimizer whose groups have settings of their own."""
    return torch.optim.AdamW(
        [
            {"params": model[0].parameters(), "lr": 1e-2, "weight_decay": 0.5},
            {"params": [*model[2].parameters(), model.scale, model.empty], "amsgrad": True},
        ],
        lr=1e-3,
    )


def test_two_groups_with_their_own_settings_and_a_schedule(compare: Any) -> None:
    def scheduled(model: Any, optimizer: Any, engine: Engine | None) -> list[float]:
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=STEPS + 1)
        losses = []
        for _ in range(STEPS):
            x = torch.randn(32, 300)
            loss = F.mse_loss(model(x) * model.scale, x) + model.empty.sum()
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=False)
            losses.append(loss.item())
        return losses

    compare(make_model, two_groups, scheduled)


def test_a_closure_and_the_users_own_hooks(compare: Any) -> None:
    def hooked(model: Any, optimizer: Any, _engine: Engine | None) -> list[float]:
        seen: list[float] = []

        def before(opt: Any, _args: Any, _kwargs: Any) -> None:
            for group in opt.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.mul_(0.5)

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(
            lambda opt, _args, _kwargs: seen.append(float(len(opt.param_groups[0]["params"])))
        )
        for _ in range(STEPS):
            x = torch.randn(32, 300)

            def closure(x: torch.Tensor = x) -> torch.Tensor:
                optimizer.zero_grad()
                loss = F.mse_loss(model(x) * model.scale, x)
                loss.backward()
                return loss

            seen.append(optimizer.step(closure).item())
        return seen

    compare(make_model, lambda model: torch.optim.AdamW(model.parameters(), 1e-3), hooked)


def test_notices_are_events(compare: Any) -> None:
    same = compare(make_model, lambda model: torch.optim.SGD(model.parameters(), 0.1), loop)
    recorded = same.engine._journal.recorder.events
    assert all(isinstance(event.message, str) for event in recorded if isinstance(event, Notice))
