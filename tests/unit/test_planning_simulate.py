"""The simulated run: it moves what a real run moves, and its books balance."""

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planning_models import (
    BASELINE,
    DRIVE,
    MIB,
    Model,
    machine,
    settings,
    trace,
)
from real_runs import both, check_moved

from offload.allocator.errors import BudgetError, ConfigError
from offload.planner.recording import recorded
from offload.report.model import summarise
from offload.report.reader import read_run
from offload.swap.plan import MARGIN_NBYTES, choose_chunk_numel, soft_limit_nbytes
from offload.swap.planning.compiled import compile_program
from offload.swap.planning.cost import Costs
from offload.swap.planning.predict import drive_use, least_budget, predict
from offload.swap.planning.simulate import Simulation
from offload.swap.planning.whatif import changed, parse_changes
from offload.swap.tile_blocks import block_numel
from offload.tiers.events import ListRecorder, Move, Stall

PROGRAM = trace()
LEAST = least_budget(PROGRAM, machine(), settings(1), BASELINE).settings.budget_nbytes // MIB


@pytest.mark.parametrize("window_nbytes", [1 << 20, 3 << 20])
@pytest.mark.parametrize("in_backward", [False, True])
def test_it_moves_the_bytes_that_a_real_run_moves(
    tmp_path: Path, window_nbytes: int, in_backward: bool
) -> None:
    real, virtual = both(
        PROGRAM, tmp_path, window_nbytes=window_nbytes, step_in_backward=in_backward
    )
    check_moved(real, virtual, in_backward=in_backward)


def test_the_same_questions_get_the_same_answers() -> None:
    first, second = (ListRecorder(), ListRecorder())
    for recorder in (first, second):
        predict(PROGRAM, machine(), settings(LEAST + 8), BASELINE, recorder=recorder)
    assert first.events == second.events
    assert any(isinstance(event, Stall) for event in first.events)


def test_a_first_step_makes_the_states_of_a_block_beside_its_tiles() -> None:
    found = predict(PROGRAM, machine(), settings(LEAST), BASELINE)
    first, second = (step.peak_roles for step in found.steps[:2])
    chunk_numel = choose_chunk_numel(LEAST * MIB)
    assert first["staging"] == second["staging"] > 0
    assert (first["transients"], second["transients"]) == (2 * 4 * block_numel(chunk_numel), 0)


@given(more=st.integers(0, 200))
def test_the_books_balance_at_any_budget(more: int) -> None:
    recorder = ListRecorder()
    found = predict(PROGRAM, machine(), settings(LEAST + more), BASELINE, recorder=recorder)
    moves = [event for event in recorder.events if isinstance(event, Move)]
    steps = [step.finished for step in found.steps]
    assert sum(step.read_nbytes for step in steps) == sum(
        move.nbytes for move in moves if move.src.startswith("file")
    )
    assert sum(step.written_nbytes for step in steps) == sum(
        move.nbytes for move in moves if move.dst.startswith("file")
    )
    for step, each in zip(steps, found.steps, strict=True):
        parts = step.compute_s + step.stall_s + step.optimizer_s + step.commit_s
        assert parts == pytest.approx(step.step_s)
        assert all(nbytes >= 0 for nbytes in each.peak_roles.values())
        assert step.peak_nbytes <= each.plan.budget_nbytes
    # In order on each lane, and never two at once beyond the drive's rate.
    for lane in ("file→host", "host→file"):
        ends = [move.t_s for move in moves if move.lane == lane]
        assert ends == sorted(ends)


def test_nothing_is_left_in_memory_but_what_stays() -> None:
    found = predict(PROGRAM, machine(), settings(LEAST + 8), BASELINE)
    compiled = compile_program(PROGRAM, Costs(machine(), DRIVE))
    simulation = Simulation(compiled, found.steps[0].plan, chunk_numel=1 << 18)
    for _ in range(3):
        simulation.step()
        now = simulation.world.memory.now
        held = {role for role in ("saved", "transients", "gradients", "staging") if now[role]}
        assert not held
        assert now["weights"] >= 0
        assert now["states"] >= 0


def test_more_memory_saves_reads_until_nothing_streams() -> None:
    reads = [
        predict(PROGRAM, machine(), settings(mib), BASELINE).last.finished.read_nbytes
        for mib in (LEAST, LEAST + 16, LEAST + 64, LEAST + 256)
    ]
    assert reads == sorted(reads, reverse=True)
    assert reads[-1] == 0
    rich = predict(PROGRAM, machine(), settings(LEAST + 256), BASELINE)
    assert len(rich.plan.resident) == len(PROGRAM.census.weights)
    assert len(rich.plan.resident_states) > 0


