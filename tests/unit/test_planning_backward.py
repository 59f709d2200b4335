"""Predictions of steps inside backward."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planning_models import BASELINE, DRIVE, MIB, check_books, machine, settings
from planning_programs import decoder

from offload.allocator.errors import BudgetError
from offload.swap.planning.compiled import compile_program
from offload.swap.planning.cost import Costs
from offload.swap.planning.predict import Settings, least_budget, predict
from offload.swap.planning.simulate import Simulation

PROGRAM = decoder(blocks=6)


def inside(mib: int) -> Settings:
    return dataclasses.replace(settings(mib), step_in_backward=True)


LEAST = least_budget(PROGRAM, machine(), inside(1), BASELINE).settings.budget_nbytes // MIB


def test_gradients_never_travel_and_weights_once_less() -> None:
    """Of 24 bytes read and 16 written of a parameter, 16 and 12 are left."""
    streaming = LEAST + 4
    behind = predict(PROGRAM, machine(), settings(streaming), BASELINE).last
    within = predict(PROGRAM, machine(), inside(streaming), BASELINE).last
    assert within.plan.step_in_backward
    assert within.finished.read_nbytes < behind.finished.read_nbytes
    assert within.finished.written_nbytes < behind.finished.written_nbytes
    states = sum(map(sum, PROGRAM.stepping.states_nbytes.values()))  # type: ignore[union-attr]
    moved = within.finished.written_nbytes - within.spilled_nbytes
    assert moved == pytest.approx(states + PROGRAM.trainable_nbytes, rel=0.05)


@given(more=st.integers(0, 150))
def test_the_books_balance_at_any_budget(more: int) -> None:
    check_books(predict(PROGRAM, machine(), inside(LEAST + more), BASELINE))


def test_nothing_is_left_in_memory_but_what_stays() -> None:
    found = predict(PROGRAM, machine(), inside(LEAST + 8), BASELINE)
    compiled = compile_program(PROGRAM, Costs(machine(), DRIVE))
    simulation = Simulation(compiled, found.steps[0].plan, chunk_numel=1 << 18)
    for _ in range(3):
        simulation.step()
        now = simulation.world.memory.now
        left = ("saved", "transients", "gradients", "staging")
        assert not {role: now[role] for role in left if now[role]}  # type: ignore[index]
        assert not any(weight.held for weight in simulation._weights.weights.values())


def test_what_fits_in_memory_is_stepped_there_and_reads_nothing() -> None:
    rich = predict(PROGRAM, machine(), inside(LEAST + 400), BASELINE).last
    assert len(rich.plan.resident_states) > 0
    assert rich.finished.read_nbytes == 0


def test_a_tile_is_needed_beside_weights_and_gradients() -> None:
    with pytest.raises(BudgetError, match="beside it a tile"):
        predict(PROGRAM, machine(), inside(330), BASELINE)
