"""States in memory: the bits of training in memory, no reads, nothing stored before a commit."""

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_exact_optimizers import OPTIMIZERS, make_model, two_groups
from torch import nn
from torch.nn import functional as F

import offload
from offload.engine import Engine
from offload.swap.plan import MARGIN_NBYTES
from offload.tiers.events import Move

STEPS = 12
IN_BACKWARD = {"step_in_backward": True}
# Of ``make_model``; the others are ``2.bias`` and ``2.weight``.
SOME = ("scale", "0.bias", "0.weight")


@pytest.fixture(autouse=True)
def many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """With an end that is off every grid: 300 * 257 = 77,100 elements."""
    monkeypatch.setattr("offload.runtime.choose_chunk_numel", lambda _budget: 64 * 160)


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


@pytest.mark.parametrize("commit", ["step", "manual", "never"])
def test_a_plan_that_must_shrink(commit: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain: Any = make_model()
    model = copy.deepcopy(plain)
    plain_optimizer, optimizer = adamw(plain), adamw(model)
    expected = train(plain, plain_optimizer, range(STEPS))
    kept: list[set[str]] = []
    with offload.attach(model, optimizer, budget="8GiB", nvme=tmp_path, commit=commit) as engine:
        everything = set(engine.weights.weights)
        losses = []
        for step, excess in enumerate([0, 0, 1, 0, 1 << 30, 0]):
            losses += train(model, optimizer, range(2 * step, 2 * step + 1))
            if excess:  # as if the coming step took so much more than was planned
                enough = engine.plan.budget_nbytes - MARGIN_NBYTES // 2
                engine._runtime.governor.seen_nbytes = enough + excess
            losses += train(model, optimizer, range(2 * step + 1, 2 * step + 2))
            kept.append(set(engine.plan.resident_states))
            assert held_names(engine) <= kept[-1]
    assert kept == [everything] * 2 + [everything - {"2.weight"}] * 2 + [set()] * 2
    assert losses == expected
    assert_same(plain, plain_optimizer, model, optimizer)


@pytest.mark.parametrize("commit", ["manual", "never"])
def test_steps_in_memory_move_nothing(commit: str, compare: Any) -> None:
    def counted(model: Any, optimizer: Any, engine: Engine | None) -> list[float]:
        losses = train(model, optimizer, range(1))
        hold(engine)
        losses += train(model, optimizer, range(1, 2))
        if engine is not None:
            held = [value for state in optimizer.state.values() for value in state.values()]
            large = sum(value.nbytes for value in held if value.numel() > 1024)
            assert engine._optimizing.keeper is not None
            assert engine._optimizing.keeper.held_nbytes() == large
            forget_moves(engine)
        return losses + train(model, optimizer, range(2, STEPS))

    same = compare(make_model, adamw, counted, commit=commit)
    assert {event.role for event in moves(same.engine)} <= {"activation"}


def test_each_commit_writes_each_version_once_and_reads_nothing(compare: Any) -> None:
    def counted(model: Any, optimizer: Any, engine: Engine | None) -> list[float]:
        losses = train(model, optimizer, range(2))
        hold(engine)
        losses += train(model, optimizer, range(2, 3))
        if engine is not None:
            forget_moves(engine)
        return losses + train(model, optimizer, range(3, STEPS))

    same = compare(make_model, adamw, counted, commit="step")
    moved = [event for event in moves(same.engine) if event.role in ("weight", "state", "gradient")]
    assert not [event for event in moved if event.src != "host"]
    states = [event for event in moved if event.key == "0.weight#exp_avg"]
    assert len(states) == STEPS - 3
    nbytes = {event.key: event.nbytes for event in moved}
    weights = sum(parameter.nbytes for parameter in same.model.parameters())
    assert sum(event.nbytes for event in moved) == sum(nbytes.values()) * (STEPS - 3)
    assert weights < sum(nbytes.values()) <= 3 * weights  # biases' small states are in the record


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


@pytest.mark.parametrize("commit", ["step", "manual"])
@pytest.mark.parametrize("config", [{}, IN_BACKWARD], ids=["behind", "in backward"])
def test_a_resumed_run_continues_bit_for_bit(
    commit: str, config: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    plain: Any = make_model()
    start = copy.deepcopy(plain.state_dict())
    plain_optimizer = adamw(plain)
    expected = train(plain, plain_optimizer, range(STEPS))
    losses = []
    for steps in (range(5), range(5, STEPS)):
        model: Any = make_model()
        model.load_state_dict(start)
        optimizer = adamw(model)
        options: Any = {"nvme": tmp_path, "commit": commit, "config": config}
        with offload.attach(model, optimizer, budget="8GiB", **options) as engine:
            assert engine.step == steps.start
            losses += train(model, optimizer, steps)
            assert set(engine.plan.resident_states) == set(engine.weights.weights)
            assert all(weight.dirty for weight in engine.weights.weights.values()) == (
                commit == "manual"
            )
            if commit == "manual":
                engine.commit()
                assert not engine._commits.owed_nbytes()
                if steps.start == 0:  # these are of no commit
                    train(model, optimizer, range(90, 92))
                    assert engine._commits.owed_nbytes()
    assert losses == expected
    assert_same(plain, plain_optimizer, model, optimizer)


def test_after_a_detach_all_is_ordinary_and_newest(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain: Any = make_model()
    model = copy.deepcopy(plain)
    plain_optimizer, optimizer = adamw(plain), adamw(model)
    expected = train(plain, plain_optimizer, range(STEPS))
    with offload.attach(model, optimizer, budget="8GiB", nvme=tmp_path, commit="never"):
        losses = train(model, optimizer, range(5))
    losses += train(model, optimizer, range(5, STEPS))
    assert losses == expected
    assert_same(plain, plain_optimizer, model, optimizer)


def test_the_record_tells_what_is_in_memory(tmp_path: Path) -> None:
    model: Any = make_model()
    optimizer = adamw(model)
    with offload.attach(
        model, optimizer, budget="8GiB", nvme=tmp_path / "nvme", record=tmp_path / "run"
    ) as engine:
        train(model, optimizer, range(3))
        plan = engine.plan
        large = sum(p.nbytes for p in model.parameters() if p.nbytes > 64 << 10)
        assert plan.resident_states_nbytes >= 3 * large
    lines = (tmp_path / "run" / "rank0.jsonl").read_text().splitlines()
    steps = [line for line in lines if '"StepFinished"' in line]
    assert '"state": 0' in steps[0]
    assert '"state": 0' not in steps[2]