def test_what_is_never_committed_is_written_only_as_it_leaves() -> None:
    rich = settings(LEAST + 256)
    durable = predict(PROGRAM, machine(), rich, BASELINE).last.finished
    volatile = dataclasses.replace(rich, commits=False)
    never = predict(PROGRAM, machine(), volatile, BASELINE).last.finished
    assert durable.written_nbytes > 3 * PROGRAM.trainable_nbytes * 0.9
    assert never.written_nbytes < durable.written_nbytes / 10
    assert never.commit_s < durable.commit_s


def test_a_faster_machine_is_never_slower() -> None:
    one = settings(LEAST + 8)
    before = predict(PROGRAM, machine(), one, BASELINE).step_s
    for changes in ("nvme=20GB/s", "compute=3x", "nvme=20GB/s,compute=3x"):
        faster = changed(machine(), DRIVE, parse_changes(changes))
        assert predict(PROGRAM, faster, one, BASELINE).step_s < before
    slower = changed(machine(), DRIVE, parse_changes("nvme=100MB/s"))
    slow = predict(PROGRAM, slower, one, BASELINE)
    assert slow.bound_by == "drive"
    assert slow.step_s > 3 * before


def test_the_least_budget_fits_and_one_mebibyte_less_does_not() -> None:
    assert predict(PROGRAM, machine(), settings(LEAST), BASELINE).peak_nbytes <= LEAST * MIB
    with pytest.raises(BudgetError, match="is too small") as refusal:
        predict(PROGRAM, machine(), settings(LEAST - 1), BASELINE)
    assert refusal.value.needed_nbytes > (LEAST - 1) * MIB


def test_long_batches_are_refused_as_a_run_refuses_them() -> None:
    long = trace(length=2048)
    with pytest.raises(BudgetError, match="with this batch, forward and backward take") as refusal:
        predict(long, machine(), settings(LEAST), BASELINE)
    assert refusal.value.needed_nbytes > LEAST * MIB + MARGIN_NBYTES


def test_a_drive_that_is_too_small_is_named_with_what_is_missing() -> None:
    tiers = tuple(
        dataclasses.replace(tier, free_nbytes=20 * MIB) if tier.name == DRIVE else tier
        for tier in machine().tiers
    )
    small = dataclasses.replace(machine(), tiers=tiers)
    with pytest.raises(BudgetError, match=f"{DRIVE} has 20.00 MiB free.*--commit never") as refusal:
        predict(PROGRAM, small, settings(LEAST + 8), BASELINE)
    assert refusal.value.budget_nbytes == 20 * MIB
    once = drive_use(PROGRAM, dataclasses.replace(settings(LEAST), commits=False), 0)
    twice = drive_use(PROGRAM, settings(LEAST), 0)
    assert twice.weights_nbytes == 2 * once.weights_nbytes
    assert twice.gradients_nbytes == once.gradients_nbytes


def test_a_simulated_run_is_a_run_to_the_report(tmp_path: Path) -> None:
    with recorded(tmp_path / "run", settings(LEAST + 8), machine()) as recorder:
        found = predict(PROGRAM, machine(), settings(LEAST + 8), BASELINE, recorder=recorder)
    report = summarise(read_run(tmp_path / "run"))
    assert report.headline.steps == 4
    assert report.headline.budget_nbytes == (LEAST + 8) * MIB
    assert report.headline.status == "simulated"
    assert report.headline.step_s == pytest.approx(found.step_s, rel=0.2)
    with (
        pytest.raises(ConfigError, match="holds the record of another run"),
        recorded(tmp_path / "run", settings(LEAST + 8), machine()),
    ):
        pass


def test_a_deep_model_is_simulated_whole() -> None:
    deep = trace(lambda: Model(width=64, blocks=40), length=16)
    found = predict(deep, machine(), settings(400), BASELINE)
    assert found.last.finished.step == 4


def test_soft_limit_is_where_the_simulated_runtime_waits() -> None:
    found = predict(PROGRAM, machine(), settings(LEAST + 8), BASELINE)
    assert found.building_nbytes <= soft_limit_nbytes(found.settings.budget_nbytes)
