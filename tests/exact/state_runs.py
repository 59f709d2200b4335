"""What the tests of rounded states, coded states and masters share: one loop, held against Offload.

The models have a parameter ``empty`` of no element, beside those that are trained.
"""

import copy
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import offload
from offload.allocator.errors import StoreMismatchError
from offload.engine import Engine
from offload.swap.rounding import round_to_bf16
from offload.swap.staged_states import rounding_key

LARGE_NUMEL = 1024  # states of more elements are kept in fewer bits

# Does to the values of a state, in place, what the store does: (values, name, key of its bits).
Code = Callable[[torch.Tensor, str, int], None]


def adamw(parameters: Any) -> Any:
    return torch.optim.AdamW(parameters, 1e-3, fused=True)


def adamw_of(model: Any) -> Any:
    return adamw(model.parameters())


def train(
    loss_of: Callable[[Any, int], torch.Tensor],
    model: Any,
    optimizer: Any,
    steps: range,
    after: Callable[[int], None] | None = None,
) -> list[float]:
    losses = []
    for step in steps:
        loss = loss_of(model, step) + model.empty.sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if after is not None:
            after(step)
    return losses


def through_a_file(value: Any) -> Any:
    """What ``torch.load`` finds of it."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def attach_with_room(folder: Path) -> Callable[..., Engine]:
    """Attaches as ``starve`` does, with memory for everything."""

    def attach(model: Any, optimizer: Any, **options: Any) -> Engine:
        return offload.attach(model, optimizer, budget="8GiB", nvme=folder, **options)

    return attach


def round_values(values: torch.Tensor, _name: str, key: int) -> None:
    """To bfloat16, as the store does."""
    rounded = torch.empty(values.numel(), dtype=torch.bfloat16)
    round_to_bf16(values.flatten(), rounded, key=key, start=0)
    values.copy_(rounded.view_as(values))


def code_states(
    code: Code, model: Any, optimizer: Any, step: int, owners: Iterable[Any] | None = None
) -> None:
    """Do to states of a loop in memory what the store does to its own.

    The optimizer has ``owners``, where they are given, in the places of the model's parameters.
    """
    for (name, _), owner in zip(
        model.named_parameters(), owners or model.parameters(), strict=True
    ):
        for key, value in optimizer.state.get(owner, {}).items():
            if isinstance(value, torch.Tensor) and value.numel() > LARGE_NUMEL:
                code(value, key, rounding_key(step, f"{name}#{key}", "step"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Lossy:
    """A way to keep states in fewer bits, and the training that it is tried with.

    Attributes:
        make_model: makes what is trained.
        loss_of: the loss of a model in a step.
        code: what the store does to a state.
        check: asserts that a state, which in memory has these values, is shown so.
    """

    make_model: Callable[[], Any]
    loss_of: Callable[[Any, int], torch.Tensor]
    code: Code
    check: Callable[[torch.Tensor, Any], None]

    def train(
        self, model: Any, optimizer: Any, steps: range, after: Callable[[int], None] | None = None
    ) -> list[float]:
        return train(self.loss_of, model, optimizer, steps, after)

    def assert_same(self, plain: Any, plain_optimizer: Any, model: Any, optimizer: Any) -> None:
        """Weights and states have the same bits, and states the same order."""
        for one, other in zip(plain.parameters(), model.parameters(), strict=True):
            assert torch.equal(one, other)
            kept, shown = plain_optimizer.state.get(one, {}), optimizer.state.get(other, {})
            assert list(kept) == list(shown)
            for key, value in kept.items():
                if isinstance(value, torch.Tensor):
                    self.check(value, shown[key])
                else:
                    assert value == shown[key]

    def run_both(
        self,
        attach: Callable[..., Engine],
        make_optimizer: Callable[[Any], Any],
        config: dict[str, Any],
        steps: range,
    ) -> tuple[Engine, Any, Any]:
        """Train in memory, coding after each step, and under Offload; nothing may differ."""
        torch.manual_seed(0)
        plain = self.make_model()
        model = copy.deepcopy(plain)
        one, optimizer = make_optimizer(plain), make_optimizer(model)
        expected = self.train(
            plain, one, steps, lambda step: code_states(self.code, plain, one, step)
        )
        engine = attach(model, optimizer, config=config)
        assert self.train(model, optimizer, steps) == expected
        self.assert_same(plain, one, model, optimizer)
        return engine, model, optimizer

    def resume_and_compare(self, config: dict[str, Any], folder: Path) -> Any:
        """Train in one go and in three; nothing may differ. The states after it."""
        torch.manual_seed(0)
        start = self.make_model().state_dict()
        ends = []
        for parts in ([range(6)], [range(2), range(2, 5), range(5, 6)]):
            losses = []
            for steps in parts:
                model = self.make_model()
                model.load_state_dict(start)
                optimizer = adamw_of(model)
                attach = attach_with_room(folder / str(len(parts)))
                with attach(model, optimizer, config=config) as engine:
                    assert engine.step == steps.start
                    losses += self.train(model, optimizer, steps)
            ends.append((losses, model.state_dict(), optimizer.state_dict()["state"]))
        (losses, weights, states), (other_losses, other_weights, other_states) = ends
        assert losses == other_losses
        assert all(torch.equal(value, other_weights[name]) for name, value in weights.items())
        for index, state in states.items():
            if state["exp_avg"].numel():
                assert all(
                    torch.equal(value, other_states[index][key]) for key, value in state.items()
                )
        return states

    def refuse_another(self, first: str, second: str, folder: Path) -> None:
        """A store of one precision is not continued in another, and is there afterwards."""

        def attach(precision: str, **options: Any) -> tuple[Any, Any, Engine]:
            model = self.make_model()
            optimizer = adamw_of(model)
            config = {"state_precision": precision}
            engine = attach_with_room(folder)(model, optimizer, config=config, **options)
            return model, optimizer, engine

        model, optimizer, engine = attach(first)
        self.train(model, optimizer, range(2))
        engine.detach()
        message = f"state_precision is {first}, this one's is {second} .set it to '{first}'"
        with pytest.raises(StoreMismatchError, match=message):
            attach(second)
        engine = attach(first)[2]
        assert engine.step == 2
        engine.detach()
        attach(second, resume="never")[2].detach()
