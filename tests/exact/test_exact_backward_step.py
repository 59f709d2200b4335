"""Stepping inside backward gives the bits of a step behind it, and refuses what it can't do."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from step_runs import Tied, adamw, loss_of, scheduled_loop, tokens_loop
from step_runs import loop as steps_of
from test_exact_optimizers import OPTIMIZERS, make_model, two_groups
from torch import nn

import offload
from offload.allocator.errors import (
    BudgetError,
    ConfigError,
    ConsumedGradientError,
    StepInterruptedError,
    StoreCorruptError,
)
from offload.engine import Engine
from offload.swap import weights as weights_module
from offload.swap.writeback import is_changed as _is_changed
from offload.tiers.events import ListRecorder, Move, RunFinished

pytestmark = pytest.mark.usefixtures("many_tiles")
STEPS = 12
IN_BACKWARD = {"step_in_backward": True}
loop = partial(steps_of, steps=STEPS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_optimizer_gives_the_same_bits(name: str, compare: Any) -> None:
    def make_optimizer(model: Any) -> Any:
        return OPTIMIZERS[name]([p for p in model.parameters() if p.numel() or name != "adafactor"])

    same = compare(make_model, make_optimizer, loop, config=IN_BACKWARD)
    assert "gradient" not in same.moved_roles()
    assert same.engine.step == STEPS


def test_what_moves_is_the_least_that_a_step_needs(compare: Any) -> None:
    same = compare(make_model, adamw, loop, config=IN_BACKWARD)
    weights = [p for p in same.model.parameters() if p.numel() > 64 << 10]
    stepped = sum(weight.numel() for weight in weights)
    moves = [e for e in same.engine._journal.recorder.events if isinstance(e, Move)]

    def moved(role: str, side: str) -> int:
        chosen = [e for e in moves if e.role == role and getattr(e, side) != "host"]
        return sum(e.nbytes for e in chosen)

    assert moved("state", "dst") == STEPS * 12 * stepped  # {p, m, v}, once
    assert moved("state", "src") == (STEPS - 1) * 8 * stepped  # {m, v}: p and g are in memory


def test_gradients_accumulate_before_the_last_backward(compare: Any) -> None:
    def accumulated(model: Any, optimizer: Any, engine: Engine | None) -> list[float]:
        values = []
        for _ in range(STEPS):
            for part in range(3):
                loss = loss_of(model, torch.randn(8, 300)) / 3
                loss.backward()
                values.append(loss.item())
                if part < 2:  # the gradients so far are there to be read
                    values.append(float(model[0].weight.grad.norm()))
            optimizer.step()
            optimizer.zero_grad()
        return values

    compare(make_model, adamw, accumulated, config={**IN_BACKWARD, "accumulation_steps": 3})


def test_a_step_after_fewer_backwards_is_the_ordinary_one(compare: Any) -> None:
    """The last batches of an epoch, say."""

    def uneven(model: Any, optimizer: Any, _engine: Engine | None) -> list[float]:
        for parts in (3, 1, 3, 2):
            for _ in range(parts):
                loss_of(model, torch.randn(8, 300)).backward()
            optimizer.step()
            optimizer.zero_grad()
        return []

    compare(make_model, adamw, uneven, config={**IN_BACKWARD, "accumulation_steps": 3})


def test_groups_schedules_and_unused_parameters(compare: Any) -> None:
    compare(make_model, two_groups, partial(scheduled_loop, steps=STEPS), config=IN_BACKWARD)


def test_gradients_that_are_dropped_in_the_middle(compare: Any) -> None:
    """A batch that could not be read, say: its gradients so far are of no step."""

    def dropping(model: Any, optimizer: Any, _engine: Engine | None) -> list[float]:
        for parts, dropped in ((3, False), (2, True), (3, False), (1, True), (3, False)):
            for _ in range(parts):
                loss_of(model, torch.randn(8, 300)).backward()
            if not dropped:
                optimizer.step()
            optimizer.zero_grad()
        return []

    compare(make_model, adamw, dropping, config={**IN_BACKWARD, "accumulation_steps": 3})


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_tied_weights_and_recomputed_blocks(reentrant: bool | None, compare: Any) -> None:
    def chosen(model: Any) -> Any:
        left_out = set(model.left_out.parameters())
        return torch.optim.AdamW([p for p in model.parameters() if p not in left_out], 1e-3)

    run = partial(tokens_loop, steps=STEPS)
    compare(lambda: Tied(reentrant), chosen, run, config=IN_BACKWARD)


def test_weights_are_new_where_backward_ends(starve: Any) -> None:
    """What the user's code reads between backward and step: never a half of a step."""
    torch.manual_seed(0)
    model: Any = make_model()
    optimizer = adamw(model)
    starve(model, optimizer, config=IN_BACKWARD)
    loss_of(model, torch.randn(32, 300)).backward()
    stepped = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer.step()
    after = model.state_dict()
    for name in ("0.weight", "2.weight"):
        assert torch.equal(after[name], stepped[name])
    assert int(optimizer.state[model[0].weight]["step"]) == 1


