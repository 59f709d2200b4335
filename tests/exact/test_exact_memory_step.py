"""States in memory: the bits of training in memory, whatever the optimizer and the user do."""

import copy
from typing import Any

import pytest
import torch
from memory_runs import IN_BACKWARD, SOME, STEPS, adamw, hold, loop_with, loss_of, moves, train
from test_exact_optimizers import OPTIMIZERS, make_model, two_groups
from torch import nn
from torch.nn import functional as F

from offload.engine import Engine

pytestmark = pytest.mark.usefixtures("many_tiles")


@pytest.mark.parametrize("held", ["all", "some"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_optimizer_gives_the_same_bits(name: str, held: str, compare: Any) -> None:
    def make_optimizer(model: Any) -> Any:
        return OPTIMIZERS[name]([p for p in model.parameters() if p.numel() or name != "adafactor"])

    same = compare(make_model, make_optimizer, loop_with(None if held == "all" else SOME))
    streams = {event.key for event in moves(same.engine) if event.role == "gradient"}
    assert streams == {"0.weight", "2.weight"}  # in the first step
    assert same.engine.step == STEPS


@pytest.mark.parametrize("held", ["all", "some"])
@pytest.mark.parametrize("name", ["adamw-fused", "adamw-foreach", "sgd-momentum", "third-party"])
def test_a_step_in_backward_gives_the_same_bits(name: str, held: str, compare: Any) -> None:
    compare(
        make_model,
        lambda model: OPTIMIZERS[name](model.parameters()),
        loop_with(None if held == "all" else SOME),
        config=IN_BACKWARD,
    )


def test_slices_of_one_call_and_of_many_are_the_same(
    compare: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offload.swap.memory_step._FUSED_TILES", 1)
    compare(make_model, adamw, loop_with(None))


@pytest.mark.parametrize("config", [{}, IN_BACKWARD], ids=["behind", "in backward"])
def test_without_direct_io(
    config: dict[str, Any], compare: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resident weights are private pages of file mappings there."""
    monkeypatch.setattr("offload.tiers.file._open_direct", lambda fd: fd)
    same = compare(make_model, adamw, loop_with(None), config=config)
    assert all(weight.in_memory for weight in same.engine.weights.weights.values())


def test_groups_with_settings_of_their_own(compare: Any) -> None:
    compare(make_model, two_groups, loop_with(None))


@pytest.mark.parametrize("name", ["adamw-fused", "adamw", "sgd", "sgd-momentum", "third-party"])
def test_first_states_that_a_step_in_memory_makes(name: str, compare: Any) -> None:
    compare(
        make_model, lambda model: OPTIMIZERS[name](model.parameters()), loop_with(None, after=0)
    )


def test_coming_and_going(compare: Any) -> None:
    """The plan grows and shrinks; what leaves is stored, and streams."""

    def changing(model: Any, optimizer: Any, engine: Engine | None) -> list[float]:
        losses = []
        for step, names in enumerate([(), None, SOME, ("2.weight",), (), SOME, None, ()]):
            losses += train(model, optimizer, range(3 * step, 3 * step + 2))
            hold(engine, names)
            losses += train(model, optimizer, range(3 * step + 2, 3 * step + 3))
        return losses

    compare(make_model, adamw, changing)


def test_other_parts_of_the_model_have_no_gradient(compare: Any) -> None:
    def uneven(model: Any, optimizer: Any, engine: Engine | None) -> list[float]:
        losses = []
        hold(engine)
        for step in range(STEPS):
            x = torch.randn(32, 300)
            hidden = F.gelu(model[0](x))
            loss = F.mse_loss(model[2](hidden), x) if step % 3 == 2 else hidden.square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    compare(make_model, adamw, uneven)


def test_gradients_accumulate_in_place_and_are_clipped(compare: Any) -> None:
    def accumulated(model: Any, optimizer: Any, engine: Engine | None) -> list[float]:
        values = []
        for step in range(STEPS):
            for _ in range(2):
                loss = loss_of(model, torch.randn(8, 300))
                loss.backward()
                values.append(loss.item())
            values.append(float(nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
            optimizer.step()
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            if step == 1:  # while gradients are mappings of scratch
                hold(engine)
        return values

    compare(make_model, adamw, accumulated)


def test_the_user_changes_weights_and_states(compare: Any) -> None:
    def changing(model: Any, optimizer: Any, engine: Engine | None) -> list[float]:
        losses = train(model, optimizer, range(1))
        hold(engine)

        def change(step: int) -> None:
            state = optimizer.state[model[0].weight]
            if step % 4 == 0:
                state["exp_avg"].mul_(0.5)
            elif step % 4 == 1:
                state["exp_avg_sq"] = state["exp_avg_sq"] * 2
            elif step % 4 == 2:
                with torch.no_grad():
                    model[2].weight.mul_(0.9)
            if step == 6:
                del optimizer.state[model[2].weight]
            if engine is not None and step % 3 == 0:
                engine.commit()
                state["exp_avg"].add_(1.0)  # it is clean now
                engine.commit()
            elif step % 3 == 0:
                state["exp_avg"].add_(1.0)

        return losses + train(model, optimizer, range(1, STEPS), change)

    compare(make_model, adamw, changing, commit="manual")


def test_a_state_dict_is_loaded_in_the_middle(compare: Any) -> None:
    def loading(model: Any, optimizer: Any, engine: Engine | None) -> list[float]:
        losses = train(model, optimizer, range(2))
        hold(engine)
        losses += train(model, optimizer, range(2, 4))
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        losses += train(model, optimizer, range(4, 6))
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(copy.deepcopy(saved[1]))
        losses += train(model, optimizer, range(6, 8))
        optimizer.load_state_dict(optimizer.state_dict())
        return losses + train(model, optimizer, range(8, STEPS))

    compare(make_model, adamw, loading)


class Exchanging(torch.optim.Optimizer):
    """Its two states change places at each step, and a third is made anew."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(a=torch.zeros_like(p), b=torch.ones_like(p), c=p.clone())
                state["a"], state["b"] = state["b"], state["a"]
                state["c"] = state["c"] + p.grad
                state["a"].add_(state["c"], alpha=0.1)
                p.sub_(state["a"], alpha=1e-3)


def test_states_that_are_exchanged_or_made_anew(compare: Any) -> None:
    def exchanged(model: Any, optimizer: Any, engine: Engine | None) -> list[float]:
        losses = train(model, optimizer, range(1))
        if engine is not None:  # the streamed step shows what each name was stored as
            hold(engine)
        return losses + train(model, optimizer, range(1, 6))

    same = compare(make_model, lambda model: Exchanging(model.parameters()), exchanged)
    state = same.optimizer.state[same.model[0].weight]
    assert same.engine._optimizing.keeper is not None
    assert same.engine._optimizing.keeper.shown(same.model[0].weight) is not None
    assert len({value.data_ptr() for value in state.values()}) == 3
