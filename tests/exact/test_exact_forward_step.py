"""Steps that are put off until the next forward give the bits of those that are not."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from step_runs import PutOff, Tied, adamw, loss_of, scheduled_loop, tokens_loop
from step_runs import loop as steps_of
from test_exact_optimizers import OPTIMIZERS, make_model, two_groups
from torch import nn
from torch.nn import functional as F

from offload.allocator.errors import ConfigError, UnsupportedError
from offload.engine import Engine
from offload.tiers.events import Move

pytestmark = pytest.mark.usefixtures("many_tiles")  # a weight has several
STEPS = 8
IN_FORWARD = {"step_in_forward": True}
WHOLE = ("adafactor", "third-party")
loop = partial(steps_of, steps=STEPS)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in WHOLE])
def test_each_optimizer_gives_the_same_bits(name: str, compare: Any, put_off: PutOff) -> None:
    same = compare(make_model, lambda m: OPTIMIZERS[name](m.parameters()), loop, config=IN_FORWARD)
    assert same.engine.step == STEPS
    first = 0 if name in ("sgd", "adagrad") else 1  # the others make their states in it
    assert put_off.count == 2 * (STEPS - first)  # weights; biases are small


@pytest.mark.parametrize("name", WHOLE)
def test_optimizers_that_step_whole_parameters_are_refused(name: str, starve: Any) -> None:
    model = make_model()
    optimizer = OPTIMIZERS[name](p for p in model.parameters() if p.numel())
    with pytest.raises(UnsupportedError, match="steps whole parameters"):
        starve(model, optimizer, config=IN_FORWARD)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # of torch's own compiler
def test_a_compiled_model_is_refused(starve: Any) -> None:
    model: Any = torch.compile(make_model(), backend="eager")
    with pytest.raises(UnsupportedError, match="model is compiled"):
        starve(model, adamw(model), config=IN_FORWARD)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"step_in_backward": True}, "set one of both"),
        ({"state_precision": "8bit"}, "set 'bf16' or 'exact'"),
    ],
)
def test_settings_that_exclude_each_other(other: Any, words: str, starve: Any) -> None:
    model = make_model()
    with pytest.raises(ConfigError, match=words):
        starve(model, adamw(model), config={**IN_FORWARD, **other})


def test_a_weight_is_read_twice_and_a_state_once(starve: Any) -> None:
    """Where the window holds the weights, the step takes what forward fetches anyway."""
    torch.manual_seed(0)
    model: Any = make_model()
    optimizer = adamw(model)
    engine = starve(model, optimizer, config=IN_FORWARD)
    engine.weights.window_nbytes = 8 << 20
    for _ in range(3):
        loss_of(model, torch.randn(32, 300)).backward()
        engine.weights.evict_streaming()
        engine._journal.recorder.events.clear()
        optimizer.step()
        optimizer.zero_grad()
    assert engine.step_pending
    loss_of(model, torch.randn(32, 300)).backward()
    moves = [e for e in engine._journal.recorder.events if isinstance(e, Move)]
    numel = 2 * 300 * 257

    def moved(role: str, side: str) -> int:
        chosen = [e for e in moves if e.role == role and getattr(e, side) != "host"]
        return sum(e.nbytes for e in chosen if "weight" in e.key)

    assert moved("weight", "src") == 4 * numel  # for the step and forward; they stay for backward
    assert moved("state", "src") <= 12 * numel  # {g, m, v}
    assert moved("state", "dst") == 12 * numel  # {p, m, v}


def test_groups_schedules_and_clipping(compare: Any, put_off: PutOff) -> None:
    """What changes behind the step is of the next one."""

    def scheduled(model: Any, optimizer: Any, _engine: Engine | None) -> list[float]:
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=STEPS + 1)
        losses = []
        for _ in range(STEPS):
            loss = loss_of(model, torch.randn(32, 300))
            loss.backward()
            losses.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.01)))
            optimizer.step()
            schedule.step()
            optimizer.param_groups[1]["weight_decay"] *= 0.5
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    compare(make_model, two_groups, scheduled, config=IN_FORWARD)
    assert put_off.count


def test_a_learning_rate_that_is_a_tensor(compare: Any, put_off: PutOff) -> None:
    def scheduled(model: Any, optimizer: Any, _engine: Engine | None) -> list[float]:
        for _ in range(STEPS):
            loss_of(model, torch.randn(32, 300)).backward()
            optimizer.step()
            optimizer.param_groups[0]["lr"].mul_(0.5)
            optimizer.zero_grad()
        return []

    def make(model: Any) -> Any:
        return torch.optim.AdamW(model.parameters(), torch.tensor(1e-2), foreach=False)

    compare(make_model, make, scheduled, config=IN_FORWARD)
    assert put_off.count


def test_accumulation_evaluation_and_frozen_weights(compare: Any, put_off: PutOff) -> None:
    def frozen() -> nn.Module:
        model: Any = make_model()
        model.append(nn.GELU()).append(nn.Linear(300, 300))
        model[2].weight.requires_grad_(False)
        return model

    def accumulated(model: Any, optimizer: Any, _engine: Engine | None) -> list[float]:
        values = []
        for step in range(STEPS):
            for _ in range(3):
                loss = loss_of(model, torch.randn(8, 300)) / 3
                loss.backward()
                values.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
            if step % 3 == 1:
                with torch.no_grad():
                    values.append(loss_of(model, torch.randn(8, 300)).item())
        return values

    compare(frozen, adamw, accumulated, config=IN_FORWARD)
    assert put_off.count


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_tied_weights_and_recomputed_blocks(
    reentrant: bool | None, compare: Any, put_off: PutOff
) -> None:
    run = partial(tokens_loop, steps=STEPS)
    compare(lambda: Tied(reentrant), adamw, run, config=IN_FORWARD)
    assert put_off.count == (STEPS - 1) * 7  # without the table


def test_parts_of_a_model_and_parameters_that_are_not_used(compare: Any, put_off: PutOff) -> None:
    run = partial(scheduled_loop, steps=STEPS)
    compare(make_model, two_groups, run, config=IN_FORWARD)
    assert put_off.count


@pytest.mark.parametrize("fused", [False, True])
def test_a_loss_scale_and_skipped_steps(fused: bool, compare: Any) -> None:
    def scaled(model: Any, optimizer: Any, _engine: Engine | None) -> list[float]:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        values = []
        for step in range(STEPS):
            loss = loss_of(model, torch.randn(32, 300))
            scaler.scale(loss * (float("inf") if step == 4 else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            values += [loss.item(), scaler.get_scale()]
        return values

    def make(model: Any) -> Any:
        return torch.optim.AdamW(model.parameters(), 1e-3, fused=fused)

    compare(make_model, make, scaled, config=IN_FORWARD)


def test_a_closure_that_trains(compare: Any, put_off: PutOff) -> None:
    def closing(model: Any, optimizer: Any, _engine: Engine | None) -> list[float]:
        losses = []
        for _ in range(STEPS):
            x = torch.randn(32, 300)

            def closure(x: torch.Tensor = x) -> torch.Tensor:
                optimizer.zero_grad()
                loss = loss_of(model, x)
                loss.backward()
                return loss

            losses.append(optimizer.step(closure).item())
        return losses

    compare(make_model, adamw, closing, config=IN_FORWARD)
    assert put_off.count


class Buffered(nn.Module):
    """Draws, counts what it has seen, and reads a weight that belongs to another module."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(300, 257)
        self.norm = nn.BatchNorm1d(257)
        self.drop = nn.Dropout(0.3)
        self.last = nn.Linear(257, 300)
        self.scale, self.empty = torch.ones(1), torch.ones(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        early = self.last.weight.sum() * 1e-3  # before its module is called
        hidden = self.drop(self.norm(self.first(x)))
        out: torch.Tensor = self.last(hidden) + early
        return out


def test_a_weight_that_is_used_before_its_module(compare: Any, put_off: PutOff) -> None:
    compare(Buffered, adamw, loop, config=IN_FORWARD)
    assert put_off.count


def plain_and_late(
    make: Callable[[], nn.Module], starve: Any, tmp_path: Any, config: dict[str, Any]
) -> None:
    """Both ways under Offload end at the same bits."""
    found = []
    for more in ({}, IN_FORWARD):
        torch.manual_seed(0)
        model = make()
        optimizer = adamw(model)
        place = tmp_path / str(len(found))
        engine = starve(model, optimizer, nvme=place, config={**config, **more})
        for step in range(STEPS):
            x = torch.randn(32, 300, generator=torch.Generator().manual_seed(step))
            x = x.to(next(model.parameters()).dtype)
            F.mse_loss(model(x), x).backward()
            optimizer.step()
            optimizer.zero_grad()
        engine.commit()
        states = optimizer.state_dict()["state"]
        found.append(copy.deepcopy([model.state_dict(), states]))
    (weights, states), (late_weights, late_states) = found
    assert all(torch.equal(late_weights[name], value) for name, value in weights.items())
    assert list(states) == list(late_states)
    for index, state in states.items():
        assert all(torch.equal(late_states[index][name], one) for name, one in state.items())


@pytest.mark.parametrize(
    "config", [{"state_precision": "bf16"}, {"master_weights": "fp32"}], ids=["bf16", "masters"]
)
def test_rounded_states_and_masters(
    config: Any, starve: Any, tmp_path: Any, put_off: PutOff
) -> None:
    half = torch.bfloat16 if "master_weights" in config else torch.float32

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(300, 257), nn.GELU(), nn.Linear(257, 300)).to(half)

    plain_and_late(make, starve, tmp_path, config)
    assert put_off.count


def test_what_the_engine_tells_and_commits(starve: Any, tmp_path: Any) -> None:
    torch.manual_seed(0)
    model: Any = make_model()
    optimizer = adamw(model)
    engine = starve(model, optimizer, config=IN_FORWARD)
    inside: list[bool] = []
    model[0].register_forward_hook(lambda *_: inside.append(engine.step_pending))
    for step in range(1, 4):
        loss_of(model, torch.randn(32, 300)).backward()
        assert not engine.step_pending
        optimizer.step()
        optimizer.zero_grad()
        assert engine.step == step
        assert engine.step_pending == (step > 1)
        assert type(model[0].weight).__name__ == "Parameter"
        assert model[0].weight.shape == (257, 300)
        assert engine.step_pending == (step > 1)
    assert inside == [False, False, True]  # in the first step states are made
    engine.commit({"epoch": 1})
    assert not engine.step_pending
    assert type(model[0].weight) is nn.Parameter
    optimizer_s = engine._steps._steps[-1].optimizer_s
    assert 0 < optimizer_s < engine._steps._steps[-1].step_s
