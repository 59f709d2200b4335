"""States in memory: what moves, what a commit writes, and what is there afterwards."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_runs import (
    IN_BACKWARD,
    STEPS,
    adamw,
    assert_same,
    forget_moves,
    held_names,
    hold,
    moves,
    train,
)
from test_exact_optimizers import make_model

import offload
from offload.engine import Engine
from offload.swap.plan import MARGIN_NBYTES

pytestmark = pytest.mark.usefixtures("many_tiles")


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
