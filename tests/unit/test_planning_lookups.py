"""Predictions of gradients that are made of looked-up rows."""

from dataclasses import replace

import pytest
import torch
from planning_models import BASELINE, DRIVE, MIB, Model, loss_of, machine, settings, trace
from torch import nn

from offload.planner import rehearsal
from offload.swap.planning.compiled import compile_program
from offload.swap.planning.cost import Costs
from offload.swap.planning.predict import least_budget, predict
from offload.swap.planning.program import Program, What
from offload.swap.planning.simulate import Simulation
from offload.tiers.hostmem import PAGE
from offload.tiers.machine import Machine

WIDTH, VOCABULARY = 256, 50_000
TABLE = VOCABULARY * WIDTH * 4


class Own(nn.Embedding):
    """Gives no rows, for it has a forward of its own."""

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        return super().forward(indices)


def large(**changes: object) -> Program:
    return trace(lambda: model_of(**changes), length=64)


def model_of(*, tied: bool = False, plain: bool = True) -> Model:
    model = Model(vocabulary=1000)
    if not plain:
        model.embedding = Own(VOCABULARY, WIDTH)
    elif tied:
        model = Model(vocabulary=VOCABULARY)
        model.head.weight = model.embedding.weight
    else:
        model.embedding = nn.Embedding(VOCABULARY, WIDTH)
    return model


def most_at_once(program: Program) -> int:
    """The most bytes of storages as large as half of the table that live at once."""
    now = most = 0
    for what, which in program.events:
        if what in {What.ALLOCATE, What.FREE} and program.storages[which] >= TABLE // 2:
            now += program.storages[which] * (1 if what is What.ALLOCATE else -1)
            most = max(most, now)
    return most


def test_no_more_than_the_rows_of_a_gradient_are_counted() -> None:
    found = large()
    assert found.row_gradients == {"embedding.weight": 64 * WIDTH * 4}
    assert most_at_once(found) == 0
    assert Program.from_json(found.to_json()) == found


def test_a_lookup_that_gives_no_rows_has_a_whole_gradient() -> None:
    found = large(plain=False)
    assert found.row_gradients == {}
    assert most_at_once(found) == TABLE


def test_the_sum_of_rows_and_the_gradient_of_a_tied_head_is_one_more_table() -> None:
    found = large(tied=True)
    assert found.row_gradients == {}  # the sum is whole
    assert most_at_once(found) == 2 * TABLE


def test_looking_up_as_many_rows_as_there_are_makes_a_table() -> None:
    assert trace(length=1000).row_gradients == {}
    assert trace(length=999).row_gradients == {"embedding.weight": 999 * WIDTH * 4}


def test_two_lookups_of_a_table_add_up() -> None:
    def twice(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        return loss_of(model, tokens) + loss_of(model, tokens[:, :32])

    assert trace(loss=twice).row_gradients == {"embedding.weight": 96 * WIDTH * 4}


def _passed_s(rows: int, machine: Machine) -> float:
    """Seconds of forward and backward that look up so many rows of a table of 1,000."""
    compiled = compile_program(trace(length=rows), Costs(machine, DRIVE))
    plan = predict(compiled.program, machine, settings(700), BASELINE).steps[0].plan
    simulation = Simulation(compiled, plan, chunk_numel=1 << 18)
    simulation.step()
    return simulation.keep_streaming().step().finished.compute_s


def test_a_row_that_came_with_another_one_is_not_waited_for() -> None:
    reads = [link for link in machine().links if (link.source, link.target) == (DRIVE, "host")]
    others = [link for link in machine().links if link not in reads]
    late = [replace(link, latency_s=link.latency_s + 1.0) for link in reads]
    slow = replace(machine(), links=(*others, *late))
    looks = [_passed_s(rows, slow) - _passed_s(rows, machine()) for rows in (2, 900)]
    assert looks[0] == pytest.approx(2, rel=0.1)
    assert looks[1] == pytest.approx(1000 * WIDTH * 4 / (64 << 10), rel=0.01)  # all of the table


def test_a_look_takes_as_long_as_one_at_a_page_so_far_from_the_next() -> None:
    table = 1000 * WIDTH * 4
    most = table / (64 << 10)  # looks
    spacings = {round(table / PAGE / most): 1e4, table // PAGE // 2: 1e1}
    slow = rehearsal._with(machine(), {}, apart={"page reads": spacings})
    latency_s = Costs(machine(), DRIVE).read_latency_s
    few, many = (_passed_s(rows, slow) - _passed_s(rows, machine()) for rows in (2, 900))
    assert few == pytest.approx(2 * (1e-1 - latency_s), rel=0.1)
    assert many == pytest.approx(most * (1e-4 - latency_s), rel=0.05)


def test_pages_of_rows_are_written_once_each() -> None:
    per_s = 10_000.0
    slow = rehearsal._with(machine(), {"page writes": per_s})
    writes = [per_s * (_passed_s(rows, slow) - _passed_s(rows, machine())) for rows in (2, 900)]
    pages = 1000 * WIDTH * 4 / PAGE  # of four rows
    assert writes[0] == pytest.approx(2, rel=0.01)
    assert pages * 0.9 < writes[1] < pages


def test_pages_far_apart_take_longer_each_as_the_kernel_brings_those_around() -> None:
    far = rehearsal._with(
        machine(), {}, apart={"page writes": {1: 1e4, 1000 * WIDTH * 4 // PAGE // 2: 1e2}}
    )
    near = rehearsal._with(machine(), {}, apart={"page writes": {1: 1e4}})
    few, many = ((_passed_s(rows, far) - _passed_s(rows, near)) for rows in (2, 900))
    assert few == pytest.approx(2 * (1e-2 - 1e-4), rel=0.05)
    assert many < 250 * 1e-4


def test_a_large_table_needs_no_memory_for_its_gradient() -> None:
    rows, whole = large(), large(plain=False)
    budgets = [
        least_budget(program, machine(), settings(1), BASELINE).settings.budget_nbytes
        for program in (rows, whole)
    ]
    assert budgets[1] - budgets[0] > TABLE // 2
    one, other = (
        predict(program, machine(), settings(600), BASELINE).steps[0].finished
        for program in (rows, whole)
    )
    assert other.written_nbytes - one.written_nbytes == TABLE - 64 * WIDTH * 4


def test_a_gradient_that_stays_in_memory_is_whole() -> None:
    rich = predict(trace(), machine(), settings(1200), BASELINE)
    assert "embedding.weight" in rich.plan.resident_states
    assert rich.peak_roles["gradients"] >= 1000 * WIDTH * 4
    assert rich.peak_nbytes <= 1200 * MIB
