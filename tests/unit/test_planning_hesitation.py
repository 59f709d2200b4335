"""A first pass on a drive that hesitates is simulated only where it may not fit."""

import dataclasses
from functools import cache

import pytest
from planning_models import BASELINE, DRIVE, MIB, machine, settings
from planning_programs import decoder

from offload.allocator.errors import BudgetError
from offload.swap.plan import choose_chunk_numel, make_plan
from offload.swap.planning.compiled import compile_program
from offload.swap.planning.cost import Costs
from offload.swap.planning.predict import least_budget, predict
from offload.swap.planning.program import Program
from offload.swap.planning.sim_fits import fits
from offload.swap.planning.sim_memory import Memory
from offload.swap.planning.sim_parts import PARTS, Parts
from offload.swap.planning.simulate import Simulation

PROGRAMS = [
    decoder(blocks=8, tokens=1024),
    decoder(blocks=4, tokens=256, vocabulary=20_000),
    decoder(blocks=6, tokens=512, recomputed=True),
    decoder(blocks=12, tokens=192, frozen=True),
]


def first_pass(program: Program, mib: int, slowdown: float) -> Simulation:
    """Forward and backward, whether or not they fit."""
    chunk_numel = choose_chunk_numel(mib * MIB)
    plan = make_plan(
        program.census,
        budget_nbytes=mib * MIB,
        baseline_nbytes=BASELINE.attach_nbytes,
        chunk_numel=chunk_numel,
    )
    compiled = compile_program(program, Costs(machine(), DRIVE))
    simulation = Simulation(
        compiled,
        plan,
        chunk_numel=chunk_numel,
        resident_nbytes=BASELINE.running_nbytes,
        write_slowdown=slowdown,
    )
    try:
        simulation.compute()
    except BudgetError:
        assert slowdown > 1
    return simulation


@cache
def least_mib(number: int) -> int:
    found = least_budget(PROGRAMS[number], machine(), settings(0), BASELINE)
    return found.settings.budget_nbytes // MIB


def verdict(program: Program, mib: int) -> object:
    try:
        return predict(program, machine(), settings(mib), BASELINE)
    except BudgetError as error:
        return str(error), error.needed_nbytes


@pytest.mark.parametrize("number", range(len(PROGRAMS)))
def test_what_fits_is_what_fits_where_all_is_simulated(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, least = PROGRAMS[number], least_mib(number)
    tried = [least + more for more in (-9, -2, -1, 0, 1, 5, 24, 60, 150)]
    found = [verdict(program, mib) for mib in tried]
    assert isinstance(found[2], tuple)
    assert not isinstance(found[3], tuple)
    monkeypatch.setattr(Simulation, "doubtful_parts", lambda _self: PARTS)
    assert [verdict(program, mib) for mib in tried] == found


@pytest.mark.parametrize("slowdown", [8, 10_000])
@pytest.mark.parametrize("number", range(len(PROGRAMS)))
def test_what_is_not_in_doubt_fits_however_slow_the_drive_is(number: int, slowdown: int) -> None:
    program, least = PROGRAMS[number], least_mib(number)
    for mib in range(least, 2 * least, 16):
        usual = first_pass(program, mib, 1)
        slow = first_pass(program, mib, slowdown)
        sure = slow._parts.peaks_nbytes[usual.doubtful_parts() :]
        assert all(fits(slow.plan, peak_nbytes) for peak_nbytes in sure)


def test_a_budget_far_above_the_least_takes_no_pass_on_a_slower_drive() -> None:
    program, least = PROGRAMS[0], least_mib(0)
    assert 0 < first_pass(program, least, 1).doubtful_parts() < PARTS
    assert first_pass(program, 4 * least, 1).doubtful_parts() == 0


def test_all_of_a_pass_is_in_doubt_where_more_than_saved_tensors_waits_for_writes() -> None:
    program = decoder(blocks=8, tokens=1024)
    found = predict(
        program, machine(), dataclasses.replace(settings(2000), step_in_backward=True), BASELINE
    )
    chunk_numel = choose_chunk_numel(2000 * MIB)
    compiled = compile_program(program, Costs(machine(), DRIVE))
    simulation = Simulation(compiled, found.plan, chunk_numel=chunk_numel)
    simulation.compute()
    assert simulation.doubtful_parts() == PARTS


def test_peaks_of_parts_leave_that_of_all_as_it_is() -> None:
    memory = Memory(1 << 40, 1 << 40)
    parts = Parts(memory)
    moments = [(0.0, (), 0, number, 0) for number in range(2 * PARTS)]
    for number, part in enumerate(parts.of(moments, 3)):  # type: ignore[arg-type]
        assert len(part) == 2
        memory.add("saved", (5, 7, 1)[number])
        memory.drop("saved", (5, 7, 1)[number])
    assert parts.peaks_nbytes == [5, 7, 1]
    assert memory.peak_nbytes == memory.peak_roles["saved"] == 7
    assert parts.doubtful(3, lambda nbytes: nbytes < 8) == 2
    assert parts.doubtful(3, lambda nbytes: nbytes < 4) == 3
    assert parts.doubtful(0, lambda nbytes: nbytes < 8) == 0