def test_weights_that_stay_in_memory_are_stepped_with_what_was_written_and_not_compared_first(
    compare: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes to the store with the step; to compare all bytes before would only take time."""
    compared: list[str] = []

    def is_changed(store: Any, stored: Any, address: int) -> bool:
        compared.append(stored.name)
        return _is_changed(store, stored, address)

    monkeypatch.setattr(weights_module, "is_changed", is_changed)

    def writing(model: Any, optimizer: Any, engine: Engine | None) -> list[float]:
        values = []
        if engine is not None:
            engine.weights.window_nbytes = 1 << 30
            engine.weights.keep(engine.weights.weights)
        for step in range(STEPS):
            loss = loss_of(model, torch.randn(32, 300))
            compared.clear()
            with torch.no_grad():
                model[2].weight.data.mul_(1.01)  # invisible to version counters
            loss.backward()
            assert not compared or not step
            optimizer.step()
            optimizer.zero_grad()
            model[0].weight.detach().numpy()[0, :] = step
            values.append(loss.item())
        return values

    compare(make_model, adamw, writing, config=IN_BACKWARD)


def test_a_weight_that_the_drive_has_damaged_is_not_stepped(starve: Any) -> None:
    model: Any = make_model()
    optimizer = adamw(model)
    engine = starve(model, optimizer, config=IN_BACKWARD)
    for _ in range(2):
        loss_of(model, torch.randn(32, 300)).backward()
        optimizer.step()
        optimizer.zero_grad()
    engine.weights.evict_streaming()
    stored, file = engine.weights.weights["2.weight"].stored, engine.weights.store.tier.file
    with Path(file.label).open("r+b") as data:  # the drive gives other bytes than were written
        data.seek(stored.current.extent.offset)
        data.write(bytes(64))
    with pytest.raises(StoreCorruptError, match=r"2\.weight is damaged"):
        loss_of(model, torch.randn(32, 300)).backward()
    engine.detach()  # of a backward that was interrupted in its steps nothing is given back


USES: dict[str, Callable[[Any], Any]] = {
    "clip_grad_norm_": lambda model: nn.utils.clip_grad_norm_(model.parameters(), 1.0),
    "clip_grad_value_": lambda model: nn.utils.clip_grad_value_(model.parameters(), 1.0),
    "norm": lambda model: model[0].weight.grad.norm(),
    "data": lambda model: model[0].weight.grad.data,
    "zero": lambda model: model.zero_grad(set_to_none=False),
    "backward": lambda model: loss_of(model, torch.randn(4, 300)).backward(),
}


@pytest.mark.parametrize("use", USES)
def test_a_gradient_that_is_used_up_refuses_every_use(use: str, starve: Any) -> None:
    model: Any = make_model()
    starve(model, adamw(model), config=IN_BACKWARD)
    loss_of(model, torch.randn(32, 300)).backward()
    assert "0.weight" in repr(model[0].weight.grad)
    with pytest.raises(ConsumedGradientError, match=r"weight .*step_in_backward=False"):
        USES[use](model)


def test_a_loss_scale_is_refused(starve: Any) -> None:
    model: Any = make_model()
    optimizer = adamw(model)
    starve(model, optimizer, config=IN_BACKWARD)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(loss_of(model, torch.randn(4, 300))).backward()
    with pytest.raises(ConsumedGradientError, match="unscale"):
        scaler.step(optimizer)


def test_more_backwards_than_were_announced(starve: Any) -> None:
    model: Any = make_model()
    starve(model, adamw(model), config=IN_BACKWARD)
    loss_of(model, torch.randn(4, 300)).backward()
    model.zero_grad()
    with pytest.raises(StepInterruptedError, match="stepped already, after 1 of them"):
        loss_of(model, torch.randn(4, 300)).backward()


def test_a_backward_that_fails_half_way(tmp_path: Any) -> None:
    """Nothing goes on from a torn step, and the last finished one is what a new start finds."""
    torch.manual_seed(0)
    model: Any = make_model()
    optimizer = adamw(model)
    config = {**IN_BACKWARD, "nvme": tmp_path}
    engine = offload.attach(model, optimizer, budget="8GiB", config=config)
    loss_of(model, torch.randn(4, 300)).backward()
    optimizer.step()
    optimizer.zero_grad()
    finished = {name: value.clone() for name, value in model.state_dict().items()}

    def fail(_gradient: torch.Tensor) -> None:
        raise ArithmeticError("out of luck")

    handle = model[0].weight.register_hook(fail)
    loss = loss_of(model, torch.randn(4, 300))
    with pytest.raises(ArithmeticError):
        loss.backward()
    handle.remove()
    for use in (lambda: model(torch.randn(4, 300)), engine.commit, optimizer.step):
        with pytest.raises(StepInterruptedError, match="continues from the last finished step"):
            use()
    with pytest.raises(StepInterruptedError), engine:
        model(torch.randn(4, 300))
    engine.detach()

    fresh: Any = make_model()
    with offload.attach(fresh, adamw(fresh), budget="8GiB", config=config) as again:
        assert again.step == 1
        assert all(torch.equal(value, finished[k]) for k, value in fresh.state_dict().items())


def test_a_resumed_run_continues_bit_for_bit(tmp_path: Any) -> None:
    torch.manual_seed(0)
    plain: Any = make_model()
    start = copy.deepcopy(plain.state_dict())
    plain_losses = _train(plain, adamw(plain), range(6))
    losses = []
    for steps in (range(3), range(3, 6)):
        model: Any = make_model()
        model.load_state_dict(start)
        optimizer = adamw(model)
        config = {**IN_BACKWARD, "nvme": tmp_path / "store"}
        with offload.attach(model, optimizer, budget="8GiB", config=config) as engine:
            assert engine.step == steps.start
            losses += _train(model, optimizer, steps)
    assert losses == plain_losses
    mine = model.state_dict()
    assert all(torch.equal(mine[name], value) for name, value in plain.state_dict().items())


def _train(model: Any, optimizer: Any, steps: range) -> list[float]:
    losses = []
    for step in steps:
        x = torch.randn(16, 300, generator=torch.Generator().manual_seed(step))
        loss = loss_of(model, x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_accumulation_steps_alone_are_refused(tmp_path: Any) -> None:
    model = make_model()
    with pytest.raises(ConfigError, match="only step_in_backward uses accumulation_steps"):
        offload.attach(model, adamw(model), nvme=tmp_path, config={"accumulation_steps": 2})


def test_too_small_a_budget_names_one_that_fits(tmp_path: Any) -> None:
    model = make_model()
    with pytest.raises(BudgetError, match="beside it a tile of the optimizer step"):
        offload.attach(model, adamw(model), budget="1MiB", nvme=tmp_path, config=IN_BACKWARD)


@pytest.mark.parametrize("steps", [0, 1])
def test_weights_of_no_step_are_not_given_back(steps: int, tmp_path: Any) -> None:
    """Not as damaged either, where the step was the first and there is no other version."""
    model: Any = make_model()
    optimizer = adamw(model)
    engine = offload.attach(model, optimizer, budget="8GiB", nvme=tmp_path, config=IN_BACKWARD)
    for _ in range(steps):
        loss_of(model, torch.randn(4, 300)).backward()
        optimizer.step()
        optimizer.zero_grad()

    def fail(_gradient: torch.Tensor) -> None:
        raise ArithmeticError("out of luck")

    model[0].weight.register_hook(fail)
    with pytest.raises(ArithmeticError):
        loss_of(model, torch.randn(4, 300)).backward()
    recorder = engine._journal.recorder = ListRecorder()
    engine.detach()
    (finish,) = (event for event in recorder.events if isinstance(event, RunFinished))
    assert finish.status == "interrupted"
    offload.attach(make_model(), budget="8GiB", nvme=tmp_path, config={"resume": "never"}).detach()


class Detached(nn.Module):
    """Backward reads ``last`` once more after its gradient has come."""

    def __init__(self, alias: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(300, 300), nn.Linear(300, 300)
        self.alias = alias
        self.is_read_again = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        if self.is_read_again:
            x = nn.functional.linear(x, self.alias(self.last.weight))
        out: torch.Tensor = self.last(x)
        return out


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize(
    "alias", [torch.Tensor.detach, lambda weight: weight.data], ids=["detached", "data"]
)
def test_a_weight_is_not_read_after_its_step(
    alias: Callable[[torch.Tensor], torch.Tensor], in_backward: bool, compare: Any
) -> None:
    """Old values are not there any more, and new ones would give other gradients."""

    def squares(model: Any, optimizer: Any, _engine: Engine | None) -> list[float]:
        losses = []
        for step in range(3):
            model.is_read_again = step > 0  # a commit stands by then
            loss = model(torch.randn(8, 300)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    config = {"step_in_backward": in_backward}
    if not in_backward:
        compare(lambda: Detached(alias), adamw, squares, config=config)
        return
    with pytest.raises(RuntimeError, match=r"after it has stepped it|modified by an inplace"):
        compare(lambda: Detached(alias), adamw, squares, config=config)
