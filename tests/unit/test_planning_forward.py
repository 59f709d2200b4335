"""Predictions of steps inside the next forward."""

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planning_models import BASELINE, DRIVE, MIB, check_books, machine, settings, trace
from planning_programs import decoder
from real_runs import both, check_moved_in_forward

from offload.allocator.errors import BudgetError
from offload.swap.planning.compiled import compile_program
from offload.swap.planning.cost import Costs
from offload.swap.planning.predict import Settings, least_budget, predict
from offload.swap.planning.program import Event, What
from offload.swap.planning.simulate import SimulatedStep, Simulation
from offload.tiers.events import ListRecorder

PROGRAM = decoder(blocks=6)
TRACED = trace()


def ahead(mib: int) -> Settings:
    return dataclasses.replace(settings(mib), step_in_forward=True)


LEAST = least_budget(PROGRAM, machine(), ahead(1), BASELINE).settings.budget_nbytes // MIB


@pytest.mark.parametrize("window_nbytes", [1 << 20, 3 << 20])
def test_it_moves_the_bytes_that_a_real_run_moves(tmp_path: Path, window_nbytes: int) -> None:
    real, virtual = both(TRACED, tmp_path, window_nbytes=window_nbytes, step_in_forward=True)
    check_moved_in_forward(real, virtual)


def moved(step: SimulatedStep) -> tuple[int, int]:
    """Bytes read and written, but for spilled activations."""
    finished, spilled = step.finished, step.spilled_nbytes
    return finished.read_nbytes - spilled, finished.written_nbytes - spilled


def test_a_weight_that_forward_fetches_is_not_read_for_its_step() -> None:
    streaming = LEAST + 24
    behind = predict(PROGRAM, machine(), settings(streaming), BASELINE).last
    within = predict(PROGRAM, machine(), ahead(streaming), BASELINE).last
    assert within.plan.step_in_forward
    (read, written), (read_behind, written_behind) = moved(within), moved(behind)
    assert read < read_behind
    assert written == written_behind


def test_a_first_step_is_made_at_once_and_the_second_put_off() -> None:
    found = predict(PROGRAM, machine(), ahead(LEAST + 8), BASELINE)
    behind = predict(PROGRAM, machine(), settings(LEAST + 8), BASELINE)
    states = sum(map(sum, PROGRAM.stepping.states_nbytes.values()))  # type: ignore[union-attr]
    written = [moved(step)[1] for step in found.steps]
    assert written[0] == moved(behind.steps[0])[1]
    assert written[0] - written[1] > states // 2  # most of its step is the third one's
    assert written[2] == written[3] == moved(behind.last)[1]


@given(more=st.integers(0, 150))
def test_the_books_balance_at_any_budget(more: int) -> None:
    check_books(predict(PROGRAM, machine(), ahead(LEAST + more), BASELINE))


@pytest.mark.parametrize("returns", [True, False])
def test_nothing_is_left_in_memory_but_what_stays(returns: bool) -> None:
    """``returns``: the model's forward is seen to end; a model that is called in parts has many."""
    events = [event for event in PROGRAM.events if returns or event.what is not What.RETURN]
    program = dataclasses.replace(PROGRAM, events=tuple(map(Event._make, events)))
    found = predict(program, machine(), ahead(LEAST + 8), BASELINE)
    compiled = compile_program(program, Costs(machine(), DRIVE))
    simulation = Simulation(compiled, found.steps[0].plan, chunk_numel=1 << 18)
    for _ in range(4):
        simulation.step()
        now = simulation.world.memory.now
        left = ("saved", "transients", "staging")
        assert not {role: now[role] for role in left if now[role]}  # type: ignore[index]
        assert not any(weight.held for weight in simulation._weights.weights.values())
    simulation.world.drain()
    simulation._gradients.poll()
    assert simulation.world.memory.now["gradients"] == 0


def test_what_is_recorded_is_what_is_counted() -> None:
    counted = predict(PROGRAM, machine(), ahead(LEAST + 8), BASELINE)
    whole = predict(PROGRAM, machine(), ahead(LEAST + 8), BASELINE, recorder=ListRecorder())
    for here, there in zip(whole.steps, counted.steps, strict=True):
        assert here.finished.read_nbytes == there.finished.read_nbytes
        assert here.finished.step_s == pytest.approx(there.finished.step_s)


def test_what_fits_in_memory_is_stepped_there_and_reads_nothing() -> None:
    rich = predict(PROGRAM, machine(), ahead(LEAST + 400), BASELINE).last
    assert len(rich.plan.resident_states) > 0
    assert rich.finished.read_nbytes == 0


def test_a_tile_is_needed_beside_weights_and_activations() -> None:
    with pytest.raises(BudgetError, match="beside it a tile"):
        predict(PROGRAM, machine(), ahead(330), BASELINE)
